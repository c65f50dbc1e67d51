"""Where a training starts: from a checkpoint to resume, from the weights of a detector, or from none."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from models.weights.architecture import Purpose, adopt
from models.weights.finetune import FLAG as FINETUNE
from models.weights.finetune import FROZEN
from models.weights.load import read_trained
from util.checkpoint import BATCHFORMER, load_state
from util.class_map import classes_of
from util.config import Config, with_classes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where a training starts.

    config: the flags, with the architecture of the checkpoint if there is one; weights: of --resume,
    --finetune or --frozen_weights, None for a new detector; source: their name; resumed: they are
    those of --resume.
    """

    config: Config
    weights: Mapping[str, Any] | None
    source: str
    resumed: bool


def find_start(config: Config, checkpoint: Mapping[str, Any] | None, source: str) -> Start:
    """The start of a run. `checkpoint` is what it resumes, with its name `source`; else --finetune or
    --frozen_weights count.

    Raises UserError if flags contradict the architecture of the weights.
    """
    # a run that was interrupted does not start from --finetune again
    finetune, frozen = config.run.finetune, config.segmentation.frozen_weights
    if checkpoint is not None:
        adopted = adopt(config, checkpoint, source, purpose=Purpose.RESUME)
        if frozen:
            adopted = _with_classes_of(adopted, checkpoint, source)
        return Start(adopted, checkpoint, source, resumed=True)
    if frozen:
        weights = read_trained(frozen, FROZEN)
        # all but the mask head must be there: nothing else trains
        adopted = adopt(config, weights, frozen, FROZEN, Purpose.FINE_TUNE)
        return Start(_with_classes_of(adopted, weights, frozen), weights, frozen, resumed=False)
    if finetune:
        weights = read_trained(finetune, FINETUNE)
        # heads and queries may have been removed from a checkpoint that others are to start from
        adopted = adopt(config, weights, finetune, FINETUNE, Purpose.FINE_TUNE, without_heads=True)
        return Start(adopted, weights, finetune, resumed=False)
    # no checkpoint decides any flag
    return Start(dataclasses.replace(config, settled=True), None, "", resumed=False)


def _with_classes_of(config: Config, checkpoint: Mapping[str, Any], source: str) -> Config:
    """The labels of frozen class heads stay, even if the data have fewer classes."""
    classes = classes_of(checkpoint, source)
    if classes is None or config.is_given("num_classes"):
        return config
    return with_classes(config, classes)


def load_checkpoint(
    model: nn.Module,
    checkpoint: Mapping[str, Any],
    source: str,
    which: str = "",
    may_lack: tuple[str, ...] = (BATCHFORMER,),
) -> None:
    """Load weights and log what fitted.

    Args:
        source: name of the checkpoint, for messages.
        which: start of the log line ("averaged weights: ").
        may_lack: beginnings of the names of tensors that the checkpoint may lack.

    Raises:
        UserError: the weights are of another architecture.
    """
    result = load_state(model, checkpoint, source)
    # the lists of the log explain the error
    log.info("%s%s", which, result)
    result.require_same_architecture(may_lack)
