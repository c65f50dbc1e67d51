"""What is noted of the steps of an epoch: sums, progress lines, the finite check, the watchdog's notes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from util.distributed.processes import world_size
from util.distributed.watchdog import note
from util.nested_tensor import NestedTensor
from util.step.metrics import EpochSums, memory_in_use, published_names
from util.step.not_finite import FiniteWatch, StepInputs, Targets
from util.step.progress import Progress, Throughput
from util.step.random_state import torch_state


class StepLog:
    """Takes the notes of one epoch. The loop calls the methods in their order in every step.

    Apart from the matching, a step blocks on the device only if a line is due (every `log_every` steps).

    Args:
        epoch: counted from 0.
        num_steps: steps of the whole epoch, with those before a resume.
        sums: running sums of the epoch, with those before a resume.
        watch: the check for losses and gradients that are not finite.
        weights: weight of each loss term (SetCriterion.weight_dict).
        first_step: steps of this epoch that were done before a resume.
        title: for the progress lines.
        on_step: called after every step with the number of steps done; may save, or end the run by
            an exception.
        on_window: called every `log_every` steps, and after the last one, with the means of this
            process since the last call (names of log.txt).
    """

    def __init__(
        self,
        epoch: int,
        num_steps: int,
        sums: EpochSums,
        watch: FiniteWatch,
        weights: Mapping[str, float],
        *,
        first_step: int = 0,
        title: str = "",
        log_every: int = 10,
        on_step: Callable[[int], None] = lambda step: None,
        on_window: Callable[[Mapping[str, float]], None] = lambda means: None,
    ) -> None:
        self.first_step, self.num_steps = first_step, num_steps
        self._epoch, self._sums, self._watch, self._weights = epoch, sums, watch, weights
        self._on_step, self._on_window = on_step, on_window
        self._progress = Progress(title or f"epoch {epoch}", num_steps, log_every, first_step)
        self._throughput = Throughput()
        self._inputs: StepInputs | None = None

    def before_forward(self, step: int, images: NestedTensor, targets: Targets) -> None:
        """Keep what a diagnosis of this step needs."""
        # Dropout of a rerun must draw the same numbers.
        random = torch_state(images.tensors.device)
        self._inputs = StepInputs(self._epoch, step, images, targets, random)
        note("epoch %d, step %d: forward", self._epoch, step)

    def before_backward(self) -> None:
        """Check the previous step: its numbers arrived with the matching of this step.

        Raises UserError if they were not finite. The weights are those from before that step.
        """
        assert self._inputs is not None
        self._watch.check()
        note("epoch %d, step %d: backward and exchange of gradients", self._epoch, self._inputs.number)

    def after_step(
        self,
        losses: Mapping[str, Tensor],
        total: Tensor,
        norm: Tensor | None,
        scale: Tensor | None,
        lr: float,
    ) -> None:
        """Add the step to the sums, and show a line if one is due.

        Args:
            losses: unweighted loss terms, scalars by name.
            total: the weighted sum.
            norm: norm of the gradient; None inside an accumulation.
            scale: of the gradient scaler; None without one.
            lr: learning rate of the transformer.
        """
        assert self._inputs is not None
        inputs, device = self._inputs, total.device
        if norm is not None:
            self._sums.norms.update({"grad_norm": norm})
        self._sums.losses.update(losses)
        # The copy to the host starts now, and is read in the next step.
        self._watch.expect(inputs, losses, total, norm, scale)
        self._throughput.add(len(inputs.images) * world_size())

        fields: list[str] = []
        if self._progress.due():
            # This blocks on the device.
            window = published_names(self._sums.window(), self._weights)
            window["images_per_second"] = self._throughput.rate()
            self._on_window(window)
            fields = _fields(window, lr, device)
        # Saving comes last: the sums have this step already.
        self._progress.step(fields)
        self._on_step(inputs.number + 1)
        note("epoch %d, step %d: waiting for the batch", self._epoch, inputs.number + 1)

    def close(self, lr: float) -> dict[str, float]:
        """Check the last step, and return the means of the epoch over all processes (names of log.txt).

        Every process must call. Raises UserError as `before_backward` does.
        """
        self._watch.check()
        self._progress.close()
        # The batch need not stay in the memory of the device.
        self._inputs = None
        return {"lr": lr} | published_names(self._sums.totals(), self._weights)


def _fields(window: Mapping[str, float], lr: float, device: torch.device) -> list[str]:
    """The fields of a progress line, the most important first."""
    norm = "-"
    if "grad_norm" in window:
        norm = f"{window['grad_norm']:.3g}"
    return [
        f"loss {window['loss']:.4f}",
        f"lr {lr:.1e}",
        f"grad norm {norm}",
        f"{window['images_per_second']:.2f} images/s",
        f"mem {memory_in_use(device)}",
    ]
