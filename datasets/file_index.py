"""Which file a name in an annotation file means.

Labelling tools write names as they were on another machine: with backslashes, absolute, below other
folders, in another letter case. An `Index` knows the files of one folder, and no name leads to a
file outside of it. A name is taken as it stands, or else in another spelling, or else by its end.
The bare name is the last resort.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from util.config import DataConfig
from util.errors import UserError
from util.images.files import BadImageError, Header, read_header

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
# folders that are called so have images, not masks or thumbnails
IMAGE_FOLDERS = frozenset({"images", "jpegimages", "imgs"})
# how a file was found by less than its exact name, as the user is told
SPELLING = "images found by another spelling of their names (letter case, Unicode form, slashes, URL)"
END = "images found by the end of their paths"
BARE = "images found by their bare names"

# folders and files that systems leave behind: hidden ones, macOS' shadows, thumbnails of network
# drives, what was lost
_LEFT_BEHIND = (".", "__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN")

Key = tuple[str, ...]
Size = tuple[float, float]
Identity = tuple[int, int]
# of an image whose annotation has no usable size: no picture has it
UNKNOWN_SIZE: Size = (0, 0)
# Label Studio puts eight digits before the names of uploaded files
_UPLOAD = re.compile(r"[0-9a-f]{8}-(?=.)")


# ---- walking


def files_below(root: Path, suffixes: Container[str]) -> list[Path]:
    """The files with one of these endings (lower case), in order; linked folders are followed, but
    not in circles.

    What systems leave behind is passed over, hidden files for example.

    Raises:
        UserError: a folder can't be searched.
    """
    return sorted(path for path in _walk(root, (), set(), False) if path.suffix.lower() in suffixes)


def _walk(folder: Path, above: tuple[Identity, ...], seen: set[Identity], linked: bool) -> Iterator[Path]:
    """linked: `folder` is behind a link. Further links are then followed to new folders only, or
    the paths could multiply.
    """
    try:
        here = _identity(folder)
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UserError(f"{folder} can't be searched ({error.strerror}); make it readable") from None
    if here in above:
        return
    seen.add(here)
    for entry in entries:
        if is_left_behind(entry.name):
            continue
        is_link = entry.is_symlink()
        if os.path.isdir(entry.path) if is_link else entry.is_dir():
            if not (is_link and linked and _identity(Path(entry.path)) in seen):
                yield from _walk(Path(entry.path), (*above, here), seen, linked or is_link)
        elif os.path.isfile(entry.path) if is_link else entry.is_file():
            yield Path(entry.path)


def is_left_behind(name: str) -> bool:
    return name.startswith(_LEFT_BEHIND)


def _identity(folder: Path) -> Identity:
    status = folder.stat()
    return status.st_dev, status.st_ino


# ---- names


def portable(name: str) -> str:
    """The name as a path below a folder: no host, drive, leading or double slash, backslash, `.` or
    `..`; may be empty.

    Of a name with `..` only the part behind the last one is kept. The path that Label Studio puts
    into `?d=` is taken out.
    """
    name = _without_host(name).replace("\\", "/")
    parts = [part for part in re.sub(r"^[A-Za-z]:", "", name).split("/") if part not in ("", ".")]
    ups = [i for i, part in enumerate(parts) if part == ".."]
    return "/".join(parts[ups[-1] + 1 :] if ups else parts)


def _without_host(name: str) -> str:
    _, is_local_file, path = name.partition("?d=")
    if is_local_file:
        return unquote(path)  # not parse_qs: +, & and # may be in a name
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", name):
        return name
    try:
        return urlsplit(name, allow_fragments=False).path  # a # is one of the name
    except ValueError:
        return name


def folded(text: str) -> str:
    """The same for all spellings of a name: letter case, Unicode form, characters that a URL has as
    %20.
    """
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


def shown_size(header: Header) -> tuple[int, int]:
    """(width, height) as viewers show it."""
    return header.size if header.orientation < 5 else header.size[::-1]


def _has_size(path: Path, size: Size) -> bool | None:
    """Whether the picture is so large, as it is stored or as it is shown; None: it can't be read."""
    try:
        header = read_header(path, DataConfig.max_image_megapixels, "")
    except BadImageError:
        return None
    return size in (header.size, shown_size(header))


class Places:
    """Files and folders by their paths below a root; letter case and Unicode form may differ."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._listings: dict[Path, dict[str, list[str]]] = {}

    def at(self, parts: Iterable[str]) -> Path | None:
        """What is there; None if nothing is, or if several names differ in their spelling alone."""
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
            for name in _names_in(folder):
                self._listings[folder][folded(name)].append(name)
        return self._listings[folder]


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # it is no folder, or can't be listed
        return []


# ---- finding


class Found(NamedTuple):
    """how: "" for the exact name, or SPELLING, END or BARE."""

    path: Path
    how: str


@dataclass
class Findings:
    """found: name -> file. missing: name -> why there is none, to be read after "names the image
    <name>, and ".
    """

    found: dict[str, Found] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def notes(self) -> Counter[str]:
        """How many files were found by less than their exact names, by how."""
        return Counter(found.how for found in self.found.values() if found.how)


def annotated_size(image: Mapping[str, Any]) -> Size:
    """(width, height) of an entry of COCO's images."""
    width, height = image.get("width"), image.get("height")
    return (
        (width, height)
        if isinstance(width, int | float) and isinstance(height, int | float)
        else UNKNOWN_SIZE
    )


def respell(images: Iterable[dict[str, Any]], folder: Path) -> Counter[str]:
    """Give entries of COCO's images whose `file_name` is not that of a file below `folder` the name
    of the file that is meant.

    Here the folder is known: a name may be spelled otherwise or begin above the folder, but a file
    in another folder below it is another image's. Returns how many have got a name, by how it was
    found. Names of files that are missing stay.
    """
    if not folder.is_dir():
        return Counter()
    names = {image["file_name"]: image for image in images}
    absent = absent_names(folder, names)
    if not absent:
        return Counter()
    there = (folder / name for name in names if name not in absent)
    findings = Index.below(folder).find({name: annotated_size(names[name]) for name in absent}, taken=there)
    notes: Counter[str] = Counter()
    for name, found in findings.found.items():
        relative = found.path.relative_to(folder)
        if folded_key(relative.parts) == folded_key(parts_of(name))[-len(relative.parts) :]:
            names[name]["file_name"] = relative.as_posix()
            notes[found.how or END] += 1
    return notes


def absent_names(folder: Path, names: Iterable[str]) -> set[str]:
    """Names of no file below `folder`. Listing the folders takes a hundredth of the time of asking
    for each file.
    """
    listings: dict[str, set[str]] = {}
    absent = set()
    for name in names:
        place, bare = os.path.split(name)
        if place not in listings:
            listings[place] = _file_names_in(folder / place) if is_within(folder / place, folder) else set()
        # where upper and lower case are one, a name that is not listed may yet be there
        if bare not in listings[place] and not (
            is_within(folder / name, folder) and os.path.exists(folder / name)
        ):
            absent.add(name)
    return absent


def _file_names_in(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:  # it is no folder, or can't be listed
        return set()


class _Option(NamedTuple):
    """A file with the wanted bare name. length: how many parts its path's end has in common with
    the name. exact: in the same spelling. base: the folder that the name would be relative to;
    None: the name's first parts are not in its path.
    """

    path: Path
    length: int
    exact: bool
    base: Key | None


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
        files = [(parts_of(path.relative_to(root).as_posix()), path) for path in files_below(root, suffixes)]
        return cls(files, root, Path(os.path.abspath(root)).parts[1:])

    def find(
        self,
        names: Mapping[str, Size | None],
        taken: Iterable[Path] = (),
        prefers: Callable[[Path], int] = lambda path: 0,
    ) -> Findings:
        """The files that `names` mean; two names never mean the same file.

        Names that are complete have priority over ends of names. Of several folders that `names`
        may be relative to, the one with most of them counts. What is found outside of that folder
        must be the only one of its name, and a picture of that size.

        Args:
            names: name -> (width, height) of its picture; None: nobody knows, and no size is asked
                for.
            taken: files that have a name already.
            prefers: 1 for files that are likely, 0 for others, -1 for those that are not used where
                a likely one is.
        """
        options = _without_unlikely({name: _distinct(self._options(name)) for name in names}, prefers)
        sizes = tqdm(names.items(), desc="looking for images", unit="image", disable=None)
        complete = {name: _complete(options[name], size) for name, size in sizes}
        home = _home(complete, prefers)
        chosen: dict[str, Found | str | None] = {
            name: _at_home([option for option in found if option.base == home])
            for name, found in complete.items()
        }
        if None in chosen.values():
            doubtful = _doubtful(options.values())
            for name in [name for name, found in chosen.items() if found is None]:
                chosen[name] = self._elsewhere(options[name], names[name], doubtful)
        return _each_once(chosen, taken)

    def _options(self, name: str) -> list[_Option]:
        """The files whose path's end has most in common with the name."""
        parts = parts_of(name)
        wanted, is_plain = folded_key(parts), portable(name) == name
        for start in range(len(wanted)):
            end = wanted[start:]
            if found := self._ending(end):
                return [self._option(key, path, parts, start, is_plain) for key, path in found]
        return self._uploads(wanted)

    def _option(self, key: Key, path: Path, parts: Key, start: int, is_plain: bool) -> _Option:
        """A file whose key ends as `parts` do from `start` on."""
        length, rest = len(parts) - start, folded_key(parts[:start])
        base = None
        if not rest:
            base = (*self._above, *folded_key(key[:-length]))
        elif len(key) == length and self._above[-start:] == rest:
            base = self._above[:-start]
        return _Option(path, length, is_plain and key[-length:] == parts[start:], base)

    def _ending(self, end: Key) -> list[tuple[Key, Path]]:
        """Lists may leave out the ending of files."""
        if end in self._by_end or end[-1].endswith(IMAGE_SUFFIXES):
            return self._by_end.get(end, [])
        return [
            entry
            for suffix in IMAGE_SUFFIXES
            for entry in self._by_end.get((*end[:-1], end[-1] + suffix), [])
        ]

    def _uploads(self, wanted: Key) -> list[_Option]:
        """The files whose name has got a prefix as they were uploaded."""
        bare = _UPLOAD.sub("", wanted[-1]) if wanted else ""
        return [_Option(path, 1, False, None) for _, path in self._by_end.get((bare,), [])]

    def _elsewhere(self, options: list[_Option], size: Size | None, doubtful: Container[str]) -> Found | str:
        """The one file with the longest end in common, or why it is not taken."""
        if not options:
            return f"below {self._place} it is not there"
        path = options[0].path
        if len(options) > 1:
            return (
                f"there are {len(options)} of that name in several folders, {path} and {options[1].path} "
                "first"
            )
        if _folder(path) in doubtful:
            return (
                f"{path} may be a mask or a copy of it: its folder has the names of images that lie elsewhere"
            )
        if size is not None and not _has_size(path, size):
            return f"{path}, the only one of that name, is not a picture of the annotated size"
        return Found(path, END if options[0].length > 1 else BARE)


def _distinct(options: list[_Option]) -> list[_Option]:
    """Of paths that lead to the same file, through links, one."""
    files: dict[str, _Option] = {}
    for option in sorted(options, key=lambda option: not option.exact):
        files.setdefault(os.path.realpath(option.path), option)
    return list(files.values())


def _complete(options: list[_Option], size: Size | None) -> list[_Option]:
    """Those that the whole name fits, unless the picture has another size than the annotated one."""
    complete = [option for option in options if option.base is not None]
    if size in (None, UNKNOWN_SIZE):
        return complete
    return [option for option in complete if _has_size(option.path, size) is not False]


def _without_unlikely(
    options: dict[str, list[_Option]], prefers: Callable[[Path], int]
) -> dict[str, list[_Option]]:
    likely = any(prefers(option.path) > 0 for found in options.values() for option in found)
    if not likely:
        return options
    return {
        name: [option for option in found if prefers(option.path) >= 0] for name, found in options.items()
    }


def _home(fitting: Mapping[str, list[_Option]], prefers: Callable[[Path], int]) -> Key | None:
    """The folder that most names are relative to; of several, the one named for images. None: there
    is none, or several.
    """
    votes: Counter[Key] = Counter()
    likely: dict[Key, tuple[int, bool]] = {}
    for options in fitting.values():
        for option in {option.base: option for option in options}.values():
            votes[option.base] += 1
            likely[option.base] = (prefers(option.path), not IMAGE_FOLDERS.isdisjoint(option.base[-1:]))
    ranked = sorted(votes, key=lambda base: (votes[base], likely[base]), reverse=True)
    rank = [(votes[base], likely[base]) for base in ranked[:2]]
    if not rank or (len(rank) == 2 and rank[0] == rank[1]):
        return None
    return ranked[0]


def _doubtful(options: Iterable[list[_Option]]) -> set[str]:
    """Folders most of whose files have the names of files in other folders, as masks, thumbnails
    and copies have.
    """
    total: Counter[str] = Counter()
    shared: Counter[str] = Counter()
    for found in options:
        folders = {_folder(option.path) for option in found}
        total.update(folders)
        shared.update(folders if len(folders) > 1 else ())
    return {folder for folder, count in total.items() if 2 * shared[folder] > count}


def _folder(path: Path) -> str:
    return os.path.dirname(os.path.realpath(path))


def _at_home(options: list[_Option]) -> Found | None:
    exact = [option for option in options if option.exact]
    if len(exact) == 1:
        return Found(exact[0].path, "")
    return Found(options[0].path, SPELLING) if len(options) == 1 else None


def _each_once(chosen: Mapping[str, Found | str], taken: Iterable[Path]) -> Findings:
    """A file that two names lead to is the one's that says more of its path; if both say as much,
    it is nobody's.
    """
    result = Findings(missing={name: reason for name, reason in chosen.items() if isinstance(reason, str)})
    owners = {os.path.realpath(path): "another image" for path in taken}
    found = {name: found for name, found in chosen.items() if isinstance(found, Found)}
    for how in ("", SPELLING, END, BARE):
        level = {name: os.path.realpath(entry.path) for name, entry in found.items() if entry.how == how}
        claims = Counter(level.values())
        for name, file in level.items():
            if how and (file in owners or claims[file] > 1):
                other = owners.get(file) or next(
                    rival for rival in level if level[rival] == file and rival != name
                )
                result.missing[name] = f"{found[name].path} may be meant, which is that of {other}"
            else:
                result.found[name] = found[name]
        owners |= {file: name for name, file in level.items()}
    return result
