"""Which file a name in an annotation file means.

Labelling tools write names as they were on another machine: with backslashes, absolute, below other
folders, in another letter case. An `Index` knows the files of one folder, and no name leads to a
file outside of it. First the exact name is tried, then other spellings, then the end of the name,
and last the bare name.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from datasets.file_names import IMAGE_SUFFIXES, Key, files_below, folded_key, parts_of, portable
from util.config import DataConfig
from util.images.files import BadImageError, Header, read_header

# folders of these names have images, not masks or thumbnails
IMAGE_FOLDERS = frozenset({"images", "jpegimages", "imgs"})
# how a file was found by less than its exact name, as the log says
SPELLING = "images found by another spelling of their names (letter case, Unicode form, slashes, URL)"
END = "images found by the end of their paths"
BARE = "images found by their bare names"

Size = tuple[float, float]
# of an image whose annotation has no usable size: no picture has it
UNKNOWN_SIZE: Size = (0, 0)
# Label Studio puts eight digits before the names of uploaded files
_UPLOAD = re.compile(r"[0-9a-f]{8}-(?=.)")


def shown_size(header: Header) -> tuple[int, int]:
    """(width, height) as viewers show it."""
    return header.size if header.orientation < 5 else header.size[::-1]


def _has_size(path: Path, size: Size) -> bool | None:
    """Whether the picture has this size, as stored or as shown; None: it can't be read."""
    try:
        header = read_header(path, DataConfig.max_image_megapixels, "")
    except BadImageError:
        return None
    return size in (header.size, shown_size(header))


class Found(NamedTuple):
    """how: "" for the exact name, or SPELLING, END or BARE."""

    path: Path
    how: str


@dataclass
class Findings:
    """found: name -> file. missing: name -> why there is none, to follow "names the image <name>, and "."""

    found: dict[str, Found] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def notes(self) -> Counter[str]:
        """How many files were found by less than their exact names, by how."""
        return Counter(found.how for found in self.found.values() if found.how)


def annotated_size(image: Mapping[str, Any]) -> Size:
    """(width, height) of an entry of COCO's images."""
    width, height = image.get("width"), image.get("height")
    if isinstance(width, int | float) and isinstance(height, int | float):
        return width, height
    return UNKNOWN_SIZE


class _Option(NamedTuple):
    """A file with the wanted bare name.

    real: its path without links. length: number of parts that the end of its path has in common with
    the name. exact: in the same spelling. base: the folder that the name would be relative to; None:
    the name's first parts are not in its path.
    """

    path: Path
    real: str
    length: int = 1
    exact: bool = False
    base: Key | None = None

    @property
    def folder(self) -> str:
        return os.path.dirname(self.real)


class Index:
    """Files by their names.

    Args:
        files: every file under the key that names are compared with: the parts of its path, or some
            of them.
        place: what the files lie in, for messages.
        above: parts of the path that `files` lie in; names may begin with them.
    """

    def __init__(self, files: Iterable[tuple[Key, Path]], place: Path, above: Key = ()) -> None:
        self._place, self._above = place, folded_key(above)
        self._by_end: dict[Key, list[tuple[Key, Path]]] = defaultdict(list)
        for key, path in files:
            spelled = folded_key(key)
            for start in range(len(key)):
                self._by_end[spelled[start:]].append((key, path))

    @classmethod
    def below(cls, root: Path, suffixes: Container[str] = IMAGE_SUFFIXES) -> Index:
        """All files below a folder. Names may begin with the folder's own name, or with its whole
        path.
        """
        # without the root: "/" is no part of a name
        files = [(parts_of(path.relative_to(root).as_posix()), path) for path in files_below(root, suffixes)]
        return cls(files, root, Path(os.path.abspath(root)).parts[1:])

    def find(
        self,
        names: Mapping[str, Size | None],
        taken: Iterable[Path] = (),
        prefers: Callable[[Path], int] = lambda path: 0,
    ) -> Findings:
        """The files that `names` mean; two names never mean the same file.

        Complete names have priority over ends of names. Of several folders that `names` may be
        relative to, the one with most of them counts. A file outside of that folder must be the only
        one of its name, and a picture of that size.

        Args:
            names: name -> (width, height) of its picture; None: unknown, any size fits.
            taken: files that have a name already.
            prefers: 1 for likely files, 0 for others, -1 for those that are not used if there is a
                likely one.
        """
        # the files that a name may mean, and among them those that the whole name fits
        options = {name: _distinct(self._options(name)) for name in names}
        options = _without_unlikely(options, prefers)
        complete = {}
        for name, size in tqdm(names.items(), desc="looking for images", unit="image", disable=None):
            complete[name] = _complete(options[name], size)

        # in the folder that most names are relative to, or else anywhere
        home, doubtful = _home(complete, prefers), _doubtful(options.values())
        chosen: dict[str, Found | str] = {}
        for name, fitting in complete.items():
            found = _at_home([option for option in fitting if option.base == home])
            chosen[name] = found or self._elsewhere(options[name], names[name], doubtful)
        return _each_once(chosen, taken)

    def _options(self, name: str) -> list[_Option]:
        """The files whose path's end has most in common with the name."""
        # from the longest end to the bare name
        parts = parts_of(name)
        wanted, is_plain = folded_key(parts), portable(name) == name
        for start in range(len(wanted)):
            if found := self._ending(wanted[start:]):
                return [self._option(key, path, parts, start, is_plain) for key, path in found]

        # a name that got a prefix in the upload
        bare = _UPLOAD.sub("", "".join(wanted[-1:]))
        return [_Option(path, os.path.realpath(path)) for _, path in self._by_end.get((bare,), [])]

    def _option(self, key: Key, path: Path, parts: Key, start: int, is_plain: bool) -> _Option:
        """A file whose key ends like `parts` from `start` on."""
        # the name is complete if the folder's path, or nothing, precedes the common end
        length, rest = len(parts) - start, folded_key(parts[:start])
        base = None
        if not rest:
            base = (*self._above, *folded_key(key[:-length]))
        elif len(key) == length and self._above[-start:] == rest:
            base = self._above[:-start]
        exact = is_plain and key[-length:] == parts[start:]
        return _Option(path, os.path.realpath(path), length, exact, base)

    def _ending(self, end: Key) -> list[tuple[Key, Path]]:
        """Files by the end of their keys. Names in lists may omit the suffix."""
        found = self._by_end.get(end, [])
        if found or end[-1].endswith(IMAGE_SUFFIXES):
            return found
        ends = [(*end[:-1], end[-1] + suffix) for suffix in IMAGE_SUFFIXES]
        return [file for end in ends for file in self._by_end.get(end, [])]

    def _elsewhere(self, options: list[_Option], size: Size | None, doubtful: Container[str]) -> Found | str:
        """The one file with the longest end in common, or why it is not taken."""
        # none, several, or probably a mask
        if not options:
            return f"below {self._place} it is not there"
        # all have equally long ends in common with the name
        first, *others = options
        if others:
            both = f"{first.path} and {others[0].path} first"
            return f"there are {len(options)} of that name in several folders, {both}"
        if first.folder in doubtful:
            why = "its folder has the names of images that lie elsewhere"
            return f"{first.path} may be a mask or a copy of it: {why}"

        # the only one must be as large as annotated
        if size is not None and not _has_size(first.path, size):
            return f"{first.path}, the only one of that name, is not a picture of the annotated size"
        return Found(first.path, END if first.length > 1 else BARE)


def _distinct(options: list[_Option]) -> list[_Option]:
    """One of the paths that lead to the same file through links, the exact spelling if possible."""
    files: dict[str, _Option] = {}
    for option in sorted(options, key=lambda option: not option.exact):
        files.setdefault(option.real, option)
    return list(files.values())


def _complete(options: list[_Option], size: Size | None) -> list[_Option]:
    """Those that the whole name fits, without pictures of another size than annotated."""
    complete = [option for option in options if option.base is not None]
    if size in (None, UNKNOWN_SIZE):
        return complete
    return [option for option in complete if _has_size(option.path, size) is not False]


def _without_unlikely(
    options: dict[str, list[_Option]], prefers: Callable[[Path], int]
) -> dict[str, list[_Option]]:
    """Without the files that `prefers` rates -1, if it rates any 1."""
    rated = {name: [(prefers(option.path), option) for option in found] for name, found in options.items()}
    if not any(rate > 0 for found in rated.values() for rate, _ in found):
        return options
    return {name: [option for rate, option in found if rate >= 0] for name, found in rated.items()}


def _home(fitting: Mapping[str, list[_Option]], prefers: Callable[[Path], int]) -> Key | None:
    """The folder that most names are relative to; of several, the one named for images.

    None if there is none, or if several are equal.
    """
    # one vote a name; how likely a folder is decides between equals
    votes: Counter[Key] = Counter()
    likely = {}
    for options in fitting.values():
        bases = {option.base: option.path for option in options if option.base is not None}
        votes.update(bases.keys())
        for base, path in bases.items():
            likely[base] = prefers(path), not IMAGE_FOLDERS.isdisjoint(base[-1:])
    ranks = {base: (count, likely[base]) for base, count in votes.items()}
    highest = max(ranks.values(), default=None)
    best = [base for base, rank in ranks.items() if rank == highest]
    return best[0] if len(best) == 1 else None


def _doubtful(options: Iterable[list[_Option]]) -> set[str]:
    """Folders of masks, thumbnails or copies: most files have the names of files in other folders."""
    total: Counter[str] = Counter()
    shared: Counter[str] = Counter()
    for found in options:
        folders = {option.folder for option in found}
        total.update(folders)
        if len(folders) > 1:
            shared.update(folders)
    return {folder for folder, count in total.items() if 2 * shared[folder] > count}


def _at_home(options: list[_Option]) -> Found | None:
    """The only file with the exact name, or else the only one at all."""
    exact = [option for option in options if option.exact]
    if len(exact) == 1:
        return Found(exact[0].path, "")
    if len(options) == 1:
        return Found(options[0].path, SPELLING)
    return None


def _each_once(chosen: Mapping[str, Found | str], taken: Iterable[Path]) -> Findings:
    """A file that two names mean belongs to the more complete name; to none if both are equal."""
    result = Findings()
    result.missing = {name: choice for name, choice in chosen.items() if isinstance(choice, str)}
    found = {name: choice for name, choice in chosen.items() if isinstance(choice, Found)}

    # the more complete names choose first
    owners = {os.path.realpath(path): "another image" for path in taken}
    for how in ("", SPELLING, END, BARE):
        level = {name: os.path.realpath(entry.path) for name, entry in found.items() if entry.how == how}
        claims = Counter(level.values())
        for name, file in level.items():
            if not how or (file not in owners and claims[file] == 1):
                result.found[name] = found[name]
                continue
            rivals = [rival for rival in level if level[rival] == file and rival != name]
            other = owners.get(file) or rivals[0]
            result.missing[name] = f"{found[name].path} may be meant, which is that of {other}"
        owners |= {file: name for name, file in level.items()}
    return result
