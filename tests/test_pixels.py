"""Pixels of more than 8 bits: scaled by one rule in files, PIL images, arrays and tensors, or
refused with the remedy.
"""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from datasets import build_dataset
from tests.helpers import SMALL_IMAGES, write_coco
from util.config import parse_config
from util.images.files import BadImageError, read_header, read_picture, to_8_bits
from util.images.prepare import as_picture

RAMP = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (48, 1))
GREYS = {
    "float": (RAMP, (RAMP * 255).round()),
    "8 bits": ((RAMP * 255).astype(np.uint16), (RAMP * 255).astype(np.uint16)),
    "10 bits": ((RAMP * 1023).astype(np.uint16), (RAMP * 1023).astype(np.uint16) // 4),
    "12 bits": ((RAMP * 4095).astype(np.uint16), (RAMP * 4095).astype(np.uint16) // 16),
    "14 bits": ((RAMP * 16383).astype(np.uint16), (RAMP * 16383).astype(np.uint16) // 64),
    "16 bits": ((RAMP * 65535).astype(np.uint16), (RAMP * 65535).astype(np.uint16) // 256),
    "int32": ((RAMP * 65535).astype(np.int32), (RAMP * 65535).astype(np.int32) // 256),
    "int32 of 12 bits": ((RAMP * 4095).astype(np.int32), (RAMP * 4095).astype(np.int32) // 16),
}
FILES = [
    (name, suffix)
    for name in GREYS
    for suffix in ("tif", "png", "pgm")
    if suffix == "tif" or GREYS[name][0].dtype == np.uint16
]


def seen(image: object) -> np.ndarray:
    """[H, W, 3] uint8 of what the detector gets."""
    return np.asarray(as_picture(image, 100))


def colours(wanted: np.ndarray) -> np.ndarray:
    return np.repeat(wanted.astype(np.uint8)[..., None], 3, 2)


@pytest.mark.parametrize(("name", "suffix"), FILES)
def test_a_file_is_scaled_as_its_numbers_are(tmp_path, name, suffix):
    numbers, wanted = GREYS[name]
    path = tmp_path / f"grey.{suffix}"
    Image.fromarray(numbers).save(path)
    np.testing.assert_array_equal(seen(path), colours(wanted))
    np.testing.assert_array_equal(seen(Image.open(path)), colours(wanted))


@pytest.mark.parametrize("name", GREYS)
def test_arrays_and_tensors_are_scaled_alike(name):
    numbers, wanted = GREYS[name]
    for image in (numbers, numbers[..., None], torch.from_numpy(numbers)[None], Image.fromarray(numbers)):
        np.testing.assert_array_equal(seen(image), colours(wanted))
    several = np.stack([numbers, numbers[::-1], numbers * 0], 2)
    alpha = np.full_like(numbers[..., None], 1 if name == "float" else 65535 if name == "int32" else 255)
    wanted = np.stack([wanted, wanted[::-1], wanted * 0], 2)
    for image in (several, torch.from_numpy(several).permute(2, 0, 1), np.concatenate([several, alpha], 2)):
        np.testing.assert_array_equal(seen(image), wanted)


def test_big_endian_files_and_maps_of_floats_are_scaled_alike(tmp_path):
    numbers, wanted = GREYS["12 bits"]
    Image.fromarray(numbers.astype(">u2")).save(tmp_path / "big.tif")
    np.testing.assert_array_equal(seen(tmp_path / "big.tif"), colours(wanted))
    Image.fromarray(RAMP).save(tmp_path / "map.pfm")
    np.testing.assert_array_equal(seen(tmp_path / "map.pfm"), colours(GREYS["float"][1]))


@pytest.mark.parametrize("suffix", ["tif", "jpg", "png"])
def test_an_upright_picture_is_turned_once(tmp_path, suffix):
    """Pillow itself turns TIFF files."""
    pixels = np.zeros((20, 30), np.uint8)
    pixels[:10, :10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # row 0 is the right side
    Image.fromarray(pixels).save(tmp_path / f"turned.{suffix}", exif=exif)
    upright = np.asarray(read_picture(tmp_path / f"turned.{suffix}", 100, ""))[..., 0]
    assert upright.shape == (30, 20)
    np.testing.assert_array_equal(upright > 128, np.rot90(pixels, -1) > 128)
    header = read_header(tmp_path / f"turned.{suffix}", 100, "")
    assert header.orientation == (1 if suffix == "tif" else 6)


def test_training_sees_what_prediction_sees(tmp_path):
    write_coco(tmp_path, num_train=1)
    path = tmp_path / "annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    content["images"][0]["file_name"] = "deep.tif"
    path.write_text(json.dumps(content))
    numbers = (np.tile(np.linspace(0, 1, 64), (48, 1)) * 4095).astype(np.uint16)
    Image.fromarray(numbers).save(tmp_path / "val2017/deep.tif")
    config = parse_config(
        ["--coco_path", str(tmp_path), *SMALL_IMAGES, "--eval_size", "48", "--max_size", "64"]
    )
    pixels, _ = build_dataset("val", config)[0]
    predicted = pil_to_tensor(read_picture(tmp_path / "val2017/deep.tif", 100, ""))
    assert torch.equal(pixels, predicted)


# ---- colours of 16 bits, of which Pillow reads the upper half


def write_png(path: Path, pixels: np.ndarray) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def write_tiff(path: Path, pixels: np.ndarray) -> None:
    """Uncompressed, little-endian, in one strip. The widths of the channels and the pixels follow
    the tags.
    """
    height, width, channels = pixels.shape
    data = pixels.astype("<u2").tobytes()
    after = 8 + 2 + 12 * 9 + 4
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, channels, after),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, after + 2 * channels),
        (277, 3, 1, channels),
        (278, 4, 1, height),
        (279, 4, 1, len(data)),
    ]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    path.write_bytes(
        b"II*\0"
        + struct.pack("<IH", 8, len(tags))
        + entries
        + bytes(4)
        + struct.pack("<H", 16) * channels
        + data
    )


COLOURS = np.stack([RAMP, RAMP[:, ::-1], RAMP / 2], 2)
WRITERS = pytest.mark.parametrize("write", [write_png, write_tiff])


@WRITERS
@pytest.mark.parametrize("largest", [65535, 16384])
def test_colours_of_16_bits_are_those_of_the_array(tmp_path, write, largest):
    pixels = (COLOURS * largest).astype(np.uint16)
    write(tmp_path / "deep", pixels)
    np.testing.assert_array_equal(seen(tmp_path / "deep"), pixels // 256)
    np.testing.assert_array_equal(seen(pixels), pixels // 256)


@WRITERS
def test_colours_of_fewer_bits_stored_as_16_are_refused_and_never_black(tmp_path, write):
    pixels = (COLOURS * 4095).astype(np.uint16)
    write(tmp_path / "deep", pixels)
    with pytest.raises(BadImageError, match="above 16383.*; scale all pictures") as error:
        seen(tmp_path / "deep")
    assert str(tmp_path / "deep") in str(error.value)
    np.testing.assert_array_equal(seen(pixels), pixels // 16)


# ---- what the rule does not cover


REFUSED = {
    "floats up to 255": (RAMP * 255, "from 0 to 255"),
    "floats below 0": (RAMP - 1, "from -1 to 0"),
    "not a number": (np.where(RAMP > 0.5, np.nan, RAMP), "from nan to nan"),
    "more than 16 bits": ((RAMP * 2**20).astype(np.int32), "from 0 to 1048576"),
    "signed": ((RAMP * 2000).astype(np.int32) - 1000, "from -1000 to 1000"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_numbers_are_refused_with_the_remedy(tmp_path, name):
    numbers, told = REFUSED[name]
    Image.fromarray(numbers).save(tmp_path / "grey.tif")
    for image in (tmp_path / "grey.tif", numbers, torch.from_numpy(numbers)[None], Image.fromarray(numbers)):
        with pytest.raises(BadImageError, match="; scale all pictures of the data by one factor") as error:
            seen(image)
        assert told in str(error.value)
        assert len(str(error.value).splitlines()) == 1
        assert str(image) in str(error.value) or not isinstance(image, Path)


def test_channels_that_pillow_lacks_are_refused_with_the_remedy(tmp_path):
    path = tmp_path / "grey.tif"
    Image.fromarray(RAMP.astype(np.float32)).save(path)
    bits = struct.Struct("<HHIHH")  # the TIFF entry of bits a sample
    path.write_bytes(path.read_bytes().replace(bits.pack(258, 3, 1, 32, 0), bits.pack(258, 3, 1, 64, 0)))
    with pytest.raises(
        BadImageError, match=r"grey\.tif can't be decoded .*channels.*store it with 8 bits a channel"
    ):
        seen(path)


WHOLE = st.sampled_from([np.uint8, np.uint16, np.int32, np.uint32, np.int64])


@settings(deadline=None, derandomize=True)
@given(WHOLE, st.lists(st.integers(0, 65535), min_size=2, max_size=30))
def test_whole_numbers_keep_their_order_and_the_largest_is_never_dark(dtype, numbers):
    pixels = np.array(numbers).astype(dtype).reshape(1, -1)
    scaled = to_8_bits(pixels)
    assert scaled.dtype == np.uint8
    order = np.argsort(pixels[0], kind="stable")
    assert (np.diff(scaled[0][order].astype(int)) >= 0).all()
    if pixels.max() <= 255:
        np.testing.assert_array_equal(scaled, pixels)
    else:
        assert scaled.max() >= 64, "2 bits from one depth to the next"
