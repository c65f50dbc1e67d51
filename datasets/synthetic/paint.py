"""Shapes and their paint: which samples lie inside of a shape, and how they are coloured.

Shape letters: P side of a square patch in pixels; S samples per pixel side. Coordinates of a canvas
are in pixels with (0, 0) at the outer corner of the first pixel; local coordinates (u, v) are those
of a shape, which lies in the unit disc.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import ndimage

Rng = np.random.Generator
Samples = np.ndarray  # (P*S, P*S)

S = 4  # samples per pixel side
MIN_CONTRAST = 110.0  # distance in RGB, of at most 442, between an object and what it lies on


# --- shapes: which of the points (u, v) are inside ---


def _square(u: Samples, v: Samples) -> Samples:
    return np.maximum(np.abs(u), np.abs(v)) <= 0.7


def _triangle(u: Samples, v: Samples) -> Samples:
    slanted = math.sqrt(0.75) * np.abs(u) - 0.5 * v
    return np.maximum(slanted, v) <= 0.5


def _star(u: Samples, v: Samples) -> Samples:
    """Five points at radius 1 and five notches at radius 0.45."""
    sector = math.pi / 5
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    # Fold every half point onto the one between angle 0 (its tip) and `sector` (its notch).
    angle = np.abs((angle + sector) % (2 * sector) - sector)
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    notch_x, notch_y = 0.45 * math.cos(sector), 0.45 * math.sin(sector)
    return (1 - x) * notch_y >= y * (1 - notch_x)


def _cross(u: Samples, v: Samples) -> Samples:
    long, short = np.maximum(np.abs(u), np.abs(v)), np.minimum(np.abs(u), np.abs(v))
    return (long <= 0.95) & (short <= 0.3)


def _ring(u: Samples, v: Samples) -> Samples:
    radius = np.hypot(u, v)
    return (radius <= 0.95) & (radius >= 0.5)


def _crescent(u: Samples, v: Samples) -> Samples:
    return (np.hypot(u, v) <= 0.95) & (np.hypot(u - 0.5, v) >= 0.72)


def _heart(u: Samples, v: Samples) -> Samples:
    x, y = 1.27 * u, 0.25 - 1.27 * v  # scaled and shifted into the unit disc
    return (x * x + y * y - 1) ** 3 <= x * x * y**3


SHAPES: dict[str, Callable[[Samples, Samples], Samples]] = {
    "circle": lambda u, v: np.hypot(u, v) <= 0.9,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "crescent": _crescent,
    "heart": _heart,
}
CLASS_NAMES = tuple(SHAPES)  # category id = position + 1; a data set of n classes has the first n


class Pose(NamedTuple):
    """Where a shape lies. x, y and radius are in pixels, angle in radians; stretch in (0, 1]
    narrows its v axis.
    """

    x: float
    y: float
    radius: float
    angle: float
    stretch: float


class Patch(NamedTuple):
    """A shape, sampled around its pose. place: rows and columns of the canvas; radius in pixels."""

    place: tuple[slice, slice]
    radius: float
    u: Samples
    v: Samples
    inside: Samples

    @property
    def coverage(self) -> np.ndarray:
        """Share of every pixel that the shape covers, (P, P) float."""
        return _pool(self.inside)


def _pool(samples: np.ndarray) -> np.ndarray:
    """The mean of every pixel's samples: (P*S, P*S) or (P*S, P*S, 3) -> (P, P) or (P, P, 3)."""
    side = len(samples) // S
    return samples.reshape(side, S, side, S, *samples.shape[2:]).mean(axis=(1, 3))


def sample_shape(name: str, pose: Pose, margin: int) -> Patch:
    """The patch of a shape on a canvas with this margin."""
    reach = math.ceil(pose.radius) + 1
    side = 2 * reach + 1
    left, top = math.floor(pose.x) - reach, math.floor(pose.y) - reach

    # local coordinates of the samples: shift, turn, stretch
    steps = (np.arange(side * S) + 0.5) / S
    x = (left + steps - pose.x)[None, :] / pose.radius
    y = (top + steps - pose.y)[:, None] / pose.radius
    cos, sin = math.cos(pose.angle), math.sin(pose.angle)
    u, v = cos * x + sin * y, (cos * y - sin * x) / pose.stretch

    row, column = top + margin, left + margin
    place = slice(row, row + side), slice(column, column + side)
    return Patch(place, pose.radius, u, v, SHAPES[name](u, v))


# --- textures: coordinates in periods -> share of the second of two colours, in [0, 1] ---


def _value_noise(rng: Rng, a: Samples, b: Samples) -> Samples:
    return ndimage.map_coordinates(rng.random((16, 16)), [2 * a, 2 * b], order=1, mode="grid-wrap")


TEXTURES: dict[str, Callable[[Rng, Samples, Samples], Samples]] = {
    "solid": lambda rng, a, b: np.zeros_like(a),
    "gradient": lambda rng, a, b: np.clip(0.5 + 0.25 * a, 0, 1),
    "stripes": lambda rng, a, b: a % 1 < 0.5,
    "checks": lambda rng, a, b: (a % 1 < 0.5) ^ (b % 1 < 0.5),
    "dots": lambda rng, a, b: np.hypot(a % 1 - 0.5, b % 1 - 0.5) < 0.3,
    "noise": _value_noise,
}


class Paint(NamedTuple):
    """texture: its name; colours: (2, 3) RGB in [0, 255]; angle of the texture, in radians; period:
    as a share of the shape's radius; shading: relative change of the brightness across half the
    shape.
    """

    texture: str
    colours: np.ndarray
    angle: float
    period: float
    shading: float


def random_paint(rng: Rng, ground: np.ndarray, is_plain: bool) -> Paint:
    """A texture in colours that stand out from `ground` (3,)."""
    names = list(TEXTURES)
    if is_plain:
        names = ["solid", "gradient"]
    return Paint(
        texture=names[rng.integers(len(names))],
        colours=_contrasting_colours(rng, ground),
        angle=rng.uniform(0, 2 * math.pi),
        period=rng.uniform(0.35, 0.8),
        shading=rng.uniform(0, 0.2),
    )


def _contrasting_colours(rng: Rng, ground: np.ndarray) -> np.ndarray:
    """Two colours (2, 3) that both stand out from the colour `ground` (3,)."""
    candidates = rng.uniform(10, 250, (2, 24, 3))
    distance = np.linalg.norm(candidates - ground, axis=-1)
    # The first that is far enough, or the farthest; argmax of booleans gives the first True.
    enough = distance >= MIN_CONTRAST
    choice = np.where(enough.any(axis=1), enough.argmax(axis=1), distance.argmax(axis=1))
    return candidates[[0, 1], choice]


def paint_shape(rng: Rng, canvas: np.ndarray, patch: Patch, paint: Paint) -> None:
    """Draw onto the canvas, (H + 2 margin, W + 2 margin, 3) float, in place."""
    # texture coordinates: the patch's own, turned and counted in periods
    cos, sin = math.cos(paint.angle), math.sin(paint.angle)
    a, b = cos * patch.u + sin * patch.v, cos * patch.v - sin * patch.u
    period = max(paint.period, 4 / patch.radius)  # texture finer than 4 pixels would be grey

    # colour of every sample, (P*S, P*S, 3)
    second = TEXTURES[paint.texture](rng, a / period, b / period)[..., None]
    first_colour, second_colour = paint.colours
    colour = first_colour + second * (second_colour - first_colour)
    colour = colour * (1 + paint.shading * patch.u[..., None])

    # pixels at the outline are mixed with what is there
    covered = _pool(colour * patch.inside[..., None])
    canvas[patch.place] = canvas[patch.place] * (1 - patch.coverage[..., None]) + covered
