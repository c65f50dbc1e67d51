"""The masks of segments, read from the maps as they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datasets.panoptic.format import PanopticSet, read_map
from datasets.respell import absent_names
from util.errors import UserError
from util.images.files import BadImageError


@dataclass(frozen=True)
class SegmentMasks:
    """The masks of N segments, without crowds. Arrays, which loader workers share (RunLengths says why).

    files: [images] names of the maps in `folder`; image: [N] places in them; ids: [N] in the maps.
    annotations, megapixels: for messages, and the limit of --max_image_megapixels.
    """

    folder: Path
    files: np.ndarray
    image: np.ndarray
    ids: np.ndarray
    annotations: Path
    megapixels: float

    @classmethod
    def of(cls, objects: Iterable[dict[str, Any]], data: PanopticSet, megapixels: float) -> SegmentMasks:
        """Of the objects of `data.as_instances()`. Raises UserError if maps are missing."""
        names = [annotation["file_name"] for annotation in data.annotations.values()]
        if missing := absent_names(data.folder, names):
            first = data.folder / next(name for name in names if name in missing)
            raise UserError(
                f"missing panoptic maps of {data.path}: {len(missing)}, first {first}; add them, or take "
                f"their images out"
            )
        places = {image_id: place for place, image_id in enumerate(data.annotations)}
        single = [entry for entry in objects if not entry["iscrowd"]]
        image = np.array([places[entry["image_id"]] for entry in single], np.int32)
        ids = np.array([entry["segment"] for entry in single], np.int32)
        return cls(data.folder, np.array(names), image, ids, data.path, megapixels)

    def decoded(self, objects: Sequence[int], height: int, width: int) -> np.ndarray:
        """The masks of some segments of an image, [n, H, W] uint8 of 0 and 1.

        Raises BadImageError if the map can't be read, has another size, or lacks a segment.
        """
        if not objects:
            return np.zeros((0, height, width), np.uint8)
        path = self.folder / str(self.files[self.image[objects[0]]])
        remedy = f"take its image out of {self.annotations}, or add --on_bad_image skip"
        ids = read_map(path, self.megapixels, remedy)
        if ids.shape != (height, width):
            sizes = f"is {ids.shape[1]} x {ids.shape[0]} pixels, and its image {width} x {height}"
            raise BadImageError(str(path), sizes, remedy)
        masks = ids == self.ids[objects][:, None, None]
        empty = ~masks.any((1, 2))
        if empty.any():
            number = self.ids[objects][empty.argmax()]
            raise BadImageError(str(path), f"has no pixel of segment {number}, which is listed", remedy)
        return masks.view(np.uint8)
