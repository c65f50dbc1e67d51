"""From a picture to the detector's input, the same for training, evaluation and prediction."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torchvision.transforms.v2.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from util.errors import UserError
from util.images.files import as_rgb, read_picture, to_8_bits

ImageLike = str | os.PathLike | Image.Image | np.ndarray | Tensor

_SEVERAL = "give several as a list"


def as_picture(image: ImageLike, megapixels: float) -> Image.Image:
    """An RGB picture of an image in any usual form.

    Args:
        image: a path; a PIL image, whose pixels are taken as they lie; an array [H, W], [H, W, 1],
            [H, W, 3] or [H, W, 4]; a tensor [1, H, W], [3, H, W] or [4, H, W] on any device. Three
            channels are RGB, of four the last is left out. Numbers become 8 bits by the rule of
            files (util.images.files.to_8_bits).
        megapixels: larger files are refused before they are decoded.

    Raises:
        BadImageError: the file, or a number of the image, can't be used.
        UserError: the array is none of these; the message says which it should be.
        TypeError: it is something else.
    """
    if isinstance(image, str | os.PathLike):
        return read_picture(Path(image), megapixels, "or leave it out")
    if isinstance(image, Image.Image):
        return as_rgb(image)
    if isinstance(image, Tensor):
        return _picture_of_tensor(image)
    if isinstance(image, np.ndarray):
        return _picture_of_array(image)
    raise TypeError(f"an image is a path, a PIL image, an array or a tensor, not {type(image).__name__}")


def _picture_of_tensor(image: Tensor) -> Image.Image:
    shape = list(image.shape)
    if len(shape) != 3 or shape[0] not in (1, 3, 4):
        raise UserError(f"a tensor of shape {shape} is no image: it must be [3, H, W]; {_SEVERAL}")
    if image.is_floating_point():
        image = image.float()  # NumPy has no bfloat16
    return _picture_of_array(image.detach().permute(1, 2, 0).cpu().numpy())


def _picture_of_array(image: np.ndarray) -> Image.Image:
    # [H, W] is [H, W, 1]
    shape = list(image.shape)
    channels = shape[2] if len(shape) == 3 else 1
    if len(shape) not in (2, 3) or channels not in (1, 3, 4) or 0 in shape:
        raise UserError(f"an array of shape {shape} is no image: it must be [H, W, 3]; {_SEVERAL}")
    # one channel is grey, and a fourth would be transparency
    image = image.reshape(shape[:2]) if channels == 1 else image[..., :3]
    return as_rgb(Image.fromarray(np.ascontiguousarray(to_8_bits(image))))


def prepare(image: Image.Image, size: int, max_size: int) -> Tensor:
    """An RGB picture as evaluation gives it to the detector: uint8 [3, H, W].

    Args:
        size: the shorter side, in pixels.
        max_size: limit of the longer side (see `resized`).
    """
    height, width = resized(image.height, image.width, size, max_size)
    return F.pil_to_tensor(resize(image, [height, width]))


def resize(inpt: Any, size: list[int]) -> Any:
    """An image, or boxes on one, brought to `size` (height, width)."""
    return F.resize(inpt, size, v2.InterpolationMode.BILINEAR, antialias=True)


def resized(height: int, width: int, size: int, max_size: int | None) -> tuple[int, int]:
    """(height, width) with the shorter side at `size`, or less if the longer would exceed `max_size`.

    As published: the limited side is rounded and the other truncated, so the longer one may exceed
    `max_size` by a pixel or two.
    """
    # published code, kept as it is: each rounding counts
    shorter, longer = sorted((height, width))
    if max_size is not None and longer / shorter * size > max_size:
        size = round(max_size * shorter / longer)
    if shorter == size:
        return height, width
    if width < height:
        height, width = int(size * height / width), size
    else:
        height, width = size, int(size * width / height)
    return max(height, 1), max(width, 1)
