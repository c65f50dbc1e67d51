"""A synthetic detection data set in COCO's layout: textured, overlapping shapes on cluttered
backgrounds.

    python -m datasets.synthetic --output_dir data/synthetic --train_images 2000 --val_images 200

A class is a shape; position, size, angle, colour and texture say nothing about it. Later shapes
hide parts of earlier ones, and every annotation describes the part that is visible. As in COCO
there are crowd regions and images without objects. Image i of a split depends on (seed, split, i)
alone, so the files are the same for every number of workers.

Shape letters: H, W image height and width; P side of a square patch in pixels; S samples per pixel
side; N points. Image coordinates are in pixels with (0, 0) at the outer corner of the first pixel;
local coordinates (u, v) are those of a shape, which lies in the unit disc.
"""

import argparse
import json
import math
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as mask_utils
from scipy import ndimage
from tqdm import tqdm

from util.config import make_parser
from util.errors import UserError

# increase with every change of the pictures: sets of another version count as other settings
VERSION = 1
SETTINGS_FILE = "synthetic.json"
SPLITS = ("train2017", "val2017")
OWN_ENTRIES = {*SPLITS, "annotations", SETTINGS_FILE}
JPEG_QUALITY = 92
MAX_WORKERS = 64

S = 4  # samples per pixel side
EMPTY_SHARE = 0.04  # of the images
CROWD_SHARE = 0.03  # of the images
PLAIN_SHARE = 0.25  # of the objects; the others get any texture, plain ones included
RADIUS = (0.07, 0.31)  # of a shape, as a share of image_size
MIN_RADIUS = 6.0  # pixels: a star of fewer is a blot
MIN_VISIBLE = 0.6  # every object keeps at least this share of its pixels
MIN_PART = 4  # pixels of a part of an object that others cut off; smaller ones are not annotated
PLACEMENT_ATTEMPTS = 20
MIN_CONTRAST = 110.0  # distance in RGB, of at most 442, between an object and what it lies on


# --- shapes ---


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) <= 0.7


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    slanted = math.sqrt(0.75) * np.abs(u) - 0.5 * v
    return np.maximum(slanted, v) <= 0.5


def _star(u: np.ndarray, v: np.ndarray, inner: float = 0.45) -> np.ndarray:
    """Five points at radius 1 and five notches at radius `inner`."""
    sector = math.pi / 5
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    # Every half point is folded onto the one between angle 0 (its tip) and `sector` (its notch).
    angle = np.abs((angle + sector) % (2 * sector) - sector)
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    notch_x, notch_y = inner * math.cos(sector), inner * math.sin(sector)
    return (1 - x) * notch_y >= y * (1 - notch_x)


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    long, short = np.maximum(np.abs(u), np.abs(v)), np.minimum(np.abs(u), np.abs(v))
    return (long <= 0.95) & (short <= 0.3)


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    radius = np.hypot(u, v)
    return (radius <= 0.95) & (radius >= 0.5)


def _crescent(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (np.hypot(u, v) <= 0.95) & (np.hypot(u - 0.5, v) >= 0.72)


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    x, y = 1.27 * u, 0.25 - 1.27 * v  # scaled and shifted into the unit disc
    return (x * x + y * y - 1) ** 3 <= x * x * y**3


SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
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


@dataclass(frozen=True)
class Pose:
    """Where a shape lies. x, y and radius are in pixels, angle in radians; stretch in (0, 1]
    narrows its v axis.
    """

    x: float
    y: float
    radius: float
    angle: float
    stretch: float


@dataclass(frozen=True)
class Patch:
    """A shape sampled around its pose, before the frame of the image cuts it."""

    left: int  # of the patch in the image, in pixels; may be negative, as may top
    top: int
    u: np.ndarray  # (P*S, P*S) local coordinates of the samples
    v: np.ndarray
    inside: np.ndarray  # (P*S, P*S) bool

    @property
    def coverage(self) -> np.ndarray:
        """Share of every pixel that the shape covers, (P, P) float."""
        return _pool(self.inside)

    def frame(self, height: int, width: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Rows and columns of the part within the image: in the image, and in the patch."""
        side = len(self.inside) // S
        top, bottom = max(self.top, 0), min(self.top + side, height)
        left, right = max(self.left, 0), min(self.left + side, width)
        in_patch = slice(top - self.top, bottom - self.top), slice(left - self.left, right - self.left)
        return (slice(top, bottom), slice(left, right)), in_patch


def _pool(samples: np.ndarray) -> np.ndarray:
    """The mean of every pixel's samples: (P*S, P*S) or (P*S, P*S, 3) -> (P, P) or (P, P, 3)."""
    side = len(samples) // S
    return samples.reshape(side, S, side, S, *samples.shape[2:]).mean(axis=(1, 3))


def _sample_shape(name: str, pose: Pose) -> Patch:
    reach = math.ceil(pose.radius) + 1
    left, top = math.floor(pose.x) - reach, math.floor(pose.y) - reach
    steps = (np.arange((2 * reach + 1) * S) + 0.5) / S
    x = (left + steps - pose.x)[None, :] / pose.radius
    y = (top + steps - pose.y)[:, None] / pose.radius
    cos, sin = math.cos(pose.angle), math.sin(pose.angle)
    u, v = cos * x + sin * y, (cos * y - sin * x) / pose.stretch
    return Patch(left, top, u, v, SHAPES[name](u, v))


# --- textures ---
# A texture maps coordinates in periods to the share of the second of two colours, in [0, 1].


def _value_noise(rng: np.random.Generator, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return ndimage.map_coordinates(rng.random((16, 16)), [2 * a, 2 * b], order=1, mode="grid-wrap")


TEXTURES: dict[str, Callable[[np.random.Generator, np.ndarray, np.ndarray], np.ndarray]] = {
    "solid": lambda rng, a, b: np.zeros_like(a),
    "gradient": lambda rng, a, b: np.clip(0.5 + 0.25 * a, 0, 1),
    "stripes": lambda rng, a, b: a % 1 < 0.5,
    "checks": lambda rng, a, b: (a % 1 < 0.5) ^ (b % 1 < 0.5),
    "dots": lambda rng, a, b: np.hypot(a % 1 - 0.5, b % 1 - 0.5) < 0.3,
    "noise": _value_noise,
}


@dataclass(frozen=True)
class Paint:
    texture: str
    colours: np.ndarray  # (2, 3) RGB in [0, 255]
    angle: float  # of the texture, in radians
    period: float  # as a share of the shape's radius
    shading: float  # relative change of the brightness across half the shape

    def colour(self, rng: np.random.Generator, patch: Patch, radius: float) -> np.ndarray:
        """RGB of every sample of a shape of this radius in pixels, (P*S, P*S, 3) float."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        a, b = cos * patch.u + sin * patch.v, cos * patch.v - sin * patch.u
        period = max(self.period, 4 / radius)  # finer ones than 4 pixels turn grey
        second = TEXTURES[self.texture](rng, a / period, b / period)[..., None]
        flat = self.colours[0] + second * (self.colours[1] - self.colours[0])
        return flat * (1 + self.shading * patch.u[..., None])


def _contrasting_colours(rng: np.random.Generator, ground: np.ndarray) -> np.ndarray:
    """Two colours (2, 3) that both stand out from the colour `ground` (3,)."""
    candidates = rng.uniform(10, 250, (2, 24, 3))
    distance = np.linalg.norm(candidates - ground, axis=-1)
    # The first that is far enough, or the farthest; a boolean's maximum is its first True.
    enough = distance >= MIN_CONTRAST
    choice = np.where(enough.any(axis=1), enough.argmax(axis=1), distance.argmax(axis=1))
    return candidates[[0, 1], choice]


def _random_paint(rng: np.random.Generator, ground: np.ndarray, textures: tuple[str, ...]) -> Paint:
    """One of the textures in colours that stand out from `ground` (3,)."""
    return Paint(
        texture=textures[rng.integers(len(textures))],
        colours=_contrasting_colours(rng, ground),
        angle=rng.uniform(0, 2 * math.pi),
        period=rng.uniform(0.35, 0.8),
        shading=rng.uniform(0, 0.2),
    )


def _paint_shape(
    rng: np.random.Generator, image: np.ndarray, patch: Patch, paint: Paint, radius: float
) -> None:
    """Draws onto the image (H, W, 3) float, in place."""
    in_image, in_patch = patch.frame(*image.shape[:2])
    colour = _pool(paint.colour(rng, patch, radius) * patch.inside[..., None])
    image[in_image] = image[in_image] * (1 - patch.coverage[in_patch][..., None]) + colour[in_patch]


# --- background ---


def _smooth_noise(rng: np.random.Generator, height: int, width: int, sigma: float) -> np.ndarray:
    """Blurred noise of mean 0 and deviation 1, (H, W) float."""
    noise = ndimage.gaussian_filter(rng.standard_normal((height, width)), sigma, mode="wrap")
    return (noise - noise.mean()) / noise.std()


def _gradient(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A slope from one muted colour to another, (H, W, 3) float in [0, 255]."""
    angle = rng.uniform(0, 2 * math.pi)
    x, y = np.linspace(-0.5, 0.5, width), np.linspace(-0.5, 0.5, height)[:, None]
    slope = np.clip(0.5 + math.cos(angle) * x + math.sin(angle) * y, 0, 1)[..., None]
    brightness = rng.uniform(50, 205)
    first, second = np.clip(brightness + rng.uniform(-45, 45, (2, 3)), 10, 245)
    return first + slope * (second - first)


def _add_blobs(rng: np.random.Generator, image: np.ndarray) -> None:
    """Faint soft spots that are no class, in place."""
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width]
    for _ in range(rng.integers(0, 4)):
        centre_x, centre_y = rng.uniform(0, width), rng.uniform(0, height)
        spread = rng.uniform(0.04, 0.12, 2) * max(height, width)
        spot = np.exp(-0.5 * (((x - centre_x) / spread[0]) ** 2 + ((y - centre_y) / spread[1]) ** 2))
        image += spot[..., None] * rng.uniform(-40, 40, 3)


def _add_lines(rng: np.random.Generator, image: np.ndarray) -> None:
    """Thin straight and curved lines that are no class, in place."""
    height, width = image.shape[:2]
    t = np.linspace(0, 1, 24)[:, None]
    for _ in range(rng.integers(0, 5)):
        start, bend, end = rng.uniform(-0.1, 1.1, (3, 2)) * (width, height)
        if rng.random() < 0.5:
            bend = (start + end) / 2  # straight
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
        stroke = Image.new("L", (width * S, height * S))
        thickness = max(1, round(rng.uniform(0.006, 0.014) * max(height, width) * S))
        ImageDraw.Draw(stroke).line([tuple(point) for point in curve * S], 255, thickness, joint="curve")
        alpha = np.asarray(stroke.reduce(S))[..., None] / 255 * rng.uniform(0.3, 0.8)
        image += alpha * (rng.uniform(20, 235, 3) - image)


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
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
    """One object, or one crowd of several shapes of a class."""

    category_id: int
    poses: list[Pose]
    mask: np.ndarray  # (H, W) bool; what is visible of it
    area: int  # pixels of the whole object, hidden and cut-off parts included
    is_crowd: bool = False

    def share_left(self, hidden: np.ndarray) -> float:
        """The share of its pixels that is visible if those of `hidden`, (H, W) bool, are covered."""
        return np.count_nonzero(self.mask & ~hidden) / self.area


def _make_object(category_id: int, poses: list[Pose], height: int, width: int, is_crowd: bool) -> SceneObject:
    mask = np.zeros((height, width), dtype=bool)
    area = 0
    for pose in poses:
        patch = _sample_shape(CLASS_NAMES[category_id - 1], pose)
        in_image, in_patch = patch.frame(height, width)
        covered = patch.coverage >= 0.5
        area += np.count_nonzero(covered) - np.count_nonzero(covered[in_patch] & mask[in_image])
        mask[in_image] |= covered[in_patch]
    return SceneObject(category_id, poses, mask, area, is_crowd)


def _random_pose(rng: np.random.Generator, height: int, width: int, image_size: int) -> Pose:
    smallest, largest = max(RADIUS[0] * image_size, MIN_RADIUS), RADIUS[1] * image_size
    radius = math.exp(rng.uniform(math.log(smallest), math.log(largest)))
    margin = 0.7 * radius  # the frame cuts some objects, and none by much
    return Pose(
        x=rng.uniform(margin, width - margin),
        y=rng.uniform(margin, height - margin),
        radius=radius,
        angle=rng.uniform(0, 2 * math.pi),
        stretch=rng.uniform(0.8, 1.0),
    )


def _crowd_poses(rng: np.random.Generator, height: int, width: int, image_size: int) -> list[Pose]:
    """Many tiny shapes in an ellipse; they touch and overlap a little."""
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


def _fits(candidate: SceneObject, objects: list[SceneObject]) -> bool:
    """Whether the candidate, drawn last, leaves enough of every object to see, itself included."""
    nothing = np.zeros_like(candidate.mask)
    return candidate.share_left(nothing) >= MIN_VISIBLE and all(
        other.share_left(candidate.mask) >= MIN_VISIBLE for other in objects
    )


def _add_object(
    rng: np.random.Generator, image: np.ndarray, objects: list[SceneObject], new: SceneObject
) -> None:
    """Draws the object onto the image in place, takes what it hides from the earlier ones, and
    appends it to them.
    """
    name = CLASS_NAMES[new.category_id - 1]
    # The outline is easiest to see on plain shapes; on the tiny ones of a crowd a pattern would
    # hide it.
    plain = new.is_crowd or rng.random() < PLAIN_SHARE
    textures = ("solid", "gradient") if plain else tuple(TEXTURES)
    paint = _random_paint(rng, image[new.mask].mean(axis=0), textures)
    for pose in new.poses:
        _paint_shape(rng, image, _sample_shape(name, pose), paint, pose.radius)
    for other in objects:
        other.mask &= ~new.mask
    objects.append(new)


def _place_objects(
    rng: np.random.Generator, image: np.ndarray, image_size: int, num_classes: int, max_objects: int
) -> list[SceneObject]:
    """Draws a random number of objects onto the image (H, W, 3) float, in place."""
    height, width = image.shape[:2]
    objects: list[SceneObject] = []
    kind = rng.random()
    if kind < EMPTY_SHARE:
        return objects
    if kind < EMPTY_SHARE + CROWD_SHARE:
        poses = _crowd_poses(rng, height, width, image_size)
        category_id = int(rng.integers(1, num_classes + 1))
        _add_object(rng, image, objects, _make_object(category_id, poses, height, width, is_crowd=True))
    for _ in range(rng.integers(1, max_objects + 1)):
        category_id = int(rng.integers(1, num_classes + 1))
        for _ in range(PLACEMENT_ATTEMPTS):
            pose = _random_pose(rng, height, width, image_size)
            candidate = _make_object(category_id, [pose], height, width, is_crowd=False)
            if _fits(candidate, objects):
                _add_object(rng, image, objects, candidate)
                break
    return objects


def render_scene(
    rng: np.random.Generator, *, image_size: int, num_classes: int, max_objects: int
) -> tuple[np.ndarray, list[dict]]:
    """One random image and its annotations; the same for the same state of `rng`.

    Args:
        image_size: the longer side in pixels; the other has 0.75 to 1.0 of it.
        num_classes: the first so many of CLASS_NAMES occur.
        max_objects: the number of objects is 1 to max_objects, or 0 in an image without any; a
            crowd comes on top.

    Returns:
        image: (H, W, 3) uint8 RGB.
        annotations: dicts as in COCO with `category_id`, `bbox` ([x, y, width, height] in pixels),
        `area` (visible pixels), `iscrowd` and `segmentation` (compressed run lengths), without ids.
    """
    long, short = image_size, round(image_size * rng.uniform(0.75, 1.0))
    height, width = (long, short) if rng.random() < 0.5 else (short, long)
    image = _background(rng, height, width)
    objects = _place_objects(rng, image, image_size, num_classes, max_objects)
    image += rng.uniform(1, 5) * rng.standard_normal(image.shape)  # of the sensor
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), [_annotation(item) for item in objects]


# --- annotations ---


def _without_specks(mask: np.ndarray) -> np.ndarray:
    """The mask (H, W) bool less the parts that nobody can see; a box around them would be too
    large.
    """
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    large = np.bincount(labels.ravel()) >= MIN_PART
    kept = mask & large[labels]
    return kept if kept.any() else mask


def _annotation(item: SceneObject) -> dict:
    runs = mask_utils.encode(np.asfortranarray(_without_specks(item.mask), dtype=np.uint8))
    return {
        "category_id": item.category_id,
        "bbox": mask_utils.toBbox(runs).tolist(),
        "area": float(mask_utils.area(runs)),
        "iscrowd": int(item.is_crowd),
        "segmentation": {"size": runs["size"], "counts": runs["counts"].decode()},
    }


# --- files ---


@dataclass(frozen=True)
class Settings:
    """What the files depend on. Raises ValueError for values out of range."""

    train_images: int = 2000
    val_images: int = 200
    image_size: int = 128
    num_classes: int = 5
    max_objects: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {
            "train_images": (0, 10**6),
            "val_images": (0, 10**6),
            "image_size": (32, 2048),
            "num_classes": (1, len(CLASS_NAMES)),
            "max_objects": (1, 100),
            "seed": (0, 2**32 - 1),
        }
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} {getattr(self, name)} must be from {low} to {high}")


def _write_image(
    index: int, *, folder: str, split: int, first_id: int, settings: Settings
) -> tuple[dict, list[dict]]:
    """Renders and saves image `index` of a split; returns its COCO entry and its annotations, still
    without ids.
    """
    rng = np.random.default_rng(np.random.SeedSequence((settings.seed, split, index)))
    image, annotations = render_scene(
        rng,
        image_size=settings.image_size,
        num_classes=settings.num_classes,
        max_objects=settings.max_objects,
    )
    image_id = first_id + index
    file_name = f"{image_id:012d}.jpg"
    # Without subsampling: at these sizes half the colour resolution smears the small shapes.
    Image.fromarray(image).save(os.path.join(folder, file_name), quality=JPEG_QUALITY, subsampling=0)
    height, width = image.shape[:2]
    entry = {"id": image_id, "file_name": file_name, "height": height, "width": width}
    return entry, [{"image_id": image_id, **annotation} for annotation in annotations]


def _run(job: Callable, count: int, workers: int, description: str) -> list:
    """[job(0), ..., job(count - 1)], with a progress bar on a terminal."""
    progress = partial(tqdm, total=count, desc=description, unit="image", disable=None)
    if workers == 1:
        return list(progress(map(job, range(count))))
    # Ctrl-C is left to the parent, which ends its workers without a traceback from each
    with multiprocessing.Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        return list(progress(pool.imap(job, range(count), chunksize=8)))


def _write_split(folder: Path, split: int, settings: Settings, workers: int) -> None:
    """Writes the images and the annotations of SPLITS[split] below the folder."""
    count = (settings.train_images, settings.val_images)[split]
    first_id = (1, settings.train_images + 1)[split]  # as in COCO, no id occurs in both
    images = folder / SPLITS[split]
    images.mkdir(parents=True)
    job = partial(_write_image, folder=str(images), split=split, first_id=first_id, settings=settings)
    results = _run(job, count, workers, SPLITS[split])
    annotations = [annotation for _, of_image in results for annotation in of_image]
    content = {
        "info": {"description": "synthetic shapes", "version": str(VERSION)},
        "licenses": [],
        "categories": [
            {"id": number, "name": name, "supercategory": "shape"}
            for number, name in enumerate(CLASS_NAMES[: settings.num_classes], start=1)
        ],
        "images": [entry for entry, _ in results],
        "annotations": [
            {"id": number, **annotation} for number, annotation in enumerate(annotations, start=1)
        ],
    }
    path = folder / "annotations" / f"instances_{SPLITS[split]}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, separators=(",", ":")))


def _read_settings(folder: Path) -> dict | None:
    """What SETTINGS_FILE in the folder says, or None if there is nothing to be read."""
    try:
        return json.loads((folder / SETTINGS_FILE).read_text())
    except (FileNotFoundError, ValueError):
        return None


def _check_replaceable(folder: Path, force: bool) -> None:
    """Raises FileExistsError unless the folder is missing, empty, or a data set of ours that
    `force` gives up.
    """
    entries = set(os.listdir(folder)) if folder.exists() else set()
    if not entries:
        return
    if SETTINGS_FILE not in entries or entries - OWN_ENTRIES:
        raise FileExistsError(
            f"{folder} holds other files than a synthetic data set; choose another --output_dir"
        )
    if not force:
        raise FileExistsError(f"{folder} holds a data set of other settings; --force replaces it")


def _replace(folder: Path, new: Path, aside: Path) -> None:
    """Moves `new` to `folder`, and what was there to `aside`; all lie on one file system. A failure
    changes nothing.
    """
    if folder.exists():
        folder.rename(aside)
    try:
        new.rename(folder)
    except BaseException:
        if aside.exists():
            aside.rename(folder)
        raise


def generate(output_dir: str | Path, *, workers: int = 1, force: bool = False, **settings: int) -> bool:
    """Writes a data set in COCO's layout, whole or not at all.

    Args:
        output_dir: gets train2017/, val2017/, annotations/instances_{train,val}2017.json and
            synthetic.json.
        workers: processes; the files do not depend on it.
        force: replaces a synthetic data set of other settings.
        settings: the fields of Settings: train_images, val_images, image_size, num_classes,
            max_objects, seed.

    Returns:
        False if a data set of these settings was there already, and nothing was done; else True.

    Raises:
        ValueError: a value is out of range.
        OSError: the folder cannot be written; FileExistsError if it holds something else.
    """
    chosen = Settings(**settings)
    if not 1 <= workers <= MAX_WORKERS:
        raise ValueError(f"workers {workers} must be from 1 to {MAX_WORKERS}")
    description = {"version": VERSION, **asdict(chosen)}
    folder = Path(output_dir).resolve()
    if _read_settings(folder) == description and not force:
        return False
    _check_replaceable(folder, force)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        # one folder deeper, for a temporary folder is its owner's alone
        new = Path(temporary, "new")
        for split in range(len(SPLITS)):
            _write_split(new, split, chosen, workers)
        (new / SETTINGS_FILE).write_text(json.dumps(description, indent=2) + "\n")
        _replace(folder, new, aside=Path(temporary, "old"))
    return True


# --- command line ---


HELP = {
    "train_images": "images in train2017",
    "val_images": "images in val2017",
    "image_size": "longer side of the images in pixels; the other has 0.75 to 1.0 of it",
    "num_classes": f"the first so many of: {', '.join(CLASS_NAMES)}",
    "max_objects": "most objects in an image; a crowd counts as none",
    "seed": "another seed gives other images",
}


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "-m datasets.synthetic",
        "Writes a synthetic detection data set of textured shapes in COCO's layout.",
        "python -m datasets.synthetic --output_dir data/shapes --train_images 200 --num_classes 3",
    )
    parser.add_argument("--output_dir", default="data/synthetic", help="folder of the data set")
    for field in fields(Settings):
        parser.add_argument(f"--{field.name}", type=int, default=field.default, help=HELP[field.name])
    workers = min(os.cpu_count() or 1, 16)
    parser.add_argument("--workers", type=int, default=workers, help="processes; no effect on the files")
    parser.add_argument(
        "--force", action="store_true", help="replace a synthetic data set that is there already"
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Do what the flags say. Raises UserError."""
    options = vars(_parser().parse_args(arguments))
    folder = options["output_dir"]
    try:
        written = generate(**options)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None
    print(f"wrote {folder}" if written else f"{folder} is there already with these settings; nothing to do")
