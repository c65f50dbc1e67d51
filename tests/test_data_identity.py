"""A run that goes on says what has changed of its data, and an interrupted epoch takes every image
as it is now.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers import SMALL_IMAGES, SMALL_MODEL, write_coco
from tests.processes import run_main_forked, run_main_together
from util.checkpoint import read_checkpoint, write_atomically
from util.data_identity import DataIdentity

IMAGES = [{"id": 3, "file_name": "a.png"}, {"id": 7, "file_name": "ä.png"}]
OBJECTS = [{"image_id": 3, "category_id": 1, "iscrowd": 0, "bbox": [1, 2, 3.5, 4]}]


def identity(images=IMAGES, objects=OBJECTS) -> DataIdentity:
    return DataIdentity.of(images, objects)


def test_equal_data_have_one_identity_through_a_checkpoint():
    known = identity()
    assert (known.images, known.annotations) == (2, 1)
    again = identity(
        [dict(image, width=9) for image in IMAGES], [dict(OBJECTS[0], id=4, bbox=[1.0, 2.0, 3.5, 4.0])]
    )
    assert again == known, "neither other fields nor how a number is written"
    assert DataIdentity.from_plain(known.to_plain()) == known
    assert known.changes_since(known) == []
    assert identity([], []).annotations == 0


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (identity(IMAGES[:1]), ["1 images instead of 2"]),
        (identity([IMAGES[0], {"id": 8, "file_name": "ä.png"}]), ["2 images with other ids or file names"]),
        (identity([IMAGES[0], {"id": 7, "file_name": "b.png"}]), ["2 images with other ids or file names"]),
        (identity(objects=OBJECTS * 2), ["2 annotations instead of 1"]),
        *[
            (identity(objects=[OBJECTS[0] | change]), ["1 annotations with other boxes, classes or images"])
            for change in ({"bbox": [1, 2, 3.5, 5]}, {"category_id": 2}, {"image_id": 7}, {"iscrowd": 1})
        ],
        (identity(IMAGES[:1], []), ["1 images instead of 2", "0 annotations instead of 1"]),
    ],
)
def test_changes_are_said(changed, said):
    assert changed.changes_since(identity()) == said


# ---- runs


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """A folder with `data`, and the run `out` that stopped in epoch 1 after 4 of 6 images."""
    folder = tmp_path_factory.mktemp("interrupted")
    write_coco(folder / "data", num_train=6, num_val=3)
    result = run_main_forked(*flags(folder / "data"), "--output_dir", str(folder / "out"))
    assert result.returncode == 0, result.stderr
    for name in ("resume_0002_000000000.pth", "checkpoint.pth", "log.txt"):
        (folder / "out" / name).unlink()
    return folder


def flags(data: Path) -> tuple[str, ...]:
    common = (
        "--epochs",
        "2",
        "--batch_size",
        "1",
        "--accumulate_steps",
        "3",
        "--num_workers",
        "0",
        "--log_every",
        "1",
    )
    return (
        "--coco_path",
        str(data),
        *SMALL_IMAGES,
        *SMALL_MODEL,
        *common,
        "--save_every",
        "4",
        "--keep",
        "9",
    )


def edited(interrupted: Path, tmp_path: Path, part: str, change: Callable[[dict], object]) -> tuple[str, ...]:
    """The flags of a run on changed data."""
    shutil.copytree(interrupted / "data", tmp_path / "data")
    path = tmp_path / f"data/annotations/instances_{part}2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return flags(tmp_path / "data")


def without_image(content: dict, number: int) -> None:
    content["images"] = [image for image in content["images"] if image["id"] != number]
    content["annotations"] = [item for item in content["annotations"] if item["image_id"] != number]


def without_most(content: dict) -> None:
    for number in range(10, 14):
        without_image(content, number)


def another_name(content: dict) -> None:
    content["images"][0]["file_name"], content["images"][1]["file_name"] = "000001.png", "000000.png"


def add_image(content: dict) -> None:
    content["images"].append({"id": 99, "file_name": "000000.png", "width": 64, "height": 48})


ANEW = "resume: epoch 1 starts again with the present images, after 4 of the earlier ones"


@pytest.mark.parametrize(
    ("change", "said", "steps"),
    [
        (
            lambda content: without_image(content, 12),
            "now 5 images instead of 6, 10 annotations instead of 12",
            5,
        ),
        (without_most, "now 2 images instead of 6, 4 annotations instead of 12", 2),
        (add_image, "now 7 images instead of 6", 7),
        (another_name, "now 6 images with other ids or file names", 6),
    ],
)
def test_an_epoch_whose_images_have_changed_begins_anew(interrupted, tmp_path, change, said, steps):
    checkpoint = interrupted / "out" / "resume_0001_000000004.pth"
    run = edited(interrupted, tmp_path, "train", change)
    result = run_main_forked(*run, "--resume", str(checkpoint), "--output_dir", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert f"resume: the training data are not the checkpoint's: {said}\n" in result.stdout
    assert f"{ANEW}\n" in result.stdout
    trained = re.findall(r"epoch 1 \S+ \[ *(\d+)/(\d+)\]", result.stdout, re.MULTILINE)
    assert trained == [(str(step), str(steps)) for step in range(1, steps + 1)], "every image once"
    assert read_checkpoint(tmp_path / "out" / "checkpoint.pth")["data"]["train"]["images"] == steps
    assert [
        json.loads(line)["epoch"] for line in (tmp_path / "out" / "log.txt").read_text().splitlines()
    ] == [0, 1]


def test_a_run_goes_on_in_its_folder_with_the_epoch_that_began_anew(interrupted, tmp_path):
    run = edited(interrupted, tmp_path, "train", add_image)
    out = tmp_path / "out"
    shutil.copytree(interrupted / "out", out)
    auto = (*run, "--keep", "1", "--output_dir", str(out), "--resume", "auto")
    result = run_main_forked(*auto, "--save_every", "3")
    assert result.returncode == 0, result.stderr
    assert ANEW in result.stdout
    assert (out / "earlier-1" / "resume_0001_000000004.pth").exists()
    assert [path.name for path in out.glob("resume_*.pth")] == ["resume_0002_000000000.pth"]
    again = run_main_forked(*auto)
    assert "nothing is left to do" in again.stdout
    assert "resume: " not in again.stdout


def test_where_only_boxes_have_changed_the_epoch_goes_on_and_says_it(interrupted, tmp_path):
    run = edited(
        interrupted, tmp_path, "train", lambda content: content["annotations"][0].update(bbox=[1, 1, 9, 9])
    )
    checkpoint = interrupted / "out" / "resume_0001_000000004.pth"
    result = run_main_forked(*run, "--resume", str(checkpoint), "--output_dir", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert (
        "training data are not the checkpoint's: now 12 annotations with other boxes, classes or "
        "images\n" in result.stdout
    )
    assert "starts again" not in result.stdout
    assert re.findall(r"epoch 1 \S+ \[ *(\d+)/6\]", result.stdout, re.MULTILINE) == ["5", "6"]


def test_between_epochs_changed_images_are_said_and_nothing_is_repeated(interrupted, tmp_path):
    run = edited(interrupted, tmp_path, "train", lambda content: without_image(content, 12))
    checkpoint = interrupted / "out" / "resume_0001_000000000.pth"
    result = run_main_forked(*run, "--resume", str(checkpoint), "--output_dir", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert "now 5 images instead of 6" in result.stdout
    assert "starts again" not in result.stdout
    assert "epoch 0 (1/2) [" not in result.stdout
    assert "epoch 1 (2/2) [5/5]" in result.stdout


def test_with_other_validation_images_the_best_is_chosen_anew(interrupted, tmp_path):
    run = edited(interrupted, tmp_path, "val", lambda content: without_image(content, 11))
    source = tmp_path / "best.pth"
    checkpoint = read_checkpoint(interrupted / "out" / "resume_0001_000000004.pth")
    checkpoint["history"]["best"] = {"AP": 0.9, "epoch": 0, "weights": "model"}
    write_atomically(checkpoint, source)
    result = run_main_forked(*run, "--resume", str(source), "--output_dir", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert (
        "validation data are not the checkpoint's: now 2 images instead of 3, 4 annotations "
        "instead of 6\n" in result.stdout
    )
    assert "checkpoint_best.pth is chosen again" in result.stdout
    assert read_checkpoint(tmp_path / "out" / "checkpoint.pth")["history"]["best"]["epoch"] == 1
    assert re.findall(r"epoch 1 \S+ \[ *(\d+)/6\]", result.stdout, re.MULTILINE) == ["5", "6"]


@pytest.mark.parametrize(("change", "anew"), [(lambda content: None, False), (without_most, True)])
def test_a_checkpoint_that_does_not_know_its_data_is_resumed_too(interrupted, tmp_path, change, anew):
    run = edited(interrupted, tmp_path, "train", change)
    checkpoint = read_checkpoint(interrupted / "out" / "resume_0001_000000004.pth")
    del checkpoint["data"]
    source = tmp_path / "old.pth"
    write_atomically(checkpoint, source)
    result = run_main_forked(*run, "--resume", str(source), "--output_dir", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert "not the checkpoint's" not in result.stdout
    assert (ANEW in result.stdout) == anew, "more images had been trained on than there are"


def test_other_classes_are_refused(interrupted, tmp_path):
    def rename(content: dict) -> None:
        content["categories"][0]["name"] = "zebra"

    edited(interrupted, tmp_path / "val", "val", rename)
    validation = ("--val_annotations", str(tmp_path / "val/data/annotations/instances_val2017.json"))
    validation += ("--val_images", str(tmp_path / "val/data/val2017"))
    run = (*edited(interrupted, tmp_path, "train", rename), *validation)
    checkpoint = interrupted / "out" / "resume_0001_000000004.pth"
    result = run_main_forked(*run, "--resume", str(checkpoint), "--output_dir", str(tmp_path / "out"))
    assert result.returncode == 2
    told = (
        f"error: --resume {checkpoint} was trained on other classes: its class 1 is 'one', in "
        "this data it is 'zebra'; "
    )
    assert result.stderr.startswith(told)
    assert result.stderr.count("\n") == 1


def test_two_processes_begin_the_epoch_anew_together(interrupted, tmp_path):
    run = edited(interrupted, tmp_path, "train", add_image)
    checkpoint = interrupted / "out" / "resume_0001_000000004.pth"
    printed = run_main_together(
        *run,
        "--resume",
        str(checkpoint),
        "--output_dir",
        str(tmp_path / "out"),
        processes=2,
        output=tmp_path / "printed",
    )
    assert ANEW in printed
    assert "epoch 1 (2/2) [3/3]" in printed
    weights = read_checkpoint(tmp_path / "out" / "checkpoint.pth")["model"]
    assert all(torch.isfinite(tensor).all() for tensor in weights.values() if tensor.is_floating_point())
