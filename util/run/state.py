"""Everything that a run must get back to go on as if it had never stopped.

Each part is an object with `state_dict()` and `load_state_dict()`. Some parts are the same on all
processes (weights, optimiser, position); of others every process has its own (random generators,
sums of losses, gradients of an unfinished group), and they are gathered by rank. What loader
workers draw needs no saving: it depends on seed, epoch and image alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from util.class_map import ClassMap
from util.config import FLAGS, Config
from util.distributed.processes import gather_on_main, is_main, rank, world_size
from util.errors import UserError
from util.optim import go_to_epoch
from util.run.data_identity import DataIdentity
from util.step.updater import Updater

log = logging.getLogger(__name__)

_PARTS = {"train": "training", "val": "validation"}


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


@dataclass(order=True)
class Position:
    """Where a run is: `images` of the order of `epoch` have been trained on."""

    epoch: int = 0
    images: int = 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "images": self.images}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.images = int(state["epoch"]), int(state["images"])
        if min(self.epoch, self.images) < 0:
            raise ValueError(f"a position of {self.epoch} epochs and {self.images} images")


class TrainingState:
    """The parts of a run, and their one dictionary for a checkpoint.

    Args:
        data: of the parts "train" and "val".
        shared: name -> part that all processes have alike; the main process's is saved.
        own: name -> part of which every process has its own.

    After `restore`: `other_images` if the training images are not the checkpoint's, so that the
    order of an interrupted epoch means nothing any more; `other_validation` if results before and
    after can't be compared.
    """

    def __init__(
        self,
        config: Config,
        classes: ClassMap,
        data: Mapping[str, DataIdentity],
        model: nn.Module,
        updater: Updater,
        schedule: LambdaLR,
        position: Position,
        shared: Mapping[str, Stateful],
        own: Mapping[str, Stateful],
    ) -> None:
        self._config, self._classes, self._data = config, classes, data
        self.other_images = self.other_validation = False
        self._model, self._updater, self._schedule, self._position = model, updater, schedule, position
        self._shared, self._own = dict(shared), dict(own)

    def gather(self) -> dict[str, Any] | None:
        """The contents of a checkpoint, on the main process; every process must call."""
        own = {name: part.state_dict() for name, part in self._own.items()}
        processes = gather_on_main({**own, "gradients": self._updater.pending_gradients()})
        if not is_main():
            return None
        return {
            "model": self._model.state_dict(),
            **self._updater.state_dict(),
            "lr_scheduler": self._schedule.state_dict(),
            "epoch": self._position.epoch - 1,  # as published: the last finished one
            "args": self._config.flags(),
            "classes": self._classes.to_plain(),
            "data": {part: identity.to_plain() for part, identity in self._data.items()},
            "position": self._position.state_dict(),
            **{name: part.state_dict() for name, part in self._shared.items()},
            "processes": processes,
        }

    def restore(self, checkpoint: Mapping[str, Any] | None, source: str) -> bool:
        """Put back all but the model's weights, which are loaded elsewhere; gives whether the run
        goes on exactly.

        Without a checkpoint, or with one that was not written for resuming, the run starts at
        --start_epoch. This run's flags hold: where they differ from the checkpoint's, a warning
        says so.

        Raises:
            UserError: the checkpoint's optimiser belongs to other parameters, or an entry is not
            what it should be.
        """
        if checkpoint is None or not is_own(checkpoint):
            if checkpoint is not None:
                log.warning(
                    "resume: not a checkpoint of this program; its weights are loaded, the "
                    "optimiser starts afresh"
                )
            self._position.epoch = self._config.run.start_epoch
            go_to_epoch(self._schedule, self._position.epoch)
            return True
        try:
            return self._restore(checkpoint)
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"--resume {source}: its state does not fit this run ({type(error).__name__}: "
                f"{_first_line(error)}); resume with "
                "the flags that it was trained with (--bf, --sgd, --lr_backbone and the like)"
            ) from None

    def _restore(self, checkpoint: Mapping[str, Any]) -> bool:
        warn_about_changes(checkpoint["args"], self._config.flags())
        base_lrs = list(self._schedule.base_lrs)
        self._updater.load_state_dict(checkpoint)
        self._schedule.load_state_dict(checkpoint["lr_scheduler"])
        self._schedule.base_lrs = base_lrs
        go_to_epoch(self._schedule, self._schedule.last_epoch)
        self._position.load_state_dict(checkpoint["position"])
        self._compare_data(checkpoint.get("data", {}))
        for name, part in self._shared.items():
            part.load_state_dict(checkpoint[name])
        return self._restore_own(checkpoint["processes"], checkpoint["args"])

    def _compare_data(self, saved: Mapping[str, Any]) -> None:
        """Say which data are not the checkpoint's, if it says which it had."""
        for part, plain in saved.items():
            before, now = DataIdentity.from_plain(plain), self._data[part]
            changes = now.changes_since(before)
            if changes:
                log.warning(
                    "resume: the %s data are not the checkpoint's: now %s", _PARTS[part], ", ".join(changes)
                )
            if part == "train":
                self.other_images = now.images_sum != before.images_sum
            else:
                self.other_validation = bool(changes)
        self.other_images |= self._position.images > self._data["train"].images

    def _restore_own(self, processes: Sequence[Mapping[str, Any]], flags: Mapping[str, Any]) -> bool:
        """This process's part; with another number of processes what can be kept of it."""
        same_step = all(
            flags[name] == self._config.flags()[name] for name in ("batch_size", "accumulate_steps")
        )
        if len(processes) == world_size() and same_step:
            mine = processes[rank()]
            for name, part in self._own.items():
                part.load_state_dict(mine[name])
            self._updater.load_pending_gradients(mine["gradients"])
            return True
        for name, part in self._own.items():
            if hasattr(part, "load_merged"):
                part.load_merged([process[name] for process in processes])
        _tell_what_changes(processes)
        return False


def is_own(checkpoint: Mapping[str, Any]) -> bool:
    """Whether this program wrote it for resuming."""
    return "processes" in checkpoint and isinstance(checkpoint.get("args"), dict)


def position_of(checkpoint: Mapping[str, Any]) -> Position:
    """Where a run goes on with a checkpoint of any origin."""
    position = Position()
    if is_own(checkpoint):
        position.load_state_dict(checkpoint["position"])
    return position


def warn_about_changes(saved: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    for name, value in flags.items():
        if name in saved and saved[name] != value and not FLAGS[name].free_on_resume:
            log.warning(
                "resume: --%s was %s in the checkpoint and is %s in this run, which holds",
                name,
                saved[name],
                value,
            )


def _tell_what_changes(processes: Sequence[Mapping[str, Any]]) -> None:
    log.warning(
        "resume: the checkpoint is of %d process(es), this run has %d or other batches. Kept: the "
        "epoch goes on with the images that it has not seen, and its means count those that it "
        "has. No longer exact: which images share a batch, and what processes draw (dropout)%s",
        len(processes),
        world_size(),
        ". Dropped: the gradients of an unfinished accumulation"
        if any(process["gradients"] for process in processes)
        else "",
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["no message"])[0][:200]
