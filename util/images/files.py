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
from typing import NamedTuple, cast

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from util.errors import UserError

# bitmaps that Pillow decodes by itself; for others it starts programs (EPS: Ghostscript)
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000")
_UNKNOWN_FORMAT = f"can't be decoded (no {', '.join(FORMATS)} image, or of channels that Pillow lacks)"
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

    Raises OSError; also for a pipe or a device, which could block the reader forever.
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
    with _bad_image_errors(path, megapixels, otherwise):
        if os.stat(path).st_size > megapixels * 1e6 * _BYTES_PER_PIXEL + _METADATA_BYTES:
            raise _too_large("is a file longer", megapixels)
        return read_regular_file(path)


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
    with _bad_image_errors(path, megapixels, otherwise):
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        _check_size(image, megapixels)
        picture = as_rgb(image)
        if upright:
            # after decoding, which may turn the picture and change its metadata
            turn = _UPRIGHT.get(_orientation(image))
            if turn is not None:
                return picture.transpose(turn)
        return picture


def read_picture(path: Path, megapixels: float, otherwise: str, *, upright: bool = True) -> Image.Image:
    """The RGB picture in a file; by default as viewers show it. Raises BadImageError.

    The arguments are those of `decode`.
    """
    content = read_image_file(path, megapixels, otherwise)
    return decode(content, path, megapixels, otherwise, upright=upright)


class Header(NamedTuple):
    """size: (width, height) in pixels as stored, as `decode` returns it by default.

    orientation: EXIF's, 1 to 8, by which viewers turn or mirror the image (1: not at all; from 5 on
    the sides are exchanged).
    """

    size: tuple[int, int]
    orientation: int


def read_header(path: Path, megapixels: float, otherwise: str) -> Header:
    """Size and orientation of an image file, without decoding it. Raises BadImageError."""
    with _bad_image_errors(path, megapixels, otherwise):
        _require_regular(path)
        with Image.open(path, formats=FORMATS) as image:
            _check_size(image, megapixels)
            # Pillow turns TIFF files itself when it decodes them
            orientation = 1 if image.format == "TIFF" else _orientation(image)
            return Header(image.size, orientation)


def _check_size(image: Image.Image, megapixels: float) -> None:
    pixels = image.width * image.height
    if pixels > int(megapixels * 1e6):
        raise Image.DecompressionBombError(f"{pixels} pixels")


def _orientation(image: Image.Image) -> int:
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # Pillow would decode all of it to look behind the pixels
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # metadata can be broken in any way
        return 1
    return value if value in _UPRIGHT else 1


@contextlib.contextmanager
def _bad_image_errors(path: Path, megapixels: float, otherwise: str) -> Iterator[None]:
    """Raise every error of the block as a BadImageError of the file `path`.

    Pillow refuses what is far larger than `megapixels`: some decoders allocate all pixels before we
    know the size.
    """
    Image.MAX_IMAGE_PIXELS = int(megapixels * 1e6)  # it raises above twice this
    try:
        yield
        return
    except BadImageError as error:
        bad = error
    except UnidentifiedImageError:
        bad = BadImageError("", _UNKNOWN_FORMAT, "replace the file, or store it with 8 bits a channel")
    except Image.DecompressionBombError as error:
        pixels = re.findall(r"\d+", str(error))
        what = f"has {int(pixels[0]) / 1e6:.4g} megapixels, more" if pixels else "is larger"
        bad = _too_large(what, megapixels)
    except Exception as error:  # a broken file can fail anywhere in a decoder
        text = " ".join(str(error).split())[:200] or type(error).__name__
        bad = BadImageError("", f"can't be decoded ({text})", "replace the file")
        # an error of the file system, not of a decoder
        if isinstance(error, OSError) and error.strerror:
            bad = BadImageError("", f"can't be read ({error.strerror})", "add the file")
    finally:
        Image.MAX_IMAGE_PIXELS = None
    raise BadImageError(str(path), bad.reason, f"{bad.remedy}, {otherwise}") from None


def _too_large(what: str, megapixels: float) -> BadImageError:
    reason = f"{what} than --max_image_megapixels {megapixels:g} allows"
    return BadImageError("", reason, "scale the image down, raise the flag")


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
        if max(high for _, high in rgb_extrema(picture)) < 2**6:
            raise _wrong_numbers(
                "colours of 16 bits but no number above 16383, so what can be read of it is nearly black"
            )
        picture.info["bits"] = 16
    return picture


def rgb_extrema(picture: Image.Image) -> list[tuple[int, int]]:
    """The lowest and the highest number of each channel of an RGB picture."""
    return cast(list[tuple[int, int]], picture.getextrema())


def to_8_bits(numbers: np.ndarray) -> np.ndarray:
    """The numbers of a picture as uint8, by one rule for files, arrays and tensors.

    Floats must lie in [0, 1]; they are multiplied by 255 and rounded. Integers of any dtype must lie
    in 0 to 65535; the upper 8 of `bit_depth` bits are taken, so numbers up to 255 do not change.

    Raises BadImageError for any others.
    """
    if not np.issubdtype(numbers.dtype, np.floating) and not np.issubdtype(numbers.dtype, np.integer):
        raise _wrong_numbers(f"numbers of type {numbers.dtype}", "give uint8, or floats in [0, 1]")
    low, high = numbers.min(), numbers.max()
    if np.issubdtype(numbers.dtype, np.floating):
        if not (low >= 0 and high <= 1):  # NaN does not lie in [0, 1] either
            raise _wrong_numbers(f"floats outside of [0, 1], from {low:g} to {high:g}")
        return (numbers * 255).round().astype(np.uint8)
    if low < 0 or high >= 2**16:
        raise _wrong_numbers(f"numbers of {numbers.dtype} outside of 0 to 65535, from {low} to {high}")
    return (numbers >> (bit_depth(numbers) - 8)).astype(np.uint8)


def _wrong_numbers(what: str, remedy: str = _SCALE_IT) -> BadImageError:
    return BadImageError("an image", f"has {what}", remedy)


def bit_depth(numbers: np.ndarray) -> int:
    """The smallest of 8, 10, 12, 14 and 16 bits that hold the largest of integers from 0 to 65535."""
    # cameras, scanners and screens have these
    largest = int(numbers.max())
    return next(depth for depth in (8, 10, 12, 14, 16) if largest < 2**depth)
