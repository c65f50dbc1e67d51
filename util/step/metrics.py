"""Means of losses and gradient norms: summed on the device, read back when a line is due."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from util.distributed.processes import is_main, sum_over_processes


class MeanOnDevice:
    """Means of named scalars, summed on their device. `window()`, `totals()` and `state_dict()`
    copy them to the host.

    A step with a scalar that is not finite is not counted.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        # [scalars + 1]: the sums, then the number of steps
        self._total: Tensor | None = None
        self._window: Tensor | None = None

    @torch.no_grad()
    def update(self, values: Mapping[str, Tensor]) -> None:
        """Add the scalars of one step; the names must be those of the first step."""
        # The count travels with the sums, so that one transfer reads both.
        one = torch.ones((), device=next(iter(values.values())).device)
        vector = torch.stack([*(value.detach().float().reshape(()) for value in values.values()), one])
        # Decided on the device; one bad step would spoil the mean of the epoch.
        vector = torch.where(torch.isfinite(vector).all(), vector, 0.0)
        self._names = self._names or list(values)
        assert list(values) == self._names, "the losses of a run never change their names"

        # A resumed total is on the host until now.
        self._total = vector.clone() if self._total is None else self._total.to(vector.device) + vector
        self._window = vector if self._window is None else self._window + vector

    def window(self) -> dict[str, float]:
        """Means of this process since the last call; one copy to the host."""
        sums, self._window = self._window, None
        if sums is None:
            return {}
        return self._means(sums)

    def totals(self) -> dict[str, float]:
        """Means over all steps of all processes. Every process must call."""
        if self._total is None:
            return {}
        return self._means(sum_over_processes(self._total.clone()))

    def state_dict(self) -> dict[str, Any]:
        total = None
        if self._total is not None:
            total = self._total.cpu()
        return {"names": list(self._names), "total": total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._names, self._total, self._window = list(state["names"]), state["total"], None

    def load_merged(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Resume from another number of processes: the main process takes the sums of all."""
        self.load_state_dict(states[0])
        totals = [state["total"] for state in states if state["total"] is not None]
        # The sum over processes counts every share once.
        if totals:
            self._total = torch.stack(totals).sum(0)
            if not is_main():
                self._total.zero_()

    def _means(self, sums: Tensor) -> dict[str, float]:
        *values, count = sums.tolist()
        if count == 0:
            return dict.fromkeys(self._names, math.nan)
        return {name: value / count for name, value in zip(self._names, values, strict=True)}


@dataclass
class EpochSums:
    """Running sums of losses and gradient norms of the current epoch; part of a checkpoint."""

    losses: MeanOnDevice = field(default_factory=MeanOnDevice)
    norms: MeanOnDevice = field(default_factory=MeanOnDevice)

    def window(self) -> dict[str, float]:
        return self.losses.window() | self.norms.window()

    def totals(self) -> dict[str, float]:
        return self.losses.totals() | self.norms.totals()

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses.state_dict(), "norms": self.norms.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses.load_state_dict(state["losses"])
        self.norms.load_state_dict(state["norms"])

    def load_merged(self, states: Sequence[Mapping[str, Any]]) -> None:
        self.losses.load_merged([state["losses"] for state in states])
        self.norms.load_merged([state["norms"] for state in states])

    def reset(self) -> None:
        self.losses, self.norms = MeanOnDevice(), MeanOnDevice()


def published_names(means: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """Means of unweighted losses under the names of log.txt.

    Args:
        means: unweighted loss terms, `class_error` and `grad_norm` by name.
        weights: weight of each loss term (SetCriterion.weight_dict).

    Returns:
        `loss` (the weighted sum), each weighted term under its name, each term with `_unscaled`.
    """
    # Only weighted terms are part of the loss.
    scaled = {name: means[name] * weight for name, weight in weights.items() if name in means}
    named = {name: means[name] for name in ("class_error", "grad_norm") if name in means}
    unscaled = {f"{name}_unscaled": value for name, value in means.items() if name != "grad_norm"}
    return named | {"loss": sum(scaled.values())} | scaled | unscaled


def memory_in_use(device: torch.device) -> str:
    """Peak memory so far: of the allocator on a GPU, of the process elsewhere."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux counts KiB.
    kib = peak / 1024 if sys.platform == "darwin" else peak
    return f"{kib / 2**20:.1f} GiB"
