"""Category ids of any data set, through training and back."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from datasets import build_dataset
from tests.helpers import SMALL_IMAGES, SMALL_MODEL, write_coco
from tests.processes import run_main_forked
from util.checkpoint import read_checkpoint
from util.class_map import AUTO, COCO_CLASSES, Category, ClassMap, classes_of
from util.config import parse_config
from util.errors import UserError

SPARSE = {1: 1000, 2: 3, 3: 17}  # of write_coco's ids: the order changes, too
NAMES = {3: "two", 17: "three", 1000: "one"}


def categories(names: dict[int, str]) -> list[dict]:
    return [{"id": number, "name": name} for number, name in names.items()]


def with_sparse_ids(folder: Path) -> None:
    for path in (folder / "annotations").iterdir():
        content = json.loads(path.read_text())
        for category in content["categories"]:
            category["id"] = SPARSE[category["id"]]
        for annotation in content["annotations"]:
            annotation["category_id"] = SPARSE[annotation["category_id"]]
        path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def sparse(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sparse")
    large = {
        i: [{"bbox": [4, 4, 56, 40], "category_id": 1 + number % 3} for number in range(i, i + 2)]
        for i in range(4)
    }
    write_coco(folder, 4, 3, annotations=large)  # large objects are soon found, at least roughly
    with_sparse_ids(folder)
    return folder


def test_labels_are_contiguous_in_the_order_of_the_ids():
    classes = ClassMap.of(categories({1000: "one", 3: "two", 17: "three"}), AUTO, "a.json")
    assert classes.num_classes == 3
    assert classes.categories == (Category(0, 3, "two"), Category(1, 17, "three"), Category(2, 1000, "one"))
    assert [classes.label_of(number) for number in (3, 17, 1000)] == [0, 1, 2]
    assert [classes.id_of(label) for label in range(3)] == [3, 17, 1000]
    assert classes.name_of(2) == "one"


def test_coco_keeps_its_published_head(tiny_coco):
    content = json.loads((tiny_coco / "annotations/instances_val2017.json").read_text())
    assert ClassMap.of(content["categories"], AUTO, "a.json") is COCO_CLASSES
    assert COCO_CLASSES.num_classes == 91
    assert len(COCO_CLASSES.categories) == 80
    assert COCO_CLASSES.label_of(90) == 90
    assert COCO_CLASSES.id_of(12) == 12  # a logit that no category has
    assert COCO_CLASSES.name_of(12) == "class 12"
    some = [category for category in content["categories"] if category["name"] in ("person", "car", "dog")]
    assert ClassMap.of(some, AUTO, "a.json").categories == ((0, 1, "person"), (1, 3, "car"), (2, 18, "dog"))


def test_a_number_makes_ids_labels():
    classes = ClassMap.of(categories({3: "a", 1: "b"}), 4, "a.json")
    assert (classes.num_classes, classes.label_of(3), classes.id_of(1)) == (4, 3, 1)
    with pytest.raises(UserError, match=r"a.json has category id 3, .*--num_classes auto.*--num_classes 4"):
        ClassMap.of(categories({3: "a"}), 3, "a.json")
    with pytest.raises(UserError, match=r"category id -1.*auto, which takes any ids$"):
        ClassMap.of(categories({-1: "a"}), 3, "a.json")


def test_plain_form_and_back():
    classes = ClassMap.of(categories(NAMES), AUTO, "a.json")
    assert ClassMap.from_plain(json.loads(json.dumps(classes.to_plain()))) == classes
    good = classes.to_plain()
    for wrong in (
        None,
        {},
        good | {"num_classes": 2},
        good | {"num_classes": "3"},
        good | {"categories": [[0, 1]]},
        {1: "one"},
        good | {"categories": [[0, 3, "a"], [0, 4, "b"]]},
        good | {"categories": [[0, 3, "a"], [1, 3, "b"]]},
        good | {"categories": [[0, 3, 5]]},
        good | {"categories": 7},
    ):
        with pytest.raises(ValueError, match="no classes"):
            ClassMap.from_plain(wrong)


def test_published_checkpoints_are_of_coco_if_their_head_says_so():
    assert classes_of({"model": {"class_embed.0.bias": torch.zeros(91)}}, "x.pth") is COCO_CLASSES
    assert classes_of({"model": {"class_embed.0.bias": torch.zeros(20)}}, "x.pth") is None
    earlier = classes_of(
        {"model": {"class_embed.0.bias": torch.zeros(5)}, "classes": {1: "a", 3: "b"}}, "x.pth"
    )
    assert earlier == ClassMap(5, (Category(1, 1, "a"), Category(3, 3, "b")))
    with pytest.raises(UserError, match=r"x.pth is damaged"):
        classes_of({"model": {}, "classes": 3}, "x.pth")


def test_items_have_labels_of_the_map(sparse):
    flags = ["--coco_path", str(sparse), *SMALL_IMAGES, "--augmentation", "none"]
    dataset = build_dataset("train", parse_config(flags))
    assert dataset.classes.names == {0: "two", 1: "three", 2: "one"}
    _, target = dataset[1]  # categories 2 and 3 of write_coco
    assert target["labels"].tolist() == [0, 1]


def test_a_data_set_may_lie_anywhere(sparse, tmp_path):
    (tmp_path / "a").symlink_to(sparse / "train2017")
    (tmp_path / "b.json").symlink_to(sparse / "annotations/instances_train2017.json")
    config = parse_config(
        [
            "--train_images",
            str(tmp_path / "a"),
            "--train_annotations",
            str(tmp_path / "b.json"),
            "--val_images",
            str(tmp_path / "a"),
            "--val_annotations",
            str(tmp_path / "b.json"),
        ]
    )
    assert len(build_dataset("train", config)) == len(build_dataset("val", config)) == 4


def figures_by_hand(annotations: Path, results: Path) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(str(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


def test_sparse_ids_are_mapped_and_come_back(sparse, tmp_path):
    """Training, its checkpoint, its figures and its detections; then the evaluation of the
    checkpoint alone.
    """
    annotations, out = sparse / "annotations/instances_val2017.json", tmp_path / "out"
    model = (*SMALL_MODEL[:-2], "--num_queries", "30")  # without --num_classes
    flags = (
        "--coco_path",
        str(sparse),
        *SMALL_IMAGES,
        *model,
        "--num_workers",
        "0",
        "--output_dir",
        str(out),
    )
    result = run_main_forked(
        *flags, "--epochs", "20", "--eval_every", "20", "--lr", "1e-3", "--save_predictions"
    )
    assert result.returncode == 0, result.stderr
    assert "3 classes: two, three, one" in result.stdout

    checkpoint = read_checkpoint(out / "checkpoint.pth")
    assert classes_of(checkpoint, "").categories == ((0, 3, "two"), (1, 17, "three"), (2, 1000, "one"))
    assert checkpoint["model"]["class_embed.0.bias"].shape == (3,)
    assert checkpoint["args"]["num_classes"] == 3
    predictions = json.loads((out / "predictions.json").read_text())
    assert {p["category_id"] for p in predictions} == set(NAMES)
    assert predictions == json.loads((out / "eval/latest.json").read_text())
    last = json.loads((out / "log.txt").read_text().splitlines()[-1])
    assert last["test_coco_eval_bbox"] == figures_by_hand(annotations, out / "predictions.json")
    assert max(last["test_coco_eval_bbox"]) > 0

    result = run_main_forked(*flags, "--eval", "--resume", str(out / "checkpoint.pth"), "--save_predictions")
    assert result.returncode == 0, result.stderr
    assert json.loads((out / "predictions.json").read_text()) == predictions


def test_going_on_with_other_classes_is_refused(sparse, tmp_path):
    out = tmp_path / "out"
    model = ("--num_workers", "0", *SMALL_IMAGES, *SMALL_MODEL[:-2], "--epochs")
    assert run_main_forked("--coco_path", str(sparse), *model, "1", "--output_dir", str(out)).returncode == 0
    write_coco(tmp_path / "data", 4, 3)  # the same names, in another order
    for more, told in (
        (("--output_dir", str(out), "--resume", "auto"), ("'two'", "'one'", "--finetune")),
        (
            ("--resume", str(out / "checkpoint.pth"), "--eval"),
            ("instances_val2017.json", "1 'one'", "training annotations"),
        ),
    ):
        result = run_main_forked("--coco_path", str(tmp_path / "data"), *model, "2", *more)
        assert result.returncode == 2
        (line,) = result.stderr.strip().splitlines()
        assert all(part in line for part in told), line
