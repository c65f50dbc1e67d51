"""The detector and its losses."""

from __future__ import annotations

from typing import Any


def build_model(config: Any):
    """(model, criterion, {"bbox": postprocessor}) of a Config; see models.build.build_model."""
    # imported here so that models.ops can be used with torch alone
    from models.build import build_model as build

    return build(config)


__all__ = ["build_model"]
