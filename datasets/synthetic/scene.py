"""One synthetic image: textured shapes on a cluttered background.

A class is a shape; position, size, angle, colour and texture do not depend on it. Later shapes hide
parts of earlier ones. As in COCO, some images have a crowd region, and some have no objects.

Shape letters: H, W image height and width. A canvas is an image with a border of `margin` pixels,
so that shapes may cross the edge of the image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from datasets.synthetic.paint import CLASS_NAMES, Patch, Pose, Rng, S, paint_shape, random_paint, sample_shape
from datasets.synthetic.stuff import paint_stuff

EMPTY_SHARE = 0.04  # of the images
CROWD_SHARE = 0.03  # of the images
PLAIN_SHARE = 0.25  # of the objects; the others get any texture, plain ones included
RADIUS = (0.07, 0.31)  # of a shape, as a share of image_size
MIN_RADIUS = 6.0  # pixels; a smaller star cannot be recognised
MIN_VISIBLE = 0.6  # every object keeps at least this share of its pixels
PLACEMENT_ATTEMPTS = 20


# --- background ---


def _smooth_noise(rng: Rng, height: int, width: int, sigma: float) -> np.ndarray:
    """Blurred noise of mean 0 and deviation 1, (H, W) float."""
    noise = ndimage.gaussian_filter(rng.standard_normal((height, width)), sigma, mode="wrap")
    return (noise - noise.mean()) / noise.std()


def _gradient(rng: Rng, height: int, width: int) -> np.ndarray:
    """A slope from one muted colour to another, (H, W, 3) float in [0, 255]."""
    angle = rng.uniform(0, 2 * math.pi)
    x, y = np.linspace(-0.5, 0.5, width), np.linspace(-0.5, 0.5, height)[:, None]
    slope = np.clip(0.5 + math.cos(angle) * x + math.sin(angle) * y, 0, 1)[..., None]
    brightness = rng.uniform(50, 205)
    first, second = np.clip(brightness + rng.uniform(-45, 45, (2, 3)), 10, 245)
    return first + slope * (second - first)


def _add_blobs(rng: Rng, image: np.ndarray) -> None:
    """Faint soft spots that belong to no class, in place."""
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width]
    for _ in range(rng.integers(0, 4)):
        centre_x, centre_y = rng.uniform(0, width), rng.uniform(0, height)
        spread = rng.uniform(0.04, 0.12, 2) * max(height, width)
        spot = np.exp(-0.5 * (((x - centre_x) / spread[0]) ** 2 + ((y - centre_y) / spread[1]) ** 2))
        image += spot[..., None] * rng.uniform(-40, 40, 3)


def _add_lines(rng: Rng, image: np.ndarray) -> None:
    """Thin straight and curved lines that belong to no class, in place."""
    height, width = image.shape[:2]
    t = np.linspace(0, 1, 24)[:, None]
    for _ in range(rng.integers(0, 5)):
        # a quadratic Bezier curve
        start, bend, end = rng.uniform(-0.1, 1.1, (3, 2)) * (width, height)
        if rng.random() < 0.5:
            bend = (start + end) / 2  # straight
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end

        # drawn at S times the size, so that its border is smooth
        stroke = Image.new("L", (width * S, height * S))
        thickness = max(1, round(rng.uniform(0.006, 0.014) * max(height, width) * S))
        ImageDraw.Draw(stroke).line([tuple(point) for point in curve * S], 255, thickness, joint="curve")
        alpha = np.asarray(stroke.reduce(S))[..., None] / 255 * rng.uniform(0.3, 0.8)
        image += alpha * (rng.uniform(20, 235, 3) - image)


def _background(rng: Rng, height: int, width: int) -> np.ndarray:
    """(H, W, 3) float, around [0, 255]."""
    image = _gradient(rng, height, width)
    for finest, coarsest in ((0.05, 0.15), (0.008, 0.03)):
        sigma = rng.uniform(finest, coarsest) * max(height, width)
        strength = rng.uniform(2, 14) * rng.uniform(0.6, 1.4, 3)  # a little tinted
        image += strength * _smooth_noise(rng, height, width, sigma)[..., None]
    _add_blobs(rng, image)
    _add_lines(rng, image)
    return image


# --- objects ---


@dataclass
class SceneObject:
    """One object, or one crowd of several shapes of a class.

    mask: (H, W) bool, what is visible of it. area: pixels of the whole object, including what is
    hidden or outside of the image.
    """

    category_id: int
    patches: list[Patch]
    mask: np.ndarray
    area: int
    is_crowd: bool = False


@dataclass
class Scene:
    """An image on its canvas, with the objects drawn so far."""

    canvas: np.ndarray
    margin: int
    objects: list[SceneObject]

    @property
    def image(self) -> np.ndarray:
        """(H, W, 3) float, a view of the canvas."""
        return self.within(self.canvas)

    def within(self, canvas: np.ndarray) -> np.ndarray:
        """A canvas without its border."""
        return canvas[self.margin : -self.margin, self.margin : -self.margin]

    def make_object(self, category_id: int, poses: list[Pose], is_crowd: bool) -> SceneObject:
        """An object at these poses, not drawn yet."""
        name = CLASS_NAMES[category_id - 1]
        patches = [sample_shape(name, pose, self.margin) for pose in poses]
        mask = np.zeros(self.canvas.shape[:2], dtype=bool)
        for patch in patches:
            mask[patch.place] |= patch.coverage >= 0.5
        area = int(np.count_nonzero(mask))
        return SceneObject(category_id, patches, self.within(mask), area, is_crowd)

    def add(self, rng: Rng, new: SceneObject) -> None:
        """Draw the object; it hides parts of the earlier ones."""
        # Outlines are easiest to see on plain shapes; a pattern would hide the tiny ones of a crowd.
        is_plain = new.is_crowd or rng.random() < PLAIN_SHARE
        paint = random_paint(rng, self.image[new.mask].mean(axis=0), is_plain)
        for patch in new.patches:
            paint_shape(rng, self.canvas, patch, paint)
        for other in self.objects:
            other.mask &= ~new.mask
        self.objects.append(new)

    def has_room_for(self, candidate: SceneObject) -> bool:
        """Whether enough of every object stays visible, the candidate included."""
        shares = [np.count_nonzero(candidate.mask) / candidate.area]
        for other in self.objects:
            shares.append(np.count_nonzero(other.mask & ~candidate.mask) / other.area)
        return bool(min(shares) >= MIN_VISIBLE)


def _random_pose(rng: Rng, height: int, width: int) -> Pose:
    image_size = max(height, width)
    smallest, largest = max(RADIUS[0] * image_size, MIN_RADIUS), RADIUS[1] * image_size
    radius = math.exp(rng.uniform(math.log(smallest), math.log(largest)))
    inset = 0.7 * radius  # the edge of the image cuts some objects, but none by much
    return Pose(
        x=rng.uniform(inset, width - inset),
        y=rng.uniform(inset, height - inset),
        radius=radius,
        angle=rng.uniform(0, 2 * math.pi),
        stretch=rng.uniform(0.8, 1.0),
    )


def _crowd_poses(rng: Rng, height: int, width: int) -> list[Pose]:
    """Many tiny shapes in an ellipse; they touch and overlap a little."""
    image_size = max(height, width)
    radius = max(0.035 * image_size, 3.0)
    spread = rng.uniform(0.13, 0.22, 2) * image_size
    centre = rng.uniform(spread, (width, height) - spread)
    poses: list[Pose] = []
    for _ in range(200):
        distance, angle = math.sqrt(rng.random()), rng.uniform(0, 2 * math.pi)
        x, y = centre + spread * distance * (math.cos(angle), math.sin(angle))
        if all(math.hypot(x - other.x, y - other.y) >= 1.4 * radius for other in poses):
            poses.append(Pose(x, y, radius * rng.uniform(0.9, 1.2), rng.uniform(0, 2 * math.pi), 1.0))
    return poses[: rng.integers(12, 25)]


class Picture(NamedTuple):
    """image: (H, W, 3) uint8 RGB. objects: with what is visible of them. stuff: (H, W) int, the kind of
    every pixel's background (stuff.py); None if the background has no kinds.
    """

    image: np.ndarray
    objects: list[SceneObject]
    stuff: np.ndarray | None


def render_scene(
    rng: Rng, *, image_size: int, num_classes: int, max_objects: int, stuff_rng: Rng | None = None
) -> Picture:
    """One random image and its objects; the same for the same state of `rng`.

    Args:
        image_size: the longer side in pixels; the other has 0.75 to 1.0 of it.
        num_classes: the first so many of CLASS_NAMES occur.
        max_objects: the number of objects is 1 to max_objects, or 0 in an image without any; a
            crowd is not counted.
        stuff_rng: decides kinds of stuff for the background; None: a background without kinds. The
            objects are the same either way, but for their colours.
    """
    # the background, on a canvas that holds the largest shape at its edge
    height, width = image_size, round(image_size * rng.uniform(0.75, 1.0))
    if rng.random() >= 0.5:
        height, width = width, height
    margin = math.ceil(RADIUS[1] * image_size) + 2
    background = _background(rng, height, width)
    stuff = None if stuff_rng is None else paint_stuff(stuff_rng, background)
    canvas = np.pad(background, ((margin, margin), (margin, margin), (0, 0)))
    scene = Scene(canvas, margin, [])

    # no objects, or perhaps a crowd and then some objects
    kind = rng.random()
    if EMPTY_SHARE <= kind < EMPTY_SHARE + CROWD_SHARE:
        poses = _crowd_poses(rng, height, width)
        scene.add(rng, scene.make_object(int(rng.integers(1, num_classes + 1)), poses, is_crowd=True))
    if kind >= EMPTY_SHARE:
        for _ in range(rng.integers(1, max_objects + 1)):
            _place_object(rng, scene, int(rng.integers(1, num_classes + 1)))

    # the sensor's noise
    image = scene.image + rng.uniform(1, 5) * rng.standard_normal(scene.image.shape)
    return Picture(np.clip(np.rint(image), 0, 255).astype(np.uint8), scene.objects, stuff)


def _place_object(rng: Rng, scene: Scene, category_id: int) -> None:
    """Draw one object where there is room; none if no place was found."""
    height, width = scene.image.shape[:2]
    for _ in range(PLACEMENT_ATTEMPTS):
        pose = _random_pose(rng, height, width)
        candidate = scene.make_object(category_id, [pose], is_crowd=False)
        if scene.has_room_for(candidate):
            scene.add(rng, candidate)
            return
