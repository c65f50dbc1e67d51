"""Stuff: a background of several kinds, each with a texture and a tint of its own, as grass and water have.

Shape letters: H, W image height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from datasets.synthetic.paint import CLASS_NAMES, Rng

Texture = Callable[[Rng, np.ndarray, np.ndarray], np.ndarray]

STRENGTH = 22.0  # of a texture; weaker than the contrast of objects
TINT_SHARE = 0.5  # the rest is the background that was there
REGION_SIZE = 0.22  # as a share of the longer side


def _waves(rng: Rng, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Waves that run across, with a random phase."""
    phase = rng.uniform(0, 2 * math.pi, 2)
    return np.sin(2 * math.pi * y / 7 + 1.5 * np.sin(2 * math.pi * x / 31 + phase[0]) + phase[1])


def _blades(rng: Rng, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Fine noise, longer from top to bottom than across."""
    noise = ndimage.gaussian_filter(rng.standard_normal(np.broadcast_shapes(x.shape, y.shape)), (2.0, 0.6))
    return noise / noise.std()


def _tiles(rng: Rng, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A grid of dark joints."""
    shift_x, shift_y = rng.uniform(0, 10, 2)
    return 0.5 - 2.0 * (((x + shift_x) % 10 < 1.5) | ((y + shift_y) % 10 < 1.5))


class Stuff(NamedTuple):
    """texture: numbers around 0 of about 1, from x [1, W] and y [H, 1] in pixels. tint: RGB."""

    texture: Texture
    tint: tuple[int, int, int]


STUFF = {
    "water": Stuff(_waves, (70, 115, 165)),
    "grass": Stuff(_blades, (85, 135, 60)),
    "tiles": Stuff(_tiles, (160, 125, 110)),
}
# of the first one; the ids do not depend on how many classes of things there are
FIRST_STUFF_ID = len(CLASS_NAMES) + 1


def paint_stuff(rng: Rng, image: np.ndarray) -> np.ndarray:
    """Paint one to three kinds of stuff over a background (H, W, 3) float, in place.

    Returns:
        (H, W) int, the kind of every pixel as its place in STUFF.
    """
    height, width = image.shape[:2]
    x, y = np.arange(width)[None, :], np.arange(height)[:, None]
    chosen = rng.permutation(len(STUFF))[: rng.integers(1, len(STUFF) + 1)]

    # each kind has a smooth random height, and the highest one is seen
    noise = rng.standard_normal((len(chosen), height, width))
    sigma = REGION_SIZE * max(height, width)
    seen = np.argmax([ndimage.gaussian_filter(layer, sigma, mode="wrap") for layer in noise], axis=0)
    for place, kind in enumerate(chosen):
        region = seen == place
        texture, tint = list(STUFF.values())[kind]
        painted = (1 - TINT_SHARE) * image + TINT_SHARE * np.array(tint, float)
        painted += STRENGTH * texture(rng, x, y)[..., None]
        image[region] = painted[region]
    return chosen[seen]
