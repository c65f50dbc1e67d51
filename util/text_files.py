"""Text files: those that other programs wrote (lists, class names, labels, YAML), and ours, which
are replaced as a whole.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from util.errors import UserError
from util.images.files import read_regular_file

# UTF-32 first: its mark begins with that of UTF-16
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class Line(NamedTuple):
    """number: counts from 1. text: without spaces and quotes around it."""

    number: int
    text: str


def read_text(path: Path) -> str:
    r"""The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark; all line ends
    are \n.

    Raises:
        UserError: the file can't be read, or is no text.
    """
    try:
        content = read_regular_file(path)
        encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8-sig")
        text = content.decode(encoding)
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text; save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a file, without empty ones and those that begin with #.

    Raises:
        UserError: as `read_text`, before the first line.
    """
    lines = enumerate(read_text(path).split("\n"), 1)
    stripped = (Line(number, text.strip()) for number, text in lines)
    kept = (line for line in stripped if line.text and not line.text.startswith("#"))
    return (line._replace(text=unquoted(line.text)) for line in kept)


def unquoted(text: str) -> str:
    """The text without the quotes around all of it."""
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    return text


def replace_text(path: Path, text: str) -> None:
    """Write a file in UTF-8; it is the old one or the new one, never a part. Raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", errors="replace")
    os.replace(temporary, path)
