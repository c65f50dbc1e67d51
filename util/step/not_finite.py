"""Numbers that are not finite: noticing them without waiting for the device, and finding out where
they come from.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from util.checkpoint import write_atomically
from util.distributed.processes import rank, world_size
from util.errors import NotSavedError, UserError
from util.nested_tensor import NestedTensor
from util.step.random_state import set_torch_state
from util.step.transfer import HostCopy

log = logging.getLogger(__name__)

Targets = Sequence[dict[str, Tensor]]
# a gradient scaler begins at 2^16 and halves: after so many failures in a row the scale is not what
# is wrong
SCALE_TRIES = 20


@dataclass(frozen=True)
class Step:
    """What running a step again needs: the batch, and PyTorch's generators before the forward pass."""

    epoch: int
    number: int
    images: NestedTensor
    targets: Targets
    random: Mapping[str, Tensor]

    @property
    def image_ids(self) -> list[int]:
        return [target["image_id"].item() for target in self.targets]


@dataclass(frozen=True)
class Verdict:
    """What a step gave. norm: of the gradient, None inside an accumulation; scale: of the gradient
    scaler, 1 without.
    """

    total: float
    norm: float | None
    scale: float
    terms: dict[str, float]

    @property
    def loss_is_finite(self) -> bool:
        return math.isfinite(self.total)

    @property
    def norm_is_finite(self) -> bool:
        return self.norm is None or math.isfinite(self.norm)

    def __str__(self) -> str:
        wrong = ", ".join(name for name, value in self.terms.items() if not math.isfinite(value))
        norm = "" if self.norm is None else f", gradient norm {self.norm}"
        return f"loss {self.total}{norm} is not finite; terms {wrong or 'all finite'}"


class FiniteWatch:
    """Looks at loss and gradient norm of every step one step late, when they have arrived anyway.

    The optimiser has left a step that is not finite out, on all processes, so the weights are good.
    Such a step ends the run with a diagnosis, or is skipped; its batch, weights and random state
    are saved for tools/replay.py.

    Args:
        model: not wrapped: the other processes take no part in a diagnosis.
        loss_of: maps (images, targets) to the total loss of `model`, as in training and without an
            exchange.
        flags: of the run, for the file.
        folder: where the step is saved; None saves nothing.
        skip: skip such steps, at most `max_steps` of them.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_of: Callable[[NestedTensor, Targets], Tensor],
        flags: Mapping[str, Any],
        folder: Path | None,
        *,
        skip: bool = False,
        max_steps: int = 0,
    ) -> None:
        self._model, self._loss_of, self._flags, self._folder = model, loss_of, dict(flags), folder
        self._skip, self._max_steps = skip, max_steps
        self.skipped = 0
        self._scale_failures = 0
        self._saved_in_group = False
        self._expected: tuple[Step, list[str], bool, HostCopy] | None = None

    def expect(
        self, step: Step, losses: dict[str, Tensor], total: Tensor, norm: Tensor | None, scale: Tensor | None
    ) -> None:
        """Start fetching a step's verdict, and keep what a diagnosis needs."""
        total = total.detach()
        numbers = [total, total if norm is None else norm, torch.ones_like(total) if scale is None else scale]
        copied = HostCopy(
            torch.stack([*(x.float() for x in numbers), *(x.detach().float() for x in losses.values())])
        )
        self._expected = step, list(losses), norm is not None, copied

    def check(self) -> None:
        """Judge the step before, if there is one.

        Raises:
            UserError: it was not finite, and is not to be skipped or one too many.
        """
        if self._expected is None:
            return
        step, names, has_norm, copied = self._expected
        self._expected = None
        total, norm, scale, *terms = copied.get().tolist()
        verdict = Verdict(total, norm if has_norm else None, scale, dict(zip(names, terms, strict=True)))
        if not (verdict.loss_is_finite and verdict.norm_is_finite) and not self._is_the_scaler(verdict):
            self._judge(step, verdict)
        if has_norm:
            self._saved_in_group = False
            self._scale_failures = 0 if verdict.norm_is_finite else self._scale_failures

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "scale_failures": self._scale_failures}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped, self._scale_failures = int(state["skipped"]), int(state["scale_failures"])

    def load_merged(self, states: Sequence[Mapping[str, Any]]) -> None:
        self.load_state_dict(states[0])  # all processes skip the same steps

    def _is_the_scaler(self, verdict: Verdict) -> bool:
        """Whether a gradient overflowed because its scale is still being looked for, which is no
        failure.
        """
        if verdict.scale == 1 or not verdict.loss_is_finite:
            return False
        self._scale_failures += 1
        return self._scale_failures <= SCALE_TRIES

    def _judge(self, step: Step, verdict: Verdict) -> None:
        where = f"epoch {step.epoch}, step {step.number}, process {rank()}"
        if not self._skip:
            module = self._run_again(step, verdict).module
            saved = self._save(step, verdict, module)
            raise UserError(
                f"{where}: {verdict}; images {step.image_ids}; first wrong: {module}; {saved}. "
                f"Look at these images and "
                "their boxes, or lower --lr or --clip_max_norm, and go on with --resume auto"
            )
        # inside a group the bad loss; at its end the gradient, unless that bad loss has been saved
        # already
        saved = "" if self._saved_in_group else f"; {self._save(step, verdict, '')}"
        self._saved_in_group = True
        self.skipped += not verdict.norm_is_finite
        log.warning("%s: %s; images %s; skipped%s", where, verdict, step.image_ids, saved)
        if self.skipped > self._max_steps:
            raise UserError(
                f"{where}: this is step {self.skipped} that is not finite, more than "
                f"--max_nan_steps {self._max_steps}; "
                "run tools/replay.py on what was saved, lower --lr, and go on with --resume auto"
            )

    def _run_again(self, step: Step, verdict: Verdict) -> Rerun:
        device = step.images.tensors.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            set_torch_state(step.random, device)
            return run_again(self._model, lambda: self._loss_of(step.images, step.targets), verdict.scale)

    def _save(self, step: Step, verdict: Verdict, module: str) -> str:
        if self._folder is None:
            return "nothing saved without --output_dir"
        path = self._folder / f"nonfinite_{step.epoch:04}_{step.number:06}_process{rank()}.pth"
        content = {
            "epoch": step.epoch,
            "step": step.number,
            "process": rank(),
            "processes": world_size(),
            "image_ids": step.image_ids,
            "loss": verdict.total,
            "grad_norm": verdict.norm,
            "scale": verdict.scale,
            "losses": verdict.terms,
            "module": module,
            "images": step.images.tensors,
            "mask": step.images.mask,
            "targets": [dict(t) for t in step.targets],
            "random": dict(step.random),
            "model": self._model.state_dict(),
            "args": self._flags,
        }
        try:
            write_atomically(content, path)
        except NotSavedError as error:
            return str(error)
        return f"saved to {path}: python tools/replay.py {path}"


@dataclass(frozen=True)
class Rerun:
    """Total loss, norm of the gradient (nan if the loss was not differentiated), and where it first
    went wrong.
    """

    total: float
    norm: float
    module: str


def run_again(model: nn.Module, loss_of_model: Callable[[], Tensor], scale: float = 1.0) -> Rerun:
    """Run a step and name the first module with an output, or gradient of an output, that is not
    finite.

    Args:
        model: its modules are watched; its gradients are as before afterwards.
        loss_of_model: runs the model and gives the total loss.
        scale: of the gradient scaler.
    """
    # an offending module's container is offended too; the innermost reports first
    forward: list[str] = []
    backward: list[str] = []
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [p.grad for p in parameters]
    model.zero_grad(set_to_none=True)
    norm = math.nan
    try:
        with _watched(model, forward, backward):
            loss = loss_of_model()
            if not forward and torch.isfinite(loss):
                (loss * scale).backward()
                norm = (
                    torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()
                    / scale
                )
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
    return Rerun(loss.item(), norm, _where(loss, norm, forward, backward))


def _where(loss: Tensor, norm: float, forward: list[str], backward: list[str]) -> str:
    if forward:
        return f"{forward[0]} (forward)"
    if not torch.isfinite(loss):
        return "the losses (every module's output was finite)"
    if backward:
        return f"{backward[0]} (gradient of its output)"
    if not math.isfinite(norm):
        return "a parameter's gradient (every output's gradient was finite)"
    return "no module: the step is finite when it is run again"


@contextmanager
def _watched(model: nn.Module, forward: list[str], backward: list[str]) -> Iterator[None]:
    def hook_for(name: str) -> Callable:
        def watch(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if not torch.isfinite(tensor).all():
                    forward.append(name)
                if tensor.requires_grad:
                    tensor.register_hook(
                        lambda gradient: None if torch.isfinite(gradient).all() else backward.append(name)
                    )

        return watch

    handles = [module.register_forward_hook(hook_for(name)) for name, module in model.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in a module's output."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif hasattr(value, "tokens"):
        yield value.tokens
