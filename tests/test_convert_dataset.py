"""Pascal VOC and YOLO to COCO's layout: boxes by hand, folders of every habit, and files that mean
harm.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from torchvision.transforms import v2

from datasets.coco import CocoDetection
from datasets.coco_format import read_annotations
from datasets.convert.problems import Corners, Problems, as_stored
from datasets.convert.voc import VocRules, read_voc
from datasets.convert.voc_masks import read_voc_masks
from datasets.convert.yolo import read_yolo
from datasets.file_index import shown_size
from tests import layouts
from tests.exports import convert
from tests.helpers import run, write_coco
from util.errors import UserError
from util.images.files import Header, read_header

SIZE = (100, 60)


def write_image(path: Path, size: tuple[int, int] = SIZE, orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size, (9, 9, 9)).save(path, **({"exif": exif} if orientation > 1 else {}))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def voc_object(name: str, *box: object, extra: str = "") -> str:
    sides = "".join(
        f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox>"
    part = f"<part><name>head</name>{box}</part>"
    return f"<object><name>{name}</name>{part}<bndbox>{sides}</bndbox>{extra}</object>"


def voc_xml(*objects: str, size: tuple[int, int] | None = SIZE) -> str:
    said = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>" if size else ""
    return f"<annotation><filename>wrong.jpg</filename>{said}{''.join(objects)}</annotation>"


def write_voc(root: Path) -> None:
    """Two training images and one for validation; one object is difficult."""
    difficult = "<truncated>1</truncated><difficult>1</difficult>"
    labels = {
        "2007_a": (voc_object("dog", 1, 1, 100, 60), voc_object("cat", 11, 21, 30, 40, extra=difficult)),
        "2007_b": (voc_object("person", 48.5, 2, 60, 10.5),),
        "2007_c": (),
        "2007_unused": (voc_object("zebra", 1, 1, 2, 2),),
    }
    for name, objects in labels.items():
        write_image(root / "JPEGImages" / f"{name}.jpg")
        write(root / "Annotations" / f"{name}.xml", voc_xml(*objects))
        write_image(root / "SegmentationClass" / f"{name}.png")
    write(root / "ImageSets/Main/train.txt", "2007_a\n2007_b\n")
    write(root / "ImageSets/Main/val.txt", "2007_c  1\n")
    write(root / "ImageSets/Main/cat_train.txt", "2007_a 1\n2007_b -1\n")


def write_yolo(root: Path) -> None:
    """Two training images, one without a file of labels, and one for validation."""
    for part, name in (("train", "a"), ("train", "sub/b"), ("val", "c")):
        write_image(root / "images" / part / f"{name}.png")
    write(root / "labels/train/a.txt", "2 0.5 0.5 1 1\n0 0.2 0.25 0.1 0.5\n\n")
    write(root / "labels/val/c.txt", "1 0.1 0.1 0.5 0.1 0.5 0.9\n")
    write(
        root / "data.yaml",
        "path: .\ntrain: images/train\nval: images/val\nnames:\n  0: car\n  1: bus\n  2: van\n",
    )


def content(folder: Path, part: str) -> dict:
    """What was written, which must be what training reads, with its images beside it."""
    path = folder / "annotations" / f"instances_{part}2017.json"
    written = read_annotations(path).dataset
    for image in written["images"]:
        assert read_header(folder / f"{part}2017" / image["file_name"], 1, "").size == (
            image["width"],
            image["height"],
        )
    return written


def boxes(written: dict, areas: bool = True) -> dict[str, list[tuple]]:
    """File name -> (class, box, crowd)."""
    names = {category["id"]: category["name"] for category in written["categories"]}
    found: dict[str, list[tuple]] = {image["file_name"]: [] for image in written["images"]}
    files = {image["id"]: image["file_name"] for image in written["images"]}
    for a in written["annotations"]:
        if areas and "segmentation" not in a:
            assert a["area"] == pytest.approx(a["bbox"][2] * a["bbox"][3], abs=1e-3)
        found[files[a["image_id"]]].append((names[a["category_id"]], a["bbox"], a["iscrowd"]))
    return found


def read(
    source: Path, on_bad: str = "stop", **rules: object
) -> tuple[dict[str, dict[str, list[tuple]]], Problems]:
    """The boxes of every part of a source, and what was wrong with it."""
    faults = Problems(on_bad)
    is_voc = next(source.rglob("*.xml"), None) is not None
    data = read_voc(source, VocRules(**rules), faults) if is_voc else read_yolo(source, faults)
    faults.stop_if_asked()
    return {part: boxes(written) for part, (written, _) in data.items()}, faults


def refusal(source: Path, **rules: object) -> str:
    with pytest.raises(UserError) as error:
        read(source, **rules)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


# ---- Pascal VOC


def test_voc_is_converted_by_one_command(tmp_path):
    write_voc(tmp_path / "VOC2007")
    said = convert(tmp_path / "VOC2007", "--output_dir", tmp_path / "out")
    train, val = content(tmp_path / "out", "train"), content(tmp_path / "out", "val")
    assert (
        train["categories"]
        == val["categories"]
        == [{"id": i, "name": n} for i, n in enumerate(("cat", "dog", "person"), 1)]
    )
    assert boxes(train) == {
        "2007_a.jpg": [("dog", [0, 0, 100, 60], 0), ("cat", [10, 20, 20, 20], 1)],
        "2007_b.jpg": [("person", [47.5, 1, 12.5, 9.5], 0)],
    }
    assert boxes(val) == {"2007_c.jpg": []}
    assert {image["id"] for image in train["images"]}.isdisjoint(image["id"] for image in val["images"])
    assert "difficult objects (crowd): 1" in said
    assert "3 classes; no problems;" in said
    source, target = (tmp_path / place / "2007_a.jpg" for place in ("VOC2007/JPEGImages", "out/train2017"))
    assert source.samefile(target), "linked"


@pytest.mark.parametrize(("rule", "wanted"), [("keep", [("dog", 0), ("cat", 0)]), ("drop", [("dog", 0)])])
def test_difficult_objects_are_kept_or_dropped(tmp_path, rule, wanted):
    write_voc(tmp_path)
    parts, _ = read(tmp_path, difficult=rule)
    assert [(name, crowd) for name, _, crowd in parts["train"]["2007_a.jpg"]] == wanted


def test_pixels_may_be_numbered_from_0(tmp_path):
    write_image(tmp_path / "a.jpg")
    write(tmp_path / "a.xml", voc_xml(voc_object("dog", 0, 0, 99, 59), voc_object("dog", 10, 20, 29, 39)))
    parts, _ = read(tmp_path, first_pixel=0)
    assert [box for _, box, _ in parts["train"]["a.jpg"]] == [[0, 0, 100, 60], [10, 20, 20, 20]]


def test_other_lists_of_images_may_be_chosen(tmp_path):
    write_voc(tmp_path)
    (tmp_path / "ImageSets/Main/train.txt").rename(tmp_path / "ImageSets/Main/trainval.txt")
    (tmp_path / "ImageSets/Main/val.txt").rename(tmp_path / "ImageSets/Main/test.txt")
    assert [sorted(names) for names in read(tmp_path)[0].values()] == [
        ["2007_a.jpg", "2007_b.jpg"],
        ["2007_c.jpg"],
    ]
    assert list(read(tmp_path, train_set="test")[0]["train"]) == ["2007_c.jpg"]
    assert "nowhere.txt can't be read" in refusal(tmp_path, train_set="nowhere")
    assert "share 2 images, for example 2007_a" in refusal(
        tmp_path, train_set="trainval", val_set="cat_train"
    )


@pytest.mark.parametrize(
    "places",
    [
        ("a.jpg", "a.xml", "b.jpg", "b.xml"),
        ("images/a.jpg", "annotations/a.xml", "images/b.jpg", "annotations/b.xml"),
        ("JPEGImages/x/a.jpg", "Annotations/x/a.xml", "JPEGImages/b.jpg", "Annotations/b.xml"),
        ("train/a.jpg", "train/a.xml", "valid/b.jpg", "valid/b.xml"),
        ("train/images/a.jpg", "train/annotations/a.xml", "val/images/b.jpg", "val/annotations/b.xml"),
        ("images/train/a.jpg", "labels/train/a.xml", "images/test/b.jpg", "labels/test/b.xml"),
    ],
)
def test_images_and_xml_files_may_lie_in_any_usual_folders(tmp_path, places):
    for place in places:
        if place.endswith(".xml"):
            write(tmp_path / place, voc_xml(voc_object(Path(place).stem, 1, 1, 10, 10)))
        else:
            write_image(tmp_path / place)
    write_image(tmp_path / "unlabelled.jpg")
    parts, faults = read(tmp_path)
    found = {Path(name).stem: objects[0][0] for images in parts.values() for name, objects in images.items()}
    assert found == {"a": "a", "b": "b"}, "each has its own labels"
    assert len(parts) == 1 + any(name in places[2] for name in ("val", "valid", "test"))
    assert faults.notes["images without an XML file, left out"] == 1


HOSTILE = {
    "billion laughs": '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b '
    '"&a;&a;&a;">]><annotation><folder>&b;</folder></annotation>',
    "external entity": "<!DOCTYPE x [<!ENTITY a SYSTEM "
    '"file:///etc/passwd">]><annotation><folder>&a;</folder></annotation>',
    "external DTD": '<!DOCTYPE annotation SYSTEM "http://127.0.0.1:1/x.dtd"><annotation/>',
    "parameter entity": '<!DOCTYPE x [<!ENTITY % a SYSTEM "http://127.0.0.1:1/x"> %a;]><annotation/>',
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_document_types_are_refused(tmp_path, text):
    write_image(tmp_path / "a.jpg")
    write(tmp_path / "a.xml", text)
    assert "a.xml has a document type" in refusal(tmp_path)


VOC_FAULTS = {
    "is not XML": "<annotation><object>",
    "is not XML (undefined entity": "<annotation><object><name>&a;</name></object></annotation>",
    "has 'html' where": "<html/>",
    "object 1 has no name": voc_xml(voc_object(" ", 1, 1, 9, 9)),
    "object 2 ('dog') has no box of four numbers": voc_xml(
        voc_object("dog", 1, 1, 9, 9), voc_object("dog", 1, 1, "x", 9)
    ),
    "is not finite": voc_xml(voc_object("dog", 1, 1, "nan", 9)),
    "object 1 ('dog'): box from (19, 0) to (9, 9) has no width or no height": voc_xml(
        voc_object("dog", 20, 1, 9, 9)
    ),
    "lies outside of the image of 100 x 60": voc_xml(voc_object("dog", 120, 1, 140, 9)),
    "reaches 30 pixels out of the image": voc_xml(voc_object("dog", 50, 1, 130, 9)),
    "its size is 60 x 100, and the image's 100 x 60": voc_xml(size=(60, 100)),
    "its size is no number": voc_xml(size=("wide", 60)),
}


@pytest.mark.parametrize(
    ("named", "encoding"),
    [("gb2312", "gb2312"), ("Shift_JIS", "cp932"), ("utf-16", "utf-8"), ("utf-16", "utf-16")],
)
def test_xml_files_may_name_any_encoding(tmp_path, named, encoding):
    write_image(tmp_path / "a.jpg")
    text = f'<?xml version="1.0" encoding="{named}"?>' + voc_xml(voc_object("中", 1, 1, 20, 10))
    (tmp_path / "a.xml").write_bytes(text.encode(encoding))
    assert read(tmp_path)[0]["train"]["a.jpg"] == [("中", [0, 0, 20, 10], 0)]
    write(tmp_path / "a.xml", text.replace(named, "klingon"))
    assert "is not in the encoding that it names" in refusal(tmp_path)


@pytest.mark.parametrize("wanted", VOC_FAULTS)
def test_a_fault_of_an_xml_file_is_named_or_left_out(tmp_path, wanted):
    for name in ("a", "b"):
        write_image(tmp_path / f"{name}.jpg")
        write(tmp_path / f"{name}.xml", voc_xml(voc_object("cat", 1, 1, 5, 5)))
    write(tmp_path / "a.xml", VOC_FAULTS[wanted])
    text = refusal(tmp_path)
    assert str(tmp_path / "a.xml") in text
    assert wanted in text
    assert "--on_bad skip" in text
    parts, faults = read(tmp_path, on_bad="skip")
    assert len(faults.messages) == 1
    assert wanted in faults.messages[0]
    assert parts["train"]["b.jpg"] == [("cat", [0, 0, 5, 5], 0)]


def test_boxes_that_reach_out_are_cut_if_asked_for_and_rounding_always_is(tmp_path):
    write_image(tmp_path / "a.jpg")
    write(tmp_path / "a.xml", voc_xml(voc_object("dog", 0, 1, 101, 60), voc_object("dog", 91, 51, 120, 99)))
    parts, faults = read(tmp_path, on_bad="clip")
    assert [box for _, box, _ in parts["train"]["a.jpg"]] == [[0, 0, 100, 60], [90, 50, 10, 10]]
    assert faults.notes["boxes cut at the border of their image"] == 1


def test_xml_without_an_image_and_images_that_are_broken_are_faults(tmp_path):
    write_voc(tmp_path)
    (tmp_path / "JPEGImages/2007_b.jpg").unlink()
    assert "2007_b.xml has no image" in refusal(tmp_path)
    (tmp_path / "Annotations/2007_b.xml").unlink()
    assert "image 2007_b of the train set has no XML file" in refusal(tmp_path)
    (tmp_path / "JPEGImages/2007_a.jpg").write_bytes(b"no image")
    _, faults = read(tmp_path, on_bad="skip")
    assert len(faults.messages) == 2
    assert "2007_a.jpg can't be decoded" in faults.messages[1]


# ---- YOLO


def test_yolo_is_converted_by_one_command(tmp_path):
    write_yolo(tmp_path / "source")
    said = convert(tmp_path / "source", "--output_dir", tmp_path / "out", "--images", "copy")
    train, val = content(tmp_path / "out", "train"), content(tmp_path / "out", "val")
    assert (
        train["categories"]
        == val["categories"]
        == [{"id": i, "name": n} for i, n in enumerate(("car", "bus", "van"), 1)]
    )
    assert boxes(train) == {
        "a.png": [("van", [0, 0, 100, 60], 0), ("car", [15, 0, 10, 30], 0)],
        "sub/b.png": [],
    }
    assert boxes(val) == {"c.png": [("bus", [10, 6, 40, 48], 0)]}
    assert "taken to have no objects: 1" in said
    assert "masks: 1 of 3 objects; --masks needs all, and tools/check_data.py --masks lists those" in said
    assert not (tmp_path / "source/images/val/c.png").samefile(tmp_path / "out/val2017/c.png")


@pytest.mark.parametrize("way", ["folder", "list file", "lists", "no path", "parent", "another machine"])
def test_data_yaml_names_images_in_every_way(tmp_path, way):
    write_yolo(tmp_path)
    names = "names: [car, bus, van]\n"
    if way == "folder":
        text = f"path: {tmp_path}\ntrain: images/train\nval: images/val\n"
    elif way == "list file":
        write(tmp_path / "lists/train.txt", f"../images/train/a.png\n\n{tmp_path}/images/train/sub/b.png\n")
        text = "train: lists/train.txt\nval: images/val\n"
    elif way == "lists":
        write(tmp_path / "b.txt", "./images/train/sub/b.png\n")
        write(tmp_path / "a.txt", "./images/train/a.png\n")
        text = "train: [a.txt, b.txt]\nval:\n  - images/val\n"
    elif way == "no path":
        text = "train: images/train\nval: images/val\n"
    elif way == "parent":
        text = "train: ../images/train\nval: ../images/val\n"
    else:
        text = "path: ../datasets/mine\ntrain: images/train\nval: images/val\n"
    write(tmp_path / "data.yaml", text + names)
    parts, _ = read(tmp_path)
    assert [[name for name, *_ in objects] for objects in parts["train"].values()] == [["van", "car"], []]
    assert parts["val"] == {"c.png": [("bus", [10, 6, 40, 48], 0)]}


@pytest.mark.parametrize(
    "layout",
    [
        "images/{part}/{name}|labels/{part}/{name}",
        "{part}/images/{name}|{part}/labels/{name}",
        "{name}|{name}",
        "images/{name}|labels/{name}",
    ],
)
def test_folders_without_a_yaml_have_classes_txt(tmp_path, layout):
    image, label = layout.split("|")
    for part, name in (("train", "a"), ("valid", "b")):
        write_image(tmp_path / (image.format(part=part, name=name) + ".jpg"))
        write(
            tmp_path / (label.format(part=part, name=name) + ".txt"), f"{int(name == 'b')} 0.5 0.5 0.5 0.5\n"
        )
    place = "labels/classes.txt" if layout.startswith("images/{name}") else "classes.txt"
    write(tmp_path / place, "car\nvan\n")
    parts, _ = read(tmp_path)
    assert len(parts) == 1 + ("part" in layout)
    found = {Path(name).stem: objects for images in parts.values() for name, objects in images.items()}
    assert found == {"a": [("car", [25, 15, 50, 30], 0)], "b": [("van", [25, 15, 50, 30], 0)]}


YOLO_FAULTS = {
    "line 1 has class 3; classes are 0 to 2": "3 0.5 0.5 0.1 0.1",
    "line 2 has class -1": "0 0.5 0.5 0.1 0.1\n-1 0.5 0.5 0.1 0.1",
    "line 1 has class 0.5": "0.5 0.5 0.5 0.1 0.1",
    "line 1 has '0 0.5 a 0.1 0.1', which are not numbers": "0 0.5 a 0.1 0.1",
    "line 1 has 6 columns": "0 0.5 0.5 0.1 0.1 0.9",
    "line 1 has 4 columns": "0 0.5 0.5 0.1",
    "line 1: box from (nan": "0 nan 0.5 0.1 0.1",
    "line 1: box from (50, 30) to (50, 36) has no width": "0 0.5 0.55 0 0.1",
    "line 1: box from (100, 30) to (100, 36) has no width": "0 1 0.55 1e-9 0.1",
    "line 1: box from (100, 30) to (110, 36) lies outside": "0 1.05 0.55 0.1 0.1",
    "reaches 40 pixels out of the image of 100 x 60": "0 0.9 0.5 1 0.1",
    "is no text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("wanted", YOLO_FAULTS)
def test_a_fault_of_a_line_is_named_or_left_out(tmp_path, wanted):
    write_yolo(tmp_path)
    text = YOLO_FAULTS[wanted]
    path = tmp_path / "labels/val/c.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refusal(tmp_path)
    assert f"{path}" in message
    assert wanted in message
    parts, faults = read(tmp_path, on_bad="skip")
    assert len(faults.messages) == 1
    assert ("unknown_category" in faults.kinds) == (" has class " in wanted)
    assert len(parts["val"]["c.png"]) == len(text.splitlines()) - 1


def test_boxes_in_pixels_are_not_taken_for_shares(tmp_path):
    write_yolo(tmp_path)
    write(tmp_path / "labels/val/c.txt", "0 50 30 10 10")
    assert "lies outside of the image of 100 x 60" in refusal(tmp_path)


def test_a_line_of_labels_may_have_quotes(tmp_path):
    write_yolo(tmp_path)
    write(tmp_path / "labels/val/c.txt", '"0 0.5 0.5 0.5 0.5"\n')
    assert read(tmp_path)[0]["val"]["c.png"] == [("car", [25, 15, 50, 30], 0)]


def test_key_points_behind_a_box_are_passed_over(tmp_path):
    write_yolo(tmp_path)
    write(tmp_path / "labels/val/c.txt", "0 0.5 0.5 0.5 0.5 0.9 0.9 0.1 0.1\n")
    write(tmp_path / "data.yaml", (tmp_path / "data.yaml").read_text() + "kpt_shape: [2, 2]\n")
    assert read(tmp_path)[0]["val"]["c.png"] == [("car", [25, 15, 50, 30], 0)]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("train: [", "is not YAML"),
        ("- a", "must have train, val and names"),
        ("train: images/train\n", "'names' must be"),
        ("train: images/train\nnames: {0: a, 2: b}", "without gaps"),
        ("train: images/train\nnames: [a, a]", "two classes 'a'"),
        ("names: [a]", "no 'train'"),
        ("train: nowhere\nnames: [a]", "names nowhere, which is missing"),
        ("train: {a: b}\nnames: [a]", "be a path"),
        ("train: !!python/object/apply:os.system [x]\nnames: [a]", "is not YAML"),
        (
            "train: images/val\nval: images/train/sub\nnames: [a, b, c]",
            "no image of the val split has labels",
        ),
    ],
)
def test_a_data_yaml_that_cannot_be_used_is_refused(tmp_path, text, wanted):
    write_yolo(tmp_path)
    write(tmp_path / "data.yaml", text)
    message = refusal(tmp_path)
    assert wanted in message
    assert str(tmp_path) in message


# ---- masks

# class -> outline; the second picture is shown turned clockwise, 60 wide and 100 high
OUTLINES = {
    "car": [(10, 6), (50, 6), (50, 30), (30, 30), (30, 54), (10, 54)],
    "bus": [(60, 10), (90, 10), (90, 20), (60, 20)],
}
MASKS = {name: np.zeros(SIZE[::-1], np.uint8) for name in OUTLINES}
MASKS["car"][6:54, 10:30] = MASKS["car"][6:30, 30:50] = MASKS["bus"][10:20, 60:90] = 1
PICTURES = {"a": 1, "b": 6}


def shown_points(name: str, picture: str) -> list[tuple[int, int]]:
    return [(SIZE[1] - y, x) if picture == "b" else (x, y) for x, y in OUTLINES[name]]


def as_shown(values: dict[str, object], picture: str) -> np.ndarray:
    """An image of the masks as shown, each in its value."""
    image = sum(np.multiply.outer(mask, values[name]) for name, mask in MASKS.items())
    return np.rot90(image, -1) if picture == "b" else image


def yolo_outlines(root: Path, picture: str) -> None:
    width, height = SIZE if picture == "a" else SIZE[::-1]
    lines = ""
    for number, name in enumerate(OUTLINES):
        shares = (f"{x / width} {y / height}" for x, y in shown_points(name, picture))
        lines += f"{number} {' '.join(shares)}\n"
    write(root / f"labels/{picture}.txt", lines)
    write(root / "classes.txt", "\n".join(OUTLINES))


def voc_polygons(root: Path, picture: str) -> None:
    objects = []
    for name in OUTLINES:
        points = shown_points(name, picture)
        (x0, y0), (x1, y1) = map(min, zip(*points, strict=True)), map(max, zip(*points, strict=True))
        numbered = enumerate(points, 1)
        outline = "".join(f"<x{i}>{x + 1}</x{i}><y{i}>{y + 1}</y{i}>" for i, (x, y) in numbered)
        objects.append(voc_object(name, x0 + 1, y0 + 1, x1, y1, extra=f"<polygon>{outline}</polygon>"))
    size = SIZE if picture == "a" else SIZE[::-1]
    write(root / f"Annotations/{picture}.xml", voc_xml(*objects, size=size))


def coco_outlines(root: Path, picture: str) -> None:
    """An outline without a list around it, and one with a part that is a line; no size of the image."""
    path = root / "result.json"
    names = [{"id": i, "name": name} for i, name in enumerate(OUTLINES)]
    written = {"images": [], "annotations": [], "categories": names}
    if path.exists():
        written = json.loads(path.read_text())
    written["images"].append({"id": ord(picture), "file_name": f"{picture}.png"})
    for i, name in enumerate(OUTLINES):
        points = np.array(shown_points(name, picture))
        box = [*points.min(0).tolist(), *np.ptp(points, axis=0).tolist()]
        outline = points.ravel().tolist()
        written["annotations"].append(
            {"image_id": ord(picture), "category_id": i, "bbox": box, "area": int(MASKS[name].sum())}
            | {"segmentation": [[3, 4, 5, 6], outline] if i else outline}
        )
    write(path, json.dumps(written))


def masks_in_colours(root: Path, picture: str) -> None:
    """CVAT's: VOC's first colours for objects, colours of the label map for classes."""
    colours = {"car": (250, 50, 83), "bus": (36, 179, 83)}
    for folder, values in (
        ("SegmentationObject", {"car": (0, 128, 0), "bus": (128, 0, 0)}),
        ("SegmentationClass", colours),
    ):
        (root / folder).mkdir(parents=True, exist_ok=True)
        image = as_shown(values, picture).astype(np.uint8)
        Image.fromarray(np.ascontiguousarray(image)).save(root / folder / f"{picture}.png")
    lines = (f"{name}:{','.join(map(str, colour))}::" for name, colour in colours.items())
    write(root / "labelmap.txt", "\n".join(("# label:color_rgb:parts:actions", "background:0,0,0::", *lines)))
    write(root / "ImageSets/Segmentation/default.txt", "a\nb\nwithout\n")
    write_image(root / "JPEGImages/without.png")


def masks_in_numbers(root: Path, picture: str, **palette: bool) -> None:
    """Numbers of objects and of VOC's classes; border pixels are 255."""
    for folder, values in (("Object", {"car": 1, "bus": 2}), ("Class", {"car": 7, "bus": 6})):
        (root / f"Segmentation{folder}").mkdir(parents=True, exist_ok=True)
        numbers = as_shown(values, picture).astype(np.uint8)
        numbers[0] = 255
        image = Image.fromarray(np.ascontiguousarray(numbers))
        if palette:
            colours = {1: (128, 0, 0), 2: (0, 128, 0), 6: (0, 128, 128), 7: (128, 128, 128)}
            flat = [channel for i in range(255) for channel in colours.get(i, (0, 0, 0))]
            image.putpalette([*flat, 224, 224, 192])
        image.save(root / f"Segmentation{folder}/{picture}.png")


MASK_WRITERS = {
    "YOLO": yolo_outlines,
    "VOC's polygons": voc_polygons,
    "COCO's without sizes": coco_outlines,
    "masks in colours": masks_in_colours,
    "masks in numbers": masks_in_numbers,
    "masks with a palette": lambda root, picture: masks_in_numbers(root, picture, palette=True),
}


@pytest.mark.parametrize("kind", MASK_WRITERS)
def test_outlines_and_masks_arrive_to_the_pixel(tmp_path, kind):
    source, out = tmp_path / "in", tmp_path / "out"
    for picture, orientation in PICTURES.items():
        write_image(source / f"JPEGImages/{picture}.png", orientation=orientation)
        MASK_WRITERS[kind](source, picture)
    if kind == "YOLO":
        (source / "JPEGImages").rename(source / "images")
    said = convert(source, "--output_dir", out, "--val_fraction", "0.4")
    assert "masks: 4 of 4 objects\n" in said

    seen = []
    for part in ("train", "val"):
        path = out / f"annotations/instances_{part}2017.json"
        dataset = CocoDetection(out / f"{part}2017", path, v2.ToImage(), seed=0, masks=True)
        written = content(out, part)
        names = {category["id"]: category["name"] for category in written["categories"]}
        for image_id, (_, target) in zip(dataset.image_ids, dataset, strict=True):
            entries = dataset.coco.imgToAnns[image_id]
            for entry, mask in zip(entries, target["masks"].numpy(), strict=True):
                name = names[entry["category_id"]]
                assert np.array_equal(mask, MASKS[name])
                rows, columns = np.nonzero(mask)
                x, y, width, height = entry["bbox"]
                assert (x, y, x + width, y + height) == pytest.approx(
                    (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
                )
                assert entry["area"] == mask.sum()
                seen.append(name)
    assert sorted(seen) == ["bus", "bus", "car", "car"]


def test_masks_that_can_not_be_used_cost_no_box(tmp_path):
    masks_in_numbers(tmp_path, "a")
    write_image(tmp_path / "a.png")
    for name in ("b", "c"):
        write_image(tmp_path / f"{name}.png", (9, 9))
        for folder in ("SegmentationObject", "SegmentationClass"):
            Image.fromarray(np.full((9, 10 - (name == "c")), 30, np.uint8)).save(
                tmp_path / folder / f"{name}.png"
            )
    faults = Problems("skip")
    parts = read_voc_masks(tmp_path, VocRules(), faults)
    assert faults.kinds == {"wrong_size": 1, "unknown_category": 1}
    assert "b.png is 10 x 9, and its image 9 x 9" in faults.messages[0]
    assert "c.png: object 30 has no class in SegmentationClass" in faults.messages[1]
    assert list(boxes(parts["train"].content)) == ["a.png", "c.png"]
    write(tmp_path / "labelmap.txt", "car:red::\n")
    with pytest.raises(UserError, match="line 1 must be name:red,green,blue"):
        read_voc_masks(tmp_path, VocRules(), faults)

    # an outline that is far outside is not drawn; the box is cut
    write_yolo(tmp_path / "yolo")
    write(tmp_path / "yolo/labels/val/c.txt", "1 0.1 0.1 0.5 0.1 0.5 0.9\n0 0.1 0.1 5 0.1 0.5 0.9\n")
    said = convert(tmp_path / "yolo", "--output_dir", tmp_path / "out", "--on_bad", "clip")
    assert "masks: 1 of 4 objects; " in said
    assert boxes(content(tmp_path / "out", "val"), areas=False)["c.png"][1] == ("car", [10, 6, 90, 48], 0)


# ---- both


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_turned_from_the_image_as_shown_to_the_image_as_stored(tmp_path, orientation):
    """Pillow turns an image with a white box; the box found in it must come back to where it is
    stored.
    """
    stored = np.zeros((60, 100, 3), dtype=np.uint8)
    stored[10:25, 30:70] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        shown = np.asarray(ImageOps.exif_transpose(image))
    y, x = np.nonzero(shown[:, :, 0])
    header = read_header(tmp_path / "a.png", 1, "")
    assert header == Header((100, 60), orientation)
    assert shown_size(header) == shown.shape[1::-1]
    box = Corners(x.min(), y.min(), x.max() + 1, y.max() + 1)
    assert as_stored(box, header) == (30, 10, 70, 25)


def test_boxes_of_turned_images_are_those_of_the_stored_pixels(tmp_path):
    """Orientation 6 is shown turned clockwise: 60 wide and 100 high."""
    write_yolo(tmp_path / "yolo")
    write_image(tmp_path / "yolo/images/val/c.png", orientation=6)
    # shown: x 0 to 30, y 0 to 10
    write(tmp_path / "yolo/labels/val/c.txt", "0 0.25 0.05 0.5 0.1\n")
    parts, faults = read(tmp_path / "yolo")
    assert parts["val"]["c.png"] == [("car", [0, 30, 10, 30], 0)]
    for size, wanted in (((60, 100), [0, 30, 10, 30]), ((100, 60), [0, 0, 30, 10]), (None, [0, 30, 10, 30])):
        write_image(tmp_path / "voc/a.jpg", orientation=6)
        write(tmp_path / "voc/a.xml", voc_xml(voc_object("dog", 1, 1, 30, 10), size=size))
        assert read(tmp_path / "voc")[0]["train"]["a.jpg"] == [("dog", wanted, 0)]
    assert faults.notes["images with an EXIF orientation: boxes turned to the pixels as stored"] == 1


def test_a_single_instances_file_is_parted_and_keeps_its_ids(tmp_path):
    write_coco(tmp_path / "coco", 10, 2)
    content = json.loads((tmp_path / "coco/annotations/instances_train2017.json").read_text())
    for category in content["categories"]:
        category["id"] *= 100
    for annotation in content["annotations"]:
        annotation["category_id"] *= 100
    (tmp_path / "coco/annotations/instances_train2017.json").write_text(json.dumps(content))
    layouts.write_labelled(tmp_path / "coco", tmp_path / "labelled")
    said = convert(tmp_path / "labelled", "--output_dir", tmp_path / "out", "--val_fraction", "0.3")
    parts = [
        read_annotations(tmp_path / f"out/annotations/instances_{part}2017.json").dataset
        for part in ("train", "val")
    ]
    assert [len(part["images"]) for part in parts] == [7, 3]
    assert "train: 7 images with 14 objects" in said
    for name in ("images", "annotations"):
        assert sorted((e for part in parts for e in part[name]), key=lambda e: e["id"]) == content[name]
    assert [part["categories"] for part in parts] == [content["categories"]] * 2
    for name, part in zip(("train", "val"), parts, strict=True):
        files = {path.name for path in (tmp_path / f"out/{name}2017").iterdir()}
        assert files == {image["file_name"] for image in part["images"]}
        of_part = {image["id"] for image in part["images"]}
        assert {annotation["image_id"] for annotation in part["annotations"]} == of_part


@pytest.mark.parametrize(
    "names",
    [
        ("train/_annotations.coco.json", "valid/_annotations.coco.json", "train", "valid"),
        (
            "annotations/instances_train.json",
            "annotations/instances_test.json",
            "images/train",
            "images/test",
        ),
        (
            "annotations/instances_train2017.json",
            "annotations/instances_val2017.json",
            "a/train2017",
            "a/val2017",
        ),
    ],
    ids=["beside", "images", "coco"],
)
def test_instances_files_for_each_part_may_lie_as_tools_export_them(tmp_path, names):
    write_coco(tmp_path / "coco", 3, 2, size=(40, 36))
    for part, file, folder in zip(("train", "val"), names[:2], names[2:], strict=True):
        (tmp_path / "in" / folder).mkdir(parents=True)
        (tmp_path / "in" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"coco/annotations/instances_{part}2017.json").rename(tmp_path / "in" / file)
        for path in (tmp_path / f"coco/{part}2017").iterdir():
            path.rename(tmp_path / "in" / folder / f"{path.name}")
    convert(tmp_path / "in", "--output_dir", tmp_path / "out")
    for part, folder in zip(
        ("train", "val"), names[2:], strict=True
    ):  # both parts have files of the same names
        files = sorted((tmp_path / f"out/{part}2017").iterdir())
        assert len(files) == {"train": 3, "val": 2}[part]
        assert all(file.samefile(tmp_path / "in" / folder / file.name) for file in files)


def test_folders_that_an_instances_file_may_mean_are_not_guessed(tmp_path):
    write_coco(tmp_path / "coco", 3, 3)
    (tmp_path / "coco/annotations/instances_val2017.json").unlink()
    (tmp_path / "coco/annotations/instances_train2017.json").rename(tmp_path / "coco/result.json")
    assert "several folders" in convert(tmp_path / "coco", "--output_dir", tmp_path / "out", code=2)


def test_images_that_an_instances_file_names_must_be_found_once(tmp_path):
    write_coco(tmp_path / "coco", 3, 2)
    layouts.write_labelled(tmp_path / "coco", tmp_path / "in")
    (tmp_path / "in/images/000001.png").rename(tmp_path / "in/000001.png")
    convert(tmp_path / "in", "--output_dir", tmp_path / "found")  # by its bare name
    (tmp_path / "in/more").mkdir()
    (tmp_path / "in/more/000001.png").write_bytes(b"another")
    assert "there are 2 of that name" in convert(tmp_path / "in", "--output_dir", tmp_path / "a", code=2)
    for place in ("", "more/"):
        (tmp_path / f"in/{place}000001.png").unlink()
    assert "000001.png" in convert(tmp_path / "in", "--output_dir", tmp_path / "b", code=2)


def test_a_source_without_validation_images_is_split_alike_every_time(tmp_path):
    for i in range(10):
        write_image(tmp_path / f"source/images/{i}.jpg")
        write(tmp_path / f"source/labels/{i}.txt", "0 0.5 0.5 0.5 0.5\n")
    write(tmp_path / "source/classes.txt", "car\n")
    split = []
    for out, flags in (("a", ()), ("b", ()), ("c", ("--seed", "1")), ("d", ("--val_fraction", "0.5"))):
        convert(tmp_path / "source", "--output_dir", tmp_path / out, *flags)
        names = [
            {image["file_name"] for image in content(tmp_path / out, part)["images"]}
            for part in ("train", "val")
        ]
        assert len(names[0] | names[1]) == len(names[0]) + len(names[1]) == 10
        split.append(names[1])
    assert [len(names) for names in split] == [2, 2, 2, 5]
    assert split[0] == split[1] != split[2]


def test_images_of_the_same_name_in_several_folders_stay_several(tmp_path):
    write_yolo(tmp_path)
    for i in range(2):
        write_image(tmp_path / f"{i}/images/x.png")
        write(tmp_path / f"{i}/labels/x.txt", f"{i} 0.5 0.5 0.5 0.5\n")
    write(tmp_path / "data.yaml", "train: [0/images, 1/images]\nval: images/val\nnames: [a, b, c]\n")
    parts, _ = read(tmp_path)
    assert {name: objects[0][0] for name, objects in parts["train"].items()} == {
        "0/x.png": "a",
        "1/x.png": "b",
    }


def test_what_file_managers_leave_behind_is_passed_over(tmp_path):
    write_voc(tmp_path / "voc")
    write_yolo(tmp_path / "yolo")
    before = read(tmp_path / "voc")[0], read(tmp_path / "yolo")[0]
    for name in ("._2007_a.xml", ".cache/x.xml", "../__MACOSX/y.xml"):
        write(tmp_path / "voc/Annotations" / name, "shadow")
    for name in ("._a.png", ".thumbnails/a.png", "__MACOSX/a.png"):
        write(tmp_path / "yolo/images/train" / name, "shadow")
    assert (read(tmp_path / "voc")[0], read(tmp_path / "yolo")[0]) == before


def test_symbolic_links_lead_to_the_source(tmp_path):
    write_voc(tmp_path / "source")
    convert(tmp_path / "source", "--output_dir", tmp_path / "out", "--images", "symlink")
    assert os.path.realpath(tmp_path / "out/val2017/2007_c.jpg") == str(
        tmp_path / "source/JPEGImages/2007_c.jpg"
    )


def test_mistakes_cost_one_line(tmp_path):
    write_voc(tmp_path / "voc")
    write_yolo(tmp_path / "both")
    write_voc(tmp_path / "both")
    (tmp_path / "empty").mkdir()
    out = ("--output_dir", tmp_path / "out")
    command = (sys.executable, "tools/convert_dataset.py", "nowhere", "--output_dir", str(tmp_path / "out"))
    result = run(*command)
    assert result.returncode == 2
    assert result.stderr.startswith("error: nowhere does not exist")
    assert len(result.stderr.splitlines()) == 1
    assert "neither of Pascal" in convert(tmp_path / "empty", *out, code=2)
    assert "--format voc or --format yolo" in convert(tmp_path / "both", *out, code=2)
    assert "has a validation split already" in convert(
        tmp_path / "voc", *out, "--val_fraction", "0.5", code=2
    )
    assert "is not empty" in convert(tmp_path / "voc", "--output_dir", tmp_path / "both", code=2)
    assert not any((tmp_path / "out").iterdir()), "nothing is written before all has been read"
    convert(tmp_path / "both", *out, "--format", "yolo")
    assert (
        json.loads((tmp_path / "out/annotations/instances_train2017.json").read_text())["categories"][0][
            "name"
        ]
        == "car"
    )


def test_a_source_of_which_nothing_is_left_says_what_is_wrong_with_it(tmp_path):
    out = ("--output_dir", tmp_path / "out")
    write_yolo(tmp_path / "yolo")
    write(tmp_path / "yolo/data.yaml", "train: train.txt\nnames: [car]\n")
    write(tmp_path / "yolo/train.txt", "nowhere.png\n")
    said = convert(tmp_path / "yolo", *out, "--on_bad", "skip", code=2)
    assert "no train images that can be used; problems: 1, the first one:" in said
    assert "line 1 names the image 'nowhere.png'" in said
    write(tmp_path / "coco/result.json", '{"images": [')
    assert "result.json is not JSON" in convert(tmp_path / "coco", *out, code=2)
    write(tmp_path / "coco/result.json", '{"images": [], "categories": []}')
    assert "result.json is no COCO instances file: the lists annotations are missing" in convert(
        tmp_path / "coco", *out, code=2
    )


def test_help_shows_defaults_and_an_example():
    text = " ".join(run(sys.executable, "tools/convert_dataset.py", "--help").stdout.split())
    for wanted in (
        "--on_bad {stop,clip,skip}",
        "(default: stop)",
        "(default: 0.2)",
        "(default: crowd)",
        "example: python ",
    ):
        assert wanted in text


@pytest.mark.parametrize("layout", ["voc", "yolo"])
def test_real_annotations_come_back_from_both_formats(tiny_coco, tmp_path, layout):
    {"voc": layouts.write_voc, "yolo": layouts.write_yolo}[layout](tiny_coco, tmp_path)
    parts, faults = read(tmp_path)
    assert faults.messages == []
    for part in ("train", "val"):
        wanted = boxes(
            read_annotations(tiny_coco / f"annotations/instances_{part}2017.json").dataset, areas=False
        )
        assert len(parts[part]) == len(wanted) == 50
        for name, objects in parts[part].items():
            expected = [entry for entry in wanted[name.removeprefix(f"{part}_")] if not entry[2]]
            assert [entry[0] for entry in objects] == [entry[0] for entry in expected]
            for (_, box, _), (_, original, _) in zip(objects, expected, strict=True):
                assert box == pytest.approx(original, abs=2e-4)
