"""Pairs of images and files of labels, and COCO's instances format of them, for voc.py and yolo.py.

Readers for these formats on PyPI give boxes alone: of the light and maintained ones, globox and
supervision, neither keeps VOC's `difficult` or says which line of which file is wrong. So they are
read with what Python, Pillow and PyYAML have.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from tqdm import tqdm

from datasets.coco_format import is_file_name
from datasets.convert.masks import pixels_of
from datasets.convert.problems import Corners, Problems, coco_box
from datasets.file_index import IMAGE_FOLDERS
from datasets.file_names import Key, files_below
from util.images.files import Header

# folders that separate images from labels; the other folders of an image and its labels are the same
ROLES = IMAGE_FOLDERS | {"annotations", "labels", "xmls"}
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class CocoSplit(NamedTuple):
    """content: COCO's instances format. files: where each of its file names lies."""

    content: dict[str, Any]
    files: dict[str, Path]


class Object(NamedTuple):
    """name: its class. corners: in the image as stored. crowd: not trained on, and no detection of
    it is wrong. segmentation: COCO's, in the image as stored.
    """

    name: str
    corners: Corners
    crowd: bool = False
    segmentation: Any = None


class Pair(NamedTuple):
    """An image and its file of labels. key: what their paths have in common."""

    key: Key
    image: Path
    labels: Path


def read_splits(
    pairs_of: Mapping[str, Sequence[Pair]],
    read_objects: Callable[[Path, Header], list[Object] | None],
    problems: Problems,
    names: Sequence[str] = (),
) -> dict[str, CocoSplit]:
    """COCO's instances format of the splits "train" and, if there is one, "val"; a bar on a terminal.

    Args:
        read_objects: of a file of labels and the header of its image; None leaves the image out.
        names: of the classes, in the order of their ids; by default those of the objects, sorted.
    """
    # ids count through both splits, so that no image has the id of another
    image_ids, object_ids = itertools.count(1), itertools.count(1)
    splits = {}
    for split, pairs in pairs_of.items():
        images, annotations, files = [], [], {}
        taken: set[str] = set()
        for pair in tqdm(pairs, desc=split, unit="image", disable=None):
            name = _new_name(pair, taken)
            # such names can't be in an annotation file, nor shown in a message
            if not is_file_name(name):
                problems.add(f"{str(pair.image)!r} has a name that annotations can't hold")
                continue
            header = problems.header(pair.image)
            if header is None:
                continue
            objects = read_objects(pair.labels, header)
            if objects is None:
                continue
            image_id = next(image_ids)
            width, height = header.size
            images.append({"id": image_id, "file_name": name, "width": width, "height": height})
            files[name] = pair.image
            for item in objects:
                head = {"id": next(object_ids), "image_id": image_id, "category_id": item.name}
                annotation = head | coco_box(item.corners) | {"iscrowd": int(item.crowd)}
                if item.segmentation:
                    annotation["segmentation"] = item.segmentation
                    # COCO's area is the object's; an object has one, so that of an empty mask is the box's
                    annotation["area"] = pixels_of(annotation, images[-1]) or annotation["area"]
                annotations.append(annotation)
        splits[split] = CocoSplit({"images": images, "annotations": annotations}, files)

    # the ids of the classes, now that all names are known
    objects_of_all = [item for split in splits.values() for item in split.content["annotations"]]
    names = names or sorted({item["category_id"] for item in objects_of_all})
    ids = {name: number for number, name in enumerate(names, 1)}
    for item in objects_of_all:
        item["category_id"] = ids[item["category_id"]]
    for content, _ in splits.values():
        content["categories"] = [{"id": number, "name": name} for name, number in ids.items()]
    return splits


def _new_name(pair: Pair, taken: set[str]) -> str:
    """A name of the image below the folder of a split, without the split's own folder; it is added
    to `taken`.
    """
    folders = [name for name in pair.key[:-1] if not split_named([name])]
    name = "/".join((*folders, pair.image.name))
    # two folders of one split may have the same names; file systems may ignore case
    number = 1
    while name.lower() in taken:
        number += 1
        name = "/".join((*folders, f"{pair.image.stem}_{number}{pair.image.suffix}"))
    taken.add(name.lower())
    return name


# ---- folders


def key_of(path: PurePath) -> Key:
    """What an image and its labels have in common: images/train/7.jpg and labels/train/7.txt have
    ("train", "7").
    """
    return (*(name for name in path.parts[:-1] if name.lower() not in ROLES), path.stem)


def files_by_key(
    root: Path, suffixes: Container[str], problems: Problems, wanted: Container[Key] | None = None
) -> dict[Key, Path]:
    """The files below `root` with one of these endings, in order; of these keys only, if they are
    given.

    Two files of one key are left out, unless one is a link to the other.
    """
    # all files of each key
    found: dict[Key, list[Path]] = {}
    for path in files_below(root, suffixes):
        key = key_of(path.relative_to(root))
        if wanted is None or key in wanted:
            found.setdefault(key, []).append(path)

    # the keys of one file; two paths to one file are no doubt
    single = {}
    for key, (first, *others) in found.items():
        doubles = [other for other in others if not first.samefile(other)]
        for other in doubles:
            problems.add(f"{other} and {first} can't be told apart: labels belong to images of the same name")
        if not doubles:
            single[key] = first
    return single


def split_named(names: Iterable[str]) -> str:
    """The split that the first of the names names (train2017: "train"); "": none does."""
    splits = (SPLITS.get(name.lower().rstrip("0123456789"), "") for name in names)
    return next(filter(None, splits), "")


def splits_by_folder(keys: Iterable[Key]) -> dict[str, list[Key]]:
    """Keys by the split that their folders name; all are "train" unless folders for both training
    and validation are there.
    """
    splits: dict[str, list[Key]] = {}
    for key in keys:
        splits.setdefault(split_named(key[:-1]), []).append(key)
    # some tools write train and test only
    val = splits.get("val") or splits.get("test")
    if "train" in splits and val and "" not in splits:
        return {"train": splits["train"], "val": val}
    return {"train": list(keys)}
