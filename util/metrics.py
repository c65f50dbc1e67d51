"""What a run reports: sums kept on the device, read back when a line is due; a progress bar or plain lines."""

from __future__ import annotations

import datetime
import logging
import resource
import sys
import time
from collections.abc import Mapping

import torch
from torch import Tensor
from tqdm import tqdm

from util.distributed import is_main, sum_over_processes


class MeanOnDevice:
    """Means of named scalars, summed where they are made; only `window()` and `totals()` read them back."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._total: Tensor | None = None
        self._window: Tensor | None = None
        self._count = self._window_count = 0

    @torch.no_grad()
    def update(self, values: Mapping[str, Tensor]) -> None:
        """Add one step's scalars; the names must be those of the first step."""
        vector = torch.stack([value.detach().float().reshape(()) for value in values.values()])
        if self._total is None or self._window is None:
            self._names = list(values)
            self._total, self._window = torch.zeros_like(vector), torch.zeros_like(vector)
        assert list(values) == self._names, "the losses of a run never change their names"
        self._total += vector
        self._window += vector
        self._count += 1
        self._window_count += 1

    def window(self) -> dict[str, float]:
        """Means of this process since the last call; one transfer to the host."""
        if self._window is None or not self._window_count:
            return {}
        means = (self._window / self._window_count).tolist()
        self._window.zero_()
        self._window_count = 0
        return dict(zip(self._names, means, strict=True))

    def totals(self) -> dict[str, float]:
        """Means over all steps of all processes (every process must call)."""
        if self._total is None:
            return {}
        packed = torch.cat([self._total, self._total.new_full((1,), float(self._count))])
        *sums, count = sum_over_processes(packed).tolist()
        return {name: value / count for name, value in zip(self._names, sums, strict=True)}


class Progress:
    """The main process's view of a loop: a bar on a terminal, a plain line every `every` steps elsewhere."""

    def __init__(self, title: str, steps: int, every: int) -> None:
        self._title, self._steps, self._every = title, steps, every
        self._log = logging.getLogger("progress")
        self._start, self._done = time.perf_counter(), 0
        # a logging bar in a file is a thousand lines of noise
        layout = "{desc} {n_fmt}/{total_fmt} |{bar}| left {remaining} {postfix}"  # the bar gives way to the numbers
        self._bar = tqdm(total=steps, desc=title, dynamic_ncols=True, bar_format=layout) if _interactive() else None

    def due(self) -> bool:
        """Whether the step about to be reported ends an interval (so that its values are worth reading back)."""
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
            self._log.info("%s [%*d/%d]  %s  left %s", self._title, width, self._done, self._steps, text, self._left())

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _left(self) -> str:
        seconds = (time.perf_counter() - self._start) / self._done * (self._steps - self._done)
        return str(datetime.timedelta(seconds=round(seconds)))


def memory_in_use(device: torch.device) -> str:
    """Peak memory so far: of the allocator on a GPU, of the process elsewhere."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return f"{kib / 2**20:.1f} GiB"


def _interactive() -> bool:
    return is_main() and sys.stderr.isatty()
