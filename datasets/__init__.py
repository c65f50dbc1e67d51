"""Data sets, transforms, loading and COCO evaluation; knows nothing of models."""

from __future__ import annotations

from typing import Any


def build_dataset(image_set: str, config: Any, classes: Any = None):
    """The "train" or "val" data set of a Config: (image, target) items, transformed.

    `classes` is the ClassMap to label by, that of the training data or of a checkpoint; without it,
    and without classes in the Config, the annotations and --num_classes decide.

    Raises:
        UserError: a folder or file is missing or unusable, or its categories fit neither `classes`
        nor --num_classes.
    """
    # imported here so that datasets.synthetic starts without torch
    from datasets.coco import build_coco

    return build_coco(image_set, config.data, config.run.seed, classes or config.classes)


__all__ = ["build_dataset"]
