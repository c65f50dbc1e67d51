"""A synthetic data set in COCO's layout: settings, annotations and files.

Image i of a split depends on (seed, split, i) alone, so the files do not depend on the number of
workers.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils
from scipy import ndimage
from tqdm import tqdm

from datasets.panoptic.format import VOID, Panoptic, describe, write_annotations, write_image
from datasets.synthetic.paint import CLASS_NAMES
from datasets.synthetic.scene import Picture, SceneObject, render_scene
from datasets.synthetic.stuff import FIRST_STUFF_ID, STUFF

# increase with every change of the pictures: a data set of another version counts as another one
VERSION = 1
SETTINGS_FILE = "synthetic.json"
SPLITS = ("train2017", "val2017")
OWN_ENTRIES = {*SPLITS, "annotations", SETTINGS_FILE}
JPEG_QUALITY = 92
MAX_WORKERS = 64
MIN_PIECE = 4  # pixels of a piece of an object that others cut off; smaller ones are not annotated


def _setting(default: int, low: int, high: int, help: str) -> Any:
    return field(default=default, metadata={"low": low, "high": high, "help": help})


@dataclass(frozen=True)
class Settings:
    """What the files depend on. Raises ValueError for values out of range."""

    train_images: int = _setting(2000, 0, 10**6, "images in train2017")
    val_images: int = _setting(200, 0, 10**6, "images in val2017")
    image_size: int = _setting(
        128, 32, 2048, "longer side of the images in pixels; the other has 0.75 to 1.0 of it"
    )
    num_classes: int = _setting(5, 1, len(CLASS_NAMES), f"the first so many of: {', '.join(CLASS_NAMES)}")
    max_objects: int = _setting(5, 1, 100, "most objects in an image; a crowd is not counted")
    seed: int = _setting(0, 0, 2**32 - 1, "another seed gives other images")
    panoptic: bool = _setting(False, 0, 1, "backgrounds of several kinds of stuff, and panoptic maps")

    def __post_init__(self) -> None:
        for item in fields(self):
            value, low, high = getattr(self, item.name), item.metadata["low"], item.metadata["high"]
            if not low <= value <= high:
                raise ValueError(f"{item.name} {value} must be from {low} to {high}")

    @property
    def description(self) -> dict[str, int]:
        """The content of SETTINGS_FILE."""
        entries = {"version": VERSION, **asdict(self)}
        if not self.panoptic:
            # sets from before there were panoptic maps do not have it
            del entries["panoptic"]
        return entries


# --- annotations ---


def annotation_of(item: SceneObject) -> dict[str, Any]:
    """COCO's annotation of what is visible of an object, without ids. `bbox` is [x, y, width,
    height] in pixels, `area` counts pixels, `segmentation` is compressed run lengths.
    """
    runs = mask_utils.encode(np.asfortranarray(_without_specks(item.mask), dtype=np.uint8))
    return {
        "category_id": item.category_id,
        "bbox": mask_utils.toBbox(runs).tolist(),
        "area": float(mask_utils.area(runs)),
        "iscrowd": int(item.is_crowd),
        "segmentation": {"size": runs["size"], "counts": runs["counts"].decode()},
    }


def _without_specks(mask: np.ndarray) -> np.ndarray:
    """The mask (H, W) bool without pieces that are too small to see: they would enlarge the box."""
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    large = np.bincount(labels.ravel()) >= MIN_PIECE
    kept = mask & large[labels]
    return kept if kept.any() else mask


def panoptic_of(picture: Picture) -> Panoptic:
    """The objects and the stuff around them. Specks, which are not annotated, are void."""
    assert picture.stuff is not None
    objects = dict(enumerate(picture.objects, 1))
    categories = {number: item.category_id for number, item in objects.items()}
    first = len(objects) + 1  # id of stuff
    categories |= {first + kind: FIRST_STUFF_ID + kind for kind in range(len(STUFF))}
    ids = first + picture.stuff
    for number, item in objects.items():
        ids[item.mask] = VOID
        ids[_without_specks(item.mask)] = number
    crowds = {number for number, item in objects.items() if item.is_crowd}
    return describe(ids, categories, crowds)


# --- files ---


class _Written(NamedTuple):
    """What the annotation files say of an image: its entry, its annotations without ids, and with
    panoptic maps the annotation of its map.
    """

    entry: dict[str, Any]
    annotations: list[dict[str, Any]]
    panoptic: dict[str, Any] | None


def _write_image(index: int, *, folder: Path, split: int, first_id: int, settings: Settings) -> _Written:
    """Write image `index` of a split below `folder`."""
    key = (settings.seed, split, index)
    picture = render_scene(
        np.random.default_rng(np.random.SeedSequence(key)),
        image_size=settings.image_size,
        num_classes=settings.num_classes,
        max_objects=settings.max_objects,
        stuff_rng=np.random.default_rng(np.random.SeedSequence((*key, 1))) if settings.panoptic else None,
    )
    image_id = first_id + index
    file_name = f"{image_id:012d}.jpg"
    # Chroma subsampling would smear the small shapes at these sizes.
    path = folder / SPLITS[split] / file_name
    Image.fromarray(picture.image).save(path, quality=JPEG_QUALITY, subsampling=0)
    height, width = picture.image.shape[:2]
    entry = {"id": image_id, "file_name": file_name, "height": height, "width": width}
    annotations = [{"image_id": image_id, **annotation_of(item)} for item in picture.objects]
    panoptic = None
    if settings.panoptic:
        panoptic = write_image(_maps(folder, split), image_id, panoptic_of(picture))
    return _Written(entry, annotations, panoptic)


def _maps(folder: Path, split: int) -> Path:
    return folder / "annotations" / f"panoptic_{SPLITS[split]}"


def _write_split(folder: Path, split: int, settings: Settings, workers: int) -> None:
    """Write the images and the annotations of SPLITS[split] below the folder; a bar on a terminal."""
    # as in COCO, no id occurs in both splits
    name = SPLITS[split]
    count, first_id = settings.train_images, 1
    if split:
        count, first_id = settings.val_images, settings.train_images + 1
    (folder / name).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    if settings.panoptic:
        _maps(folder, split).mkdir()
    job = partial(_write_image, folder=folder, split=split, first_id=first_id, settings=settings)
    progress = partial(tqdm, total=count, desc=name, unit="image", disable=None)
    if workers == 1:
        results = list(progress(map(job, range(count))))
    else:
        # Workers ignore Ctrl-C: the parent ends them, without a traceback from each.
        with multiprocessing.Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            results = list(progress(pool.imap(job, range(count), chunksize=8)))

    # annotations, numbered in the order of the images
    annotations: list[dict[str, Any]] = []
    for result in results:
        for annotation in result.annotations:
            annotations.append({"id": len(annotations) + 1, **annotation})
    things = _categories(CLASS_NAMES[: settings.num_classes], 1, "shape")
    images = [result.entry for result in results]
    content = {
        "info": {"description": "synthetic shapes", "version": str(VERSION)},
        "licenses": [],
        "categories": things,
        "images": images,
        "annotations": annotations,
    }
    path = folder / "annotations" / f"instances_{name}.json"
    path.write_text(json.dumps(content, separators=(",", ":")))

    maps = [result.panoptic for result in results if result.panoptic]
    if settings.panoptic:
        stuff = _categories(STUFF, FIRST_STUFF_ID, "ground")
        categories = [{**category, "isthing": 1} for category in things]
        categories += [{**category, "isthing": 0} for category in stuff]
        write_annotations(_maps(folder, split).with_suffix(".json"), images, categories, maps)


def _categories(names: Iterable[str], first_id: int, group: str) -> list[dict[str, Any]]:
    return [{"id": i, "name": name, "supercategory": group} for i, name in enumerate(names, first_id)]


def _is_there(folder: Path, description: dict[str, Any], force: bool) -> bool:
    """Whether the folder has the data set of this description, and is to keep it.

    Raises FileExistsError unless the folder is missing, empty, such a data set, or another
    synthetic one that `force` gives up.
    """
    entries = set()
    if folder.exists():
        entries = set(os.listdir(folder))
    if not entries:
        return False
    if SETTINGS_FILE not in entries or entries - OWN_ENTRIES:
        raise FileExistsError(
            f"{folder} holds other files than a synthetic data set; choose another --output_dir"
        )
    if force:
        return False
    # a damaged file describes no data set
    with contextlib.suppress(ValueError):
        if json.loads((folder / SETTINGS_FILE).read_text()) == description:
            return True
    raise FileExistsError(f"{folder} holds a data set of other settings; --force replaces it")


def _replace(folder: Path, new: Path, aside: Path) -> None:
    """Move `new` to `folder`, and what was there to `aside`. A failure changes nothing."""
    if folder.exists():
        folder.rename(aside)
    try:
        new.rename(folder)
    except BaseException:
        if aside.exists():
            aside.rename(folder)
        raise


def generate(output_dir: str | Path, *, workers: int = 1, force: bool = False, **settings: Any) -> bool:
    """Write a data set in COCO's layout, whole or not at all.

    Args:
        output_dir: gets train2017/, val2017/, annotations/instances_{train,val}2017.json and
            synthetic.json; with `panoptic` also annotations/panoptic_{train,val}2017.json and the maps
            in folders beside them.
        workers: processes; the files do not depend on it.
        force: replaces a synthetic data set of other settings.
        settings: the fields of Settings: train_images, val_images, image_size, num_classes,
            max_objects, seed, panoptic.

    Returns:
        False if a data set of these settings was there already, and nothing was done; else True.

    Raises:
        ValueError: a value is out of range.
        OSError: the folder cannot be written; FileExistsError if it holds something else.
    """
    # is it there already, or something else?
    chosen = Settings(**settings)
    if not 1 <= workers <= MAX_WORKERS:
        raise ValueError(f"workers {workers} must be from 1 to {MAX_WORKERS}")
    folder = Path(output_dir).resolve()
    if _is_there(folder, chosen.description, force):
        return False

    # write beside the folder, then rename: an interruption leaves no half data set
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        # one folder deeper, because others may not read a temporary folder
        new = Path(temporary, "new")
        for split in range(len(SPLITS)):
            _write_split(new, split, chosen, workers)
        (new / SETTINGS_FILE).write_text(json.dumps(chosen.description, indent=2) + "\n")
        _replace(folder, new, Path(temporary, "old"))
    return True
