"""The detector and its losses. The training loop, main.py and the tools use this room.

build_model(config)          model, criterion and postprocessors of a Config
load_model(checkpoint)       the same of a checkpoint, and its Config
load_detector(checkpoint)    a checkpoint as a function of images
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "build_model": "models.build",
    "load_model": "models.build",
    "load_detector": "models.loading",
}

__all__ = ["build_model", "load_detector", "load_model"]


def __getattr__(name: str) -> Any:
    """Load a function's module when it is asked for, so that models.ops can be used with torch
    alone.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
