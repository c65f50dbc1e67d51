"""The checkpoints of a run's folder: their names, which are kept, which is the newest good one, and
what a full disk means.

    resume_0003_000000960.pth   the last few (--keep): goes on in epoch 3 after 960 images
    checkpoint.pth              the newest of them
    checkpoint0004.pth          of the published schedule, always kept
    checkpoint_best.pth         the one whose evaluation had the highest AP

The last three are further names (hard links) of files that were `resume_*` once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from util.checkpoint import flush_folder, read_checkpoint, temporary_name, write_atomically
from util.errors import NotSavedError, UserError
from util.run.state import Position, position_of

log = logging.getLogger(__name__)

NEWEST, BEST = "checkpoint.pth", "checkpoint_best.pth"
WAITS = (1.0, 4.0, 10.0)  # seconds before a failed write is tried again
_ROLLING = re.compile(r"resume_(\d{4,})_(\d{9,})\.pth")
_SCHEDULED = re.compile(r"checkpoint(\d{4,})\.pth")


def rolling_name(position: Position) -> str:
    return f"resume_{position.epoch:04}_{position.images:09}.pth"


def scheduled_name(epoch: int) -> str:
    """The published name of the checkpoint after `epoch`."""
    return f"checkpoint{epoch:04}.pth"


class CheckpointFolder:
    """Writes and finds the checkpoints in `folder`; of one process only.

    Args:
        keep: how many `resume_*` files are kept; as many saves in a row may fail before the run
            ends.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self._keep = folder, keep
        self._failed = 0
        self._damaged: set[Path] = set()

    def save(
        self, content: dict[str, Any], position: Position, also: Sequence[str] = (), *, must: bool = False
    ) -> Path | None:
        """Write a checkpoint, also under the names `also`, and remove those that are too many.

        A write that fails is tried again after a moment, and then given up for this time: None, and
        a warning. The earlier ones are as they were.

        Raises:
            NotSavedError: as many saves in a row as are kept have failed, or, with `must`, this
            one.
        """
        path = self.folder / rolling_name(position)
        try:
            _persistently(lambda: write_atomically(content, path))
        except NotSavedError as error:
            self._failed += 1
            if must or self._failed >= self._keep:
                raise NotSavedError(f"{error}; {self._remedy()}") from None
            log.warning(
                "%s; training goes on, and ends if %d more can't be written", error, self._keep - self._failed
            )
            return None
        self._failed = 0
        self._damaged.discard(path)
        for name in (NEWEST, *also):
            self.name_also(path, name)
        self._remove_old(path)
        return path

    def name_also(self, path: Path, name: str) -> None:
        """Another name for a checkpoint, replacing what had it. A failure costs a warning."""
        target = self.folder / name
        temporary = temporary_name(target)
        try:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
            try:
                os.link(path, temporary)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, temporary)
            os.replace(temporary, target)
            flush_folder(self.folder)
        except OSError as error:
            log.warning(
                "%s could not be written (%s); %s has the same contents", target, error.strerror, path.name
            )

    def name_newest(self, name: str) -> None:
        """Another name for the newest of the rolling checkpoints."""
        if rolling := self._rolling():
            self.name_also(rolling[-1], name)

    def newest_good(self) -> Path | None:
        """The newest intact checkpoint; None if the folder has none. Damaged ones are named in a
        warning.

        Raises:
            UserError: there are checkpoints and all of them are damaged.
        """
        candidates = self._candidates()
        for path in candidates:
            try:
                read_checkpoint(path)
                return path
            except UserError as error:
                log.warning("%s; the one before it is taken", error)
                self._damaged.add(path)
        if candidates:
            raise UserError(
                f"--resume auto: all {len(candidates)} checkpoints in {self.folder} are damaged, "
                f"{candidates[0].name} first; "
                "move them away to start from the beginning"
            )
        return None

    def newer_than(self, position: Position) -> list[Path]:
        """Checkpoints from which a run would go on later than at `position`, and such as can't be
        read.
        """
        newer = []
        for path in self._candidates():
            found = _position_in(path.name) or _position_inside(path)
            if found is None or position < found:
                newer.append(path)
        return newer

    def sweep(self) -> None:
        """Remove what processes that were killed while writing have left."""
        for path in self.folder.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                path.unlink()

    def _candidates(self) -> list[Path]:
        """Newest first, as far as names tell; then the names that don't."""
        named = [path for path in self.folder.glob("*.pth") if _position_in(path.name)]
        named.sort(key=lambda path: (_position_in(path.name), path.name), reverse=True)
        return named + [self.folder / name for name in (NEWEST, BEST) if (self.folder / name).is_file()]

    def _rolling(self) -> list[Path]:
        """The good ones among those of which only a few are kept, oldest first."""
        rolling = [
            p
            for p in self.folder.glob("resume_*.pth")
            if _ROLLING.fullmatch(p.name) and p not in self._damaged
        ]
        return sorted(rolling, key=lambda path: _position_in(path.name) or Position())

    def _remove_old(self, saved: Path) -> None:
        """Damaged files are not counted: those that are kept are good. Nor is the newest removed,
        if its epoch began anew.
        """
        for path in self._rolling()[: -self._keep]:
            if path != saved:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _remedy(self) -> str:
        good = self._rolling()
        last = f"the last good one is {good[-1]}" if good else "there is none yet"
        return f"{last}. Make room or choose another --output_dir, and go on with --resume auto"


def _position_in(name: str) -> Position | None:
    """Where a run goes on with a checkpoint of this name, if the name says it."""
    if match := _ROLLING.fullmatch(name):
        return Position(int(match[1]), int(match[2]))
    if match := _SCHEDULED.fullmatch(name):
        return Position(int(match[1]) + 1, 0)
    return None


def _position_inside(path: Path) -> Position | None:
    try:
        return position_of(read_checkpoint(path))
    except (UserError, KeyError, TypeError, ValueError):
        return None


def _persistently(write: Any) -> None:
    for wait in WAITS:
        try:
            return write()
        except NotSavedError as error:
            log.warning("%s; trying again in %g s", error, wait)
            time.sleep(wait)
    return write()
