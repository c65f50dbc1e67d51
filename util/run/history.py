"""The history of a run: the lines of log.txt, and the best result."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from util.atomic import replace_text

log = logging.getLogger(__name__)


class History:
    """The lines of log.txt, one JSON object an epoch. Checkpoints hold them too, and a resumed run
    writes the file from its checkpoint; after that, lines are appended.

    If the file can't be written, a warning says so and the next epoch tries again; the run continues.

    Args:
        path: log.txt, or None to keep the lines only.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lines: list[str] = []
        # the entries of an epoch that is trained and not evaluated yet
        self.unfinished: dict[str, Any] | None = None
        self.best: dict[str, Any] | None = None
        # lines that the file has; 0: it must be written as a whole
        self._written = 0

    def finish_epoch(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Complete the line of the unfinished epoch with `entries`, write it, and return it."""
        # the entries of the training come first
        line = {**(self.unfinished or {}), **entries}
        self._lines.append(json.dumps(line))
        self.unfinished = None
        self.write()
        return line

    def is_best(self, metric: str, value: float, epoch: int, weights: str) -> bool:
        """Whether a result is better by `metric` than all before; it is kept then."""
        # of equal results the first one stays; one of another metric, of an older version, does not
        if self.best is not None and value <= self.best.get(metric, -math.inf):
            return False
        self.best = {metric: value, "epoch": epoch, "weights": weights}
        return True

    def write(self) -> None:
        """Append the lines that the file does not have.

        After a resume or a failure all lines are written: the file may have others, or a part of one.
        """
        if self._path is None:
            return
        text = "".join(f"{line}\n" for line in self._lines[self._written :])
        try:
            if self._written:
                with open(self._path, "a", encoding="utf-8") as file:
                    file.write(text)
            else:
                replace_text(self._path, text)
            self._written = len(self._lines)
        except OSError as error:
            self._written = 0
            warning = "%s could not be written (%s); training continues, the next epoch tries again"
            log.warning(warning, self._path, error.strerror)

    def lines_beyond(self) -> bool:
        """Whether the file has more lines than this history and the epoch that it is in."""
        try:
            lines = self._path.read_text().splitlines() if self._path else []
        except (OSError, ValueError):
            return False
        # one more is of the epoch that the checkpoint is in the middle of
        return len(lines) > len(self._lines) + 1

    def state_dict(self) -> dict[str, Any]:
        return {"lines": list(self._lines), "unfinished": self.unfinished, "best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._lines, self.unfinished, self.best = list(state["lines"]), state["unfinished"], state["best"]
        self._written = 0
