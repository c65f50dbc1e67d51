"""What a run has to tell of its epochs: the lines of log.txt, and the best result."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from util.atomic import replace_text

log = logging.getLogger(__name__)


class History:
    """The lines of log.txt, one JSON object an epoch, kept in the checkpoints too, from which a
    resumed run writes the file anew.

    A log that can't be written costs a warning and is caught up on later; it never ends a run.

    Args:
        path: log.txt, or None to keep the lines only.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lines: list[str] = []
        # an epoch that is trained and not yet evaluated: its part of the line
        self.unfinished: dict[str, Any] | None = None
        self.best: dict[str, Any] | None = None
        self._written = 0

    def finish_epoch(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Complete the unfinished epoch's line with `entries`, write it, and give it."""
        line = {**(self.unfinished or {}), **entries}
        self._lines.append(json.dumps(line))
        self.unfinished = None
        self.write()
        return line

    def is_best(self, average_precision: float, epoch: int, weights: str) -> bool:
        """Note a result, and whether it is better than all before."""
        if self.best is not None and average_precision <= self.best["AP"]:
            return False
        self.best = {"AP": average_precision, "epoch": epoch, "weights": weights}
        return True

    def write(self) -> None:
        """Append what the file lacks; after a failure or a resume, all of it."""
        if self._path is None:
            return
        try:
            if 0 < self._written <= len(self._lines):
                with open(self._path, "a") as file:
                    file.writelines(f"{line}\n" for line in self._lines[self._written :])
            else:
                self._rewrite()
            self._written = len(self._lines)
        except OSError as error:
            self._written = 0
            log.warning(
                "%s could not be written (%s); training goes on, the next epoch tries again",
                self._path,
                error.strerror,
            )

    def lines_beyond(self) -> bool:
        """Whether the file has lines that this history has not, other than one for the epoch it is
        in.
        """
        try:
            lines = self._path.read_text().splitlines() if self._path else []
        except (OSError, ValueError):
            return False
        return len(lines) > len(self._lines) + 1

    def state_dict(self) -> dict[str, Any]:
        return {"lines": list(self._lines), "unfinished": self.unfinished, "best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._lines, self.unfinished, self.best = list(state["lines"]), state["unfinished"], state["best"]
        self._written = 0

    def _rewrite(self) -> None:
        assert self._path is not None
        replace_text(self._path, "".join(f"{line}\n" for line in self._lines))
