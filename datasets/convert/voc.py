"""Pascal VOC's format: an XML file for every image (Everingham et al., The PASCAL Visual Object
Classes Challenge, section 2.3 of the development kits).
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from datasets.convert.common import (
    ROLES,
    SPLITS,
    CocoSplit,
    Object,
    Pair,
    files_by_key,
    read_splits,
    split_named,
    splits_by_folder,
)
from datasets.convert.masks import outline_as_stored
from datasets.convert.problems import BOXES_TURNED, Corners, Problems, as_stored
from datasets.file_index import UNKNOWN_SIZE, Index, Size, shown_size
from datasets.file_names import IMAGE_SUFFIXES, Key, files_below, parts_of
from util.errors import UserError
from util.images.files import Header, read_regular_file
from util.text_files import read_lines, unquoted

_LISTS = Path("ImageSets/Main")
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_BY_FILENAME = "images found by the filename in their XML files"
# lists for training and validation, in order of preference
_LIST_PAIRS = (
    ("train", "val"),
    ("trainval", "test"),
    ("train", "test"),
    ("trainval", ""),
    ("train", ""),
    ("default", ""),
)


@dataclass(frozen=True)
class VocRules:
    """How to read Pascal VOC's format.

    difficult: "keep" such objects, make them "crowd" (no detection of them is wrong, as in VOC's
    own evaluation) or "drop" them. first_pixel: the number of the first column and row, 1 in VOC;
    some programs number from 0. train_set, val_set: names of lists in ImageSets/Main; "": the first
    pair of train/val, trainval/test that is there.
    """

    difficult: str = "crowd"
    first_pixel: int = 1
    train_set: str = ""
    val_set: str = ""


def is_voc(root: Path) -> bool:
    return root.is_dir() and bool(files_below(root, [".xml"]))


def read_voc(root: Path, rules: VocRules, problems: Problems) -> dict[str, CocoSplit]:
    """A folder with JPEGImages, Annotations and ImageSets/Main, or any folder of images with an XML
    file of the same name each.

    Coordinates are whole pixels that belong to the box, the first one 1: xmin 1 and xmax 10 is a
    box 10 pixels wide at the left border. A `polygon`, which Roboflow writes, gives a mask. `truncated`
    and all other fields are ignored. Classes are in alphabetical order, which is VOC's own.

    Raises:
        UserError: there is nothing to convert.
    """
    # which XML files belong to which split
    root = folder_with("Annotations", root)
    lists = root / _LISTS
    images = files_by_key(root, IMAGE_SUFFIXES, problems)
    labels = files_by_key(root, [".xml"], problems)
    if not labels:
        raise UserError(f"{root} has no XML files: it is no data set in Pascal VOC's format")
    if rules.train_set or rules.val_set or lists.is_dir():
        keys_of = listed_splits(lists, labels, rules, problems)
    else:
        keys_of = splits_by_folder(labels)

    # images whose names are not those of their XML files
    missing = {key for keys in keys_of.values() for key in keys if key in labels and key not in images}
    _add_images_of_other_names(images, missing, labels, root, problems)
    if not lists.is_dir():
        used = {os.path.realpath(images[key]) for key in labels if key in images}
        unused = {os.path.realpath(path) for path in images.values()} - used
        problems.notes["images without an XML file, left out"] += len(unused)

    # the objects
    pairs_of: dict[str, list[Pair]] = {}
    for split, keys in keys_of.items():
        pairs_of[split] = []
        for key in dict.fromkeys(keys):
            if key not in labels:
                problems.add(f"{lists}: image {'/'.join(key)} of the {split} set has no XML file")
            elif key in images:
                pairs_of[split].append(Pair(key, images[key], labels[key]))
    return read_splits(pairs_of, functools.partial(_read_objects, rules=rules, problems=problems), problems)


def folder_with(name: str, root: Path) -> Path:
    """The folder itself, or the only VOC<year> in it that has a folder of this name."""
    if (root / name).is_dir():
        return root
    found = [*root.glob(f"VOC*/{name}"), *root.glob(f"VOCdevkit/VOC*/{name}")]
    years = sorted(path.parent for path in found)
    if len(years) > 1:
        names = ", ".join(path.name for path in years)
        raise UserError(f"{root} holds {names}; name one of them, for example {years[0]}")
    return years[0] if years else root


def _add_images_of_other_names(
    images: dict[Key, Path], missing: set[Key], labels: dict[Key, Path], root: Path, problems: Problems
) -> None:
    """Add the images of the XML files `missing`, for which there is none of the same name, by the
    `filename` in the XML file; if none is found, that is a problem.

    An image that has an XML file of its name, or is in a folder of another split, is not used.
    """
    # images of no split may be those of any
    by_split: dict[str, list[Key]] = {}
    for key in sorted(missing):
        by_split.setdefault(split_named(key[:-1]), []).append(key)
    free = {key: path for key, path in images.items() if key not in labels}
    for split, keys in by_split.items():
        likely = [path for key, path in free.items() if not split or split_named(key[:-1]) in (split, "")]
        files = ((parts_of(path.relative_to(root).as_posix()), path) for path in likely)

        # a name that two XML files have is nobody's
        described = {key: _describe(labels[key]) for key in keys}
        counts = Counter(name for name, _ in described.values())
        sizes = {name: size for name, size in described.values() if counts[name] == 1}
        found = Index(files, root).find(sizes).found
        for key in keys:
            file = found.get(described[key][0])
            if file:
                images[key] = file.path
                problems.notes[file.how or _BY_FILENAME] += 1
            else:
                problems.add(
                    f"{labels[key]} has no image: none of that name is below {root}", "missing_image"
                )


def _describe(path: Path) -> tuple[str, Size]:
    """Name and size of the image as an XML file has them; the file's own name may be that of a mask."""
    try:
        root, size = _parse(path)
    except ValueError:
        return "", UNKNOWN_SIZE
    return root.findtext("filename", "").strip(), size


# ---- lists of images


def listed_splits(
    lists: Path, labels: dict[Key, Path], rules: VocRules, problems: Problems
) -> dict[str, list[Key]]:
    train, val = _list_names(lists, rules)
    splits = {"train": _read_list(lists / f"{train}.txt", labels, problems)}
    if val:
        splits["val"] = _read_list(lists / f"{val}.txt", labels, problems)
        # a picture in both splits would make the metrics too good
        shared = set(splits["train"]) & set(splits["val"])
        if shared:
            example = "/".join(min(shared))
            raise UserError(
                f"{lists}: {train}.txt and {val}.txt share {len(shared)} images, for example {example}"
            )
    return splits


def _list_names(lists: Path, rules: VocRules) -> tuple[str, str]:
    """The names of the lists for training and validation; "": there is none for validation."""
    if rules.train_set or rules.val_set:
        return rules.train_set or "train", rules.val_set
    # name in lower case, or the split that it names -> name
    there = {"": ""}
    # exact names last, so that they replace others (Train.txt)
    for name in sorted((path.stem for path in lists.glob("*.txt")), key=lambda name: name in SPLITS):
        there[SPLITS.get(name.lower(), name)] = name
    for train, val in _LIST_PAIRS:
        if train in there and val in there:
            return there[train], there[val]
    raise UserError(f"{lists} has no train.txt, trainval.txt or default.txt; name a list with --train_set")


def _read_list(path: Path, labels: dict[Key, Path], problems: Problems) -> list[Key]:
    """The keys of a list's entries, in order."""
    try:
        entries = [_entry(line.text, labels) for line in read_lines(path)]
    except UserError as error:
        raise UserError(f"{error}; --train_set and --val_set must name lists that are there") from None

    # entries that are spelled otherwise, or begin with other folders
    others = {"/".join(key): None for key in entries if key not in labels}
    findings = Index(labels.items(), path).find(others)
    for how, count in findings.notes().items():
        problems.notes[f"entries of lists: {how}"] += count
    key_of_file = {file: key for key, file in labels.items()}
    found = {name: key_of_file[file.path] for name, file in findings.found.items()}
    return [found.get("/".join(key), key) for key in entries]


def _entry(text: str, labels: dict[Key, Path]) -> Key:
    """The key of an image; some programs write folders and ending, too."""
    written = tuple(text.split("/"))
    if written in labels:
        return written
    # lists of one class say for each image whether it has the class: 1, 0 or -1
    name = unquoted(re.sub(r"\s+(-1|0|1)$", "", text))
    stem, suffix = os.path.splitext(name)
    if suffix.lower() not in (*IMAGE_SUFFIXES, ".xml"):
        stem = name
    return tuple(part for part in parts_of(stem) if part.lower() not in ROLES) or (name,)


# ---- XML files


class _PlainXml(ElementTree.TreeBuilder):
    """Refuses document types: their entities could name other files or grow without bound."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("has a document type (DTD), which no annotation needs")


def _parse(path: Path) -> tuple[ElementTree.Element, tuple[int, int]]:
    """The root of an XML file, and (width, height) in it, 0 where there is none.

    Raises ValueError; its message continues a sentence that begins with the path.
    """
    # the standard parser reads no other files, but it expands entities
    parser = ElementTree.XMLParser(target=_PlainXml())
    try:
        parser.feed(_xml_text(read_regular_file(path)))
        root = parser.close()
    except OSError as error:
        raise ValueError(f"can't be read ({error.strerror})") from None
    except (LookupError, UnicodeError) as error:
        raise ValueError(f"is not in the encoding that it names ({error})") from None
    except ElementTree.ParseError as error:
        raise ValueError(f"is not XML ({error})") from None
    # other programs write XML, too
    if root.tag != "annotation":
        raise ValueError(f"has {root.tag[:40]!r} where Pascal VOC has 'annotation'")
    try:
        width, height = (int(float(root.findtext(f"size/{side}", "0"))) for side in ("width", "height"))
    except (ValueError, OverflowError):
        raise ValueError("can't be used: its size is no number") from None
    return root, (width, height)


def _xml_text(content: bytes) -> bytes | str:
    """Python knows more encodings than ElementTree, for example GB2312 and Shift JIS."""
    named = re.match(rb"""<\?xml[^>]*\sencoding=["']([\w.-]+)["']""", content)
    if not named:
        return content
    encoding = named[1].decode().lower()
    if encoding.startswith("utf"):  # "utf-16" in ASCII letters can't be true
        encoding = "utf-8"
    return content.decode(encoding)


def _read_objects(path: Path, header: Header, rules: VocRules, problems: Problems) -> list[Object] | None:
    """The objects of an XML file. None: the file can't be used."""
    # the file
    try:
        root, size = _parse(path)
    except ValueError as error:
        problems.add(f"{path} {error}")
        return None

    # The size tells whether boxes are those of the image as shown or as stored, if these differ.
    # Some programs write no size, or 0; labelling tools show the turned image.
    as_shown = 0 in size or size == shown_size(header)
    if not as_shown and size != header.size:
        width, height = header.size
        problems.add(f"{path}: its size is {size[0]} x {size[1]}, and the image's {width} x {height}")
        return None
    is_turned = as_shown and header.orientation > 1
    problems.notes[BOXES_TURNED] += is_turned

    # its objects
    objects = []
    for number, item in enumerate(root.iterfind("object"), 1):
        read = _read_object(item, f"{path}: object {number}", rules, problems)
        if read is None:
            continue
        corners = as_stored(read.corners, header) if is_turned else read.corners
        placed = problems.placed(corners, header.size, f"{path}: object {number} ({read.name[:40]!r})")
        if placed:
            turning = header if is_turned else header._replace(orientation=1)
            mask = outline_as_stored(_outline_in(item, rules.first_pixel), turning)
            objects.append(read._replace(corners=placed, segmentation=mask))
    return objects


def _read_object(item: ElementTree.Element, where: str, rules: VocRules, problems: Problems) -> Object | None:
    """An object as the file has it; None if it is left out. `where` begins messages."""
    name = (item.findtext("name") or "").strip()
    if not name:
        problems.add(f"{where} has no name")
        return None

    is_difficult = (item.findtext("difficult") or "0").strip() not in ("0", "false", "False")
    problems.notes[f"difficult objects ({rules.difficult})"] += is_difficult
    if is_difficult and rules.difficult == "drop":
        return None

    try:
        x0, y0, x1, y1 = (float(item.findtext(f"bndbox/{side}", "")) for side in _SIDES)
    except ValueError:
        problems.add(f"{where} ({name[:40]!r}) has no box of four numbers {', '.join(_SIDES)}")
        return None
    # the last column and row belong to the box
    first = rules.first_pixel
    corners = Corners(x0 - first, y0 - first, x1 - first + 1, y1 - first + 1)
    return Object(name, corners, is_difficult and rules.difficult == "crowd")


def _outline_in(item: ElementTree.Element, first_pixel: int) -> list[float]:
    """x1, y1, x2, y2, ... of an object's `polygon`; empty: it has none that can be read."""
    points: list[float] = []
    for number in itertools.count(1):
        x, y = (item.findtext(f"polygon/{axis}{number}") for axis in "xy")
        if x is None or y is None:
            break
        try:
            points += [float(x) - first_pixel, float(y) - first_pixel]
        except ValueError:
            return []
    return points
