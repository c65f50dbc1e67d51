"""The detector and its losses."""

from __future__ import annotations

import os
from typing import Any


def build_model(config: Any):
    """(model, criterion, {"bbox": postprocessor}) of a Config; see models.build.build_model."""
    # imported here so that models.ops can be used with torch alone
    from models.build import build_model as build

    return build(config)


def load_detector(checkpoint: str | os.PathLike, **options: Any):
    """The detector of a checkpoint, to be called with images; see models.detector.load_detector for the options."""
    from models.detector import load_detector as load

    return load(checkpoint, **options)


__all__ = ["build_model", "load_detector"]
