"""Where a run starts from: its output folder, whether it goes on with what lies there, and the
checkpoint that it loads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from util.config import Config
from util.distributed.processes import broadcast_from_main, gather_on_main, is_main
from util.distributed.slurm_job import restart_count
from util.errors import UserError
from util.run.checkpoints import CheckpointFolder
from util.run.folder import evaluation_folder, is_announced, open_folder
from util.run.hold import FolderHold

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A checkpoint to load. by_itself: the newest of --output_dir, which the program found."""

    path: str
    by_itself: bool

    def __str__(self) -> str:
        return self.path


@contextlib.contextmanager
def output_folder(config: Config) -> Iterator[FolderHold | None]:
    """The folder to write to, made if need be and held for the length of the block, in the main
    process. The others have none.
    """
    if not config.run.output_dir or not is_main():
        yield None
        return
    with (evaluation_folder if config.run.eval else open_folder)(config.run.output_dir) as hold:
        yield hold


def goes_on(config: Config, folder: Path | None) -> bool:
    """Whether the run goes on with what its folder holds: told to, or started again by torchrun or
    Slurm after it had begun.

    The same on all processes. With several nodes torchrun counts the restarts on each, so one count
    decides for all.
    """
    by_torchrun = int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)
    restarted = any(gather_on_main(bool(by_torchrun or restart_count())))
    return broadcast_from_main(
        config.run.resume == "auto" or bool(folder and restarted and not is_announced(folder))
    )


def find_checkpoint(config: Config, folder: Path | None, going_on: bool) -> Source | None:
    """What to load, the same on all processes: the newest good checkpoint of the folder if the run
    goes on, else --resume's.
    """
    explicit = Source(config.run.resume, by_itself=False) if config.run.resume not in ("", "auto") else None
    if not going_on or config.run.eval and explicit:
        return explicit
    newest = broadcast_from_main(_newest_checkpoint(folder) if folder else None)
    if isinstance(newest, UserError):
        raise newest
    if newest:
        log.info("%s %s", "evaluating" if config.run.eval else "going on with", newest)
        return Source(newest, by_itself=True)
    if config.run.eval:
        raise UserError(
            f"--resume auto: there is no checkpoint in --output_dir {config.run.output_dir} to evaluate"
        )
    first = explicit or config.run.finetune
    log.info(
        "no checkpoint in %s yet: %s",
        config.run.output_dir,
        f"starting with {first}" if first else "starting afresh",
    )
    return explicit


def loading(config: Config, source: Source | None) -> Config:
    """The Config to build the model by: a checkpoint makes other weights of the backbone needless."""
    weights = {"resume": source.path, "finetune": ""} if source else {"resume": ""}
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **weights))


def _newest_checkpoint(folder: Path) -> str | UserError | None:
    try:
        found = CheckpointFolder(folder, keep=1).newest_good()
    except UserError as error:  # to be raised by all processes
        return error
    return str(found) if found else None
