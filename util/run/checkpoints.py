"""The checkpoints in a run's folder: their names, how many are kept, which one is the newest good one.

    resume_0003_000000960.pth   the last few (--keep): the run resumes in epoch 3 after 960 images
    checkpoint.pth              the newest of them
    checkpoint0004.pth          of the published schedule, always kept
    checkpoint_best.pth         the one with the highest AP, of masks if there are some, or PQ

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

from util.atomic import written_aside
from util.checkpoint import read_checkpoint, write_atomically
from util.errors import NotSavedError, UserError
from util.optim import lr_factor
from util.run.state import TrainingPosition, position_of

log = logging.getLogger(__name__)

NEWEST, BEST = "checkpoint.pth", "checkpoint_best.pth"
WAITS = (1.0, 4.0, 10.0)  # seconds before a failed write is tried again
_ROLLING = re.compile(r"resume_(\d{4,})_(\d{9,})\.pth")
_SCHEDULED = re.compile(r"checkpoint(\d{4,})\.pth")


def scheduled_names(epoch: int, lr_drop: int, lr_drop_epochs: Sequence[int]) -> list[str]:
    """The published name of the checkpoint after `epoch`, if the published schedule keeps one.

    It keeps those before a drop of the learning rates, and one every 5 epochs.
    """
    drops = lr_factor(epoch + 1, lr_drop, lr_drop_epochs) != lr_factor(epoch, lr_drop, lr_drop_epochs)
    if drops or (epoch + 1) % 5 == 0:
        return [f"checkpoint{epoch:04}.pth"]
    return []


class CheckpointFolder:
    """Writes and finds the checkpoints in `folder`. Only the main process uses it.

    Args:
        keep: how many `resume_*` files are kept. After as many failed saves in a row the run ends.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self._keep = folder, keep
        self._failed = 0  # saves in a row
        self._damaged: set[Path] = set()

    def save(
        self,
        content: dict[str, Any],
        position: TrainingPosition,
        also: Sequence[str] = (),
        must: bool = False,
    ) -> Path | None:
        """Write a checkpoint, also under the names `also`, and remove old ones.

        A write that fails is tried again after a moment. Then it is given up with a warning, and
        the result is None. Earlier checkpoints do not change.

        Raises:
            NotSavedError: as many saves in a row as are kept have failed, or, with `must`, this one.
        """
        # names sort like positions
        path = self.folder / f"resume_{position.epoch:04}_{position.images:09}.pth"
        try:
            _write_patiently(content, path)
        except NotSavedError as error:
            self._failed += 1
            # after that every kept checkpoint would be older than what it is kept for
            left = self._keep - self._failed
            if must or left <= 0:
                raise NotSavedError(f"{error}; {self._remedy()}") from None
            log.warning("%s; training continues, and ends if %d more can't be written", error, left)
            return None

        # the other names are links, so only the oldest rolling files free room
        self._failed = 0
        self._damaged.discard(path)
        for name in (NEWEST, *also):
            self.name_also(path, name)
        # an epoch that began anew is saved under an older name: it must stay
        for old in self._rolling()[: -self._keep]:
            if old != path:
                with contextlib.suppress(OSError):
                    old.unlink()
        return path

    def name_also(self, path: Path, name: str) -> None:
        """Give a checkpoint another name, and take it from the file that had it."""
        target = self.folder / name
        try:
            with written_aside(target) as temporary:
                temporary.unlink(missing_ok=True)  # of a process that was killed
                try:
                    os.link(path, temporary)
                except OSError:  # a file system without hard links
                    shutil.copyfile(path, temporary)
        except OSError as error:
            text = "%s could not be written (%s); %s has the same contents"
            log.warning(text, target, error.strerror, path.name)

    def name_newest(self, name: str) -> None:
        """Give the newest of the rolling checkpoints another name."""
        if rolling := self._rolling():
            self.name_also(rolling[-1], name)

    def newest_good(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest intact checkpoint and its content; None if the folder has none.

        Damaged ones are named in a warning. Raises UserError if all are damaged.
        """
        candidates = self._candidates()
        for path in candidates:
            try:
                # the whole file: its checksum is compared, and nothing else is proof
                return path, read_checkpoint(path)
            except UserError as error:
                log.warning("%s; the one before it is taken", error)
                self._damaged.add(path)
        # a new run would hide that there was one
        if candidates:
            raise UserError(
                f"--resume auto: all {len(candidates)} checkpoints in {self.folder} are damaged, "
                f"{candidates[0].name} first; move them away to start from the beginning"
            )
        return None

    def newer_than(self, position: TrainingPosition) -> list[Path]:
        """Checkpoints from which a run would resume later than at `position`, and unreadable ones."""
        newer = []
        for path in self._candidates():
            found = _position_in(path.name)
            # checkpoint.pth and checkpoint_best.pth do not say it in their names
            if found is None:
                with contextlib.suppress(UserError, KeyError, TypeError, ValueError):
                    found = position_of(read_checkpoint(path))
            if found is None or position < found:
                newer.append(path)
        return newer

    def sweep(self) -> None:
        """Remove what processes that were killed while writing have left."""
        for path in self.folder.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                path.unlink()

    def _candidates(self) -> list[Path]:
        """Checkpoints whose name has a position, newest first; then those whose name has none."""
        found = []
        for path in self.folder.glob("*.pth"):
            if position := _position_in(path.name):
                found.append((position, path))
        # of equal positions resume_* comes before checkpoint*, which is the same file
        paths = [path for _, path in sorted(found, reverse=True)]
        paths += [self.folder / NEWEST, self.folder / BEST]
        return [path for path in paths if path.is_file()]

    def _rolling(self) -> list[Path]:
        """The good ones among the `resume_*` files, oldest first."""
        # a damaged file must not push out a good one
        files = [path for path in self.folder.glob("resume_*.pth") if _ROLLING.fullmatch(path.name)]
        return sorted((path for path in files if path not in self._damaged), key=lambda path: path.name)

    def _remedy(self) -> str:
        last = "there is none yet"
        if rolling := self._rolling():
            last = f"the last good one is {rolling[-1]}"
        return f"{last}. Make room or choose another --output_dir, and start again with --resume auto"


def _position_in(name: str) -> TrainingPosition | None:
    """Where a run resumes from a checkpoint of this name, if the name says it."""
    if match := _ROLLING.fullmatch(name):
        return TrainingPosition(int(match[1]), int(match[2]))
    if match := _SCHEDULED.fullmatch(name):
        # its number is the epoch that it finished
        return TrainingPosition(int(match[1]) + 1, 0)
    return None


def _write_patiently(content: dict[str, Any], path: Path) -> None:
    for wait in WAITS:
        try:
            write_atomically(content, path)
            return
        except NotSavedError as error:
            log.warning("%s; trying again in %g s", error, wait)
            time.sleep(wait)
    write_atomically(content, path)
