"""Mutations of bytes, JSON documents, image files and checkpoints; all randomness comes from the
`random.Random` given.
"""

from __future__ import annotations

import copy
import io
import json
import os
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image

# ---- bytes

_LIMITS = (
    0,
    1,
    2,
    127,
    128,
    255,
    2**15 - 1,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**64 - 1,
)


def mutate_bytes(rng: Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """One to three random changes: flips, cuts, insertions, numbers at their limits, splices with
    one of `others`.
    """
    for _ in range(rng.choice((1, 1, 2, 3))):
        content = rng.choice(_BYTE_MUTATIONS)(rng, content, others)
    return content


def _flip(rng: Random, content: bytes, others: Sequence[bytes]) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 10, 40)) if changed else 0):
        changed[_position(rng, changed)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _truncate(rng: Random, content: bytes, others: Sequence[bytes]) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _insert(rng: Random, content: bytes, others: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.randbytes(rng.choice((1, 4, 100))) + content[at:]


def _cut(rng: Random, content: bytes, others: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + content[at + rng.choice((1, 4, 100)) :]


def _repeat(rng: Random, content: bytes, others: Sequence[bytes]) -> bytes:
    at, length = rng.randrange(len(content) + 1), rng.choice((1, 16, 200))
    return content[:at] + content[at : at + length] * rng.choice((2, 20)) + content[at + length :]


def _limit(rng: Random, content: bytes, others: Sequence[bytes]) -> bytes:
    size = rng.choice((1, 2, 4, 8))
    number = (rng.choice(_LIMITS) & (256**size - 1)).to_bytes(size, rng.choice(("little", "big")))
    at = _position(rng, content) if content else 0
    return content[:at] + number + content[at + size :]


def _splice(rng: Random, content: bytes, others: Sequence[bytes]) -> bytes:
    other = rng.choice(others)
    if rng.random() < 0.3:  # another one's header
        at = rng.choice((2, 4, 8, 16, 32, 64))
        return other[:at] + content[at:]
    return content[: rng.randrange(len(content) + 1)] + other[rng.randrange(len(other) + 1) :]


def _position(rng: Random, content: bytes | bytearray) -> int:
    """Anywhere, but often in the header, where the sizes are."""
    return rng.randrange(min(len(content), rng.choice((32, 128, len(content)))))


_BYTE_MUTATIONS: tuple[Callable[[Random, bytes, Sequence[bytes]], bytes], ...] = (
    _flip,
    _truncate,
    _insert,
    _cut,
    _repeat,
    _limit,
    _splice,
)


# ---- zip files


def mutate_zip(rng: Random, content: bytes, other: bytes) -> bytes:
    """Damage to whole blocks, or to what says where a zip file's records are; `other` has the same
    layout.
    """
    return rng.choice((_zip_field, _zip_field, _zip_entry, _blocks))(rng, content, other)


def _zip_field(rng: Random, content: bytes, other: bytes) -> bytes:
    """Another number in the header of a record, its entry in the directory, or the end of the
    directory.
    """
    found = rng.choice(list(re.finditer(rb"PK(\x01\x02|\x03\x04|\x05\x06|\x06\x06|\x06\x07)", content)))
    at, size = found.end() + rng.randrange(42), rng.choice((1, 2, 4, 8))
    one_bit_off = int.from_bytes(content[at : at + size], "little") ^ 1 << rng.randrange(8 * size)
    number = rng.choice((one_bit_off, one_bit_off, rng.choice(_LIMITS)))
    return content[:at] + (number & (256**size - 1)).to_bytes(size, "little") + content[at + size :]


def _zip_entry(rng: Random, content: bytes, other: bytes) -> bytes:
    """An entry of the directory lost, twice, in another place, or with the record of another."""
    data, *entries = re.split(rb"(?=PK\x01\x02|PK\x06\x06)", content)
    # the last piece is no entry
    i, j = rng.randrange(len(entries) - 1), rng.randrange(len(entries) - 1)
    how = rng.randrange(4)
    if how == 0:
        del entries[i]
    elif how == 1:
        entries[i] = entries[j]
    elif how == 2:
        entries[i], entries[j] = entries[j], entries[i]
    else:
        entries[i] = entries[i][:42] + entries[j][42:46] + entries[i][46:]
    return data + b"".join(entries)


def _blocks(rng: Random, content: bytes, other: bytes) -> bytes:
    """A block zeroed, lost, twice, in another's place, or of `other`, as a disk may give it back."""
    size = rng.choice((64, 512, 4096))
    blocks = [content[at : at + size] for at in range(0, len(content), size)]
    i, j = rng.randrange(len(blocks)), rng.randrange(len(blocks))
    at = i * size
    replaced = rng.choice((bytes(len(blocks[i])), b"", blocks[i] * 2, blocks[j], other[at : at + size]))
    return content[:at] + replaced + content[at + size :]


# ---- JSON


def mutate_json(rng: Random, document: Any) -> Any:
    """A copy with one to four random changes at random places."""
    root = [copy.deepcopy(document)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        holder, key = rng.choice(_places(root))
        rng.choice(_JSON_MUTATIONS)(rng, holder, key)
        if not root:
            return None
    return root[0] if len(root) == 1 else root


def json_text(rng: Random, document: Any) -> bytes:
    """As a file, now and then with what only a file can have: other encodings, a key twice, nesting
    without end.
    """
    text = json.dumps(document, ensure_ascii=rng.random() < 0.9)
    kind = rng.randrange(40)
    if kind == 0:
        text = re.sub(
            r'"(id|bbox|images|file_name)":', lambda found: f"{found[0]} 7, {found[0]}", text, count=1
        )
    elif kind == 1:
        text = text.replace(
            "0", rng.choice(("[" * 5000 + "]" * 5000, "1" * 6000, "1e999", "-0", "Infinity", "0x1")), 1
        )
    elif kind == 2:  # below the reader's limit, but not below that of whoever walks through it
        text = re.sub(
            r'"(description|name)": "[^"]*"',
            lambda found: f'"{found[1]}x": {"[" * 900}{"]" * 900}',
            text,
            count=1,
        )
    elif kind == 3:
        return text.encode(rng.choice(("utf-16", "utf-32", "utf-8-sig", "cp500")), "replace")
    return text.encode("utf-8", "surrogatepass")


def _places(root: list) -> list[tuple[Any, Any]]:
    """(container, key) of every value below `root`."""
    found, waiting = [], [root]
    while waiting:
        holder = waiting.pop()
        for key in holder if isinstance(holder, dict) else range(len(holder)):
            found.append((holder, key))
            if isinstance(holder[key], (dict, list)):
                waiting.append(holder[key])
    return found


def _delete(rng: Random, holder: Any, key: Any) -> None:
    del holder[key]


def _duplicate(rng: Random, holder: Any, key: Any) -> None:
    if isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
    else:
        holder[rng.choice(sorted(holder))] = copy.deepcopy(holder[key])


def _retype(rng: Random, holder: Any, key: Any) -> None:
    holder[key] = copy.deepcopy(rng.choice(_VALUES))


def _other_number(rng: Random, holder: Any, key: Any) -> None:
    value = holder[key]
    if isinstance(value, (int, float)):
        holder[key] = rng.choice(
            (value + 1, value * 2, value // 2, value % 7, -value, float(min(value, 1e300)), str(value))
        )
    else:
        _retype(rng, holder, key)


def _other_text(rng: Random, holder: Any, key: Any) -> None:
    holder[key] = rng.choice(_TEXTS)


def _wrap(rng: Random, holder: Any, key: Any) -> None:
    for _ in range(rng.choice((1, 1, 3, 300))):
        holder[key] = [holder[key]] if rng.random() < 0.5 else {"a": holder[key]}


def _add(rng: Random, holder: Any, key: Any) -> None:
    """What nobody asked for."""
    if isinstance(holder, dict):
        holder[rng.choice(("score", "ignore", "segmentation", "keypoints", "info", "attributes"))] = (
            rng.choice(_VALUES)
        )
    else:
        _duplicate(rng, holder, key)


def _rename(rng: Random, holder: Any, key: Any) -> None:
    if isinstance(holder, dict):
        holder[rng.choice((*_TEXTS, f"{key} ", key.upper()))] = holder.pop(key)
    else:
        _duplicate(rng, holder, key)


_JSON_MUTATIONS = (
    _delete,
    _duplicate,
    _retype,
    _other_number,
    _other_number,
    _other_number,
    _other_text,
    _wrap,
    _add,
    _add,
    _rename,
)
_NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    90,
    0.5,
    -0.0,
    1e-300,
    1e9,
    1e10,
    1e39,
    1e308,
    2**31,
    2**53,
    2**63 - 1,
    2**63,
    -(2**63),
    2**64,
    10**30,
    10**400,
    float("nan"),
    float("inf"),
    float("-inf"),
)
_TEXTS = (
    "",
    "0",
    "a.png",
    "..",
    ".",
    "/",
    "/etc/passwd",
    "../../../../etc/passwd",
    "images/../../x",
    "0.png/..",
    "C:\\x",
    "\\\\host\\x",
    "a\0b",
    "a\nb",
    "\ud800",
    "\u2028",
    "é",
    "x" * 5000,
    "/dev/zero",
    "/proc/self/mem",
    "id",
    "__class__",
    "$(touch x)",
    "`touch x`",
    "%s%n",
    "file:///etc/passwd",
    "http://127.0.0.1/x",
)
_VALUES = (
    *_NUMBERS,
    *_TEXTS,
    None,
    True,
    False,
    [],
    {},
    [1],
    [None] * 4,
    [[]],
    {"id": 1},
    [1, 2, 3, 4],
    ["1", "2", "3", "4"],
)


# ---- image files

# format -> the ways to save it: a mode, and what Pillow's writer takes
_WAYS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "JPEG": [
        ("RGB", {}),
        ("L", {}),
        ("CMYK", {}),
        ("RGB", {"progressive": True, "quality": 30}),
        ("RGB", {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}),
    ],
    "PNG": [
        *((mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
        ("P", {"transparency": 3}),
        ("RGB", {"save_all": True}),
    ],
    "GIF": [("P", {}), ("L", {"interlace": 0}), ("P", {"save_all": True, "transparency": 2})],
    "BMP": [(mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")],
    "TIFF": [
        *(
            ("RGB", {"compression": name})
            for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
        ),
        *((mode, {}) for mode in ("L", "CMYK", "I;16", "F", "RGBA", "P")),
        ("1", {"compression": "group4"}),
        ("RGB", {"save_all": True}),
    ],
    "WEBP": [("RGB", {}), ("RGBA", {"lossless": True}), ("RGBA", {"save_all": True})],
    "PPM": [(mode, {}) for mode in ("1", "L", "RGB", "F", "I;16")],
    "JPEG2000": [("RGB", {}), ("L", {"no_jp2": True}), ("RGBA", {})],
}


def image_files() -> list[bytes]:
    """Small valid files of all formats that are read, in many ways."""
    noise = np.random.default_rng(0).integers(0, 255, (24, 33, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((48, 37), Image.Resampling.BICUBIC)
    files = []
    for name, ways in _WAYS.items():
        for mode, options in ways:
            image = _deep(picture) if mode == "I;16" else picture.convert(mode)
            more = {"append_images": [image.rotate(180)]} if options.get("save_all") else {}
            file = io.BytesIO()
            image.save(file, name, **options, **more)
            files.append(file.getvalue())
    return files


def _deep(picture: Image.Image) -> Image.Image:
    """In 16 bits."""
    return Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)


def mutate_image(rng: Random, files: Sequence[bytes]) -> bytes:
    """A damaged one of `files`."""
    content = rng.choice(files)
    kind = rng.random()
    if content.startswith(_PNG) and kind < 0.5:
        return _mutate_png(rng, content)
    if kind < 0.2:
        content = _absurd_size(rng, content)
        return content if rng.random() < 0.7 else mutate_bytes(rng, content, files)
    return mutate_bytes(rng, content, files)


_PNG_CHUNKS = (
    b"PLTE",
    b"tRNS",
    b"iCCP",
    b"zTXt",
    b"iTXt",
    b"acTL",
    b"fcTL",
    b"fdAT",
    b"eXIf",
    b"sBIT",
    b"gAMA",
)
_PNG = b"\x89PNG\r\n\x1a\n"


def _mutate_png(rng: Random, content: bytes) -> bytes:
    """Damage inside a chunk, with a checksum that fits: otherwise the checksum is all that is ever
    tested.
    """
    chunks, at = [], len(_PNG)
    while at < len(content):
        (length,) = struct.unpack_from(">I", content, at)
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    for _ in range(rng.choice((1, 2))):
        i = rng.randrange(len(chunks))
        kind, body = chunks[i]
        how = rng.randrange(6)
        if how == 0:
            chunks.insert(rng.randrange(len(chunks)), chunks[i])
        elif how == 1:
            chunks[i] = (rng.choice((*_PNG_CHUNKS, rng.randbytes(4))), body)
        elif how == 2 and kind == b"IHDR":
            sizes = rng.choice((0, 1, 5000, 2**24, 2**31 - 1, 2**32 - 1)), rng.choice((0, 1, 5000, 2**31 - 1))
            chunks[i] = (kind, struct.pack(">II", *sizes) + body[8:])
        elif how == 3 and kind == b"IDAT":
            chunks[i] = (
                kind,
                zlib.compress(rng.randbytes(rng.choice((0, 10, 10_000))) + bytes(rng.choice((0, 10**6)))),
            )
        else:
            chunks[i] = (kind, mutate_bytes(rng, body, [body]))
    return _PNG + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def _absurd_size(rng: Random, content: bytes) -> bytes:
    """Another width and height in the header."""
    width, height = (rng.choice((0, 1, 999, 16383, 65535, 2**24, 2**31 - 1)) for _ in range(2))
    two = [min(size, 65535) for size in (width, height)]
    if content[:3] == b"GIF":
        return content[:6] + struct.pack("<HH", *two) + content[10:]
    if content[:2] == b"BM":
        return content[:18] + struct.pack("<ii", width, rng.choice((height, -height))) + content[26:]
    if content[:1] == b"P":
        return re.sub(rb"48\s37", b"%d %d" % (width, height), content, count=1)
    if content[12:16] == b"VP8X":
        return (
            content[:24] + width.to_bytes(4, "little")[:3] + height.to_bytes(4, "little")[:3] + content[30:]
        )
    if content[:2] == b"\xff\xd8":
        return _replaced(rb"(\xff[\xc0\xc2]..\x08)....", struct.pack(">HH", *two), content)
    if content[:4] == b"II*\0":
        return _replaced(_TIFF_SIZES, struct.pack("<I", rng.choice((width, height))), content)
    return _replaced(rb"(ihdr)........", struct.pack(">II", height, width), content)


# the tag of the width, the height, the rows of a strip, the width or the height of a tile, with its
# type and count
_TIFF_SIZES = rb"([\x00\x01\x16\x42\x43]\x01[\x03\x04]\x00\x01\x00\x00\x00)...."


def _replaced(pattern: bytes, end: bytes, content: bytes) -> bytes:
    """Everything that fits, its first group followed by `end`."""
    return re.sub(pattern, lambda found: found[1] + end, content, flags=re.DOTALL)


# ---- checkpoints


def mutate_state(rng: Random, content: Any) -> Any:
    """A copy of a tree of dicts, lists and tensors with one to three entries lost, renamed, swapped
    or replaced.
    """
    root = [copy.deepcopy(content)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = _places(root)
        if not places:
            break
        holder, key = rng.choice(places)
        how = rng.randrange(5)
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder, dict):
            names = (f"{key}x", f"module.{key}", str(key)[1:], "", "a\nb", 3, None, True, 2.5, (1, 2))
            holder[rng.choice(names)] = holder.pop(key)
        elif how == 2:
            other, name = rng.choice(places)
            if name in other if isinstance(other, dict) else name < len(other):
                holder[key] = copy.deepcopy(other[name])
        elif how == 3 and isinstance(holder[key], torch.Tensor):
            holder[key] = rng.choice(_TENSOR_MUTATIONS)(holder[key])
        else:
            holder[key] = copy.deepcopy(rng.choice(_ENTRIES))
    return root[0] if root else None


class Payload:
    """Unpickled by an unguarded reader, it would run a program."""

    def __init__(self, call: Callable, *args: str) -> None:
        self._call, self._args = call, args

    def __reduce__(self):
        return self._call, self._args

    def __deepcopy__(self, memo: dict) -> Payload:
        return self  # copied like others, it would run here


_TENSOR_MUTATIONS = (
    lambda t: t.double(),
    lambda t: t.half(),
    lambda t: t.long(),
    lambda t: t.bool(),
    lambda t: t.to(torch.complex64),
    lambda t: t.float().to(torch.float8_e4m3fn),
    lambda t: t.to(torch.uint16),
    lambda t: t.reshape(-1),
    lambda t: t[None],
    lambda t: t.expand(2, *t.shape),
    lambda t: t.new_zeros(0),
    lambda t: t.new_zeros(3, 1, 4),
    lambda t: t.float() * float("nan"),
    lambda t: t.float().to_sparse(),
    lambda t: torch.nn.Parameter(t.float()),
    lambda t: t.to("meta"),
    lambda t: t.tolist(),
)
_ENTRIES = (
    None,
    0,
    -1,
    2**70,
    float("nan"),
    "text",
    "a\nb",
    b"bytes",
    [],
    {},
    [1, "2", None],
    {"a": {"b": []}},
    {3: torch.zeros(2)},
    (1, 2),
    {1, 2},
    [[[[[[[[]]]]]]]],
    torch.zeros(()),
    torch.ones(2, 2),
    torch.float32,
    torch.Size([1]),
    Random,
    Payload(os.system, "true"),
    Payload(eval, "__import__('os').system('true')"),
)
