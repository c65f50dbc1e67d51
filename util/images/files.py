"""Image files from anywhere, read safely.

Only regular files are opened, nothing of absurd size is decoded, and nothing is executed.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from util.errors import UserError

# bitmaps that Pillow decodes by itself; for others it starts programs (EPS: Ghostscript)
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000")
_UNKNOWN_FORMAT = (
    f"can't be decoded (no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image, or of channels "
    "that Pillow lacks)"
)
_STORE_IT = "replace the file, or store it with 8 bits a channel"
# four channels of 32 bits: no image that is small enough has a larger file, metadata aside
_BYTES_PER_PIXEL = 16
_METADATA_BYTES = 2**24

# Pillow's own limit would refuse crops too. --max_image_megapixels replaces it while a file is decoded
Image.MAX_IMAGE_PIXELS = None
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class BadImageError(UserError):
    """An image file that can't be used.

    Args:
        path: the file, as the message names it.
        reason: what is wrong, to be read after the path ("can't be read (...)").
        remedy: what to do about it.
    """

    def __init__(self, path: str, reason: str, remedy: str) -> None:
        super().__init__(path, reason, remedy)  # as given: workers send it by its arguments
        self.path, self.reason, self.remedy = path, reason, remedy

    def __str__(self) -> str:
        return f"{self.path} {self.reason}; {self.remedy}"


def read_regular_file(path: Path) -> bytes:
    """The content of a regular file, or of one that a link leads to.

    Raises OSError; also for a pipe or a device, which could block the reader for ever.
    """
    _require_regular(path)
    return path.read_bytes()


def _require_regular(path: Path) -> None:
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(0, "not a regular file")


def read_image_file(path: Path, megapixels: float, otherwise: str) -> bytes:
    """The bytes of an image file.

    Raises BadImageError if it can't be read, or is longer than an image within
    --max_image_megapixels can be; `otherwise` ends the remedy.
    """
    try:
        if os.stat(path).st_size > megapixels * 1e6 * _BYTES_PER_PIXEL + _METADATA_BYTES:
            reason, remedy = _too_large("is a file longer", megapixels)
            raise BadImageError(str(path), reason, f"{remedy}, {otherwise}")
        return read_regular_file(path)
    except OSError as error:
        raise BadImageError(
            str(path), f"can't be read ({error.strerror or error})", f"add the file, {otherwise}"
        ) from None


def decode(
    content: bytes, path: Path, megapixels: float, otherwise: str, *, upright: bool = False
) -> Image.Image:
    """The image in the bytes of the file `path`, as RGB of 8 bits (as_rgb).

    `upright`: turned as the file's EXIF orientation says, which is how viewers show it. Data sets
    leave it: their boxes refer to the pixels as they are stored.

    Raises BadImageError if it is no whole image of one of FORMATS, has numbers that `to_8_bits`
    refuses, or is larger than `megapixels` by its header: then nothing of it is decoded.
    `otherwise` ends the remedy.
    """
    limit = int(megapixels * 1e6)
    remedy = "replace the file"
    try:
        with _pillow_limit(limit):
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            if image.width * image.height > limit:
                raise Image.DecompressionBombError(f"{image.width * image.height} pixels")
            picture = as_rgb(image)
            # after decoding, which may turn the picture and change its metadata
            turn = _UPRIGHT.get(_orientation(image)) if upright else None
            return picture if turn is None else picture.transpose(turn)
    except BadImageError as error:
        reason, remedy = error.reason, error.remedy
    except UnidentifiedImageError:
        reason, remedy = _UNKNOWN_FORMAT, _STORE_IT
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        reason, remedy = _too_large(
            f"has {int(pixels[0]) / 1e6:.4g} megapixels, more" if pixels else "is larger", megapixels
        )
    except Exception as error:  # a broken file can fail anywhere in a decoder
        reason = f"can't be decoded ({_in_a_line(error)})"
    raise BadImageError(str(path), reason, f"{remedy}, {otherwise}")


class Header(NamedTuple):
    """size: (width, height) in pixels as stored, as `decode` returns it by default.

    orientation: EXIF's, 1 to 8, by which viewers turn or mirror the image (1: not at all; from 5 on
    the sides are exchanged).
    """

    size: tuple[int, int]
    orientation: int


def read_header(path: Path, megapixels: float, otherwise: str) -> Header:
    """Size and orientation of an image file, without decoding it. Raises BadImageError."""
    try:
        _require_regular(path)
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height <= int(megapixels * 1e6):
                turned_by_decoding = image.format == "TIFF"  # by Pillow, which leaves nothing to do
                return Header(image.size, 1 if turned_by_decoding else _orientation(image))
            reason, remedy = _too_large(
                f"has {image.width * image.height / 1e6:.4g} megapixels, more", megapixels
            )
    except UnidentifiedImageError:
        reason, remedy = _UNKNOWN_FORMAT, _STORE_IT
    except OSError as error:
        reason, remedy = f"can't be read ({error.strerror or _in_a_line(error)})", "add the file"
    except Exception as error:  # a broken file can fail anywhere
        reason, remedy = f"can't be decoded ({_in_a_line(error)})", "replace the file"
    raise BadImageError(str(path), reason, f"{remedy}, {otherwise}")


def _orientation(image: Image.Image) -> int:
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # Pillow would decode all of it to look behind the pixels
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # metadata can be broken in any way
        return 1
    return value if value in range(1, 9) else 1


def _too_large(what: str, megapixels: float) -> tuple[str, str]:
    return f"{what} than --max_image_megapixels {megapixels:g} allows", "scale the image down, raise the flag"


@contextlib.contextmanager
def _pillow_limit(pixels: int) -> Iterator[None]:
    """Let Pillow refuse what is far larger: some decoders allocate all pixels before we know the size."""
    Image.MAX_IMAGE_PIXELS = pixels  # it raises above twice this
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = None


# EXIF orientation -> what undoes it (Exif 3.0, section 4.6.5.1.6)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# bits that cameras, scanners and screens have for a number
_DEPTHS = (8, 10, 12, 14, 16)
_SCALE_IT = "scale all pictures of the data by one factor, to uint8 or to floats in [0, 1]"


def as_rgb(image: Image.Image) -> Image.Image:
    """Any image as RGB of 8 bits; numbers of more bits are scaled by `to_8_bits`, where Pillow
    would cut them off at 255.

    `info["bits"]` of the result is `bit_depth` of such numbers, if they are integers. Raises
    BadImageError as `to_8_bits` does.
    """
    # one channel of integers (I) or floats (F)
    if image.mode[0] in "IF":
        numbers = np.asarray(image)
        picture = Image.fromarray(to_8_bits(numbers)).convert("RGB")
        if image.mode[0] == "I":
            picture.info["bits"] = bit_depth(numbers)
        return picture

    # Pillow reads only the upper 8 bits of colours of 16: what to_8_bits gives, unless the numbers
    # have fewer
    upper_half = any(";16" in str(tile) for tile in getattr(image, "tile", ()))
    picture = image.convert("RGB")
    if upper_half:
        if np.asarray(picture).max() < 2**6:
            reason = (
                "has colours of 16 bits but no number above 16383, so what can be read of it is nearly black"
            )
            raise BadImageError("an image", reason, _SCALE_IT)
        picture.info["bits"] = 16
    return picture


def to_8_bits(numbers: np.ndarray) -> np.ndarray:
    """The numbers of a picture as uint8, by one rule for files, arrays and tensors.

    Floats must lie in [0, 1]; they are multiplied by 255 and rounded. Integers of any dtype must lie
    in 0 to 65535; the upper 8 of `bit_depth` bits are taken, so numbers up to 255 do not change.

    Raises BadImageError for any others.
    """
    if np.issubdtype(numbers.dtype, np.floating):
        if not ((numbers >= 0) & (numbers <= 1)).all():  # NaN does not lie in [0, 1] either
            reason = f"has floats outside of [0, 1], from {numbers.min():g} to {numbers.max():g}"
            raise BadImageError("an image", reason, _SCALE_IT)
        return (numbers * 255).round().astype(np.uint8)
    if not np.issubdtype(numbers.dtype, np.integer):
        raise BadImageError(
            "an image", f"has numbers of type {numbers.dtype}", "give uint8, or floats in [0, 1]"
        )
    low, high = int(numbers.min()), int(numbers.max())
    if low < 0 or high >= 2 ** _DEPTHS[-1]:
        reason = f"has numbers of {numbers.dtype} outside of 0 to 65535, from {low} to {high}"
        raise BadImageError("an image", reason, _SCALE_IT)
    return (numbers >> (bit_depth(numbers) - 8)).astype(np.uint8)


def bit_depth(numbers: np.ndarray) -> int:
    """The smallest of 8, 10, 12, 14 and 16 bits that hold the largest of integers from 0 to 65535."""
    largest = int(numbers.max())
    return next(depth for depth in _DEPTHS if largest < 2**depth)


def _in_a_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
