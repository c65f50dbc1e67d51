"""Image and box transforms of training and evaluation, on torchvision.transforms.v2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import PIL.Image
import torch
import torchvision.transforms.v2.functional as F
from torchvision.transforms import v2
from torchvision.tv_tensors import Image, TVTensor

from util.images.prepare import normalize, resize, resized

# matters only for images more than 50 times as long as wide: one of a single column would grow to
# gigabytes
_LONGEST_BEFORE_CROP = 2**15


def train_transform(
    sizes: Sequence[int],
    max_size: int,
    crop_resize_sizes: Sequence[int],
    crop_sizes: Sequence[int],
    augmentation: str,
) -> v2.Transform:
    """Random flip; then a random scale, or with equal chance a random crop before it ("DETR",
    section 4).

    Args:
        sizes: shorter sides to choose from.
        max_size: limit of the longer side.
        crop_resize_sizes: shorter sides to choose from before the crop.
        crop_sizes: smallest and largest side of the crop.
        augmentation: "published"; "flip" leaves out the crop, "none" the flip too.
    """
    steps: list[Callable] = []
    if augmentation != "none":
        steps.append(v2.RandomHorizontalFlip())
    scale = RandomShorterSide(sizes, max_size)
    if augmentation == "published":
        before_crop = RandomShorterSide(crop_resize_sizes, _LONGEST_BEFORE_CROP)
        crop = v2.Compose([before_crop, RandomCrop(*crop_sizes), scale])
        steps.append(v2.RandomChoice([scale, crop]))
    else:
        steps.append(scale)
    # further augmentations go here: before the normalisation, on a PIL image
    return v2.Compose([*steps, normalize()])


def eval_transform(size: int, max_size: int) -> v2.Transform:
    """The shorter side to `size`, the longer at most about `max_size`."""
    return v2.Compose([RandomShorterSide([size], max_size), normalize()])


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
        height, width = _size(flat_inputs)
        size = self.sizes[_random_int(0, len(self.sizes) - 1)]
        new_height, new_width = resized(height, width, size, self.max_size)
        return {"size": [new_height, new_width], "area_scale": new_height * new_width / (height * width)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, Area):
            return inpt * params["area_scale"]
        return resize(inpt, params["size"])


class RandomCrop(v2.Transform):
    """Crop to sides drawn from `smallest` to `largest` (or to the image's side where that is less)."""

    def __init__(self, smallest: int, largest: int) -> None:
        super().__init__()
        self.smallest, self.largest = smallest, largest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = _size(flat_inputs)
        crop_height, crop_width = self._side(height), self._side(width)
        top = _random_int(0, height - crop_height)
        left = _random_int(0, width - crop_width)
        return {"top": top, "left": left, "height": crop_height, "width": crop_width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, Area):
            return inpt
        return F.crop(inpt, **params)

    def _side(self, side: int) -> int:
        return _random_int(min(self.smallest, side), min(self.largest, side))


def _random_int(low: int, high: int) -> int:
    """Uniform, both ends included. Drawn from torch, which the data set seeds for every item."""
    return int(torch.randint(low, high + 1, ()))


def _size(flat_inputs: list[Any]) -> tuple[int, int]:
    """(height, width) of the image among the inputs."""
    image = next(x for x in flat_inputs if isinstance(x, (PIL.Image.Image, Image)))
    height, width = F.get_size(image)
    return int(height), int(width)
