"""What annotation files may hold: every mistake is named in one line, and what many programs leave
out is filled in.
"""

from __future__ import annotations

import copy
import json

import pytest

from datasets.coco import CocoDetection
from datasets.coco_eval import evaluate_results
from datasets.coco_format import read_annotations
from tests.helpers import write_coco
from util.errors import UserError

GOOD = {
    "info": {"description": "two images"},
    "images": [
        {"id": 1, "file_name": "a.jpg", "width": 640, "height": 480},
        {"id": 2, "file_name": "sub/b c.é.jpg", "width": 640.0, "height": 480},
    ],
    "annotations": [
        {
            "id": 900100448263,
            "image_id": 1,
            "category_id": 1,
            "bbox": [0, 1.5, 20, 30],
            "area": 12.5,
            "iscrowd": 0,
        },
        {"id": 0, "image_id": 2, "category_id": 3, "bbox": [-3, 4, 0, 8], "area": 0, "iscrowd": 1},
    ],
    "categories": [{"id": 1, "name": "one"}, {"id": 3, "name": "three"}],
}


def read(tmp_path, content):
    path = tmp_path / "instances.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return read_annotations(path)


def refusal(tmp_path, content) -> str:
    with pytest.raises(UserError) as error:
        read(tmp_path, content)
    text = str(error.value)
    assert "instances.json" in text
    assert len(text.splitlines()) == 1
    assert len(text) < 600
    return text


def changed(name: str, key: str, value) -> dict:
    content = copy.deepcopy(GOOD)
    content[name][1][key] = value
    return content


def test_good_annotations_are_read(tmp_path):
    assert sorted(read(tmp_path, GOOD).imgs) == [1, 2]


IDS = [None, "1", 1.0, True, [1], {}, 2**63, -(2**63) - 1, 10**400, float("nan")]
WRONG = {
    ("images", "id"): IDS,
    ("images", "width"): [0, -1, 0.5, "640", None, True, float("nan"), float("inf"), 10**400],
    ("images", "height"): [0, -3, 479.5, []],
    ("annotations", "id"): IDS,
    ("annotations", "image_id"): IDS,
    ("annotations", "category_id"): IDS,
    ("annotations", "bbox"): [
        None,
        {},
        "1234",
        [],
        [1, 2, 3],
        [1, 2, 3, 4, 5],
        [1, 2, 3, None],
        [1, 2, 3, "4"],
        [1, 2, 3, True],
        [[1], 2, 3, 4],
        [float("nan"), 2, 3, 4],
        [1, float("inf"), 3, 4],
        [1, 2, 1e300, 4],
        [1, 2, 3, 10**400],
        [-1e300, 2, 3, 4],
        [1, 2, -3, 4],
        [1, 2, 3, -0.5],
    ],
    ("annotations", "area"): [None, "5", -1, float("nan"), float("inf"), 1e11, True, 10**400, [5]],
    ("annotations", "iscrowd"): [None, 2, -1, 0.5, "0", [0], float("nan")],
    ("categories", "id"): IDS,
    ("categories", "name"): [None, 1, ["one"]],
}


@pytest.mark.parametrize(
    ("name", "key", "value"), [(*where, value) for where, values in WRONG.items() for value in values]
)
def test_a_value_that_cannot_be_right_is_refused(tmp_path, name, key, value):
    text = refusal(tmp_path, changed(name, key, value))
    assert key in text
    assert "must be" in text
    if key != "id":
        assert f"{GOOD[name][1]['id']} has {key}" in text, "which one is said"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "../secret.jpg",
        "a/../../b.jpg",
        "a/..",
        "..",
        "C:/b.jpg",
        "c:b.jpg",
        "\\\\host\\b.jpg",
        "\\b.jpg",
        "a\\..\\b.jpg",
        "a\0.jpg",
        "a\n.jpg",
        "a\x85.jpg",
        "a\u2028.jpg",
        "\ud800.jpg",
        None,
        3,
        ["a.jpg"],
        "x" * 1001,
    ],
)
def test_file_names_cannot_leave_the_image_folder(tmp_path, name):
    text = refusal(tmp_path, changed("images", "file_name", name))
    assert "image 2 has file_name" in text
    assert "below the image folder" in text


@pytest.mark.parametrize(
    "name", ["a..b.jpg", "..a/b.jpg", "...", "x/y/z.jpg", "図 1.jpg", "ab:c", "-", "~/x.jpg"]
)
def test_unusual_file_names_are_none_of_that(tmp_path, name):
    assert read(tmp_path, changed("images", "file_name", name)).imgs[2]["file_name"] == name


@pytest.mark.parametrize(("name", "key"), [where for where in WRONG if where[1] not in ("area", "iscrowd")])
def test_what_is_lacking_is_named(tmp_path, name, key):
    content = copy.deepcopy(GOOD)
    del content[name][1][key]
    assert f"{name}[1] lacks '{key}'" in refusal(tmp_path, content)


@pytest.mark.parametrize("name", ["images", "annotations", "categories"])
def test_ids_are_unique_and_entries_are_objects(tmp_path, name):
    assert f"two {name}" in refusal(tmp_path, changed(name, "id", GOOD[name][0]["id"]))
    for entry in (None, 3, "text", ["id"], []):
        assert f"{name}[2] lacks" in refusal(tmp_path, GOOD | {name: [*GOOD[name], entry]})
    assert name in refusal(tmp_path, GOOD | {name: {"1": GOOD[name][0]}})


def test_objects_of_unknown_images_and_categories_are_refused(tmp_path):
    assert "image_id 7" in refusal(tmp_path, changed("annotations", "image_id", 7))
    (tmp_path / "images").mkdir()
    for category in (2, -1, 9):
        (tmp_path / "instances.json").write_text(json.dumps(changed("annotations", "category_id", category)))
        with pytest.raises(UserError, match="not among its categories"):
            CocoDetection(tmp_path / "images", tmp_path / "instances.json", None, num_classes=4, seed=0)


TEXT = json.dumps(GOOD).encode()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "not JSON"),
        (TEXT[:-5], "not JSON"),
        (TEXT + b"]", "not JSON"),
        (b"\xff" + TEXT, "not JSON"),
        (TEXT.replace(b"two images", b"\xe9"), "not JSON"),
        (b"[" * 100_000, "nested"),
        (b'{"a":' * 100_000, "nested"),
        (b"[]", "instances format"),
        (b"3", "instances format"),
        (b"null", "instances format"),
        (b"{}", "no list 'images'"),
        (TEXT.replace(b'"width"', b'"id"', 1), "the key 'id' twice"),
        (b"1" * 5000, "not JSON"),
    ],
)
def test_what_is_no_instances_file_is_refused(tmp_path, content, named):
    assert named in refusal(tmp_path, content)


def test_strange_values_in_fields_that_nobody_uses_do_no_harm(tmp_path):
    deep = json.loads("[" * 900 + "]" * 900)
    content = copy.deepcopy(GOOD) | {"info": deep, "licenses": float("nan")}
    for name in ("images", "annotations", "categories"):
        content[name][0]["extra"] = deep
        content[name][1]["score"] = float("inf")
    truth = read(tmp_path, content)
    perfect = [{"image_id": 1, "category_id": 1, "bbox": [0, 1.5, 20, 30], "score": 1.0}]
    assert evaluate_results(truth, perfect).stats[0] == pytest.approx(1)


def perfect_detections(truth) -> list[dict]:
    return [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 1.0}
        for a in truth.anns.values()
    ]


def test_annotations_without_area_and_iscrowd_train_and_evaluate_alike(tmp_path):
    write_coco(tmp_path, num_train=2)
    path = tmp_path / "annotations/instances_val2017.json"
    whole = read_annotations(path)
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    path.write_text(json.dumps(content))
    filled = read_annotations(path)
    assert filled.anns == whole.anns, "the area is the box's, as in this data set"
    detections = perfect_detections(filled)[1:]
    assert (
        evaluate_results(filled, detections).stats.tolist()
        == evaluate_results(whole, detections).stats.tolist()
    )


def test_an_object_of_id_0_is_found_like_any_other(tmp_path):
    """COCOeval takes a detection matched with it for unmatched."""
    write_coco(tmp_path, num_train=2)
    path = tmp_path / "annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        annotation["id"] -= 1
    path.write_text(json.dumps(content))
    truth = read_annotations(path)
    assert 0 in truth.anns
    before = copy.deepcopy(truth.dataset)
    assert evaluate_results(truth, perfect_detections(truth)).stats[0] == pytest.approx(1)
    assert truth.dataset == before, "evaluating changes nothing of the annotations"
