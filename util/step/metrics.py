"""What a run reports: sums kept on the device, read back when a line is due; a progress bar or
plain lines.
"""

from __future__ import annotations

import datetime
import logging
import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from util.distributed.processes import is_main, sum_over_processes


class MeanOnDevice:
    """Means of named scalars, summed where they are made; only `window()` and `totals()` read them
    back.

    Steps with a scalar that is not finite are not counted. `state_dict` and `load_state_dict` carry
    the sums over an interruption, to the bit.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        # of all scalars, and last the number of steps
        self._total: Tensor | None = None
        self._window: Tensor | None = None

    @torch.no_grad()
    def update(self, values: Mapping[str, Tensor]) -> None:
        """Add one step's scalars; the names must be those of the first step."""
        one = torch.ones((), device=next(iter(values.values())).device)
        vector = torch.stack([*(value.detach().float().reshape(()) for value in values.values()), one])
        vector = torch.where(torch.isfinite(vector).all(), vector, 0.0)
        self._names = self._names or list(values)
        assert list(values) == self._names, "the losses of a run never change their names"
        self._total = vector.clone() if self._total is None else self._total.to(vector.device) + vector
        self._window = vector if self._window is None else self._window + vector

    def window(self) -> dict[str, float]:
        """Means of this process since the last call; one transfer to the host."""
        sums, self._window = self._window, None
        return {} if sums is None else self._means(sums.tolist())

    def totals(self) -> dict[str, float]:
        """Means over all steps of all processes (every process must call)."""
        return {} if self._total is None else self._means(sum_over_processes(self._total.clone()).tolist())

    def state_dict(self) -> dict[str, Any]:
        return {"names": list(self._names), "total": None if self._total is None else self._total.cpu()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._names, self._total, self._window = list(state["names"]), state["total"], None

    def load_merged(self, states: Sequence[Mapping[str, Any]]) -> None:
        """As `load_state_dict`, from any number of processes: the main process takes all their
        sums.
        """
        totals = [state["total"] for state in states if state["total"] is not None]
        total = torch.stack(totals).sum(0) if totals else None
        self.load_state_dict(
            {**states[0], "total": total if total is None or is_main() else torch.zeros_like(total)}
        )

    def _means(self, sums: list[float]) -> dict[str, float]:
        *values, count = sums
        return {
            name: value / count if count else math.nan
            for name, value in zip(self._names, values, strict=True)
        }


class Progress:
    """The main process's view of a loop: a bar on a terminal, a plain line every `every` steps
    elsewhere.
    """

    def __init__(self, title: str, steps: int, every: int, done: int = 0) -> None:
        self._title, self._steps, self._every = title, steps, every
        self._log = logging.getLogger("progress")
        self._start, self._done, self._done_before = time.perf_counter(), done, done
        # a logging bar in a file is a thousand lines of noise
        # the bar gives way to the numbers
        layout = "{desc} {n_fmt}/{total_fmt} |{bar}| left {remaining} {postfix}"
        self._bar = (
            tqdm(total=steps, initial=done, desc=title, dynamic_ncols=True, bar_format=layout)
            if _interactive()
            else None
        )

    def due(self) -> bool:
        """Whether the step about to be reported ends an interval (so that its values are worth
        reading back).
        """
        return (self._done + 1) % self._every == 0 or self._done + 1 == self._steps

    def step(self, text: str | None = None) -> None:
        """One step is done; `text` is shown if given."""
        self._done += 1
        if self._bar is not None:
            if text:
                self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
        elif text and is_main():
            width = len(str(self._steps))
            self._log.info(
                "%s [%*d/%d]  %s  left %s", self._title, width, self._done, self._steps, text, self._left()
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _left(self) -> str:
        pace = (time.perf_counter() - self._start) / (self._done - self._done_before)
        seconds = pace * (self._steps - self._done)
        return str(datetime.timedelta(seconds=round(seconds)))


def memory_in_use(device: torch.device) -> str:
    """Peak memory so far: of the allocator on a GPU, of the process elsewhere."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return f"{kib / 2**20:.1f} GiB"


def _interactive() -> bool:
    return is_main() and sys.stderr.isatty()
