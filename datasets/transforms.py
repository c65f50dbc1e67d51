"""Image and box transforms of training and evaluation, on torchvision.transforms.v2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from torchvision.transforms import v2
from torchvision.tv_tensors import Mask, TVTensor

from util.config import DataConfig
from util.images.prepare import resize, resized

# matters only for images more than 50 times as long as wide: one of a single column would grow to
# gigabytes
_LONGEST_BEFORE_CROP = 2**15


def train_transform(data: DataConfig) -> v2.Transform:
    """Random flip; then a random scale, or with equal chance a random crop before it ("DETR",
    section 4).

    data.augmentation "flip" leaves out the crop, "none" the flip too.
    """
    scale = RandomShorterSide(data.train_sizes, data.max_size)
    steps: list[Callable] = [scale]
    if data.augmentation == "published":
        # no practical limit: the crop makes it small again
        before_crop = RandomShorterSide(data.crop_resize_sizes, _LONGEST_BEFORE_CROP)
        crop = v2.Compose([before_crop, RandomCrop(*data.crop_sizes), scale])
        steps = [v2.RandomChoice([scale, crop])]
    if data.augmentation != "none":
        steps.insert(0, v2.RandomHorizontalFlip())
    # further augmentations go here, on a PIL image
    return v2.Compose([*steps, v2.ToImage()])


def eval_transform(size: int, max_size: int) -> v2.Transform:
    """The shorter side to `size`, the longer at most about `max_size`."""
    return v2.Compose([RandomShorterSide([size], max_size), v2.ToImage()])


class Area(TVTensor):
    """[n] areas in pixels of the image beside them.

    Resizing scales them. Cropping leaves them unchanged, as published.
    """


class RandomShorterSide(v2.Transform):
    """Resize the shorter side to a random one of `sizes`; the longer is at most about `max_size`."""

    def __init__(self, sizes: Sequence[int], max_size: int | None) -> None:
        super().__init__()
        self.sizes, self.max_size = tuple(sizes), max_size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        # areas grow by the real factor, which rounding changes a little
        size = self.sizes[_random_int(0, len(self.sizes) - 1)]
        new_height, new_width = resized(height, width, size, self.max_size)
        return {"size": [new_height, new_width], "area_scale": new_height * new_width / (height * width)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, Area):
            return inpt * params["area_scale"]
        if isinstance(inpt, Mask):
            return _resized_mask(inpt, *params["size"])
        return resize(inpt, params["size"])


class RandomCrop(v2.Transform):
    """Crop to sides drawn from `smallest` to `largest` (or to the image's side where that is less)."""

    def __init__(self, smallest: int, largest: int) -> None:
        super().__init__()
        self.smallest, self.largest = smallest, largest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        crop_height, crop_width = self._side(height), self._side(width)
        # the order of the draws is part of an item's augmentation: it must not change
        top = _random_int(0, height - crop_height)
        left = _random_int(0, width - crop_width)
        return {"top": top, "left": left, "height": crop_height, "width": crop_width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, Area):
            return inpt
        return F.crop(inpt, **params)

    def _side(self, side: int) -> int:
        return _random_int(min(self.smallest, side), min(self.largest, side))


def _resized_mask(masks: Mask, height: int, width: int) -> Mask:
    """[n, H, W] at another size: each pixel is the one at its centre.

    torchvision takes the one at its upper left corner, which shifts a mask by half a pixel. It also
    takes longer: an object is a small part of its mask, and only that part is resized here.
    """
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64)
        for new, old in zip((height, width), masks.shape[1:], strict=True)
    )
    resized = np.zeros((len(masks), height, width), np.uint8)
    for new, old in zip(resized, masks.numpy(), strict=True):
        in_columns = np.flatnonzero(old.max(0))
        if len(in_columns):
            old = old[:, in_columns[0] : in_columns[-1] + 1]
            in_rows = np.flatnonzero(old.max(1))
            old = old[in_rows[0] : in_rows[-1] + 1]
            # the pixels that come from the object's box; rows are copied whole, so they come last
            top, bottom = np.searchsorted(rows, [in_rows[0], in_rows[-1] + 1])
            left, right = np.searchsorted(columns, [in_columns[0], in_columns[-1] + 1])
            wide = old.take(columns[left:right] - in_columns[0], 1)
            new[top:bottom, left:right] = wide.take(rows[top:bottom] - in_rows[0], 0)
    return Mask(torch.from_numpy(resized))


def _random_int(low: int, high: int) -> int:
    """Uniform, both ends included. Drawn from torch, which the data set seeds for every item."""
    return int(torch.randint(low, high + 1, ()))
