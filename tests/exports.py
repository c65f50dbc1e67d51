"""Small exports in the formats of labelling tools: every image has a size, and a box, that tell its
number.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

from PIL import Image

from datasets.convert.common import CocoSplit
from tools.convert_dataset import main
from util.errors import UserError

HEIGHT = 20
# file -> [(class, x, y, width, height)]
Boxes = dict[str, list[tuple]]


def convert(*flags: object, code: int = 0) -> str:
    """What tools/convert_dataset.py prints, or its error in one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            main([str(flag) for flag in flags])
    except UserError as error:
        assert error.exit_code == code, error
        assert len(str(error).splitlines()) == 1
        return str(error)
    assert code == 0
    return said.getvalue()


def width_of(number: int) -> int:
    """Every image has a width of its own, and a box that tells its number."""
    return 60 + number


def write(path: Path, text: str, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))


def write_image(path: Path, number: int, size: tuple[int, int] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size or (width_of(number), HEIGHT)).save(path)


def box_of(number: int) -> tuple[int, int, int, int]:
    """x, y, width, height in pixels."""
    return 10, 5, 10 + number, 8


def yolo_line(number: int, label: int = 0) -> str:
    x, y, width, height = box_of(number)
    columns = (
        (x + width / 2) / width_of(number),
        (y + height / 2) / HEIGHT,
        width / width_of(number),
        height / HEIGHT,
    )
    return f"{label} " + " ".join(f"{share:.8f}" for share in columns) + "\n"


def voc_text(number: int, filename: str = "", name: str = "thing") -> str:
    x, y, width, height = box_of(number)
    said = f"<size><width>{width_of(number)}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    corners = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + width}</xmax><ymax>{y + height}</ymax>"
    item = f"<object><name>{name}</name><bndbox>{corners}</bndbox></object>"
    return f"<annotation><filename>{filename}</filename>{said}{item}</annotation>"


def coco_text(names: dict[int, str]) -> str:
    images = [
        {"id": n, "file_name": name, "width": width_of(n), "height": HEIGHT} for n, name in names.items()
    ]
    boxes = [
        {"id": n, "image_id": n, "category_id": 3, "bbox": box_of(n), "area": 8 * (10 + n), "iscrowd": 0}
        for n in names
    ]
    return json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 3, "name": "thing"}]})


def boxes(parts: dict[str, CocoSplit], root: Path) -> dict[str, Boxes]:
    """Of every part: where the images are below `root`, and what is in them."""
    found: dict[str, Boxes] = {}
    for part, (content, files) in parts.items():
        classes = {category["id"]: category["name"] for category in content["categories"]}
        names = {
            image["id"]: files[image["file_name"]].resolve().relative_to(root).as_posix()
            for image in content["images"]
        }
        found[part] = {name: [] for name in names.values()}
        for annotation in content["annotations"]:
            box = (round(value, 3) for value in annotation["bbox"])
            found[part][names[annotation["image_id"]]].append((classes[annotation["category_id"]], *box))
    return found


def coco_boxes(parts: dict[str, CocoSplit], root: Path) -> dict[str, Boxes]:
    for content, _ in parts.values():
        for annotation in content["annotations"]:
            assert annotation["id"] == annotation["image_id"], "ids stay as they are"
    return boxes(parts, root)


def class_names(parts: dict[str, CocoSplit]) -> list[str]:
    """Of the classes, in the order of their ids."""
    return [category["name"] for category in parts["train"].content["categories"]]


def wanted(places: dict[int, str], name: str = "thing") -> Boxes:
    return {place: [(name, *box_of(number))] for number, place in places.items()}


def merged(parts: dict[str, Boxes]) -> Boxes:
    """Of all parts together, where they are drawn at random."""
    return {name: objects for boxes_of_part in parts.values() for name, objects in boxes_of_part.items()}
