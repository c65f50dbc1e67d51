"""Ultralytics' data.yaml and Darknet's obj.data: the class names, the images and the files of
labels that they name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from datasets.coco_format import shown
from datasets.convert.common import PARTS, Faults
from datasets.file_index import IMAGE_FOLDERS, Index
from datasets.file_names import IMAGE_SUFFIXES, Key, Places, files_below, folded, is_within, parts_of
from util.errors import UserError
from util.text_files import read_lines, read_text, unquoted

YAML = (".yaml", ".yml")
DARKNET = ".data"
LABELS_BY_SPELLING = "files of labels found by another spelling of their names"
# values of a YAML file that name nothing
_NOTHING = ("", "~", "null", "Null", "NULL")


# ---- what is written in the file


@dataclass
class Description:
    """What the file `path` says.

    names: the class names, or the path of a file with them. parts: of "train" and "val" the folders
    and lists of images. root: where those are, relative to the file's folder. boxes_first: other
    columns follow the box in every line of labels.
    """

    path: Path
    names: list[str] | str
    parts: dict[str, list[str]]
    root: str = ""
    boxes_first: bool = False


def describe(path: Path) -> Description:
    """Read a data.yaml or an obj.data. Raises UserError."""
    return _describe_darknet(path) if path.suffix.lower() == DARKNET else _describe_yaml(path)


def _describe_darknet(path: Path) -> Description:
    """Lines `key = value`."""
    pairs = [line.text.partition("=") for line in read_lines(path)]
    content = {key.strip().lower(): unquoted(value.strip()) for key, _, value in pairs}
    for key in ("names", "train"):
        if not content.get(key):
            raise UserError(
                f"{path} has no {key!r}: it must name the file of the class names, and the list of "
                f"training images"
            )
    parts = {part: [content[key]] for part, key in (("train", "train"), ("val", "valid")) if content.get(key)}
    return Description(path, content["names"], parts)


def _describe_yaml(path: Path) -> Description:
    content = _yaml_content(path)
    names = class_names(content.get("names"), path)
    named = {"train": content.get("train"), "val": content.get("val") or content.get("valid")}
    parts = {part: _entries(value, path) for part, value in named.items() if value and value not in _NOTHING}
    if "train" not in parts:
        raise UserError(f"{path} has no 'train': it must name the folder or the list of the training images")
    root = content.get("path")
    root = root if isinstance(root, str) and root not in _NOTHING else ""
    return Description(path, names, parts, root, "kpt_shape" in content)


def _yaml_content(path: Path) -> dict[str, Any]:
    """All values are text: YAML would make a truth value of `no`, and a number of 007."""
    import yaml  # of all formats only this one needs it

    class TextLoader(yaml.SafeLoader):
        yaml_implicit_resolvers = {
            "<": yaml.SafeLoader.yaml_implicit_resolvers["<"]
        }  # merges of mappings stay

    try:
        content = yaml.load(read_text(path), TextLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{path} is not YAML ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must have train, val and names, as Ultralytics' data.yaml has")
    return content


def _entries(value: Any, path: Path) -> list[str]:
    entries = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, str) for entry in entries):
        raise UserError(f"{path}: 'train' and 'val' must be a path or a list of paths, not {shown(value)}")
    return entries


def class_names(names: Any, path: Path) -> list[str]:
    """Class names by number, of a list or of a mapping from 0, 1, ... Raises UserError."""
    if isinstance(names, dict):
        if sorted(map(str, names)) != sorted(map(str, range(len(names)))):
            raise UserError(f"{path}: the keys of 'names' must be 0, 1, ... without gaps")
        names = [name for _, name in sorted(names.items(), key=lambda item: int(item[0]))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: 'names' must be a list of class names, or a mapping from numbers to names")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path} names two classes {shown(twice)}; names must differ")
    return names


def names_in(path: Path, faults: Faults) -> list[str]:
    """The class names of a file, one a line. Raises UserError."""
    comments = sum(line.lstrip().startswith("#") for line in read_text(path).split("\n"))
    faults.notes[f"lines of {path} that begin with #, taken for comments"] += comments
    return class_names([line.text for line in read_lines(path)], path)


# ---- what it leads to


class _Listed(NamedTuple):
    """An image of a folder or a list. where: begins a message. path: None where its name alone is
    not enough to find it.
    """

    name: str
    where: str
    path: Path | None


class Lookup:
    """The files that a description names: those in its own folder, whatever machine its paths are
    of.

    Args:
        anywhere: the file was given by itself; then its paths may lead to other folders of this
            machine, too.
    """

    def __init__(self, description: Description, anywhere: bool, faults: Faults) -> None:
        self._description, self._anywhere, self._faults = description, anywhere, faults
        folder = description.path.parent
        self._bases = [folder / description.root, folder]
        roots = [*self._bases] if anywhere and self._bases[0].is_dir() else [folder]
        if anywhere:
            self._bases.append(folder.parent)  # Darknet's paths are relative to where it is started
        self._places = [Places(Path(os.path.normpath(root))) for root in dict.fromkeys(roots)]
        self._labels = Places(Path(Path(os.path.abspath(folder)).anchor)) if anywhere else self._places[0]
        self._by_end: dict[Path, str] = {}

    def names(self) -> list[str]:
        """The class names. Raises UserError."""
        names = self._description.names
        if isinstance(names, list):
            return names
        place = self._place(names)
        if place is None:
            raise UserError(
                f"{self._description.path} names {names}, which is missing; it must be the file of "
                f"the class names"
            )
        return names_in(place, self._faults)

    def images(self) -> dict[str, list[Path]]:
        """The images of "train" and, if any of its folders or lists is there, of "val", each once;
        what is missing is a fault.
        """
        listed: dict[str, list[_Listed]] = {}
        for part, entries in self._description.parts.items():
            places = [place for place in map(self._part_place, entries) if place is not None]
            if places or part == "train":
                listed[part] = [item for place in places for item in self._items(place)]
        found = self._search([item for items in listed.values() for item in items])
        images = {}
        for part, items in listed.items():
            paths = [item.path or found.get(item.name) for item in items]
            images[part] = list(dict.fromkeys(path for path in paths if path is not None))
        return images

    def label_file(self, image: Path) -> Path:
        """As Ultralytics has it: in `labels` in place of the last `images`; or beside the image."""
        places = self._labels
        options = _label_options(Path(os.path.relpath(image, places.root)).parts)
        exact = [places.root.joinpath(*option) for option in options]
        there = [path for path in exact if os.path.isfile(path)]
        if there:
            return there[0]
        spelled = [path for path in map(places.at, options) if path is not None]
        self._faults.notes[LABELS_BY_SPELLING] += bool(spelled)
        return spelled[0] if spelled else exact[0]

    def _part_place(self, entry: str) -> Path | None:
        place = self._place(entry)
        if place is None:
            tried = ", ".join(dict.fromkeys(str(base / entry) for base in self._bases))
            self._faults.add(f"{self._description.path} names {entry}, which is missing: tried {tried}")
        return place

    def _place(self, entry: str) -> Path | None:
        """A folder or list: where the file says, or at the end of that path below its folder."""
        literal = [Path(os.path.normpath(base / entry)) for base in self._bases]
        is_absolute = self._anywhere and os.path.isabs(entry)
        exact = [path for path in literal if os.path.exists(path) and (is_absolute or self._is_within(path))]
        if exact:
            return exact[0]
        for end in _ends(parts_of(entry)):
            for places in self._places:
                place = places.at(end)
                if place is not None and self._by_end.setdefault(place, entry) == entry:
                    self._faults.notes[
                        "folders and lists found by the end of their paths, or by another spelling"
                    ] += 1
                    return place
        return next((path for path in literal if self._anywhere and os.path.exists(path)), None)

    def _items(self, place: Path) -> Iterator[_Listed]:
        if place.is_dir():
            for path in files_below(place, IMAGE_SUFFIXES):
                yield _Listed(str(path), str(place), path)
            return
        for number, name in read_lines(place):
            yield _Listed(name, f"{place}: line {number}", self._as_written(name, place.parent))

    def _as_written(self, name: str, folder: Path) -> Path | None:
        for base in (folder, *self._bases):
            path = Path(os.path.normpath(base / name))
            if (self._anywhere or self._is_within(path)) and os.path.isfile(path):
                return path
        return None

    def _search(self, items: list[_Listed]) -> dict[str, Path]:
        """The files of images that are not where their names say, by these names."""
        taken = [item.path for item in items if item.path is not None]
        where = {item.name: item.where for item in items if item.path is None}
        found: dict[str, Path] = {}
        reasons: dict[str, str] = {}
        for places in self._places if where else ():
            findings = Index.below(places.root).find(
                {name: None for name in where if name not in found}, taken
            )
            self._faults.notes.update(findings.notes())
            found |= {name: file.path for name, file in findings.found.items()}
            reasons |= findings.missing
        for name in [name for name in where if name not in found]:
            self._faults.add(
                f"{where[name]} names the image {shown(name)}, and {reasons[name]}", "missing_image"
            )
        return found

    def _is_within(self, path: Path) -> bool:
        return any(is_within(path, places.root) for places in self._places)


def _ends(parts: Key) -> Iterator[Key]:
    """The path, then without its first folders. A folder of a part is not left out: what is in it
    may be another part's.
    """
    for start, part in enumerate(parts):
        yield parts[start:]
        if folded(part).rstrip("0123456789") in PARTS:
            return


def _label_options(parts: Key) -> list[Key]:
    """Where the labels of the image at `parts` may be: in `labels` in place of a folder of images,
    or beside it.
    """
    names = (*parts[:-1], f"{os.path.splitext(parts[-1])[0]}.txt")
    folders = [i for i, part in enumerate(parts[:-1]) if folded(part) in IMAGE_FOLDERS]
    return [*((*names[:i], "labels", *names[i + 1 :]) for i in reversed(folders)), names]
