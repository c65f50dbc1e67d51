"""Pascal VOC's format: an XML file for every image (Everingham et al., The PASCAL Visual Object Classes Challenge, section 2.3
of the development kits)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from datasets.files import IMAGE_SUFFIXES, Key, files_below, shown_size
from datasets.labelled import (
    Corners,
    Faults,
    Labelled,
    LabelledImage,
    Object,
    as_stored,
    checked_name,
    files_by_key,
    names_in_part,
    parts_by_folder,
    progress,
)
from util.errors import UserError
from util.images import Header, read_regular_file

_SETS = Path("ImageSets/Main")
# training and validation set, in order of preference
_SET_PAIRS = (("train", "val"), ("trainval", "test"), ("train", "test"), ("trainval", ""), ("train", ""))


@dataclass(frozen=True)
class VocRules:
    """difficult: keep such objects, make them crowd (no detection of them is wrong, as VOC's own evaluation has it) or drop them.

    first_pixel: the number of the first column and row, 1 in VOC; others that write such files number from 0. train_set, val_set:
    names of lists in ImageSets/Main; "": the first pair of train/val, trainval/test that is there.
    """

    difficult: str = "crowd"
    first_pixel: int = 1
    train_set: str = ""
    val_set: str = ""


def is_voc(root: Path) -> bool:
    return root.is_dir() and bool(files_below(root, [".xml"]))


def read_voc(root: Path, rules: VocRules, faults: Faults) -> Labelled:
    """A folder with JPEGImages, Annotations and ImageSets/Main, or any folder of images with an XML file of the same name each.

    Coordinates are whole pixels that belong to the box, the first one 1: xmin 1 and xmax 10 is a box 10 pixels wide at the
    left border. `truncated` and all other fields are passed over. Classes are in alphabetical order, which is VOC's own.

    Raises:
        UserError: there is nothing to convert; or as Faults says.
    """
    root = _with_annotations(root)
    images = files_by_key(root, IMAGE_SUFFIXES, faults)
    labels = files_by_key(root, [".xml"], faults)
    if not labels:
        raise UserError(f"{root} has no XML files: it is no data set in Pascal VOC's format")
    parts = {}
    for part, keys in _parts(root, labels, rules).items():
        pairs = {}
        for key in keys:
            if key not in labels:
                faults.add(f"{root / _SETS}: image {'/'.join(key)} of the {part} set has no XML file")
            elif key not in images:
                faults.add(f"{labels[key]} has no image: none of that name is below {root}")
            else:
                pairs[key] = images[key]
        named = zip(pairs, names_in_part(pairs.items()), strict=True)
        parts[part] = list(_read_images(named, labels, rules, faults, part))
    if not (root / _SETS).is_dir() and images.keys() - labels.keys():
        faults.notes["images without an XML file, left out"] += len(images.keys() - labels.keys())
    names = sorted({item.name for images_of_part in parts.values() for image in images_of_part for item in image.objects})
    return Labelled(names, parts)


def _with_annotations(root: Path) -> Path:
    """The folder itself, or the only VOC<year> in it."""
    if (root / "Annotations").is_dir():
        return root
    years = [path.parent for pattern in ("VOC*", "VOCdevkit/VOC*") for path in sorted(root.glob(f"{pattern}/Annotations"))]
    if len(years) > 1:
        raise UserError(f"{root} holds {', '.join(path.name for path in years)}; name one of them, {years[0]} say")
    return years[0] if years else root


def _parts(root: Path, labels: dict[Key, Path], rules: VocRules) -> dict[str, list[Key]]:
    lists = root / _SETS
    if rules.train_set or rules.val_set:
        train, val = rules.train_set or "train", rules.val_set
    elif lists.is_dir():
        there = {path.stem for path in lists.glob("*.txt")} | {""}
        pair = next((pair for pair in _SET_PAIRS if set(pair) <= there), None)
        if pair is None:
            raise UserError(f"{lists} has no train.txt or trainval.txt; name a list with --train_set")
        train, val = pair
    else:
        return parts_by_folder(labels)
    parts = {part: list(_listed(lists / f"{name}.txt", labels)) for part, name in (("train", train), ("val", val)) if name}
    shared = set(parts["train"]) & set(parts.get("val", []))
    if shared:
        raise UserError(f"{lists}: {train}.txt and {val}.txt share {len(shared)} images, {'/'.join(min(shared))} for one")
    return parts


def _listed(path: Path, labels: dict[Key, Path]) -> Iterator[Key]:
    try:
        lines = read_regular_file(path).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} can't be read ({reason}); --train_set and --val_set must name lists that are there") from None
    for line in lines:
        name = line.strip()
        if tuple(name.split("/")) not in labels:
            name = re.sub(r"\s+(-1|0|1)$", "", name)  # lists of one class say for each image whether it has it
        if name:
            yield tuple(name.split("/"))


def _read_images(
    named: Iterator[tuple[Key, tuple[str, Path]]], labels: dict[Key, Path], rules: VocRules, faults: Faults, part: str
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
    """Refuses document types: with them come entities, which may name other files or grow without bound."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("has a document type (DTD), which no annotation needs")


def _parse(path: Path) -> ElementTree.Element:
    """The root of an XML file. Raises ValueError with what is wrong, to be read after the path."""
    parser = ElementTree.XMLParser(target=_PlainXml())
    try:
        parser.feed(read_regular_file(path))
        root = parser.close()
    except OSError as error:
        raise ValueError(f"can't be read ({error.strerror})") from None
    except ElementTree.ParseError as error:
        raise ValueError(f"is not XML ({error})") from None
    if root.tag != "annotation":
        raise ValueError(f"has {root.tag[:40]!r} where Pascal VOC has 'annotation'")
    return root


def _is_turned(root: ElementTree.Element, header: Header, path: Path, faults: Faults) -> bool | None:
    """Whether the boxes are those of the image turned by its EXIF orientation, as labelling tools show it.

    The size in the file tells, where turning changes it. None: the size is of another image.
    """
    try:
        said = tuple(int(float(root.findtext(f"size/{side}", "0"))) for side in ("width", "height"))
    except (ValueError, OverflowError):
        return faults.add(f"{path}: its size is no number")
    if 0 in said or said == shown_size(header):  # some programs write no size, or 0
        if header.orientation > 1:
            faults.notes["images with an EXIF orientation: boxes turned to the pixels as stored"] += 1
        return header.orientation > 1
    if said == header.size:
        return False
    width, height = header.size
    return faults.add(f"{path}: its size is {said[0]} x {said[1]}, and the image's {width} x {height}")


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
            x0, y0, x1, y1 = (float(item.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax"))
        except ValueError:
            faults.add(f"{where} has no box of four numbers xmin, ymin, xmax, ymax")
            continue
        first = rules.first_pixel
        corners = Corners(x0 - first, y0 - first, x1 - first + 1, y1 - first + 1)
        placed = faults.placed(as_stored(corners, header) if turned else corners, header.size, where)
        if placed:
            yield Object(name, placed, difficult and rules.difficult == "crowd")
