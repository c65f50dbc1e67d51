"""From a picture to the detector's input: one size and normalisation for training, evaluation and prediction."""

from __future__ import annotations

from typing import Any

import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which the backbones were trained on


def prepare(image: Image.Image, size: int, max_size: int) -> Tensor:
    """An RGB picture as evaluation gives it to the detector: float32 [3, H, W], normalised.

    Args:
        size: the shorter side, in pixels.
        max_size: limit of the longer side (see `resized`).
    """
    height, width = resized(image.height, image.width, size, max_size)
    return normalize()(resize(image, [height, width])).as_subclass(Tensor)


def normalize() -> v2.Transform:
    """PIL image -> float32 [3, H, W], normalised."""
    return v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def resize(inpt: Any, size: list[int]) -> Any:
    """An image, or boxes on one, brought to `size` (height, width)."""
    return F.resize(inpt, size, v2.InterpolationMode.BILINEAR, antialias=True)


def resized(height: int, width: int, size: int, max_size: int | None) -> tuple[int, int]:
    """(height, width) with the shorter side at `size`, or less where the longer would exceed `max_size`.

    As published: the limited side is rounded and the other truncated, so the longer one may exceed `max_size` by a pixel or two.
    """
    shorter, longer = min(height, width), max(height, width)
    if max_size is not None and longer / shorter * size > max_size:
        size = round(max_size * shorter / longer)
    if shorter == size:
        return height, width
    if width < height:
        return max(int(size * height / width), 1), max(size, 1)
    return max(size, 1), max(int(size * width / height), 1)
