"""A run's output folder: who may write into it, and what is done with an earlier run in it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from util.errors import UserError
from util.run.hold import FolderHold

log = logging.getLogger(__name__)

_MARKER = ".moving"  # in a folder into which an earlier run is being moved
_NEW = ".new_run"  # in the folder of a run that has not set an earlier one aside yet
_FILES = (
    "checkpoint*.pth",
    "resume_*.pth",
    "log.txt",
    "run.json",
    "eval",
    "eval*.pth",
    "predictions*.json",
    "tensorboard",
    "nonfinite_*.pth",
)


@contextlib.contextmanager
def open_folder(name: str) -> Iterator[FolderHold]:
    """The folder of --output_dir, made if need be, and held for the length of the block.

    Raises UserError if it can't be written to, or another process holds it.
    """
    folder = Path(name)
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            hold = stack.enter_context(FolderHold(folder))
            _finish_moving(folder)
        except OSError as error:
            raise _not_writable(folder, error) from None
        yield hold


def evaluation_folder(name: str) -> contextlib.AbstractContextManager[FolderHold]:
    """`open_folder` for an evaluation: a new folder `evaluation-<n>` in --output_dir if a training
    has its files there.
    """
    folder = Path(name)
    if not _holds_training(folder):
        return open_folder(name)
    try:
        return open_folder(str(_new_folder(folder, "evaluation")))
    except OSError as error:
        raise _not_writable(folder, error) from None


def _holds_training(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("checkpoint*.pth", "resume_*.pth", "log.txt"))


def announce_new(folder: Path) -> None:
    """Note that a new run is about to begin: until `begun`, what the folder holds is not this
    run's. Raises UserError.
    """
    try:
        (folder / _NEW).touch()
    except OSError as error:
        raise _not_writable(folder, error) from None


def is_announced(folder: Path) -> bool:
    return (folder / _NEW).exists()


def begun(folder: Path) -> None:
    """From now on what the folder holds belongs to the run."""
    # a leftover makes a restarted run begin anew, which loses nothing
    with contextlib.suppress(OSError):
        (folder / _NEW).unlink(missing_ok=True)


def set_aside(folder: Path, files: Iterable[Path] | None = None) -> None:
    """Move `files`, or all of an earlier run, into `earlier-<n>`; a process that is killed
    meanwhile leaves no mixture.
    """
    files = list(files if files is not None else _of_a_run(folder))
    if not files:
        return
    try:
        earlier = _new_folder(folder, "earlier")
        (earlier / _MARKER).write_text("\n".join(file.name for file in files))
        _finish_moving(folder)
    except OSError as error:
        raise _not_writable(folder, error) from None
    log.warning("%s held an earlier run; it is now in %s (to go on with it, use --resume)", folder, earlier)


def _not_writable(folder: Path, error: OSError) -> UserError:
    return UserError(f"--output_dir {folder} can't be written to ({error.strerror}); choose another")


def _of_a_run(folder: Path) -> list[Path]:
    return [file for pattern in _FILES for file in sorted(folder.glob(pattern))]


def _new_folder(folder: Path, name: str) -> Path:
    number = next(i for i in range(1, 10**6) if not (folder / f"{name}-{i}").exists())
    new = folder / f"{name}-{number}"
    new.mkdir()
    return new


def _finish_moving(folder: Path) -> None:
    for marker in folder.glob(f"earlier-*/{_MARKER}"):
        for name in marker.read_text().splitlines():
            if (folder / name).exists():
                os.replace(folder / name, marker.parent / name)
        marker.unlink()
