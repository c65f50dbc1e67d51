"""Text files that other programs wrote: lists, class names, labels, YAML."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import NamedTuple

from util.errors import UserError
from util.images.files import read_regular_file

# the last mark that fits counts: that of UTF-32 begins with that of UTF-16
_MARKS = (
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
)


class TextLine(NamedTuple):
    """number: counts from 1. text: without spaces and quotes around it."""

    number: int
    text: str


def read_text(path: Path) -> str:
    r"""The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    All line ends are \n. Raises UserError if the file can't be read or is no text.
    """
    # a pipe would block forever
    try:
        content = read_regular_file(path)
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror or error})") from None
    encoding = "utf-8-sig"
    for mark, name in _MARKS:
        if content.startswith(mark):
            encoding = name
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text; save it as UTF-8") from None
    # programs of other systems end lines differently
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path) -> list[TextLine]:
    """The lines of a file, without empty ones and those that begin with #.

    Raises UserError like `read_text`.
    """
    lines = []
    # empty lines count too: messages give the numbers that an editor shows
    for number, line in enumerate(read_text(path).split("\n"), 1):
        text = line.strip()
        if text and not text.startswith("#"):
            lines.append(TextLine(number, unquoted(text)))
    return lines


def unquoted(text: str) -> str:
    """The text without the quotes around all of it."""
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    return text
