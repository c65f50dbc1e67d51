"""The output folder of a run (--output_dir): its states, and the checkpoint that a run starts from.

| state | recognised by | what the next start does |
|---|---|---|
| held | `.held` names a process that is alive (hold.py) | exits with code 2 |
| left behind | `.held` names a process that has ended | takes the hold over, then as below |
| being moved | `earlier-<n>/.moving` lists files | moves the rest of them, then as below |
| empty | no file of a run | begins a new run |
| announced | `.new_run`; the files are of the run before | as begun; a restart begins a new run |
| begun | files of a run, no `.new_run` | resumes, or begins a new run: see below |

A start resumes from the newest good checkpoint with --resume auto, and by itself if a launcher has
restarted it (RunFolder.resumes). Otherwise it begins a new run: it announces itself, reads the data,
moves the files of the run before into `earlier-<n>`, and removes the marker.

A kill leaves the folder in one of these states, so the table says what follows. At every moment a
file belongs to one run only, and none is overwritten. An evaluation in a folder with checkpoints or
a log.txt writes into a new folder `evaluation-<n>` in it, beside a training that may hold the folder.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from util.checkpoint import read_checkpoint
from util.config import Config, RunConfig
from util.distributed.launchers import number, slurm_restarts
from util.distributed.processes import broadcast_from_main, gather_on_main, is_main
from util.errors import UserError
from util.run.checkpoints import NEWEST, CheckpointFolder
from util.run.history import History
from util.run.hold import FolderHold
from util.run.state import TrainingPosition, position_of

log = logging.getLogger(__name__)

Reader = Callable[[str], dict[str, Any]]  # a path or an address -> the content of a checkpoint

_MOVING = ".moving"  # in the folder that files are moved into: their names
_NEW_RUN = ".new_run"  # a new run has started and not begun yet
# patterns of the files that a training resumes from, and of all files of a run
_TRAINING = ("checkpoint*.pth", "resume_*.pth", "log.txt")
_FILES = (
    *_TRAINING,
    "run.json",
    "eval",
    "eval*.pth",
    "predictions*.json",
    "tensorboard",
    "nonfinite_*.pth",
)


class RunFolder:
    """The folder that this run writes into, and the checkpoint that it starts from.

    path: the folder; None on all processes but the main one, and without --output_dir.
    resumes: whether the run continues what the folder holds. The same on all processes.
    checkpoint: the content, read and verified; None for a new run. source: its path or address,
        else "". from_folder: it is the newest one in the folder, not one that --resume names.
    """

    def __init__(self, run: RunConfig, hold: FolderHold | None) -> None:
        self.path = hold.folder if hold else None
        self._hold, self._run = hold, run
        # of the training, also where an evaluation writes elsewhere
        self.checkpoints = CheckpointFolder(Path(run.output_dir), run.keep)
        self.resumes = self._decide_to_resume()
        self.checkpoint: dict[str, Any] | None = None
        self.source, self.from_folder = "", False

    @classmethod
    @contextlib.contextmanager
    def open(cls, config: Config, read: Reader = read_checkpoint) -> Iterator[RunFolder]:
        """The folder of `config`, held for the length of the block; every process must call.

        Args:
            read: reads the checkpoint that --resume names.

        Raises:
            UserError: the folder can't be written to or is held by another process; the checkpoint
                can't be read, or is missing in an evaluation.
        """
        with _held(config.run) as hold:
            folder = cls(config.run, hold)
            # before anything is read: a restart of this run must not resume the earlier run
            if folder.path and not folder.resumes and not config.run.eval:
                with _writing_to(folder.path):
                    (folder.path / _NEW_RUN).touch()
            folder._find_checkpoint(read)
            yield folder

    def begin(self, history: History) -> None:
        """Make the folder this run's own: move files of other runs aside, write log.txt.

        After this a restart resumes from this folder. Releases `checkpoint`.
        """
        # its tensors would stay in memory for the whole run
        checkpoint, self.checkpoint = self.checkpoint, None
        if self.path is None:
            return
        self.checkpoints.sweep()

        # nothing of an earlier run may be taken for this one's
        if checkpoint is None and not self.resumes:
            _set_aside(self.path, _found(self.path, _FILES))
        # a run that resumes from an earlier checkpoint writes the later ones again
        elif checkpoint is not None and not self.from_folder:
            newer = self.checkpoints.newer_than(position_of(checkpoint))
            if newer or history.lines_beyond():
                _set_aside(self.path, [*newer, self.path / "log.txt"])

        # the file may have lines that the checkpoint does not have
        history.write()
        # a marker that stays makes a restart begin anew, which loses nothing
        with contextlib.suppress(OSError):
            (self.path / _NEW_RUN).unlink(missing_ok=True)

    def save(
        self,
        content: dict[str, Any],
        position: TrainingPosition,
        also: Sequence[str] = (),
        must: bool = False,
    ) -> str:
        """Write a checkpoint (`CheckpointFolder.save`); its name as the newest one, or "" after a failure.

        Raises NotSavedError.
        """
        self.check()
        if self.checkpoints.save(content, position, also, must) is None:
            return ""
        return str(self.checkpoints.folder / NEWEST)

    def set_aside_after(self, position: TrainingPosition) -> None:
        """Move the checkpoints aside that are newer than `position`."""
        if self.path:
            _set_aside(self.path, self.checkpoints.newer_than(position))

    def check(self) -> None:
        """Call before writing. Raises NotSavedError if another process holds the folder now."""
        if self._hold:
            self._hold.check()

    def _decide_to_resume(self) -> bool:
        # torchrun counts restarts for each node: one count above 0 decides for all processes
        restarts = number("TORCHELASTIC_RESTART_COUNT") + slurm_restarts()
        restarted = any(gather_on_main(restarts))
        begun = self.path is not None and not (self.path / _NEW_RUN).exists()
        return broadcast_from_main(self._run.resume == "auto" or restarted and begun)

    def _find_checkpoint(self, read: Reader) -> None:
        run = self._run
        explicit = "" if run.resume == "auto" else run.resume
        # an evaluation evaluates what it names
        newest = None
        if self.resumes and not (run.eval and explicit):
            newest = self._newest()

        if newest:
            self.source, self.checkpoint = newest
            self.from_folder = True
            log.info("%s %s", "evaluating" if run.eval else "resuming from", self.source)
            return
        if run.eval and not explicit:
            raise UserError(
                f"--resume auto: there is no checkpoint in --output_dir {run.output_dir} to evaluate"
            )
        if self.resumes and not run.eval:
            first = explicit or run.finetune
            start = f"starting with {first}" if first else "starting a new run"
            log.info("no checkpoint in %s yet: %s", run.output_dir, start)
        if explicit:
            self.source, self.checkpoint = explicit, read(explicit)

    def _newest(self) -> tuple[str, dict[str, Any]] | None:
        """Path and content of the newest good checkpoint in the folder."""
        path, checkpoint, error = "", None, None
        if is_main() and self._run.output_dir:
            try:
                if found := self.checkpoints.newest_good():
                    path, checkpoint = str(found[0]), found[1]
            except UserError as damaged:
                error = damaged

        # all processes raise the error of the main process, or read what it has verified
        path, error = broadcast_from_main((path, error))
        if error:
            raise error
        if not path:
            return None
        return path, checkpoint or read_checkpoint(path)


@contextlib.contextmanager
def _held(run: RunConfig) -> Iterator[FolderHold | None]:
    """The folder to write to, made if need be and held. None on processes that write nothing."""
    if not run.output_dir or not is_main():
        yield None
        return
    folder = Path(run.output_dir)
    with contextlib.ExitStack() as stack:
        with _writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # an evaluation never overwrites the files of a training
            if run.eval and _found(folder, _TRAINING):
                folder = _new_folder(folder, "evaluation")
            if run.eval:
                stack.callback(_remove_if_empty, folder)
            # what follows is for the holder alone
            hold = stack.enter_context(FolderHold(folder))
            _finish_moving(folder)
        yield hold


@contextlib.contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    """Raise UserError for an OSError in the block."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--output_dir {folder} can't be written to ({error.strerror}); choose another"
        ) from None


def _remove_if_empty(folder: Path) -> None:
    """Remove the folder of an evaluation that failed."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def _found(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def _set_aside(folder: Path, files: Sequence[Path]) -> None:
    """Move `files` into a new folder `earlier-<n>`. A kill meanwhile leaves no mixture."""
    if not files:
        return
    with _writing_to(folder):
        # the list comes first: after a kill the next start moves the rest
        earlier = _new_folder(folder, "earlier")
        (earlier / _MOVING).write_text("\n".join(file.name for file in files))
        _finish_moving(folder)
    log.warning("%s held an earlier run; it is now in %s (to go on with it, use --resume)", folder, earlier)


def _new_folder(folder: Path, name: str) -> Path:
    number = 1
    while (folder / f"{name}-{number}").exists():
        number += 1
    new = folder / f"{name}-{number}"
    new.mkdir()
    return new


def _finish_moving(folder: Path) -> None:
    for marker in folder.glob(f"earlier-*/{_MOVING}"):
        for name in marker.read_text().splitlines():
            if (folder / name).exists():  # else it was moved before a kill
                os.replace(folder / name, marker.parent / name)
        marker.unlink()
