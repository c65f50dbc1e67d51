"""Files below a folder, and their names as other machines and programs write them."""

from __future__ import annotations

import contextlib
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator
from pathlib import Path, PurePath
from urllib.parse import unquote, urlsplit

from util.errors import UserError

Key = tuple[str, ...]
Identity = tuple[int, int]

IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".webp",
    ".ppm",
    ".pgm",
    ".pnm",
    ".jp2",
)
# beginnings of names that systems make: hidden files, macOS' shadows, thumbnails of network drives,
# files that were lost
_LEFT_BEHIND = (".", "__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN")

# ---- walking


def files_below(root: Path, suffixes: Container[str]) -> list[Path]:
    """The files with one of these endings (lower case), in order.

    Linked folders are followed, but not in circles. Hidden files, and others that systems make, are
    left out.

    Raises:
        UserError: a folder can't be searched.
    """
    return sorted(path for path in _walk(root, (), set(), False) if path.suffix.lower() in suffixes)


def _walk(folder: Path, above: tuple[Identity, ...], seen: set[Identity], linked: bool) -> Iterator[Path]:
    """All files below `folder`, but for what systems make.

    above: the folders that lead to it. seen: all folders so far. linked: it is behind a link; further
    links are then followed to new folders only, because the paths could multiply.
    """
    try:
        here = _identity(folder)
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UserError(f"{folder} can't be searched ({error.strerror}); make it readable") from None
    if here in above:
        return  # a link in a circle
    seen.add(here)
    for entry in entries:
        if is_left_behind(entry.name):
            continue
        path, is_link = Path(entry.path), entry.is_symlink()
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # a link to itself
            continue
        if is_folder and not (is_link and linked and _identity(path) in seen):
            yield from _walk(path, (*above, here), seen, linked or is_link)
        elif is_file:
            yield path


def is_left_behind(name: str) -> bool:
    return name.startswith(_LEFT_BEHIND)


def _identity(folder: Path) -> Identity:
    status = folder.stat()
    return status.st_dev, status.st_ino


# ---- names


def portable(name: str) -> str:
    """The name as a path below a folder; may be empty.

    Host, drive, leading and double slashes, backslashes and `.` are removed. Of a name with `..`
    only the part behind the last one is kept. Label Studio's `?d=` contains the path.
    """
    name = _without_host(name).replace("\\", "/")
    parts: list[str] = []
    for part in re.sub(r"^[A-Za-z]:", "", name).split("/"):
        if part == "..":
            parts = []
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def _without_host(name: str) -> str:
    _, is_local_file, path = name.partition("?d=")
    if is_local_file:
        return unquote(path)  # not parse_qs: +, & and # may be in a name
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", name):
        return name
    try:
        return urlsplit(name, allow_fragments=False).path  # a # belongs to the name
    except ValueError:
        return name


def folded(text: str) -> str:
    """The same for all spellings of a name: letter case, Unicode form, %20 as in URLs."""
    plain = unicodedata.normalize("NFC", unquote(text)).casefold()
    return unicodedata.normalize("NFC", plain)


def folded_key(parts: Iterable[str]) -> Key:
    return tuple(map(folded, parts))


def parts_of(name: str) -> Key:
    """The parts of `portable(name)`."""
    return PurePath(portable(name)).parts


def is_within(path: PurePath, root: PurePath) -> bool:
    """Whether the path, as it is written, leads to a place in `root`."""
    top = os.path.abspath(root)
    return os.path.commonpath([os.path.abspath(path), top]) == top


class Places:
    """Files and folders by their paths below a root; letter case and Unicode form may differ."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._listings: dict[Path, dict[str, list[str]]] = {}

    def at(self, parts: Iterable[str]) -> Path | None:
        """The path of a name; None if it is not there, or if several differ only in their spelling."""
        place = self.root
        for part in parts:
            name = part
            if not os.path.exists(place / part):
                names = self._listing(place).get(folded(part), [])
                if len(names) != 1:
                    return None
                name = names[0]
            place /= name
        return place

    def _listing(self, folder: Path) -> dict[str, list[str]]:
        if folder not in self._listings:
            self._listings[folder] = defaultdict(list)
            with contextlib.suppress(OSError):  # it is no folder, or can't be listed
                for name in os.listdir(folder):
                    self._listings[folder][folded(name)].append(name)
        return self._listings[folder]
