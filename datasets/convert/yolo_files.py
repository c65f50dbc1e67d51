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
from datasets.convert.common import split_named
from datasets.convert.problems import Problems
from datasets.file_index import IMAGE_FOLDERS, Index
from datasets.file_names import IMAGE_SUFFIXES, Key, Places, files_below, folded, is_within, parts_of
from util.errors import UserError
from util.text_files import read_lines, read_text, unquoted

YAML = (".yaml", ".yml")
DARKNET = ".data"
LABELS_BY_SPELLING = "files of labels found by another spelling of their names"
PLACES_BY_END = "folders and lists found by the end of their paths, or by another spelling"
# values of a YAML file that name nothing, as text
_NULLS = ("~", "null", "Null", "NULL")


# ---- what is written in the file


@dataclass
class Description:
    """What the file `path` says.

    names: the class names, or the path of a file with them. splits: of "train" and "val" the
    folders and lists of images. root: where those are, relative to the file's folder. boxes_first:
    other columns follow the box in every line of labels.
    """

    path: Path
    names: list[str] | str
    splits: dict[str, list[str]]
    root: str
    boxes_first: bool


def describe(path: Path) -> Description:
    """Read a data.yaml or an obj.data. Raises UserError."""
    is_darknet = path.suffix.lower() == DARKNET
    content = _darknet_content(path) if is_darknet else _yaml_content(path)
    # `path: null` and `val:` are usual
    content = {key: value for key, value in content.items() if value and value not in _NULLS}
    names: Any = content.get("names")
    if not is_darknet:
        names = class_names(names, path)
    for key in ("names", "train"):
        if key not in content:
            raise UserError(
                f"{path} has no {key!r}: it must name the classes, and the folder or the list of the "
                f"training images"
            )
    root = content.get("path")
    if not isinstance(root, str):
        root = ""
    splits = {"train": _entries(content["train"], path)}
    if val := content.get("val") or content.get("valid"):
        splits["val"] = _entries(val, path)
    return Description(path, names, splits, root, "kpt_shape" in content)


def _darknet_content(path: Path) -> dict[str, Any]:
    """Lines `key = value`; `names` is a file."""
    content = {}
    for line in read_lines(path):
        key, _, value = line.text.partition("=")
        content[key.strip().lower()] = unquoted(value.strip())
    return content


def _yaml_content(path: Path) -> dict[str, Any]:
    """All values are text: YAML would read `no` as a truth value, and 007 as a number."""
    import yaml  # of all formats only this one needs it

    class TextLoader(yaml.SafeLoader):
        # without the rules for types; merges of mappings stay
        yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}

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
    """Class names by number, of a list or of a mapping from "0", "1", ... Raises UserError."""
    if isinstance(names, dict):
        numbers = [str(number) for number in range(len(names))]
        if names.keys() != set(numbers):
            raise UserError(f"{path}: the keys of 'names' must be 0, 1, ... without gaps")
        names = [names[number] for number in numbers]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: 'names' must be a list of class names, or a mapping from numbers to names")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path} names two classes {shown(twice)}; names must differ")
    return names


def names_in(path: Path, problems: Problems) -> list[str]:
    """The class names of a file, one a line. Raises UserError."""
    comments = sum(line.lstrip().startswith("#") for line in read_text(path).split("\n"))
    problems.notes[f"lines of {path} that begin with #, taken for comments"] += comments
    return class_names([line.text for line in read_lines(path)], path)


# ---- the files that it names


class _Entry(NamedTuple):
    """An image in a folder or a list. where: begins a message. path: None if the name as written is
    not that of a file.
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

    def __init__(self, description: Description, anywhere: bool, problems: Problems) -> None:
        self._description, self._anywhere, self._problems = description, anywhere, problems
        # folders that paths may be relative to, folders to search, and the one with the labels
        folder = description.path.parent
        self._bases = [folder / description.root, folder]
        roots, labels = [folder], folder
        if anywhere:
            if self._bases[0].is_dir():
                roots = list(self._bases)
            self._bases.append(folder.parent)  # Darknet's paths are relative to where it is started
            # labels lie beside the images, which may be anywhere
            labels = Path(Path(os.path.abspath(folder)).anchor)
        self._places = [Places(Path(os.path.normpath(root))) for root in dict.fromkeys(roots)]
        self._labels = Places(Path(os.path.normpath(labels)))
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
        return names_in(place, self._problems)

    def images(self) -> dict[str, list[Path]]:
        """The images of "train" and, if any of its folders or lists is there, of "val", each once.
        A file that is missing is a problem.
        """
        # what folders and lists say
        entries: dict[str, list[_Entry]] = {}
        for split, named in self._description.splits.items():
            places = []
            for name in named:
                place = self._place(name)
                if place is None:
                    tried = ", ".join(dict.fromkeys(str(base / name) for base in self._bases))
                    path = self._description.path
                    self._problems.add(f"{path} names {name}, which is missing: tried {tried}")
                else:
                    places.append(place)
            if places or split == "train":
                entries[split] = [entry for place in places for entry in self._entries(place)]

        # files that are not where their names say
        found = self._search([entry for of_split in entries.values() for entry in of_split])
        images = {}
        for split, of_split in entries.items():
            paths = (entry.path or found.get(entry.name) for entry in of_split)
            images[split] = list(dict.fromkeys(filter(None, paths)))
        return images

    def label_file(self, image: Path) -> Path:
        """As Ultralytics has it: in `labels` in place of the last `images`; or beside the image."""
        places = self._labels
        options = _label_options(Path(os.path.relpath(image, places.root)).parts)
        exact = [places.root.joinpath(*option) for option in options]
        # an exact name is better than a better place
        for path in exact:
            if os.path.isfile(path):
                return path
        for option in options:
            path_there = places.at(option)
            if path_there is not None:
                self._problems.notes[LABELS_BY_SPELLING] += 1
                return path_there
        return exact[0]

    def _place(self, entry: str) -> Path | None:
        """A folder or list: where the file says, or at the end of that path below its folder."""
        # where the file says
        literal = [Path(os.path.normpath(base / entry)) for base in self._bases]
        there = [path for path in literal if os.path.exists(path)]
        for path in there:
            if self._is_within(path) or (self._anywhere and os.path.isabs(entry)):
                return path

        # by the end of the path
        for end in _ends(parts_of(entry)):
            for places in self._places:
                place = places.at(end)
                # one folder can't be that of two entries
                if place is not None and self._by_end.setdefault(place, entry) == entry:
                    self._problems.notes[PLACES_BY_END] += 1
                    return place

        # at last a relative path that leads out of the folder
        if self._anywhere and there:
            return there[0]
        return None

    def _entries(self, place: Path) -> Iterator[_Entry]:
        if place.is_dir():
            for path in files_below(place, IMAGE_SUFFIXES):
                yield _Entry(str(path), str(place), path)
            return
        for number, name in read_lines(place):
            yield _Entry(name, f"{place}: line {number}", self._as_written(name, place.parent))

    def _as_written(self, name: str, folder: Path) -> Path | None:
        for base in (folder, *self._bases):
            path = Path(os.path.normpath(base / name))
            if (self._anywhere or self._is_within(path)) and os.path.isfile(path):
                return path
        return None

    def _search(self, entries: list[_Entry]) -> dict[str, Path]:
        """The files of entries without a path, by name."""
        # what is known, and what is to be found
        taken = [entry.path for entry in entries if entry.path]
        where = {entry.name: entry.where for entry in entries if not entry.path}
        found: dict[str, Path] = {}
        missing = dict.fromkeys(where, "")

        # the second folder is searched for what is not in the first
        for places in self._places:
            if not missing:
                break
            findings = Index.below(places.root).find(dict.fromkeys(missing), taken)
            self._problems.notes.update(findings.notes())
            found |= {name: file.path for name, file in findings.found.items()}
            missing = findings.missing
        for name, reason in missing.items():
            self._problems.add_missing(name, reason, where[name])
        return found

    def _is_within(self, path: Path) -> bool:
        return any(is_within(path, places.root) for places in self._places)


def _ends(parts: Key) -> Iterator[Key]:
    """The path, then without its first folders. The folder of a split is never left out: what is
    in it may be another split's.
    """
    for start, part in enumerate(parts):
        yield parts[start:]
        if split_named([part]):
            return


def _label_options(parts: Key) -> list[Key]:
    """Where the labels of the image at `parts` may be: in `labels` in place of a folder of images,
    or beside it.
    """
    # the innermost folder of images first
    names = (*parts[:-1], f"{os.path.splitext(parts[-1])[0]}.txt")
    options = []
    for i in reversed(range(len(parts) - 1)):
        if folded(parts[i]) in IMAGE_FOLDERS:
            options.append((*names[:i], "labels", *names[i + 1 :]))
    return [*options, names]
