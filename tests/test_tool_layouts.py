"""Exports as labelling tools write them: the images, boxes and ids that come of them, and what is
said.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from datasets.convert.coco import read_coco
from datasets.convert.formats import format_of
from datasets.convert.problems import Problems
from datasets.convert.voc import VocRules, read_voc
from datasets.convert.yolo import read_yolo
from datasets.file_index import BARE, END, SPELLING
from tests.exports import (
    HEIGHT,
    Boxes,
    boxes,
    class_names,
    coco_boxes,
    coco_text,
    convert,
    merged,
    voc_text,
    wanted,
    width_of,
    write,
    write_image,
    yolo_line,
)
from tests.faults.fuzz_watch import Watch
from tests.test_convert_dataset import refusal
from util.errors import UserError

# ---- COCO's format


def coco_export(
    root: Path, file: str, name: Callable[[int], str], place: Callable[[int], str]
) -> dict[int, str]:
    numbers = range(1, 7)
    for number in numbers:
        write_image(root / place(number), number)
    write(root / file, coco_text({number: name(number) for number in numbers}))
    return {number: place(number) for number in numbers}


COCO_EXPORTS = {
    "CVAT": ("annotations/instances_default.json", "{}.jpg", "images/{}.jpg", None),
    "CVAT with subsets": ("annotations/instances_default.json", "{}.jpg", "images/default/{}.jpg", None),
    "CVAT with subfolders": (
        "annotations/instances_default.json",
        "cam{0}/a.jpg",
        "images/default/cam{0}/a.jpg",
        None,
    ),
    "Label Studio": ("result.json", "images/{}.jpg", "images/{}.jpg", None),
    "Label Studio on Windows": ("result.json", "images\\{}.jpg", "images/{}.jpg", SPELLING),
    "Label Studio, older": ("result.json", "../../upload/4/0123abcd-{}.jpg", "images/0123abcd-{}.jpg", BARE),
    "Label Studio, uploads": ("result.json", "/data/upload/4/0123abcd-{}.jpg", "images/{}.jpg", BARE),
    "Label Studio, local files": (
        "result.json",
        "/data/local-files/?d=photos%2F{}.jpg",
        "photos/{}.jpg",
        SPELLING,
    ),
    "Label Studio, addresses": (
        "result.json",
        "http://localhost:8080/data/upload/4/a%20{}.jpg",
        "images/a {}.jpg",
        BARE,
    ),
    "labelme2coco": ("annotations.json", "JPEGImages/{}.jpg", "JPEGImages/{}.jpg", None),
    "labelme2coco on Windows": ("annotations.json", "JPEGImages\\{}.jpg", "JPEGImages/{}.jpg", SPELLING),
    "labelme2coco, absolute": ("dataset.json", "/home/me/labelme/{}.jpg", "labelme/{}.jpg", END),
    "Windows, absolute": ("labels/out.json", "C:\\work\\set\\img\\{}.JPG", "img/{}.jpg", END),
}


@pytest.mark.parametrize("tool", COCO_EXPORTS)
def test_coco_exports_of_labelling_tools(tmp_path, tool):
    file, name, place, how = COCO_EXPORTS[tool]
    root = tmp_path / "given/export"
    places = coco_export(root, file, name.format, place.format)
    # a picture of the right name where the file says, outside of what was given
    for number in places:
        write_image(tmp_path / f"upload/4/0123abcd-{number}.jpg", number)
    faults = Problems()
    assert format_of(root) == "coco"
    with Watch(root, 600, hard=False).case():
        parts = read_coco(root, faults)
    assert merged(coco_boxes(parts, root)) == wanted(places)
    assert +faults.notes == ({how: 6} if how else {})
    convert(root, "--output_dir", tmp_path / "out")
    for part in parts:
        content = json.loads((tmp_path / f"out/annotations/instances_{part}2017.json").read_text())
        for image in content["images"]:
            with Image.open(tmp_path / f"out/{part}2017" / image["file_name"]) as picture:
                assert picture.size == (width_of(image["id"]), HEIGHT)


def test_images_that_are_named_without_an_ending_get_one(tmp_path):
    places = coco_export(tmp_path, "result.json", "{}".format, "images/{}.jpg".format)
    parts = read_coco(tmp_path, Problems())
    assert merged(coco_boxes(parts, tmp_path)) == wanted(places)
    assert {name for part in parts.values() for name in part.files} == {f"{number}.jpg" for number in places}


def test_an_instances_file_may_be_given_without_its_folder(tmp_path):
    places = coco_export(
        tmp_path, "annotations/instances_default.json", "{}.jpg".format, "images/{}.jpg".format
    )
    parts = read_coco(tmp_path / "annotations/instances_default.json", Problems())
    assert merged(coco_boxes(parts, tmp_path)) == wanted(places)


def test_roboflow_coco(tmp_path):
    for number, part in enumerate(("train", "train", "valid", "test"), 1):
        write_image(tmp_path / f"{part}/{number}_jpg.rf.0f.jpg", number)
    for part, numbers in (("train", (1, 2)), ("valid", (3,)), ("test", (4,))):
        write(
            tmp_path / f"{part}/_annotations.coco.json",
            coco_text({number: f"{number}_jpg.rf.0f.jpg" for number in numbers}),
        )
    write(tmp_path / "README.roboflow.txt", "text")
    faults = Problems()
    found = coco_boxes(read_coco(tmp_path, faults), tmp_path)
    assert found["train"] == wanted({1: "train/1_jpg.rf.0f.jpg", 2: "train/2_jpg.rf.0f.jpg"})
    assert found["val"] == wanted({3: "valid/3_jpg.rf.0f.jpg"})
    assert sum(faults.notes.values()) == 1
    assert any("_annotations.coco.json" in note for note in +faults.notes), (
        "the test part is said to be left out"
    )


def test_of_cocos_own_folder_the_instances_are_taken(tmp_path):
    for number, part in ((1, "train"), (2, "val")):
        write_image(tmp_path / f"{part}2017/{number}.jpg", number)
        for kind in ("instances", "person_keypoints", "stuff", "panoptic"):
            write(tmp_path / f"annotations/{kind}_{part}2017.json", coco_text({number: f"{number}.jpg"}))
        write(tmp_path / f"annotations/captions_{part}2017.json", '{"images": [], "annotations": []}')
    write(tmp_path / "annotations/image_info_test-dev2017.json", '{"images": [], "categories": []}')
    faults = Problems()
    found = coco_boxes(read_coco(tmp_path, faults), tmp_path)
    assert found == {"train": wanted({1: "train2017/1.jpg"}), "val": wanted({2: "val2017/2.jpg"})}
    (said,) = +faults.notes
    assert faults.notes[said] == 9
    assert said.startswith("annotation files without instances, left out (captions_train2017.json, ")


def test_key_points_alone_serve_for_their_boxes(tmp_path):
    places = coco_export(
        tmp_path, "annotations/person_keypoints_default.json", "{}.jpg".format, "images/{}.jpg".format
    )
    assert merged(coco_boxes(read_coco(tmp_path, Problems()), tmp_path)) == wanted(places)


def test_an_image_of_another_part_is_not_taken_for_one_that_is_missing(tmp_path):
    for part, numbers in (("train", (1, 2, 3)), ("val", (1, 2, 3, 4))):
        for number in numbers:
            write_image(tmp_path / f"images/{part}/{number}.jpg", number)
        write(
            tmp_path / f"annotations/instances_{part}.json",
            coco_text({number: f"{number}.jpg" for number in (1, 2, 3, 4)}),
        )
    with pytest.raises(UserError, match="names the image '4.jpg', and below .* it is not there; "):
        read_coco(tmp_path, problems := Problems())
        problems.stop_if_asked()
    faults = Problems("skip")
    found = coco_boxes(read_coco(tmp_path, faults), tmp_path)
    assert found["train"] == wanted({number: f"images/train/{number}.jpg" for number in (1, 2, 3)})
    assert found["val"] == wanted({number: f"images/val/{number}.jpg" for number in (1, 2, 3, 4)})
    assert len(faults.messages) == 1


# ---- Pascal VOC's format


def test_cvat_voc(tmp_path):
    for number, name in enumerate(("cam 1/a", "cam2/a", "b"), 1):
        write_image(tmp_path / f"JPEGImages/{name}.jpg", number)
        write(tmp_path / f"Annotations/{name}.xml", voc_text(number, f"{name}.jpg"))
        write_image(tmp_path / f"SegmentationClass/{name}.png", number)
    write(tmp_path / "ImageSets/Main/default.txt", '"cam 1/a"\ncam2/a\nb\n')
    write(tmp_path / "ImageSets/Main/thing_default.txt", '"cam 1/a" 1\ncam2/a 1\nb -1\n')
    write(tmp_path / "labelmap.txt", "# label:color_rgb:parts:actions\nthing:128,0,0::\n")
    data = read_voc(tmp_path, VocRules(), Problems())
    places = {1: "JPEGImages/cam 1/a.jpg", 2: "JPEGImages/cam2/a.jpg", 3: "JPEGImages/b.jpg"}
    assert boxes(data, tmp_path) == {"train": wanted(places)}


@pytest.mark.parametrize("names", [("Train", "Validation"), ("train", "valid"), ("trainval", "Test")])
def test_subsets_may_have_the_names_of_tools(tmp_path, names):
    for number, name in enumerate(names, 1):
        write_image(tmp_path / f"JPEGImages/{number}.jpg", number)
        write(tmp_path / f"Annotations/{number}.xml", voc_text(number))
        write(tmp_path / f"ImageSets/Main/{name}.txt", f"{number}\n")
    found = boxes(read_voc(tmp_path, VocRules(), Problems()), tmp_path)
    assert found == {"train": wanted({1: "JPEGImages/1.jpg"}), "val": wanted({2: "JPEGImages/2.jpg"})}


LIST_ENTRIES = (
    "{}",
    "{}.jpg",
    "JPEGImages/{}.jpg",
    "./JPEGImages/{}.jpg",
    "JPEGImages\\{}.jpg",
    '"{}"',
    "'{}.jpg'",
    "{}  1",
    '"{}" -1',
    "{}\r",
    "Annotations/{}.xml",
    "C:\\VOC\\JPEGImages\\{}.jpg",
    "/data/VOC2012/JPEGImages/{}.jpg",
)


@pytest.mark.parametrize("entry", LIST_ENTRIES)
def test_lists_of_voc_in_every_form(tmp_path, entry):
    for number in (1, 2):
        write_image(tmp_path / f"JPEGImages/a {number}.jpg", number)
        write(tmp_path / f"Annotations/a {number}.xml", voc_text(number))
    write(tmp_path / "ImageSets/Main/train.txt", "\ufeff# chosen\n" + entry.format("a 2") + "\n")
    assert boxes(read_voc(tmp_path, VocRules(), Problems()), tmp_path) == {
        "train": wanted({2: "JPEGImages/a 2.jpg"})
    }


def test_xml_files_of_other_names_are_of_the_image_that_they_name(tmp_path):
    for number in (1, 2):
        write_image(tmp_path / f"images/photo {number}.jpg", number)
        write_image(tmp_path / f"masks/{number:06}.png", number)
        write(tmp_path / f"annotations/{number:06}.xml", voc_text(number, f"D:\\photos\\photo {number}.jpg"))
    faults = Problems()
    found = boxes(read_voc(tmp_path, VocRules(), faults), tmp_path)
    assert found == {"train": wanted({1: "images/photo 1.jpg", 2: "images/photo 2.jpg"})}
    assert faults.notes[BARE] == 2


def test_a_mask_is_not_taken_for_an_image_that_is_missing(tmp_path):
    for number in (1, 2):
        write_image(tmp_path / f"JPEGImages/{number}.jpg", number)
        write_image(tmp_path / f"SegmentationClass/{number}.png", number)
        write(tmp_path / f"Annotations/{number}.xml", voc_text(number, f"{number}.jpg"))
    (tmp_path / "JPEGImages/2.jpg").unlink()
    with pytest.raises(UserError, match="2.xml has no image: none of that name is below"):
        read_voc(tmp_path, VocRules(), problems := Problems())
        problems.stop_if_asked()


def test_an_image_of_another_part_is_no_xml_files(tmp_path):
    for part, number in (("train", 1), ("valid", 2)):
        write_image(tmp_path / f"{part}/{number}.jpg", number)
        write(tmp_path / f"{part}/{number}.xml", voc_text(number, f"{number}.jpg"))
    write(tmp_path / "train/3.xml", voc_text(3, "3.jpg"))
    write_image(tmp_path / "valid/3.jpg", 3)
    faults = Problems("skip")
    found = boxes(read_voc(tmp_path, VocRules(), faults), tmp_path)
    assert found == {"train": wanted({1: "train/1.jpg"}), "val": wanted({2: "valid/2.jpg"})}
    assert len(faults.messages) == 1


# ---- YOLO's format


def yolo_export(root: Path, image: str, label: str) -> dict[str, Boxes]:
    """Images 1 to 4 for training and 5 and 6 for validation."""
    found: dict[str, dict[int, str]] = {"train": {}, "val": {}}
    for number in range(1, 7):
        part = "train" if number < 5 else "val"
        place = image.format(n=number, part=part)
        write_image(root / place, number)
        write(root / label.format(n=number, part=part), yolo_line(number))
        found[part][number] = place
    return {part: wanted(places) for part, places in found.items()}


def write_list(path: Path, entry: str, numbers: range) -> None:
    write(path, "".join(entry.format(n=number) + "\n" for number in numbers))


@pytest.mark.parametrize("names", ["obj.names", "data/obj.names", "C:\\darknet\\data\\obj.names"])
def test_cvat_yolo_1_1(tmp_path, names):
    places = yolo_export(tmp_path, "obj_{part}_data/{n}.jpg", "obj_{part}_data/{n}.txt")
    lines = "# CVAT", "classes = 1", "train = data/train.txt", "valid = data/val.txt", f"names = {names}"
    write(tmp_path / "obj.data", "\r\n".join(lines))
    write(tmp_path / "obj.names", "\ufeffthing\r\n")
    write_list(tmp_path / "train.txt", "data/obj_train_data/{n}.jpg", range(1, 5))
    write_list(tmp_path / "val.txt", "data/obj_val_data/{n}.jpg", range(5, 7))
    assert format_of(tmp_path) == format_of(tmp_path / "obj.data") == "yolo"
    for source in (tmp_path, tmp_path / "obj.data"):
        faults = Problems()
        assert boxes(read_yolo(source, faults), tmp_path) == places
        assert faults.notes[END] == 6


def test_darknet_is_started_above_its_files(tmp_path):
    places = yolo_export(tmp_path, "data/{part}/{n}.jpg", "data/{part}/{n}.txt")
    write(tmp_path / "cfg/obj.data", "train = data/train.txt\nvalid = data/val.txt\nnames = data/obj.names\n")
    write(tmp_path / "data/obj.names", "thing\n")
    write_list(tmp_path / "data/train.txt", "data/train/{n}.jpg", range(1, 5))
    write_list(tmp_path / "data/val.txt", "data/val/{n}.jpg", range(5, 7))
    assert boxes(read_yolo(tmp_path / "cfg/obj.data", Problems()), tmp_path) == places


@pytest.mark.parametrize(
    "entry",
    [
        "images/train/{n}.jpg",
        "./images/train/{n}.jpg",
        "data/images/train/{n}.jpg",
        '"images/train/{n}.jpg"',
        "images/train/{n}",
        "/content/set/images/train/{n}.jpg",
        "..\\set\\images\\train\\{n}.jpg",
        "IMAGES/Train/{n}.JPG",
        "../../upload/images/train/{n}.jpg",
    ],
)
def test_lists_of_ultralytics_in_every_form(tmp_path, entry):
    root = tmp_path / "given/in"
    places = yolo_export(root, "images/{part}/{n}.jpg", "labels/{part}/{n}.txt")
    for number in range(1, 5):
        write_image(tmp_path / f"upload/images/train/{number}.jpg", 0)
    write(root / "data.yaml", "path: .\ntrain: train.txt\nval: images/val\nnames:\n  0: thing\n")
    write_list(root / "train.txt", entry, range(1, 5))
    with Watch(root, 600, hard=False).case():
        assert boxes(read_yolo(root, Problems()), root) == places


def test_lists_of_two_parts_may_have_the_same_names(tmp_path):
    for number, part in ((1, "train"), (2, "val")):
        write_image(tmp_path / f"{part}/images/a.jpg", number)
        write(tmp_path / f"{part}/labels/a.txt", yolo_line(number))
        write(tmp_path / f"{part}/list.txt", "images/a.jpg\n")
    write(tmp_path / "data.yaml", "train: train/list.txt\nval: val/list.txt\nnames: [thing]\n")
    found = boxes(read_yolo(tmp_path, Problems()), tmp_path)
    assert found == {"train": wanted({1: "train/images/a.jpg"}), "val": wanted({2: "val/images/a.jpg"})}


def test_roboflow_yolo(tmp_path):
    places = yolo_export(tmp_path / "in", "{part}/images/{n}.jpg", "{part}/labels/{n}.txt")
    for number in range(1, 7):  # other data sets lie beside it
        write_image(tmp_path / f"train/images/{number}.jpg", 0)
        write_image(tmp_path / f"val/images/{number}.jpg", 0)
    folders = "train: ../train/images\nval: ../val/images\ntest: ../test/images\n"
    write(tmp_path / "in/data.yaml", f"{folders}\nnc: 1\nnames: ['thing']\n")
    for source in (tmp_path / "in", tmp_path / "in/data.yaml"):
        assert boxes(read_yolo(source, Problems()), tmp_path / "in") == places


def test_a_part_that_is_missing_is_not_another(tmp_path):
    """Roboflow names ../valid/images of a part without images, too."""
    places = yolo_export(tmp_path, "images/{n}.jpg", "labels/{n}.txt")
    write(tmp_path / "data.yaml", "train: ../images\nval: ../valid/images\nnames: [thing]\n")
    assert "names ../valid/images, which is missing" in refusal(tmp_path)
    faults = Problems("skip")
    assert merged(boxes(read_yolo(tmp_path, faults), tmp_path)) == merged(places)
    assert len(faults.messages) == 1
    write(tmp_path / "data.yaml", "train: a/images\nval: b/images\nnames: [thing]\n")
    assert "names b/images, which is missing" in refusal(tmp_path), "one folder is not two parts"


@pytest.mark.parametrize(
    "text",
    [
        "path: C:\\set\ntrain: images\\train\nval: images\\val\n",
        "train: /home/me/set/images/train/\nval: /home/me/set/images/val/\n",
        "path: /home/me/set\ntrain: Images/Train\nval: ./images//val\n",
        "train: [images/train]\nvalid: images/val\n",
    ],
    ids=["Windows", "labelme2yolo", "case", "valid"],
)
def test_folders_of_data_yaml_in_every_form(tmp_path, text):
    places = yolo_export(tmp_path, "images/{part}/{n}.jpg", "labels/{part}/{n}.txt")
    write(tmp_path / "dataset.yaml", text + "names: [thing]\n")
    assert boxes(read_yolo(tmp_path, Problems()), tmp_path) == places


def test_label_studio_yolo(tmp_path):
    places = yolo_export(tmp_path, "images/0123abcd-{n}.jpg", "labels/0123abcd-{n}.txt")
    write(tmp_path / "classes.txt", "thing\nother\n")
    write(
        tmp_path / "notes.json",
        '{"categories": [{"id": 0, "name": "thing"}], "info": {"contributor": "Label Studio"}}',
    )
    assert format_of(tmp_path) == "yolo"
    data = read_yolo(tmp_path, Problems())
    assert class_names(data) == ["thing", "other"]
    assert merged(boxes(data, tmp_path)) == merged(places)


def test_an_archive_may_have_put_all_into_one_folder(tmp_path):
    yolo_export(tmp_path / "given/project", "images/{part}/{n}.jpg", "labels/{part}/{n}.txt")
    write(tmp_path / "given/project/DATA.YAML", "train: images/train\nval: images/val\nnames: [thing]\n")
    write(tmp_path / "given/.DS_Store", "")
    convert(tmp_path / "given", "--output_dir", tmp_path / "out")
    content = json.loads((tmp_path / "out/annotations/instances_val2017.json").read_text())
    assert len(content["images"]) == len(content["annotations"]) > 0


def test_text_of_a_yaml_stays_text(tmp_path):
    yolo_export(tmp_path, "images/{part}/{n}.jpg", "labels/{part}/{n}.txt")
    names = [
        "yes",
        "no",
        "on",
        "007",
        "1e3",
        "2024-01-31",
        "null",
        "~",
        "1_000",
        "0x1f",
        "12:30:45",
        ".inf",
        "true",
        "é",
    ]
    listed = "".join(f"  {i}: {name}\n" for i, name in enumerate(names))
    for text in (
        f"names: [{', '.join(names)}]\n",
        f"names:\n{listed}",
        "names:\n" + "".join(f"- {name}\n" for name in names),
    ):
        for encoding in ("utf-8", "utf-8-sig", "utf-16"):
            content = f"train: images/train\nval: images/val\ntest: # none\n{text}"
            (tmp_path / "data.yaml").write_bytes(content.replace("\n", "\r\n").encode(encoding))
            assert class_names(read_yolo(tmp_path, Problems())) == names
    write(tmp_path / "data.yaml", "train: images/train\nval: null\nnames: [thing]\n")
    assert list(read_yolo(tmp_path, Problems())) == ["train"]


def test_class_files_are_read_as_text(tmp_path):
    yolo_export(tmp_path, "images/{n}.jpg", "labels/{n}.txt")
    (tmp_path / "classes.txt").write_bytes('# classes\r\n"no"\r\n007\r\nStraße 1\r\n\r\n'.encode("utf-16"))
    faults = Problems()
    assert class_names(read_yolo(tmp_path, faults)) == ["no", "007", "Straße 1"]
    assert [count for note, count in faults.notes.items() if "begin with #" in note] == [1]


def test_labels_of_no_image_are_counted(tmp_path):
    yolo_export(tmp_path, "images/{n}.jpg", "labels/{n}.txt")
    write(tmp_path / "classes.txt", "thing\n")
    write(tmp_path / "README.txt", "5 images were 0.5 of all\n")
    write(tmp_path / "labels/7.txt", yolo_line(7))
    faults = Problems()
    read_yolo(tmp_path, faults)
    assert faults.notes["files of labels that belong to no image of these splits, left out"] == 1


def test_images_and_labels_that_two_folders_share_are_not_guessed(tmp_path):
    write_image(tmp_path / "images/a.jpg", 1)
    write_image(tmp_path / "images/A.jpg", 2)
    write_image(tmp_path / "images/b.jpg", 3)
    write(tmp_path / "labels/a.TXT", yolo_line(1))
    write(tmp_path / "labels/b.txt", yolo_line(3))
    write(tmp_path / "labels/A.Txt", yolo_line(2))
    write(tmp_path / "classes.txt", "thing\n")
    found = boxes(read_yolo(tmp_path, Problems()), tmp_path)
    assert found["train"] == wanted({1: "images/a.jpg", 2: "images/A.jpg", 3: "images/b.jpg"})
    (tmp_path / "labels/a.TXT").rename(tmp_path / "labels/á.txt")
    (tmp_path / "labels/A.Txt").unlink()
    (tmp_path / "images/a.jpg").rename(tmp_path / unicodedata.normalize("NFD", "images/á.jpg"))
    (tmp_path / "images/A.jpg").rename(tmp_path / "images/Á.jpg")
    faults = Problems("skip")
    assert boxes(read_yolo(tmp_path, faults), tmp_path) == {"train": wanted({3: "images/b.jpg"})}
    assert len(faults.messages) == 2
