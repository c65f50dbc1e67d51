"""Data sets, transforms, loading and COCO evaluation; knows nothing of models."""

from __future__ import annotations

from typing import Any


def build_dataset(image_set: str, config: Any):
    """The "train" or "val" data set of a Config: (image, target) items, transformed.

    Raises:
        UserError: a folder or file is missing or unusable, or an annotation's label does not fit --num_classes.
    """
    # imported here so that datasets.synthetic starts without torch
    from datasets.coco import build_coco

    return build_coco(image_set, config.data, config.run.seed)


__all__ = ["build_dataset"]
