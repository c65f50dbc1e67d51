"""The check of a data set finds what was planted in it, and nothing else; a training run looks for
the worst by itself.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datasets import build_dataset
from datasets.coco import CocoDetection
from datasets.coco_format import read_annotations
from datasets.preflight.annotations import CheckedSplit, check_annotations, check_classes, check_unused
from datasets.preflight.quick import quick_check
from datasets.preflight.report import write_report
from tests.faults.fuzz_mutate import json_text, mutate_json
from tests.faults.large_annotations import write_large
from tests.helpers import SMALL_IMAGES, SMALL_MODEL, run, run_main
from util.config import parse_config
from util.errors import UserError

NUM_IMAGES = 80  # so many that processes read them
SIZE = (64, 48)


def write_images(folder: Path, count: int, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)).save(
            folder / f"{i:03}.png"
        )


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A data set without a fault: in training image i has the id 100 + i and the objects 1000 + 2 i
    and 1001 + 2 i.
    """
    root = tmp_path_factory.mktemp("sound")
    categories = [{"id": number, "name": name} for number, name in ((3, "cat"), (17, "dog"), (1000, "emu"))]
    (root / "annotations").mkdir()
    for split, count, first in (("train", NUM_IMAGES, 100), ("val", 4, 900)):
        write_images(root / f"{split}2017", count, first)
        images, annotations = [], []
        for i in range(count):
            images.append({"id": first + i, "file_name": f"{i:03}.png", "width": SIZE[0], "height": SIZE[1]})
            for k, (box, category) in enumerate((([4, 5, 20, 16], 3), ([20, 10, 44, 38], (17, 1000)[i % 2]))):
                annotations.append(
                    {
                        "id": 10 * first + 2 * i + k,
                        "image_id": first + i,
                        "category_id": category,
                        "bbox": box,
                        "iscrowd": 0,
                        "area": box[2] * box[3] * 0.8,
                    }
                )
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def data(sound, tmp_path) -> Data:
    shutil.copytree(sound, tmp_path / "data")
    return Data(tmp_path / "data")


class Data:
    """A data set to plant faults in."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.content = {split: json.loads(self.annotations(split).read_text()) for split in ("train", "val")}

    def annotations(self, split: str) -> Path:
        return self.root / f"annotations/instances_{split}2017.json"

    def image(self, i: int, split: str = "train") -> Path:
        return self.root / f"{split}2017/{i:03}.png"

    def entry(self, i: int) -> dict[str, Any]:
        """The entry of training image i."""
        return self.content["train"]["images"][i]

    def object(self, i: int) -> dict[str, Any]:
        """The first object of training image i, of id 1000 + 2 i."""
        return self.content["train"]["annotations"][2 * i]

    def write(self) -> None:
        for split, content in self.content.items():
            self.annotations(split).write_text(json.dumps(content))

    def check(self, *flags: str, code: int) -> tuple[str, list[dict[str, Any]]]:
        """What the tool prints, and the findings of its report."""
        report = self.root / "report.json"
        result = run(
            sys.executable,
            "tools/check_data.py",
            "--coco_path",
            str(self.root),
            "--report",
            str(report),
            "--show",
            "0",
            *flags,
        )
        assert result.returncode == code, result.stderr
        content = json.loads(report.read_text())
        assert content["faults"] == sum(finding["is_fault"] for finding in content["findings"])
        return result.stdout, content["findings"]


def missing_image(d: Data, i: int) -> dict:
    d.image(i).unlink()
    return {"image_id": 100 + i, "file": str(d.image(i))}


def broken_image(d: Data, i: int) -> dict:
    d.image(i).write_bytes(d.image(i).read_bytes()[:500])
    return {"image_id": 100 + i, "file": str(d.image(i))}


def wrong_size(d: Data, i: int) -> dict:
    d.entry(i)["height"] += 1
    return {"image_id": 100 + i, "file": str(d.image(i))}


def of_object(**values: Any) -> Callable[[Data, int], dict]:
    def plant(d: Data, i: int) -> dict:
        d.object(i).update(values)
        return {"annotation_id": 1000 + 2 * i, "image_id": 100 + i, "file": str(d.annotations("train"))}

    return plant


def duplicate_image_id(d: Data, i: int) -> dict:
    write_images(d.root / "train2017/more", 1, 5)
    d.content["train"]["images"].append(d.entry(i) | {"file_name": "more/000.png"})
    return {"image_id": 100 + i, "file": str(d.annotations("train"))}


def duplicate_annotation_id(d: Data, i: int) -> dict:
    d.content["train"]["annotations"].append(d.object(i) | {"bbox": [1, 1, 5, 5], "area": 20})
    return {"annotation_id": 1000 + 2 * i, "file": str(d.annotations("train"))}


def duplicate_category_id(d: Data, i: int) -> dict:
    d.content["train"]["categories"].append({"id": 17, "name": "gnu"})
    return {"category_id": 17}


def duplicate_category_name(d: Data, i: int) -> dict:
    d.content["train"]["categories"].append({"id": 4, "name": "cat"})
    d.object(i)["category_id"] = 4
    return {"category_id": 4}


def unknown_image(d: Data, i: int) -> dict:
    d.object(i)["image_id"] = 5
    return {"annotation_id": 1000 + 2 * i, "image_id": 5}


def outside_name(d: Data, i: int) -> dict:
    d.entry(i)["file_name"] = f"../train2017/{i:03}.png"
    return {"image_id": 100 + i}


def duplicate_file(d: Data, i: int) -> dict:
    d.content["train"]["images"].append(d.entry(i) | {"id": 7})
    return {"image_id": 7, "file": str(d.image(i))}


def overlap(d: Data, i: int) -> dict:
    shutil.copy(d.image(i), d.image(2, "val"))
    return {"image_id": 902, "file": str(d.image(2, "val")), "split": "val"}


def missing_field(d: Data, i: int) -> dict:
    del d.object(i)["bbox"]
    return {"annotation_id": 1000 + 2 * i}


def other_category(d: Data, i: int) -> dict:
    d.content["val"]["categories"][2]["name"] = "rhea"
    return {"category_id": 1000, "split": "val"}


def no_number(d: Data, i: int) -> dict:
    d.entry(i)["width"] = "64"
    return {"image_id": 100 + i}


PLANTED: dict[str, tuple[str, Callable[[Data, int], dict]]] = {
    "missing image": ("missing_image", missing_image),
    "broken image": ("broken_image", broken_image),
    "wrong size": ("wrong_size", wrong_size),
    "box outside": ("box_outside", of_object(bbox=[70, 5, 20, 16])),
    "box that reaches out": ("box_reaches_out", of_object(bbox=[50, 5, 20, 16])),
    "box without width": ("degenerate_box", of_object(bbox=[4, 5, 0, 16], area=0)),
    "box of negative height": ("degenerate_box", of_object(bbox=[4, 5, 3, -16])),
    "box of NaN": ("wrong_bbox", of_object(bbox=[4, 5, float("nan"), 16])),
    "box of text": ("wrong_bbox", of_object(bbox=["4", 5, 6, 16])),
    "box of three": ("wrong_bbox", of_object(bbox=[4, 5, 6])),
    "no box": ("missing_field", missing_field),
    "unknown category": ("unknown_category", of_object(category_id=5)),
    "unknown image": ("unknown_image", unknown_image),
    "crowd of 2": ("wrong_iscrowd", of_object(iscrowd=2)),
    "area larger than the box": ("wrong_area", of_object(area=900)),
    "area of 0": ("wrong_area", of_object(area=0)),
    "negative area": ("wrong_area", of_object(area=-3)),
    "image id twice": ("duplicate_image_id", duplicate_image_id),
    "annotation id twice": ("duplicate_annotation_id", duplicate_annotation_id),
    "category id twice": ("duplicate_category_id", duplicate_category_id),
    "category name twice": ("duplicate_category_name", duplicate_category_name),
    "file name that leaves the folder": ("wrong_file_name", outside_name),
    "width that is no number": ("wrong_width", no_number),
    "file of two images": ("duplicate_file", duplicate_file),
    "image in both parts": ("overlap", overlap),
    "category of another name in validation": ("other_category", other_category),
}


def test_a_sound_data_set_has_no_faults(data):
    said, findings = data.check(code=0)
    assert findings == []
    assert said.splitlines()[-1] == "problems: 0, warnings: 0"
    rows = [line.split() for line in said.splitlines()]
    assert ["train", "80", "0", "160", "0", "64..64..64", "48..48..48"] in rows
    # 4/5 of 20 x 16 pixels are small, of 44 x 38 medium
    assert ["17", "dog", "40", "0", "40", "0", "40", "2", "0", "2", "0", "2"] in rows


def test_every_planted_fault_is_found_with_its_file_and_id_and_nothing_else(data):
    assert len({kind for kind, _ in PLANTED.values()}) >= 15
    wanted = [(kind, plant(data, 3 * i)) for i, (kind, plant) in enumerate(PLANTED.values())]
    data.write()
    said, findings = data.check(code=1)
    assert all(finding["message"] in said for finding in findings)
    for kind, ids in wanted:
        fitting = [
            f for f in findings if f["kind"] == kind and all(f[key] == value for key, value in ids.items())
        ]
        assert len(fitting) == 1, (kind, ids, findings)
        assert len(fitting[0]["message"].splitlines()) == 1
        assert Path(fitting[0]["file"]).name in fitting[0]["message"]
        findings.remove(fitting[0])
    assert findings == [], "nothing else"


@pytest.mark.parametrize("name", PLANTED)
def test_each_planted_fault_alone_is_found_alone(data, name):
    """In one process and without the images' pixels, as far as these don't matter."""
    kind, plant = PLANTED[name]
    wanted = plant(data, 5)
    data.write()
    if kind in ("missing_image", "broken_image", "wrong_size", "overlap"):
        _, findings = data.check("--workers", "1", code=1)
        assert [(f["kind"], f["is_fault"]) for f in findings] == [(kind, True)]
    else:
        findings = report_of(checked(data), data.root / "report.json")
        assert [(f["kind"], f["is_fault"]) for f in findings] == [(kind, True)]
    assert wanted.items() <= findings[0].items()


# ---- masks


def outline(*corners: float) -> list[list[float]]:
    x0, y0, x1, y1 = corners
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


RUNS = {"size": [SIZE[1], SIZE[0]], "counts": [4 * SIZE[1] + 5, 16, (SIZE[0] - 4) * SIZE[1] - 21]}
# of an object with the box [4, 5, 20, 16] and an area of 256
MASK_FAULTS = {
    "none": ("missing_mask", {"segmentation": None}),
    "no outline": ("missing_mask", {"segmentation": []}),
    "a crowd without": ("missing_mask", {"segmentation": [], "iscrowd": 1}),
    "two points": ("wrong_segmentation", {"segmentation": [[4, 5, 24, 21]]}),
    "a size that is turned": ("wrong_segmentation", {"segmentation": {**RUNS, "size": list(SIZE)}}),
    "too few runs": ("wrong_segmentation", {"segmentation": {**RUNS, "counts": "PP"}}),
    "far outside": ("wrong_segmentation", {"segmentation": outline(4, 5, 24, 999)}),
    "outside": ("empty_mask", {"segmentation": outline(70, 5, 90, 21)}),
    "a line": ("empty_mask", {"segmentation": outline(4, 5, 4, 21)}),
    "no pixel": ("empty_mask", {"segmentation": {**RUNS, "counts": [SIZE[0] * SIZE[1]]}}),
    "another place": ("mask_off_box", {"segmentation": outline(40, 20, 60, 36)}),
    "a part of it": ("mask_off_box", {"segmentation": outline(4, 5, 13, 21)}),
    "one column": ("mask_off_box", {"segmentation": RUNS}),
    "another area": ("mask_area", {"area": 100}),
}


@pytest.fixture(scope="module")
def sound_masks(sound, tmp_path_factory) -> Path:
    """Outlines around the boxes; a crowd has run lengths, and an outline is as rough as COCO's."""
    root = tmp_path_factory.mktemp("masks") / "data"
    shutil.copytree(sound, root)
    with_masks = Data(root)
    for content in with_masks.content.values():
        for annotation in content["annotations"]:
            x, y, width, height = annotation["bbox"]
            annotation["segmentation"] = outline(x, y, x + width, y + height)
    with_masks.object(1)["segmentation"] = outline(5.5, 6.5, 22, 17)
    with_masks.object(2).update(
        bbox=[4, 5, 1, 16], area=16, segmentation=json.loads(json.dumps(RUNS)), iscrowd=1
    )
    with_masks.write()
    return root


def test_masks_are_checked_with_their_flag_only(sound_masks, tmp_path):
    shutil.copytree(sound_masks, tmp_path / "data")
    data = Data(tmp_path / "data")
    check = partial(check_annotations, "train", data.root / "train2017", data.annotations("train"))
    assert check(masks=True).problems == []
    for i, (_, fault) in enumerate(MASK_FAULTS.values(), 5):
        data.object(i).update(fault)
    data.write()
    assert check().problems == []
    said, findings = data.check("--no_images", "--masks", code=1)
    assert all(finding["message"] in said for finding in findings)
    wanted = {1000 + 2 * i: kind for i, (kind, _) in enumerate(MASK_FAULTS.values(), 5)}
    assert {f["annotation_id"]: f["kind"] for f in findings} == wanted
    assert {f["kind"] for f in findings if not f["is_fault"]} == {"mask_area"}


@pytest.mark.parametrize("name", MASK_FAULTS)
def test_a_mask_that_training_refuses_is_a_problem_in_the_same_words(sound_masks, tmp_path, name):
    data = Data(sound_masks)
    kind, fault = MASK_FAULTS[name]
    data.object(5).update(fault)
    path = tmp_path / "train.json"
    path.write_text(json.dumps(data.content["train"]))
    (problem,) = check_annotations("train", data.root / "train2017", path, masks=True).problems
    assert (problem.kind, problem.entry["id"]) == (kind, 1010)
    load = partial(CocoDetection, data.root / "train2017", path, None, seed=0, masks=True)
    if kind in ("missing_mask", "wrong_segmentation"):
        with pytest.raises(UserError) as error:
            load()
        assert str(error.value) == problem.message
    else:
        assert len(load()) == NUM_IMAGES


def checked(data: Data) -> list[CheckedSplit]:
    splits = [
        check_annotations(name, data.root / f"{name}2017", data.annotations(name))
        for name in ("train", "val")
    ]
    check_classes(splits, "auto")
    return splits


def report_of(splits: list[CheckedSplit], path: Path) -> list[dict[str, Any]]:
    write_report(path, {}, [problem for split in splits for problem in split.problems])
    return json.loads(path.read_text())["findings"]


def crowds(annotations) -> None:
    for annotation in annotations:
        annotation["iscrowd"] = 1


def many_boxes(count: int) -> list[dict[str, Any]]:
    return [{"id": 10_000 + i, "bbox": [i % 40, i // 40, 5, 5], "area": 25} for i in range(count)]


def save_deep(path: Path, bits: int) -> None:
    rows = np.random.default_rng(int(path.stem)).integers(0, 2**bits, (SIZE[1], SIZE[0]))
    Image.fromarray(rows.astype(np.uint16)).save(path)


WARNINGS = {
    "duplicate_box": lambda d: d.content["train"]["annotations"].append(d.object(5) | {"id": 5}),
    "unused_category": lambda d: [
        content["categories"].append({"id": 4, "name": "yak"}) for content in d.content.values()
    ],
    "same_picture": lambda d: shutil.copy(d.image(5), d.image(6)),
    "only_crowds": lambda d: crowds(d.content["val"]["annotations"]),
    "class_of_crowds": lambda d: crowds(
        a for a in d.content["train"]["annotations"] if a["category_id"] == 17
    ),
    "no_objects": lambda d: d.content["val"]["annotations"].clear(),
    "more_than_queries": lambda d: d.content["train"]["annotations"].extend(
        d.object(3) | box for box in many_boxes(299)
    ),
    "more_than_detections": lambda d: d.content["val"]["annotations"].extend(
        d.content["val"]["annotations"][0] | box for box in many_boxes(99)
    ),
    "flat_picture": lambda d: Image.new("RGB", SIZE, (40, 50, 60)).save(d.image(5)),
    "mixed_depths": lambda d: [save_deep(d.image(i), bits) for i, bits in ((3, 12), (4, 12), (5, 16))],
}


@pytest.mark.parametrize("kind", WARNINGS)
def test_what_may_be_meant_is_a_warning_and_no_fault(data, kind):
    WARNINGS[kind](data)
    data.write()
    said, findings = data.check("--workers", "1", code=0)
    assert {(f["kind"], f["is_fault"]) for f in findings} == {(kind, False)}
    assert f"warning: {kind}" in said


SAID = {
    "only_crowds": "instances_val2017.json: all 8 objects are crowd regions (iscrowd 1)",
    "class_of_crowds": "train2017.json: 1 category has but crowd regions (iscrowd 1), "
    "which neither train nor count: 'dog'",
    "no_objects": "instances_val2017.json: no object in 4 images: there is nothing to measure",
    "more_than_queries": "1 images have more objects, up to 301 (image 103), than the 300 of "
    "--num_queries can find",
    "more_than_detections": "1 images have more objects, up to 101 (image 900), than the 100 "
    "detections that count",
    "flat_picture": "005.png is nearly of one level: as the detector sees it, its pixels differ by 0 of 255",
    "mixed_depths": "by the depth that holds their largest number: 2 of 12 bits, 1 of 16 bits",
}


@pytest.mark.parametrize("kind", SAID)
def test_what_can_neither_be_learnt_nor_measured_nor_seen_is_told_with_its_numbers(data, kind):
    WARNINGS[kind](data)
    data.write()
    _, (finding,) = data.check("--workers", "1", code=0)
    assert SAID[kind] in finding["message"]
    assert len(finding["message"].splitlines()) == 1


def test_objects_of_a_class_that_training_lacks_are_counted(data):
    train, val = (data.content[split]["annotations"] for split in ("train", "val"))
    for annotation in train:
        annotation["category_id"] = {17: 1000}.get(annotation["category_id"], annotation["category_id"])
    count = sum(annotation["category_id"] == 17 for annotation in val)
    data.write()
    _, (finding,) = data.check("--no_images", code=0)
    wanted = "1 category has no object and can never be learned: 'dog'; but validation has "
    assert finding["message"].endswith(f": {wanted}{count}: the AP will be 0 for 'dog'") and count


def test_limits_are_met_by_as_many_objects(data):
    """300 queries and 100 detections are enough for 300 and 100 objects; crowds are not counted."""
    many = [data.object(3) | box for box in many_boxes(310)]
    crowds(many[298:])
    data.content["train"]["annotations"] += many
    val = data.content["val"]["annotations"]
    val += [val[0] | box for box in many_boxes(98)]
    data.write()
    assert data.check("--no_images", code=0)[1] == []
    _, findings = data.check("--no_images", "--num_queries", "299", code=0)
    assert [(f["kind"], f["split"]) for f in findings] == [("more_than_queries", "train")]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ("{", "unreadable_annotations"),
        ("[]", "not_instances_format"),
        (None, "unreadable_annotations"),
        ('{"images": [], "annotations": []}', "not_instances_format"),
        ('{"images": [], "annotations": [], "categories": []}', "no_categories"),
    ],
)
def test_files_that_are_no_annotations_are_one_fault(data, content, kind):
    data.annotations("val").unlink() if content is None else data.annotations("val").write_text(content)
    said, findings = data.check("--no_images", code=1)
    assert [f["kind"] for f in findings] == [kind]
    assert findings[0]["split"] == "val"
    assert "problems: 1, " in said


def test_boxes_that_are_shares_of_the_image_are_one_fault(data):
    for annotation in data.content["train"]["annotations"]:
        x, y, width, height = annotation["bbox"]
        annotation["bbox"] = [x / SIZE[0], y / SIZE[1], width / SIZE[0], height / SIZE[1]]
    data.write()
    problems = [problem for split in checked(data) for problem in split.problems]
    assert [(problem.kind, problem.split) for problem in problems] == [("boxes_in_shares", "train")]


def test_what_training_refuses_of_damaged_annotations_is_among_the_faults(data):
    path = data.annotations("val")
    refused = 0
    for number in range(150):
        rng = random.Random(number)
        path.write_bytes(json_text(rng, mutate_json(rng, data.content["val"])))
        problems = check_annotations("val", data.root / "val2017", path).problems
        assert all(len(problem.message.splitlines()) == 1 for problem in problems)
        try:
            read_annotations(path)
        except UserError as error:
            refused += 1
            assert str(error) in [problem.message for problem in problems]
    assert 30 < refused < 150


def test_entries_that_are_no_objects_and_broken_images_cause_no_further_faults(data):
    data.content["train"]["annotations"][7] = None
    data.content["train"]["images"][0]["id"] = "100"
    data.content["train"]["images"][1]["height"] = -1
    data.write()
    findings = report_of(checked(data), data.root / "report.json")
    found = [(f["kind"], f["image_id"], f["annotation_id"]) for f in findings]
    assert found == [
        ("missing_field", None, None),
        ("unknown_image", 100, 1000),
        ("unknown_image", 100, 1001),
        ("wrong_height", 101, None),
        ("wrong_id", "100", None),
    ]


def test_images_may_be_looked_at_by_their_headers_or_not_at_all(data):
    broken_image(data, 1)  # the header is whole
    missing_image(data, 2)
    wrong_size(data, 3)
    overlap(data, 4)
    data.image(3, "val").unlink()
    data.image(3, "val").hardlink_to(data.image(7))
    data.write()
    _, findings = data.check("--headers_only", "--workers", "1", code=1)
    assert sorted(f["kind"] for f in findings) == ["missing_image", "overlap", "wrong_size"], (
        "a link is seen, a copy is not"
    )
    assert data.check("--no_images", code=0)[1] == []


def test_an_image_that_was_annotated_turned_is_explained(data):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(data.image(5)).save(data.image(5), exif=exif)
    data.entry(5).update(width=SIZE[1], height=SIZE[0])
    for i in (10, 11):
        data.content["train"]["annotations"][i].update(bbox=[1, 1, 10, 10], area=80)
    data.content["train"]["annotations"][11]["bbox"] = [2, 2, 10, 10]
    data.write()
    _, findings = data.check("--workers", "1", code=1)
    assert [f["kind"] for f in findings] == ["wrong_size"]
    assert "EXIF orientation" in findings[0]["message"]


def test_a_missing_folder_is_one_fault_and_four_flags_serve_too(data):
    flags = []
    for split in ("train", "val"):
        flags += [
            f"--{split}_images",
            str(data.root / f"{split}2017"),
            f"--{split}_annotations",
            str(data.annotations(split)),
        ]
    assert data.check(*flags, "--coco_path", "nowhere", "--headers_only", code=0)[1] == []
    (data.root / "val2017").rename(data.root / "elsewhere")
    _, findings = data.check(*flags, "--headers_only", code=1)
    assert [(f["kind"], f["file"]) for f in findings] == [("missing_folder", str(data.root / "val2017"))]


def test_ids_that_do_not_fit_a_given_number_of_classes_are_a_fault(data):
    _, findings = data.check("--num_classes", "91", "--no_images", code=1)
    assert [f["kind"] for f in findings] == ["wrong_num_classes"]
    assert "category id 1000" in findings[0]["message"]


def test_real_annotations_have_no_fault(tiny_coco):
    for split in ("train", "val"):
        annotations = tiny_coco / f"annotations/instances_{split}2017.json"
        checked = check_annotations(split, tiny_coco / f"{split}2017", annotations)
        assert checked.problems == []
        check_unused([checked])
        assert [problem.kind for problem in checked.problems] == ["unused_category"]


def test_generated_annotations_of_cocos_kind_have_no_fault(tmp_path):
    write_large(tmp_path, 0.002)
    for split, count in (("train", 1720), ("val", 74)):
        annotations = tmp_path / f"annotations/instances_{split}2017.json"
        checked = check_annotations(split, tmp_path / f"{split}2017", annotations)
        assert all(problem.is_warning for problem in checked.problems)
        assert len(checked.area) == count


def test_mistakes_in_flags_cost_one_line(data):
    for flags, wanted in (
        (("--workers", "-1"), "--workers"),
        (("--lr", "x"), "--lr"),
        (("--report", "/nowhere/x"), "--report"),
    ):
        result = run(
            sys.executable, "tools/check_data.py", "--coco_path", str(data.root), "--no_images", *flags
        )
        assert result.returncode == 2
        (line,) = result.stderr.splitlines()
        assert wanted in line


def test_help_shows_defaults_and_an_example():
    text = " ".join(run(sys.executable, "tools/check_data.py", "--help").stdout.split())
    for wanted in ("--headers_only", "(default: 2.0)", "--coco_path", "example: python ", "Exit code: 0"):
        assert wanted in text


# ---- what training does by itself


def quick(data: Data, caplog, skip: bool = False, num_queries: int = 300):
    """The error and the warnings of the quick check."""
    config = parse_config(["--coco_path", str(data.root)])
    train = build_dataset("train", config)
    val = build_dataset("val", config, train.classes)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        error = quick_check(train, val, skip, num_queries)
    return error, [record.getMessage() for record in caplog.records]


def test_training_says_nothing_of_a_sound_data_set(data, caplog):
    assert quick(data, caplog) == (None, [])


def test_training_refuses_missing_images_unless_bad_ones_are_skipped(data, caplog):
    for i in (3, 9):
        data.image(i).unlink()
    data.image(9).symlink_to("nowhere")
    error, warnings = quick(data, caplog)
    assert f"missing image files of {data.annotations('train')}: 2, first {data.image(3)}" in str(error)
    assert "--on_bad_image skip" in str(error)
    assert warnings == []
    error, warnings = quick(data, caplog, skip=True)
    assert error is None
    assert len(warnings) == 1
    assert "instances_train2017.json: 2" in warnings[0]


def test_training_tells_doubtful_data_in_one_line(data, caplog):
    for i, name in enumerate(("box outside", "box that reaches out", "box without width")):
        PLANTED[name][1](data, i)
    data.write()
    error, warnings = quick(data, caplog)
    assert error is None
    (line,) = warnings
    for wanted in ("boxes without width", "boxes outside", "boxes that reach", "tools/check_data.py"):
        assert wanted in line
    assert line.count("in train: 1") == 3


@pytest.mark.parametrize(
    "kind", ["only_crowds", "class_of_crowds", "no_objects", "more_than_queries", "more_than_detections"]
)
def test_training_tells_what_can_neither_be_learnt_nor_measured(data, caplog, kind):
    WARNINGS[kind](data)
    data.write()
    error, (line,) = quick(data, caplog)
    assert error is None
    assert SAID[kind].split("json: ")[-1] in line


def test_training_counts_objects_against_its_own_queries(data, caplog):
    _, (line,) = quick(data, caplog, num_queries=1)
    assert (
        "train: 80 images have more objects, up to 2 (image 100), than the 1 of --num_queries can "
        "find" in line
    )
    assert "val: 4 images have more objects" in line


def test_training_tells_of_images_in_both_parts(data, caplog):
    (data.root / "val2017").rename(data.root / "elsewhere")
    (data.root / "val2017").symlink_to(data.root / "train2017")
    _, (line,) = quick(data, caplog)
    assert "images in both train and val: 4" in line


def test_a_run_of_several_processes_ends_before_it_begins_when_images_are_missing(data):
    data.image(70).unlink()
    result = run_main(
        "--coco_path",
        str(data.root),
        *SMALL_IMAGES,
        *SMALL_MODEL[:-2],
        "--epochs",
        "1",
        "--device",
        "cpu",
        "--num_workers",
        "0",
        processes=2,
    )
    assert result.returncode == 2, result.stderr
    assert f"missing image files of {data.annotations('train')}: 1, first {data.image(70)}" in result.stderr
    assert "trainable parameters" not in result.stdout
