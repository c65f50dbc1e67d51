"""Images with labelled boxes, as the readers of other formats (voc.py, yolo.py) give them.

Readers for these formats on PyPI give boxes alone: of the light and maintained ones, globox and
supervision, neither keeps VOC's `difficult` or says which line of which file is wrong. So they are
read with what Python, Pillow and PyYAML have.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import NamedTuple

from tqdm import tqdm

from datasets.coco_format import is_file_name
from datasets.convert.problems import Corners, Problems
from datasets.file_index import IMAGE_FOLDERS
from datasets.file_names import Key, files_below
from util.images.files import Header

# folders that separate images from labels; the other folders of an image and its labels are the same
ROLES = IMAGE_FOLDERS | {"annotations", "labels", "xmls"}
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class Object(NamedTuple):
    """name: its class. corners: in the image as stored. crowd: not trained on, and no detection of
    it is wrong.
    """

    name: str
    corners: Corners
    crowd: bool = False


@dataclass
class LabelledImage:
    """An image file. name: below the folder of its split, with slashes. size: (width, height) as
    stored.
    """

    path: Path
    name: str
    size: tuple[int, int]
    objects: list[Object]


@dataclass
class Labelled:
    """A data set. names: of the classes, in the order of their ids. splits: images of "train", and
    of "val" if it has one.
    """

    names: list[str]
    splits: dict[str, list[LabelledImage]]


class Pair(NamedTuple):
    """An image and its file of labels. key: what their paths have in common."""

    key: Key
    image: Path
    labels: Path


def read_images(
    pairs: Sequence[Pair],
    read_objects: Callable[[Path, Header], list[Object] | None],
    split: str,
    problems: Problems,
) -> list[LabelledImage]:
    """The images of a split with their objects; a bar on a terminal.

    Args:
        read_objects: of a file of labels and the header of its image; None leaves the image out.
    """
    images = []
    named = zip(pairs, names_in_split(pairs), strict=True)
    for pair, name in tqdm(named, total=len(pairs), desc=split, unit="image", disable=None):
        # such names can't be in an annotation file, nor shown in a message
        if not is_file_name(name):
            problems.add(f"{str(pair.image)!r} has a name that annotations can't hold")
            continue
        header = problems.header(pair.image)
        if header is None:
            continue
        objects = read_objects(pair.labels, header)
        if objects is not None:
            images.append(LabelledImage(pair.image, name, header.size, objects))
    return images


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
    for name in names:
        split = SPLITS.get(name.lower().rstrip("0123456789"))
        if split:
            return split
    return ""


def split_of(key: Key) -> str:
    """The split that a folder is named after; "": none is."""
    return split_named(key[:-1])


def splits_by_folder(keys: Iterable[Key]) -> dict[str, list[Key]]:
    """Keys by the split that their folders name; all are "train" unless folders for both training
    and validation are there.
    """
    keys = list(keys)
    splits: dict[str, list[Key]] = {}
    for key in keys:
        splits.setdefault(split_of(key), []).append(key)
    # some tools write train and test only
    val = splits.get("val") or splits.get("test")
    if "train" in splits and val and "" not in splits:
        return {"train": splits["train"], "val": val}
    return {"train": keys}


def names_in_split(pairs: Iterable[Pair]) -> Iterator[str]:
    """Unique names of the images below the folder of a split, without the split's own folder."""
    taken: set[str] = set()
    for key, image, _ in pairs:
        folders = [name for name in key[:-1] if not split_named([name])]
        name = "/".join((*folders, image.name))
        # two folders of one split may have the same names; file systems may ignore case
        number = 1
        while name.lower() in taken:
            number += 1
            name = "/".join((*folders, f"{image.stem}_{number}{image.suffix}"))
        taken.add(name.lower())
        yield name
