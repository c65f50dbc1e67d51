"""A COCO-format data set in the layouts of Pascal VOC and YOLO: what tools/convert_dataset.py must
make the same boxes of again.

python -m tests.layouts data      # data/small -> data/voc, data/yolo, data/labelled
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

Entry = tuple[Path, dict[str, Any], list[dict[str, Any]]]


def write_voc(coco: Path, folder: Path) -> None:
    """JPEGImages, Annotations and ImageSets/Main. Corners keep their fractions, which VOC's own
    have here and there.
    """
    names = _names(coco)
    for part in ("train", "val"):
        listed = []
        for path, image, objects_of_it in _images(coco, part):
            name = f"{part}_{path.stem}"
            _copy(path, folder / "JPEGImages" / f"{name}{path.suffix}")
            objects = "".join(_voc_object(names[a["category_id"]], a["bbox"]) for a in objects_of_it)
            sides = f"<width>{image['width']}</width><height>{image['height']}</height>"
            size = f"<size>{sides}<depth>3</depth></size>"
            _write(folder / "Annotations" / f"{name}.xml", f"<annotation>{size}{objects}</annotation>")
            listed.append(name)
        _write(folder / "ImageSets/Main" / f"{part}.txt", "\n".join(listed))


def write_yolo(coco: Path, folder: Path) -> None:
    """images, labels and data.yaml."""
    names = _names(coco)
    number = {category_id: i for i, category_id in enumerate(names)}
    for part in ("train", "val"):
        for path, image, objects_of_it in _images(coco, part):
            _copy(path, folder / "images" / part / path.name)
            lines = []
            for a in objects_of_it:
                x, y, width, height = a["bbox"]
                shares = (
                    (x + width / 2) / image["width"],
                    (y + height / 2) / image["height"],
                    width / image["width"],
                    height / image["height"],
                )
                lines.append(f"{number[a['category_id']]} " + " ".join(f"{share:.8f}" for share in shares))
            _write(folder / "labels" / part / f"{path.stem}.txt", "\n".join(lines))
    _write(
        folder / "data.yaml",
        json.dumps({"train": "images/train", "val": "images/val", "names": list(names.values())}),
    )


def write_labelled(coco: Path, folder: Path) -> None:
    """One instances file and its images in a folder beside it, as labelling tools export them."""
    content = json.loads((coco / "annotations/instances_train2017.json").read_text())
    for path, _, _ in _images(coco, "train"):
        _copy(path, folder / "images" / path.name)
    _write(folder / "result.json", json.dumps(content))


def _voc_object(name: str, box: list[float]) -> str:
    x, y, width, height = box
    sides = {"xmin": x + 1, "ymin": y + 1, "xmax": x + width, "ymax": y + height}
    corners = "".join(f"<{side}>{value:.6f}</{side}>" for side, value in sides.items())
    return f"<object><name>{escape(name)}</name><difficult>0</difficult><bndbox>{corners}</bndbox></object>"


def _names(coco: Path) -> dict[int, str]:
    categories = json.loads((coco / "annotations/instances_train2017.json").read_text())["categories"]
    return {
        category["id"]: category["name"]
        for category in sorted(categories, key=lambda category: category["id"])
    }


def _images(coco: Path, part: str) -> Iterator[Entry]:
    """Every image with its objects; crowds, which neither format has, are left out."""
    content = json.loads((coco / f"annotations/instances_{part}2017.json").read_text())
    for image in content["images"]:
        own = [a for a in content["annotations"] if a["image_id"] == image["id"] and not a.get("iscrowd")]
        yield coco / f"{part}2017" / image["file_name"], image, own


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    write_voc(root / "small", root / "voc")
    write_yolo(root / "small", root / "yolo")
    write_labelled(root / "small", root / "labelled")
