"""All flags of a run as one frozen object, which is valid by construction."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from util.class_map import ClassMap
from util.config.checks import check_run, check_together, check_values
from util.config.fields import FLAGS, GROUPS, DataConfig, OptimConfig, RunConfig
from util.config.model_fields import (
    BackboneConfig,
    BatchFormerConfig,
    LossConfig,
    SegmentationConfig,
    TransformerConfig,
)
from util.errors import UserError


@dataclass(frozen=True)
class Config:
    """All flags, by group. Raises UserError for a combination that can't work.

    classes: those of the data or of a checkpoint, once they are known; --num_classes is their
        number then.
    given: the flags that were given on a command line; None: all of them.
    settled: False until the checkpoint of --resume or --finetune has decided the flags that were not
        given (models/weights/architecture.py). Only then it is checked whether they fit together.
    """

    batchformer: BatchFormerConfig = BatchFormerConfig()
    optim: OptimConfig = OptimConfig()
    backbone: BackboneConfig = BackboneConfig()
    transformer: TransformerConfig = TransformerConfig()
    segmentation: SegmentationConfig = SegmentationConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    run: RunConfig = RunConfig()
    # what is known beyond the flags
    classes: ClassMap | None = None
    given: frozenset[str] | None = None
    settled: bool = True

    def __post_init__(self) -> None:
        check_values(self)
        check_run(self)
        # flags that were not given may be others in the checkpoint
        if self.settled:
            check_together(self)

    @property
    def starts_from_weights(self) -> bool:
        """Whether a checkpoint is named that has the backbone's weights."""
        run = self.run
        named = run.finetune or self.segmentation.frozen_weights or run.resume not in ("", "auto")
        return bool(named)

    def is_given(self, name: str) -> bool:
        return self.given is None or name in self.given

    def flags(self) -> dict[str, Any]:
        """Flag name -> value, as plain data (lists for tuples), for logs and checkpoints."""
        values = {}
        for name, flag in FLAGS.items():
            value = getattr(getattr(self, flag.group), name)
            # JSON has no tuples, and flags read from a log must compare equal
            values[name] = list(value) if isinstance(value, tuple) else value
        return values

    def non_default_flags(self) -> dict[str, Any]:
        """The flags whose value is not the default."""
        changed = {}
        for name, flag in FLAGS.items():
            value = getattr(getattr(self, flag.group), name)
            if value != flag.default:
                changed[name] = value
        return changed

    def with_flags(self, flags: Mapping[str, Any], **fields: Any) -> Config:
        """The Config with other values for some flags, and for `fields` of its own; names that are
        no flags are ignored.

        Raises UserError for values that no Config can have.
        """
        # group -> its fields that change
        changes: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
        for name in FLAGS.keys() & flags.keys():
            value = flags[name]
            # frozen, as all of a Config is
            changes[FLAGS[name].group][name] = tuple(value) if isinstance(value, list) else value
        groups = {
            group: dataclasses.replace(getattr(self, group), **values) for group, values in changes.items()
        }
        try:
            return dataclasses.replace(self, **groups, **fields)
        # a check could not compare the value of a damaged checkpoint
        except TypeError as error:
            raise UserError(f"these flags of a checkpoint can't be used: {error}") from None

    def without_effect(self) -> list[str]:
        """Flags of BatchFormerV2 that were given though it is off."""
        if self.batchformer.bf or self.given is None:
            return []
        names = vars(self.batchformer).keys() - {"bf"}
        return [name for name in FLAGS if name in names & self.given]


def with_classes(config: Config, classes: ClassMap) -> Config:
    """The Config with the classes of a data set or a checkpoint, in place of --num_classes auto."""
    return config.with_flags({"num_classes": classes.num_classes}, classes=classes)
