"""Masks in COCO's formats: polygons and run lengths, through pycocotools.mask.

Shape letters: N objects of all images, n objects of an image, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils
from torch import Tensor

from datasets.coco_format import shown
from util.errors import UserError

_WANTED = (
    "a list of polygons [x, y, x, y, ...] of three points and more in or near the image, or the run lengths "
    "of a mask of its size, {height} x {width}"
)


def run_lengths(
    annotation: dict[str, Any],
    image: dict[str, Any],
    path: Path,
    remedy: str = "correct it, or leave --masks out",
) -> bytes:
    """The mask of an annotation as compressed run lengths ("counts") at its image's size.

    Raises:
        UserError: it has no usable segmentation; the message names the file `path` and the annotation.
    """
    height, width = int(image["height"]), int(image["width"])
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict) and _fits(segmentation, height, width):
        counts = segmentation["counts"]
        if isinstance(counts, str):
            return counts.encode()
        return mask_utils.frPyObjects(segmentation, height, width)["counts"]
    if isinstance(segmentation, list) and _are_polygons(segmentation, height, width):
        # an object may have several parts
        return mask_utils.merge(mask_utils.frPyObjects(segmentation, height, width))["counts"]
    has = "has no segmentation" if segmentation is None else f"has segmentation {shown(segmentation)}"
    if "score" in annotation:
        name = f"a detection of image {annotation['image_id']}"
    else:
        name = f"annotation {annotation['id']}"
    raise UserError(
        f"{path}: {name} {has}; a mask must be {_WANTED.format(height=height, width=width)}; {remedy}"
    )


def mask_of(annotation: dict[str, Any], image: dict[str, Any], path: Path, remedy: str) -> np.ndarray:
    """The mask [H, W] bool of an annotation or a result.

    Unlike pycocotools' annToMask it does not draw points far outside of the image, which would fill
    the memory. Raises UserError as `run_lengths` does.
    """
    counts = run_lengths(annotation, image, path, remedy)
    return mask_utils.decode({"size": [image["height"], image["width"]], "counts": counts}).astype(bool)


def _are_polygons(polygons: list[Any], height: int, width: int) -> bool:
    return bool(polygons) and all(_is_polygon(polygon, height, width) for polygon in polygons)


def is_outline(numbers: Any) -> bool:
    """Whether it is a list x, y, x, y, ... of three points and more; four numbers would be a box to
    pycocotools.
    """
    if not isinstance(numbers, list) or len(numbers) < 6 or len(numbers) % 2:
        return False
    return all(type(number) in (int, float) and math.isfinite(number) for number in numbers)


def _is_polygon(numbers: Any, height: int, width: int) -> bool:
    if not is_outline(numbers):
        return False
    # it draws every pixel of an outline, and far ones would fill the memory
    inside = (-side <= min(xs) and max(xs) <= 2 * side for xs, side in _axes(numbers, height, width))
    return all(inside)


def _axes(numbers: list[float], height: int, width: int) -> Iterable[tuple[list[float], int]]:
    return (numbers[0::2], width), (numbers[1::2], height)


def _fits(segmentation: dict[str, Any], height: int, width: int) -> bool:
    """Whether these are the run lengths of a mask of this size: pycocotools does not look."""
    counts = segmentation.get("counts")
    if segmentation.get("size") != [height, width]:
        return False
    if isinstance(counts, list):
        whole = all(type(count) is int and count >= 0 for count in counts)
        return whole and sum(counts) == height * width
    if not isinstance(counts, str):
        return False
    runs = _uncompressed(np.frombuffer(counts.encode("latin-1", "replace"), np.uint8))
    return runs is not None and runs.sum() == height * width


def _uncompressed(codes: np.ndarray) -> np.ndarray | None:
    """Run lengths of compressed ones, of uint8; None if they can't be such.

    The format (pycocotools' rleToString): five bits a character, the lowest first, above "0"; a sixth
    says that more follow, the highest of the last is the sign. From the fourth number on it is the
    difference from the number two places before.
    """
    codes = codes.astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    last = np.flatnonzero(codes & 32 == 0)
    first = np.append(0, last[:-1] + 1)
    lengths = last - first + 1
    if lengths.max() > 7:  # 35 bits
        return None
    place = np.arange(len(codes)) - np.repeat(first, lengths)
    numbers = np.add.reduceat((codes & 31) << (5 * place), first)
    numbers -= np.where(codes[last] & 16, 1 << (5 * lengths), 0)
    for start in (1, 2):
        numbers[start::2] = numbers[start::2].cumsum()
    return numbers if numbers.min() >= 0 else None


@dataclass(frozen=True)
class RunLengths:
    """The masks of N objects, without crowds, as compressed run lengths, in three arrays.

    Not as a list of bytes: a loader worker that reads one of them would copy its page.

    codes: uint8, of one object after another; starts: [N + 1] the first of each; sizes: [N, 2] height
    and width.
    """

    codes: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(
        cls, annotations: Iterable[dict[str, Any]], images: Mapping[int, dict[str, Any]], path: Path
    ) -> RunLengths:
        """Of COCO's annotations and its images by id, of the file `path`. Raises UserError."""
        counts, sizes = [], []
        for annotation in annotations:
            image = images[annotation["image_id"]]
            # a crowd's must be sound too: evaluation compares with it
            runs = run_lengths(annotation, image, path)
            if not annotation["iscrowd"]:
                counts.append(runs)
                sizes.append((image["height"], image["width"]))
        codes = np.frombuffer(b"".join(counts), np.uint8)
        return cls(codes, np.cumsum([0, *map(len, counts)]), np.array(sizes, np.int32).reshape(-1, 2))

    def decoded(self, objects: Sequence[int], height: int, width: int) -> np.ndarray:
        """The masks of some objects of an image, [n, H, W] uint8 of 0 and 1.

        Raises ValueError if they are of another size.
        """
        masks = np.zeros((len(objects), height, width), np.uint8)
        for mask, i in zip(masks, objects, strict=True):
            if tuple(self.sizes[i]) != (height, width):
                there = f"{self.sizes[i][1]} x {self.sizes[i][0]}"
                raise ValueError(f"is {width} x {height} pixels (width x height), and its masks are {there}")
            # down one column after another: a run of 0, one of 1, ...
            runs = _uncompressed(self.codes[self.starts[i] : self.starts[i + 1]])
            assert runs is not None  # run_lengths has looked
            runs = runs[: len(runs) // 2 * 2]
            if len(runs):
                # only the object's columns are drawn: it is a small part of the image
                end = int(runs.sum())
                left, right = int(runs[0]) // height, -(-end // height)
                runs = np.append(runs, right * height - end)
                runs[0] -= left * height
                columns = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
                mask[:, left:right] = columns.reshape(-1, height).T
        return masks


def coco_masks(chunks: Iterable[Tensor]) -> list[dict[str, Any]]:
    """Masks in COCO's results format: compressed run lengths, as JSON can hold them.

    Args:
        chunks: the masks of an image, some at a time: [some, H, W] bool on the host. It is fastest if a
            column lies beside the next in memory.
    """
    results = []
    for masks in chunks:
        columns_first = np.asfortranarray(masks.permute(1, 2, 0).numpy()).view(np.uint8)
        for runs in mask_utils.encode(columns_first):
            results.append({"size": runs["size"], "counts": runs["counts"].decode()})
    return results
