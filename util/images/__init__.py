"""Pictures and videos from files: read safely, turned upright and resized.

Data sets, prediction and tools use this room; it knows nothing of detectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def evenly_chosen(values: Sequence[T], count: int) -> list[T]:
    """At most `count` values, the first and the last among them, at equal distances."""
    # with fewer values, all of them
    places = np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(int)
    return [values[i] for i in places]
