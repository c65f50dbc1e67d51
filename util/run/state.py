"""Everything that a run must restore to continue as if it had never stopped.

Every entry is an object with `state_dict()` and `load_state_dict()`. Some are the same on all
processes (weights, optimiser, position). Of others every process has its own (random generators,
sums of losses, gradients of an unfinished accumulation); they are gathered by rank. Loader workers
have no state: what they draw depends on seed, epoch and image alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from util.class_map import ClassMap
from util.config import FLAGS, Config
from util.data_identity import DataIdentity
from util.distributed.processes import gather_on_main, is_main, rank, world_size
from util.errors import UserError
from util.optim import go_to_epoch
from util.step.updater import Updater

log = logging.getLogger(__name__)

# flags that decide which tensors the optimiser holds, and what it holds of each; those of the
# architecture are the checkpoint's
_OF_OPTIMISER = ("sgd", "lr_backbone", "frozen_weights")


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


@dataclass(order=True)
class TrainingPosition:
    """Where a run is: in `epoch`, after `images` images of its order."""

    epoch: int = 0
    images: int = 0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.images = int(state["epoch"]), int(state["images"])
        # a damaged checkpoint: an order has no negative place
        if min(self.epoch, self.images) < 0:
            raise ValueError(f"a position of {self.epoch} epochs and {self.images} images")


class TrainingState:
    """All that a checkpoint of a run holds.

    Args:
        data: identities of the splits "train" and "val".
        shared: entries that all processes have alike; the main process's are saved.
        own: entries of which every process has its own.

    After `restore`, `other_images` says that the training images differ from the checkpoint's: the
    order of an interrupted epoch is meaningless then. `other_validation` says that results before
    and after can't be compared.
    """

    def __init__(
        self,
        config: Config,
        classes: ClassMap,
        data: Mapping[str, DataIdentity],
        model: nn.Module,
        updater: Updater,
        schedule: LambdaLR,
        position: TrainingPosition,
        shared: Mapping[str, Stateful],
        own: Mapping[str, Stateful],
    ) -> None:
        self._config, self._flags, self._classes, self._data = config, config.flags(), classes, data
        self._model, self._updater, self._schedule, self._position = model, updater, schedule, position
        self._shared, self._own = shared, own
        self.other_images = self.other_validation = False

    def gather(self) -> dict[str, Any] | None:
        """The content of a checkpoint, on the main process; every process must call."""
        own = {name: entry.state_dict() for name, entry in self._own.items()}
        processes = gather_on_main({**own, "gradients": self._updater.pending_gradients()})
        if not is_main():
            return None
        return {
            "model": self._model.state_dict(),
            **self._updater.state_dict(),
            "lr_scheduler": self._schedule.state_dict(),
            # names and meanings of the published checkpoints
            "epoch": self._position.epoch - 1,
            "args": self._flags,
            # ours
            "classes": self._classes.to_plain(),
            "data": {split: identity.to_plain() for split, identity in self._data.items()},
            "position": self._position.state_dict(),
            **{name: entry.state_dict() for name, entry in self._shared.items()},
            "processes": processes,
        }

    def restore(self, checkpoint: Mapping[str, Any] | None, source: str) -> bool:
        """Restore all but the weights of the model; gives whether the run continues exactly.

        Without a checkpoint, or with one that was not written for resuming, the run starts at
        --start_epoch. The values of this run's flags are used; a warning names those that differ.

        Raises:
            UserError: the optimiser of the checkpoint belongs to other parameters, or an entry has
                a wrong type.
        """
        if checkpoint is not None and is_own(checkpoint):
            try:
                return self._restore(checkpoint)
            except UserError:
                raise
            # a damaged or foreign entry can fail in any way
            except Exception as error:
                reason = self._why_it_does_not_fit(checkpoint["args"], error)
                raise UserError(f"--resume {source}: its state does not fit this run: {reason}") from None
        if checkpoint is not None:
            log.warning(
                "resume: not a checkpoint of this program; its weights are loaded, "
                "the optimiser starts afresh"
            )
        self._position.epoch = self._config.run.start_epoch
        go_to_epoch(self._schedule, self._position.epoch)
        return True

    def _restore(self, checkpoint: Mapping[str, Any]) -> bool:
        warn_about_changes(checkpoint["args"], self._flags)
        self._updater.load_state_dict(checkpoint)

        # the rates follow this run's flags, from the epoch of the checkpoint
        base_lrs = list(self._schedule.base_lrs)
        self._schedule.load_state_dict(checkpoint["lr_scheduler"])
        self._schedule.base_lrs = base_lrs
        go_to_epoch(self._schedule, self._schedule.last_epoch)

        self._position.load_state_dict(checkpoint["position"])
        self._compare_data(checkpoint.get("data", {}))
        for name, entry in self._shared.items():
            entry.load_state_dict(checkpoint[name])
        return self._restore_own(checkpoint["processes"], checkpoint["args"])

    def _why_it_does_not_fit(self, saved: Mapping[str, Any], error: Exception) -> str:
        remedy = "resume with the flags that it was trained with"
        for name in _OF_OPTIMISER:
            # of a rate only the step from or to 0, which freezes the backbone, changes the parameters
            if name in saved and bool(saved[name]) != bool(self._flags[name]):
                return (
                    f"--{name} was {saved[name]} in the checkpoint and is {self._flags[name]} in this run; "
                    f"{remedy}, or start from its weights with --finetune"
                )
        first_line = str(error).partition("\n")[0][:200]
        return f"{type(error).__name__}: {first_line}; {remedy}"

    def _compare_data(self, saved: Mapping[str, Any]) -> None:
        """Warn about data that differ from the checkpoint's, if it says which it had."""
        # checkpoints of earlier versions do not say it
        for split, plain in saved.items():
            before, now = DataIdentity.from_plain(plain), self._data[split]
            changes = now.changes_since(before)
            kind = "validation"
            if split == "train":
                kind = "training"
                self.other_images = now.images_sum != before.images_sum
            else:
                self.other_validation = bool(changes)
            if changes:
                text = "resume: the %s data are not the checkpoint's: now %s"
                log.warning(text, kind, ", ".join(changes))
        # a position behind the last image can only be of other images
        self.other_images |= self._position.images > self._data["train"].images

    def _restore_own(self, processes: Sequence[Mapping[str, Any]], saved: Mapping[str, Any]) -> bool:
        """Restore the entries of this process; gives whether all could be restored."""
        same_batches = all(saved[name] == self._flags[name] for name in ("batch_size", "accumulate_steps"))
        if len(processes) == world_size() and same_batches:
            mine = processes[rank()]
            for name, entry in self._own.items():
                entry.load_state_dict(mine[name])
            self._updater.load_pending_gradients(mine["gradients"])
            return True

        # with other processes or batches some entries can be merged
        for name, entry in self._own.items():
            if hasattr(entry, "load_merged"):
                entry.load_merged([process[name] for process in processes])
        # gradients of other batches can't be completed
        dropped = ""
        if any(process["gradients"] for process in processes):
            dropped = ". Dropped: the gradients of an unfinished accumulation"
        log.warning(
            "resume: the checkpoint is of %s, this run of %s. Kept: the epoch continues with the images "
            "that it has not seen, and its means include those that it has seen. No longer exact: which "
            "images share a batch, and random numbers (dropout)%s",
            _batches(saved, len(processes)),
            _batches(self._flags, world_size()),
            dropped,
        )
        return False


def _batches(flags: Mapping[str, Any], processes: int) -> str:
    text = f"{processes} x {flags['batch_size']} images a step (processes x --batch_size)"
    if flags["accumulate_steps"] > 1:
        text += f" and --accumulate_steps {flags['accumulate_steps']}"
    return text


def is_own(checkpoint: Mapping[str, Any]) -> bool:
    """Whether this program wrote it for resuming."""
    return "processes" in checkpoint and isinstance(checkpoint.get("args"), dict)


def position_of(checkpoint: Mapping[str, Any]) -> TrainingPosition:
    """Where a run resumes from a checkpoint of any origin."""
    position = TrainingPosition()
    if is_own(checkpoint):
        position.load_state_dict(checkpoint["position"])
    return position


def warn_about_changes(saved: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    """Warn about flags whose value differs from the checkpoint's, on the main process."""
    if not is_main():
        return
    for name, value in flags.items():
        if name in saved and saved[name] != value and not FLAGS[name].free_on_resume:
            log.warning(
                "resume: --%s was %s in the checkpoint and is %s in this run; the new value is used",
                name,
                saved[name],
                value,
            )
