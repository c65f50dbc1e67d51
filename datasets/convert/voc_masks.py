"""Masks as images, in Pascal VOC's format for segmentation: in SegmentationObject each object of an image has
its own colour, and in SegmentationClass that of its class. CVAT ("Segmentation mask") and labelme2voc
write it, too.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils

from datasets.convert.common import CocoSplit, Object, Pair, files_by_key, read_splits, splits_by_folder
from datasets.convert.masks import mask_as_stored
from datasets.convert.problems import BOXES_TURNED, Corners, Problems
from datasets.convert.voc import VocRules, folder_with, listed_splits
from datasets.file_index import shown_size
from datasets.file_names import IMAGE_SUFFIXES, files_below
from util.config import DataConfig
from util.errors import UserError
from util.images.files import BadImageError, Header, decode, read_image_file
from util.text_files import read_lines

_OBJECTS, _CLASSES = "SegmentationObject", "SegmentationClass"
_LISTS = Path("ImageSets/Segmentation")
_VOC = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor"
)
# the number of pixels at an object's border that belong to nothing
_VOID = 255


def is_voc_masks(root: Path) -> bool:
    """Whether masks are all that there is: Pascal VOC's own folder has boxes of more images."""
    return (
        root.is_dir()
        and (folder_with(_OBJECTS, root) / _OBJECTS).is_dir()
        and not files_below(root, [".xml"])
    )


def read_voc_masks(root: Path, rules: VocRules, problems: Problems) -> dict[str, CocoSplit]:
    """A folder with JPEGImages, SegmentationObject, SegmentationClass and, for splits,
    ImageSets/Segmentation.

    Classes are those of labelmap.txt (CVAT: name:red,green,blue:...) or class_names.txt (labelme2voc: a
    line for each number), or else VOC's own twenty.

    Raises:
        UserError: there is nothing to convert.
    """
    root = folder_with(_OBJECTS, root)
    masks = files_by_key(root / _OBJECTS, [".png"], problems)
    if not masks:
        raise UserError(f"{root} has no PNG files in {_OBJECTS}: it has no masks in Pascal VOC's format")
    images = files_by_key(root, IMAGE_SUFFIXES, problems)
    images = {key: path for key, path in images.items() if not key[0].startswith("Segmentation")}
    keys_of = splits_by_folder(masks)
    if rules.train_set or rules.val_set or (root / _LISTS).is_dir():
        keys_of = listed_splits(root / _LISTS, images, rules, problems)

    pairs_of: dict[str, list[Pair]] = {}
    for split, keys in keys_of.items():
        pairs_of[split] = []
        for key in dict.fromkeys(keys):
            name = "/".join(key)
            if key in images:
                mask = masks.get(key, root / _OBJECTS / f"{name}.png")
                pairs_of[split].append(Pair(key, images[key], mask))
            else:
                problems.add(f"{root} has no image {name}, which is in the {split} set", "missing_image")

    names = _class_names(root)
    read_objects = functools.partial(_read_objects, names=names, problems=problems)
    return read_splits(pairs_of, read_objects, problems, [*dict.fromkeys(names.values())])


# ---- colours


def _class_names(root: Path) -> dict[int, str]:
    """Class names by the numbers of their pixels (see `_numbers`), without the background."""
    label_map, listed = root / "labelmap.txt", root / "class_names.txt"
    numbers: dict[int, str] = {}
    if label_map.is_file():
        for place, text in read_lines(label_map):
            try:
                name, colour, *_ = text.split(":")
                red, green, blue = map(int, colour.split(","))
            except ValueError:
                raise UserError(
                    f"{label_map}: line {place} must be name:red,green,blue, as CVAT writes it"
                ) from None
            numbers[_number_of(red << 16 | green << 8 | blue)] = name
    else:
        names = [line.text for line in read_lines(listed)] if listed.is_file() else _VOC.split()
        numbers = dict(enumerate(names))
    background = {"background", "_background_", "__ignore__", "ignored"}
    return {number: name for number, name in numbers.items() if number and name not in background}


@functools.cache
def _numbers_by_colour() -> dict[int, int]:
    """VOC's colours of 24 bits: of three bits of a number the lowest is red's, and the first three are the
    highest ones of the colours.
    """
    numbers = {}
    for number in range(256):
        bits = [[number >> 3 * place + channel & 1 for place in range(3)] for channel in range(3)]
        red, green, blue = (first << 7 | second << 6 | third << 5 for first, second, third in bits)
        numbers[red << 16 | green << 8 | blue] = number
    return numbers


def _number_of(colour: int) -> int:
    """VOC's number of a colour of 24 bits, or one from 256 on for other colours."""
    return _numbers_by_colour().get(colour, 256 + colour)


def _numbers(path: Path, header: Header) -> np.ndarray:
    """[H, W] numbers of a mask's pixels, in the image as stored: those in the file if it has one channel, or
    else VOC's numbers of its colours. Raises BadImageError, or ValueError; its message continues a sentence
    that begins with the path.
    """
    megapixels, otherwise = DataConfig.max_image_megapixels, "or take it out"
    content = read_image_file(path, megapixels, otherwise)
    picture = decode(content, path, megapixels, otherwise)
    with Image.open(io.BytesIO(content)) as image:
        if image.mode in ("1", "L", "I", "I;16"):
            numbers = np.asarray(image).astype(np.int64)
        else:
            colours = np.asarray(picture).astype(np.int64) @ (1 << 16, 1 << 8, 1)
            there, places = np.unique(colours, return_inverse=True)
            numbers = np.array([*map(_number_of, there.tolist())], np.int64)[places.reshape(colours.shape)]
    size = numbers.shape[::-1]
    if size == shown_size(header):
        return mask_as_stored(numbers, header)
    if size != header.size:
        width, height = header.size
        raise ValueError(f"is {size[0]} x {size[1]}, and its image {width} x {height}")
    return numbers


# ---- objects


def _read_objects(
    path: Path, header: Header, names: Mapping[int, str], problems: Problems
) -> list[Object] | None:
    """The objects of the image with the mask `path` of SegmentationObject. None: it can't be used."""
    # CVAT writes none for an image without objects
    if not path.is_file():
        problems.notes[f"images without a mask in {_OBJECTS}, taken to have no objects"] += 1
        return []
    problems.notes[BOXES_TURNED] += header.orientation > 1
    parts = list(path.parts)
    parts[len(parts) - 1 - parts[::-1].index(_OBJECTS)] = _CLASSES
    try:
        of_objects, of_classes = (_numbers(file, header) for file in (path, Path(*parts)))
    except BadImageError as error:
        problems.add(str(error), "broken_image")
        return None
    except ValueError as error:
        problems.add(f"{path} {error}", "wrong_size")
        return None

    objects = []
    for number in np.unique(of_objects).tolist():
        if number in (0, _VOID):
            continue
        mask = of_objects == number
        labels, counts = np.unique(of_classes[mask], return_counts=True)
        name = names.get(int(labels[counts.argmax()]))
        if name is None:
            problems.add(f"{path}: object {number} has no class in {_CLASSES}", "unknown_category")
            continue
        runs = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
        x, y, width, height = mask_utils.toBbox(runs).tolist()
        segmentation = {"size": runs["size"], "counts": runs["counts"].decode()}
        objects.append(Object(name, Corners(x, y, x + width, y + height), segmentation=segmentation))
    return objects
