"""Progress of a loop: a bar on a terminal, a plain line every few steps elsewhere."""

from __future__ import annotations

import datetime
import logging
import os
import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from util.distributed.processes import is_main

log = logging.getLogger("progress")

# Narrower terminals show no bar, to have room for the numbers.
WIDE_TERMINAL = 120


class Progress:
    """Shows the steps of a loop in the main process; the other processes show nothing.

    Args:
        title: what the loop does, for example "epoch 0 (1/50)".
        steps: number of steps of the whole loop.
        every: steps between two plain lines.
        done: steps that were done before a resume.
    """

    def __init__(self, title: str, steps: int, every: int, done: int = 0) -> None:
        self._title, self._steps, self._every = title, steps, every
        self._start, self._done, self._done_before = time.perf_counter(), done, done
        self._bar = None
        # A bar in a log file would be a thousand lines of noise.
        if is_main() and sys.stderr.isatty() and (columns := _columns()):
            # A bar that an error leaves open is cleared at the end, not drawn once more.
            layout = _layout(columns)
            self._bar = tqdm(total=steps, initial=done, desc=title, bar_format=layout, leave=False)

    def due(self) -> bool:
        """Whether the current step ends an interval, so that its numbers are worth a copy to the host."""
        return (self._done + 1) % self._every == 0 or self._done + 1 == self._steps

    def step(self, fields: Sequence[str] = ()) -> None:
        """Count one step and show `fields`, the most important first."""
        self._done += 1
        if self._bar is not None:
            self._update_bar(self._bar, fields)
        elif fields and is_main():
            count = f"[{self._done:{len(str(self._steps))}}/{self._steps}]"
            now, text = time.strftime("%H:%M:%S"), "  ".join(fields)
            log.info("%s  %s %s  %s  left %s", now, self._title, count, text, self._left())

    def close(self) -> None:
        if self._bar is not None:
            self._bar.leave = True
            self._bar.close()

    def _update_bar(self, bar: tqdm, fields: Sequence[str]) -> None:
        # The terminal may have been resized.
        columns = _columns()
        bar.ncols, bar.bar_format = columns - 1, _layout(columns)
        if fields:
            # Leave fields out from the end: a number that is cut in two is worse than none.
            room = columns - len(f"{self._title} {self._steps}/{self._steps} left 0:00:00, ") - 1
            shown = list(fields)
            while shown and len("  ".join(shown)) > room:
                shown.pop()
            bar.set_postfix_str("  ".join(shown), refresh=False)
        bar.update()

    def _left(self) -> str:
        # Steps before a resume took no time of this start.
        pace = (time.perf_counter() - self._start) / (self._done - self._done_before)
        return duration(pace * (self._steps - self._done))


def _columns() -> int:
    """Width of the terminal on stderr, where the bar is; 0 if it has none."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:
        return 80


def _layout(columns: int) -> str:
    bar = ""
    if columns >= WIDE_TERMINAL:
        bar = "|{bar}| "
    return "{desc} {n_fmt}/{total_fmt} " + bar + "left {remaining}{postfix}"


class Throughput:
    """Images per second since the last call of `rate`."""

    def __init__(self) -> None:
        self._start, self._images = time.perf_counter(), 0

    def add(self, images: int) -> None:
        self._images += images

    def rate(self) -> float:
        now = time.perf_counter()
        # 1e-9 avoids a division by zero.
        rate = self._images / max(now - self._start, 1e-9)
        self._start, self._images = now, 0
        return rate


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return str(datetime.timedelta(seconds=round(seconds)))
