"""Losses and gradients that are not finite: noticed without blocking on the device, and diagnosed."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
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
# A gradient scaler starts at 2^16 and halves. After so many failures in a row the scale is not the cause.
SCALE_TRIES = 20


@dataclass(frozen=True)
class StepInputs:
    """What a rerun of a step needs: its batch, and PyTorch's generators before the forward pass."""

    epoch: int
    number: int
    images: NestedTensor
    targets: Targets
    random: Mapping[str, Tensor]

    @property
    def image_ids(self) -> list[int]:
        return [int(target["image_id"]) for target in self.targets]


@dataclass(frozen=True)
class StepOutcome:
    """The numbers of a step.

    total: the loss; norm: of the gradient, None inside an accumulation; scale: of the gradient
    scaler, 1 without one; terms: the loss terms by name.
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
    """Checks loss and gradient norm of every step, one step late: by then the copy to the host is done.

    A step that is not finite has not changed the weights, in any process (step_if_finite). It ends
    the run with a diagnosis, or is skipped. Its batch, weights and random state are saved for
    tools/replay.py.

    Args:
        model: not wrapped, because the other processes take no part in a diagnosis.
        loss_of: maps (images, targets) to the total loss of `model` (engine.training_loss).
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
        self._expected: tuple[StepInputs, list[str], bool, HostCopy] | None = None

    def expect(
        self,
        step: StepInputs,
        losses: Mapping[str, Tensor],
        total: Tensor,
        norm: Tensor | None,
        scale: Tensor | None,
    ) -> None:
        """Start copying the numbers of a step to the host, and keep its inputs for a diagnosis."""
        # One tensor, one copy: total, norm, scale, then the terms.
        total = total.detach().float()
        numbers = [total, total, torch.ones_like(total)]
        if norm is not None:
            numbers[1] = norm.float()
        if scale is not None:
            numbers[2] = scale.float()
        numbers += [loss.detach().float() for loss in losses.values()]
        self._expected = step, list(losses), norm is not None, HostCopy(torch.stack(numbers))

    def check(self) -> None:
        """Check the loss and the gradient norm of the previous step.

        Raises:
            UserError: they are not finite, and the step is not to be skipped or is one too many.
        """
        if self._expected is None:
            return
        step, names, has_norm, copied = self._expected
        self._expected = None
        total, norm, scale, *terms = copied.get().tolist()
        outcome = StepOutcome(total, norm if has_norm else None, scale, dict(zip(names, terms, strict=True)))

        finite = outcome.loss_is_finite and outcome.norm_is_finite
        if not finite and not self._is_the_scaler(outcome):
            self._handle(step, outcome)
        # The next step begins a new group.
        if has_norm:
            self._saved_in_group = False
            if outcome.norm_is_finite:
                self._scale_failures = 0

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "scale_failures": self._scale_failures}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped, self._scale_failures = int(state["skipped"]), int(state["scale_failures"])

    def load_merged(self, states: Sequence[Mapping[str, Any]]) -> None:
        # All processes skip the same steps.
        self.load_state_dict(states[0])

    def _is_the_scaler(self, outcome: StepOutcome) -> bool:
        """Whether a gradient overflowed only because the scaler is still searching for its scale."""
        if outcome.scale == 1 or not outcome.loss_is_finite:
            return False
        self._scale_failures += 1
        return self._scale_failures <= SCALE_TRIES

    def _handle(self, step: StepInputs, outcome: StepOutcome) -> None:
        where = f"epoch {step.epoch}, step {step.number}, process {rank()}"
        # Without --on_nan skip the run ends here, with a diagnosis.
        if not self._skip:
            module = self._run_again(step, outcome).module
            saved = self._save(step, outcome, module)
            raise UserError(
                f"{where}: {outcome}; images {step.image_ids}; first wrong: {module}; {saved}. "
                f"Look at these images and "
                "their boxes, or lower --lr or --clip_max_norm, and resume with --resume auto"
            )

        # Save one file per group: the first bad batch, or the last batch if only the gradient is bad.
        saved = ""
        if not self._saved_in_group:
            saved = f"; {self._save(step, outcome, '')}"
        self._saved_in_group = True
        if not outcome.norm_is_finite:
            self.skipped += 1
        log.warning("%s: %s; images %s; skipped%s", where, outcome, step.image_ids, saved)
        if self.skipped > self._max_steps:
            raise UserError(
                f"{where}: this is step {self.skipped} that is not finite, more than "
                f"--max_nan_steps {self._max_steps}; "
                "run tools/replay.py on what was saved, lower --lr, and resume with --resume auto"
            )

    def _run_again(self, step: StepInputs, outcome: StepOutcome) -> Rerun:
        device = step.images.tensors.device
        # The run's own generators stay as they are: it may be resumed from here.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            set_torch_state(step.random, device)
            return run_again(self._model, lambda: self._loss_of(step.images, step.targets), outcome.scale)

    def _save(self, step: StepInputs, outcome: StepOutcome, module: str) -> str:
        if self._folder is None:
            return "nothing saved without --output_dir"
        path = self._folder / f"nonfinite_{step.epoch:04}_{step.number:06}_process{rank()}.pth"
        # Everything that tools/replay.py needs to run this step again.
        content = {
            "epoch": step.epoch,
            "step": step.number,
            "process": rank(),
            "processes": world_size(),
            "image_ids": step.image_ids,
            "loss": outcome.total,
            "grad_norm": outcome.norm,
            "scale": outcome.scale,
            "losses": outcome.terms,
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
    """Total loss, gradient norm (nan if there was no backward), and the module that was not finite first."""

    total: float
    norm: float
    module: str


def run_again(model: nn.Module, loss_of_model: Callable[[], Tensor], scale: float = 1.0) -> Rerun:
    """Run a step and name the first module whose output, or gradient of an output, is not finite.

    Args:
        model: its modules are watched; its gradients are restored.
        loss_of_model: runs the model and returns the total loss.
        scale: of the gradient scaler.
    """
    # The innermost module reports first, then the modules that contain it.
    forward: list[str] = []
    backward: list[str] = []
    parameters = [p for p in model.parameters() if p.requires_grad]
    # An unfinished accumulation keeps its gradients.
    before = [p.grad for p in parameters]
    model.zero_grad(set_to_none=True)
    norm = math.nan
    try:
        with _watched(model, forward, backward):
            loss = loss_of_model()
            # A forward that is wrong already makes every gradient wrong.
            if not forward and torch.isfinite(loss):
                (loss * scale).backward()
                gradients = [p.grad for p in parameters if p.grad is not None]
                norm = torch.nn.utils.get_total_norm(gradients).item() / scale
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
    return Rerun(loss.item(), norm, _where(loss, norm, forward, backward))


def _where(loss: Tensor, norm: float, forward: list[str], backward: list[str]) -> str:
    # In the order of a step: forward, losses, backward, parameters.
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
    """Add the names of modules whose outputs, or gradients of outputs, are not finite to the two lists."""

    def hook_for(name: str) -> Callable:
        def check_gradient(gradient: Tensor) -> None:
            if not torch.isfinite(gradient).all():
                backward.append(name)

        def check_output(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if not torch.isfinite(tensor).all():
                    forward.append(name)
                # The gradient of an output belongs to the backward of this module.
                if tensor.requires_grad:
                    tensor.register_hook(check_gradient)

        return check_output

    handles = [module.register_forward_hook(hook_for(name)) for name, module in model.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in the output of a module."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
        return
    items: Iterable[Any] = ()
    if isinstance(value, list | tuple):
        items = value
    elif isinstance(value, dict):
        items = value.values()
    elif is_dataclass(value):
        items = [getattr(value, item.name) for item in fields(value)]
    for item in items:
        yield from _tensors(item)
