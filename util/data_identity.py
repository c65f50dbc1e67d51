"""Which data a run trains on, small enough for a checkpoint: a resumed run says what has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np


@dataclass(frozen=True)
class DataIdentity:
    """How many images and annotations a data set has, and checksums of them.

    images_sum: of ids and file names in the order of the items, which the order of an interrupted
    epoch refers to. annotations_sum: of image, category, box and crowd flag of every object.
    """

    images: int
    annotations: int
    images_sum: str
    annotations_sum: str

    @classmethod
    def of(
        cls, images: Iterable[Mapping[str, Any]], annotations: Iterable[Mapping[str, Any]]
    ) -> DataIdentity:
        """Of COCO's `images` and `annotations` in the order of the items."""
        # the line ends keep "1 2" + "3" apart from "1" + "23"
        names = [f"{image['id']} {image['file_name']}\n" for image in images]
        numbers, boxes = [], []
        for item in annotations:
            numbers.append((item["image_id"], item["category_id"], item["iscrowd"]))
            boxes.append(item["bbox"])
        # fixed types: how a number is written in the file does not matter
        objects = np.array(numbers, np.int64).tobytes() + np.array(boxes, np.float64).tobytes()
        sums = [hashlib.sha256(data).hexdigest() for data in ("".join(names).encode(), objects)]
        return cls(len(names), len(boxes), *sums)

    def to_plain(self) -> dict[str, Any]:
        """As a checkpoint holds it."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> DataIdentity:
        """The reverse of `to_plain`. Raises TypeError for damaged entries."""
        # a later version may have more
        return cls(**{item.name: plain[item.name] for item in fields(cls)})

    def changes_since(self, before: DataIdentity) -> list[str]:
        """What is different, for a message after the word "now"."""
        # one reason for each kind: other numbers imply other sums
        changes = []
        if self.images != before.images:
            changes.append(f"{self.images} images instead of {before.images}")
        elif self.images_sum != before.images_sum:
            changes.append(f"{self.images} images with other ids or file names")
        if self.annotations != before.annotations:
            changes.append(f"{self.annotations} annotations instead of {before.annotations}")
        elif self.annotations_sum != before.annotations_sum:
            changes.append(f"{self.annotations} annotations with other boxes, classes or images")
        return changes
