"""Pascal VOC's format: an XML file for every image (Everingham et al., The PASCAL Visual Object
Classes Challenge, section 2.3 of the development kits).
"""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from datasets.convert.common import (
    PARTS,
    ROLES,
    Corners,
    Faults,
    Labelled,
    LabelledImage,
    Object,
    as_stored,
    checked_name,
    files_by_key,
    names_in_part,
    part_of,
    parts_by_folder,
    progress,
)
from datasets.file_index import SPELLING, UNKNOWN_SIZE, Found, Index, Size, shown_size
from datasets.file_names import IMAGE_SUFFIXES, Key, files_below, parts_of
from util.errors import UserError
from util.images.files import Header, read_regular_file
from util.text_files import read_lines, unquoted

_SETS = Path("ImageSets/Main")
# how an image was found, as the user is told
BY_FILENAME = "images found by the filename in their XML files"
# training and validation set, in order of preference
_SET_PAIRS = (
    ("train", "val"),
    ("trainval", "test"),
    ("train", "test"),
    ("trainval", ""),
    ("train", ""),
    ("default", ""),
)


@dataclass(frozen=True)
class VocRules:
    """difficult: keep such objects, make them crowd (no detection of them is wrong, as VOC's own
    evaluation has it) or drop them.

    first_pixel: the number of the first column and row, 1 in VOC; others that write such files
    number from 0. train_set, val_set: names of lists in ImageSets/Main; "": the first pair of
    train/val, trainval/test that is there.
    """

    difficult: str = "crowd"
    first_pixel: int = 1
    train_set: str = ""
    val_set: str = ""


def is_voc(root: Path) -> bool:
    return root.is_dir() and bool(files_below(root, [".xml"]))


def read_voc(root: Path, rules: VocRules, faults: Faults) -> Labelled:
    """A folder with JPEGImages, Annotations and ImageSets/Main, or any folder of images with an XML
    file of the same name each.

    Coordinates are whole pixels that belong to the box, the first one 1: xmin 1 and xmax 10 is a
    box 10 pixels wide at the left border. `truncated` and all other fields are passed over. Classes
    are in alphabetical order, which is VOC's own.

    Raises:
        UserError: there is nothing to convert; or as Faults says.
    """
    root = _with_annotations(root)
    images = files_by_key(root, IMAGE_SUFFIXES, faults)
    labels = files_by_key(root, [".xml"], faults)
    if not labels:
        raise UserError(f"{root} has no XML files: it is no data set in Pascal VOC's format")
    listed = _parts(root, labels, rules, faults)
    missing = [key for keys in listed.values() for key in keys if key in labels and key not in images]
    images |= _images_of_other_names(dict.fromkeys(missing), root, labels, images, faults)
    parts = {}
    for part, keys in listed.items():
        pairs = {}
        for key in keys:
            if key not in labels:
                faults.add(f"{root / _SETS}: image {'/'.join(key)} of the {part} set has no XML file")
            elif key in images:
                pairs[key] = images[key]
        named = zip(pairs, names_in_part(pairs.items()), strict=True)
        parts[part] = list(_read_images(named, labels, rules, faults, part))
    used = {os.path.realpath(images[key]) for key in labels if key in images}
    unused = {os.path.realpath(path) for path in images.values()} - used
    if not (root / _SETS).is_dir():
        faults.notes["images without an XML file, left out"] += len(unused)
    names = sorted(
        {item.name for images_of_part in parts.values() for image in images_of_part for item in image.objects}
    )
    return Labelled(names, parts)


def _with_annotations(root: Path) -> Path:
    """The folder itself, or the only VOC<year> in it."""
    if (root / "Annotations").is_dir():
        return root
    years = [
        path.parent
        for pattern in ("VOC*", "VOCdevkit/VOC*")
        for path in sorted(root.glob(f"{pattern}/Annotations"))
    ]
    if len(years) > 1:
        raise UserError(
            f"{root} holds {', '.join(path.name for path in years)}; name one of them, {years[0]} say"
        )
    return years[0] if years else root


def _images_of_other_names(
    missing: Iterable[Key], root: Path, labels: dict[Key, Path], images: dict[Key, Path], faults: Faults
) -> dict[Key, Path]:
    """Images of XML files for which there is none of the same name; what is not found is a fault.

    An image that has an XML file, or that lies in a folder of another part, is none of them.
    """
    found: dict[Key, Path] = {}
    free = {key: path for key, path in images.items() if key not in labels}
    for part, keys in itertools.groupby(sorted(missing, key=part_of), part_of):
        likely = {key: path for key, path in free.items() if not part or part_of(key) in (part, "")}
        described = {key: _description(labels[key]) for key in keys}
        files = _of_other_spelling(described, likely, root)
        files |= _of_filename(
            {key: described[key] for key in described if key not in files}, files.values(), likely, root
        )
        faults.notes.update(file.how or BY_FILENAME for file in files.values())
        found |= {key: file.path for key, file in files.items()}
        for key in [key for key in described if key not in files]:
            faults.add(f"{labels[key]} has no image: none of that name is below {root}", "missing_image")
    return found


def _of_other_spelling(
    described: Mapping[Key, tuple[str, Size]], images: dict[Key, Path], root: Path
) -> dict[Key, Found]:
    """The same name in another folder does not count: with any ending, it may be a mask or a
    drawing of the image.
    """
    keys = {"/".join(key): key for key in described}
    found = Index(images.items(), root).find({name: described[key][1] for name, key in keys.items()}).found
    return {keys[name]: file for name, file in found.items() if file.how == SPELLING}


def _of_filename(
    described: Mapping[Key, tuple[str, Size]], taken: Iterable[Found], images: dict[Key, Path], root: Path
) -> dict[Key, Found]:
    """By what `filename` says in the XML file, where no other says the same."""
    counts = Counter(name for name, _ in described.values())
    keys = {name: key for key, (name, _) in described.items() if counts[name] == 1}
    files = ((parts_of(path.relative_to(root).as_posix()), path) for path in images.values())
    sizes = {name: described[key][1] for name, key in keys.items()}
    found = Index(files, root).find(sizes, [file.path for file in taken]).found
    return {keys[name]: file for name, file in found.items()}


def _description(path: Path) -> tuple[str, Size]:
    """What an XML file says of its image: its name and size, as far as it does."""
    try:
        root = _parse(path)
        size = _said_size(root)
    except ValueError:
        return "", UNKNOWN_SIZE
    return root.findtext("filename", "").strip(), size


# ---- lists of images


def _parts(root: Path, labels: dict[Key, Path], rules: VocRules, faults: Faults) -> dict[str, list[Key]]:
    lists = root / _SETS
    if not (rules.train_set or rules.val_set or lists.is_dir()):
        return parts_by_folder(labels)
    train, val = _sets(lists, rules)
    parts = {
        part: _listed(lists / f"{name}.txt", labels, faults)
        for part, name in (("train", train), ("val", val))
        if name
    }
    shared = set(parts["train"]) & set(parts.get("val", []))
    if shared:
        raise UserError(
            f"{lists}: {train}.txt and {val}.txt share {len(shared)} images, {'/'.join(min(shared))} for one"
        )
    return parts


def _sets(lists: Path, rules: VocRules) -> tuple[str, str]:
    """The names of the lists for training and validation; "": there is none for validation."""
    if rules.train_set or rules.val_set:
        return rules.train_set or "train", rules.val_set
    # exact names last, so that they have priority
    names = sorted((path.stem for path in lists.glob("*.txt")), key=lambda name: name in ("train", "val"))
    there = {"": ""} | {PARTS.get(name.lower(), name): name for name in names}
    pair = next((pair for pair in _SET_PAIRS if set(pair) <= there.keys()), None)
    if pair is None:
        raise UserError(
            f"{lists} has no train.txt, trainval.txt or default.txt; name a list with --train_set"
        )
    return there[pair[0]], there[pair[1]]


def _listed(path: Path, labels: dict[Key, Path], faults: Faults) -> list[Key]:
    """The keys of a list's entries, in order."""
    try:
        entries = [_entry(line.text, labels) for line in read_lines(path)]
    except UserError as error:
        raise UserError(f"{error}; --train_set and --val_set must name lists that are there") from None
    others = {"/".join(key): None for key in entries if key not in labels}
    findings = Index(labels.items(), path).find(others)
    faults.notes.update({f"entries of lists: {how}": count for how, count in findings.notes().items()})
    keys = {file: key for key, file in labels.items()}
    found = {name: keys[file.path] for name, file in findings.found.items()}
    return [found.get("/".join(key), key) for key in entries]


def _entry(text: str, labels: dict[Key, Path]) -> Key:
    """The name of an image, whose folders and ending some programs write, too."""
    written = tuple(text.split("/"))
    if written in labels:
        return written
    # lists of one class say for each image whether it has it
    name = unquoted(re.sub(r"\s+(-1|0|1)$", "", text))
    parts = parts_of(name)
    stem, suffix = os.path.splitext(name)
    if suffix.lower() in (*IMAGE_SUFFIXES, ".xml"):
        parts = parts_of(stem)
    return tuple(part for part in parts if part.lower() not in ROLES) or (name,)


# ---- XML files


def _read_images(
    named: Iterator[tuple[Key, tuple[str, Path]]],
    labels: dict[Key, Path],
    rules: VocRules,
    faults: Faults,
    part: str,
) -> Iterator[LabelledImage]:
    for key, (name, path) in progress(named, part):
        header = faults.header(path) if checked_name(name, path, faults) else None
        if header is None:
            continue
        try:
            root = _parse(labels[key])
        except ValueError as error:
            faults.add(f"{labels[key]} {error}")
            continue
        turned = _is_turned(root, header, labels[key], faults)
        if turned is None:
            continue
        objects = _objects(root, header, turned, labels[key], rules, faults)
        yield LabelledImage(path, name, header.size, list(objects))


class _PlainXml(ElementTree.TreeBuilder):
    """Refuses document types: with them come entities, which may name other files or grow without
    bound.
    """

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("has a document type (DTD), which no annotation needs")


def _parse(path: Path) -> ElementTree.Element:
    """The root of an XML file. Raises ValueError with what is wrong, to be read after the path."""
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
    if root.tag != "annotation":
        raise ValueError(f"has {root.tag[:40]!r} where Pascal VOC has 'annotation'")
    return root


def _xml_text(content: bytes) -> bytes | str:
    """Python knows more encodings than ElementTree does, GB2312 and Shift JIS for example."""
    named = re.match(rb"""<\?xml[^>]*\sencoding=["']([\w.-]+)["']""", content)
    if not named:
        return content
    name = named[1].decode().lower()
    return content.decode(
        "utf-8" if name.startswith("utf") else name
    )  # what says utf-16 in bytes of ASCII is none


def _is_turned(root: ElementTree.Element, header: Header, path: Path, faults: Faults) -> bool | None:
    """Whether the boxes are those of the image turned by its EXIF orientation, as labelling tools
    show it.

    The size in the file tells, where turning changes it. None: the size is of another image.
    """
    try:
        said = _said_size(root)
    except ValueError:
        return faults.add(f"{path}: its size is no number")
    if 0 in said or said == shown_size(header):  # some programs write no size, or 0
        if header.orientation > 1:
            faults.notes["images with an EXIF orientation: boxes turned to the pixels as stored"] += 1
        return header.orientation > 1
    if said == header.size:
        return False
    width, height = header.size
    return faults.add(f"{path}: its size is {said[0]} x {said[1]}, and the image's {width} x {height}")


def _said_size(root: ElementTree.Element) -> tuple[int, int]:
    """(width, height); 0 where there is none. Raises ValueError."""
    try:
        width, height = (int(float(root.findtext(f"size/{side}", "0"))) for side in ("width", "height"))
    except OverflowError as error:
        raise ValueError from error
    return width, height


def _objects(
    root: ElementTree.Element, header: Header, turned: bool, path: Path, rules: VocRules, faults: Faults
) -> Iterator[Object]:
    for number, item in enumerate(root.iterfind("object"), 1):
        name = (item.findtext("name") or "").strip()
        where = f"{path}: object {number} ({name[:40]!r})"
        if not name:
            faults.add(f"{path}: object {number} has no name")
            continue
        difficult = (item.findtext("difficult") or "0").strip() not in ("0", "false", "False")
        if difficult:
            faults.notes[f"difficult objects ({rules.difficult})"] += 1
            if rules.difficult == "drop":
                continue
        try:
            x0, y0, x1, y1 = (
                float(item.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")
            )
        except ValueError:
            faults.add(f"{where} has no box of four numbers xmin, ymin, xmax, ymax")
            continue
        first = rules.first_pixel
        corners = Corners(x0 - first, y0 - first, x1 - first + 1, y1 - first + 1)
        placed = faults.placed(as_stored(corners, header) if turned else corners, header.size, where)
        if placed:
            yield Object(name, placed, difficult and rules.difficult == "crowd")
