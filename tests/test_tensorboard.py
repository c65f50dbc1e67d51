"""--tensorboard: what is written, that going on writes no point twice, and that nothing of it ends
a run.
"""

from __future__ import annotations

import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

import util.run.tensorboard
from util.checkpoint import read_checkpoint
from util.class_map import Category
from util.draw.curves import FIGURES
from util.errors import UserError
from util.run.record import read_record
from util.run.tensorboard import Board, check_tensorboard, detection_pictures, epoch_scalars

accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


@functools.cache
def read(folder):
    events = accumulators.EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def points(folder, tag) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in read(folder).Scalars(tag)]


# ---- a training that was gone on with


def test_every_step_is_there_once(trained_run):
    steps = points(trained_run / "tensorboard" / "steps", "steps/loss")
    assert [step for step, _ in steps] == [*range(2, 25, 2)], "images, of 3 epochs of 4 steps of 2"
    assert all(np.isfinite(value) for _, value in steps)
    tags = read(trained_run / "tensorboard" / "steps").Tags()["scalars"]
    shown = {"loss_ce", "loss_bbox", "loss_giou", "class_error", "grad_norm", "images_per_second"}
    assert {f"steps/{name}" for name in shown} <= set(tags)
    assert not any(tag.endswith("_unscaled") for tag in tags)


def test_rates_are_those_of_the_groups(trained_run):
    folder = trained_run / "tensorboard" / "steps"
    for group, rate in {"transformer and heads": 2e-4, "backbone": 2e-5, "slow linear layers": 2e-5}.items():
        assert points(folder, f"lr/{group}")[-1][1] == pytest.approx(rate)


def test_epochs_are_those_of_the_log_each_once(trained_run):
    lines = [json.loads(line) for line in (trained_run / "log.txt").read_text().splitlines()]
    folder = trained_run / "tensorboard" / "epochs"
    for tag, key in {
        "train/loss": "train_loss",
        "val/loss_bbox": "test_loss_bbox",
        "train/grad_norm": "train_grad_norm",
    }.items():
        told = points(folder, tag)
        assert [step for step, _ in told] == [0, 1, 2]
        assert [value for _, value in told] == pytest.approx([line[key] for line in lines])
    for place, figure in enumerate(FIGURES):
        known = [
            (line["epoch"], line["test_coco_eval_bbox"][place])
            for line in lines
            if line["test_coco_eval_bbox"][place] >= 0
        ]
        tag = f"val/{figure}"
        told = points(folder, tag) if tag in read(folder).Tags()["scalars"] else []
        assert [step for step, _ in told] == [epoch for epoch, _ in known]
        assert [value for _, value in told] == pytest.approx([value for _, value in known])


def test_pictures_are_there_once_an_epoch(trained_run):
    events = read(trained_run / "tensorboard" / "epochs")
    tags = events.Tags()["images"]
    assert tags == [f"detections/{i:06}.png" for i in range(3)]
    for tag in tags:
        pictures = events.Images(tag)
        assert [picture.step for picture in pictures] == [0, 1, 2]
        assert pictures[0].width > 2 * 480 and pictures[0].height > 300, (
            "ground truth beside detections, enlarged"
        )


def test_the_record_tells_of_both_starts(trained_run):
    record = read_record(trained_run)
    assert [(start["epoch"], start["images"]) for start in record["starts"]] == [(0, 0), (1, 6)]
    assert record["starts"][1]["changed_flags"] == {"epochs": 2, "resume": ""}
    assert record["flags"] == read_checkpoint(trained_run / "checkpoint.pth")["args"]
    assert record["data"]["val"]["num_images"] == 3 and record["environment"]["processes"] == 1
    assert [name for _, _, name in record["classes"]["categories"]] == ["one", "two", "three"]


# ---- names and pictures


def test_a_line_of_the_log_has_its_names():
    row = {
        "train_loss": 1.0,
        "train_loss_ce_unscaled": 2.0,
        "test_loss": 3.0,
        "test_ema_loss": 4.0,
        "epoch": 5,
        "n_parameters": 6,
        "train_lr": 1e-4,
        "test_coco_eval_bbox": [0.5, *[-1.0] * 11],
        "test_ema_coco_eval_bbox": [0.25] * 12,
        "test_ema_coco_eval_masks": [0.125, *[-1.0] * 11],
        "test_PQ_all": {"pq": 0.4, "sq": 0.8, "rq": 0.5, "n": 3},
        "test_PQ_st": {"pq": -1.0, "sq": -1.0, "rq": -1.0, "n": 0},
    }
    assert epoch_scalars(row) == {
        "train/loss": 1.0,
        "val/loss": 3.0,
        "val averaged/loss": 4.0,
        "val/AP": 0.5,
        "train/lr": 1e-4,
        **{f"val averaged/{figure}": 0.25 for figure in FIGURES},
        "val averaged/mask AP": 0.125,
        "val/PQ_all": 0.4,
    }


def test_detections_are_drawn_beside_the_ground_truth(tmp_path):
    for i in range(9):
        Image.new("RGB", (900, 600), (90, 90, 90)).save(tmp_path / f"{i}.jpg")
    (tmp_path / "8.jpg").write_bytes(b"no picture")
    files = {i: tmp_path / f"{i}.jpg" for i in range(9)}
    box = {"bbox": [100, 100, 300, 300], "category_id": 17}
    sure, unsure = ({**box, "image_id": 0, "score": score} for score in (0.9, 0.1))
    truth: dict[int, list] = {}
    dataset = SimpleNamespace(
        image_ids=list(files),
        file_of=files.get,
        coco=SimpleNamespace(imgToAnns=truth),
        classes=SimpleNamespace(categories=[Category(0, 17, "cat")]),
    )
    plain = detection_pictures(dataset, [])
    assert [*plain] == [f"detections/{i}.jpg" for i in (0, 3, 5)], (
        "spread evenly; the broken one costs its picture"
    )
    assert plain["detections/0.jpg"].width < 1400
    without_truth = detection_pictures(dataset, [unsure])["detections/0.jpg"]
    truth[0] = [{**box, "iscrowd": 0}]
    drawn = detection_pictures(dataset, [sure, unsure])["detections/0.jpg"]
    before, after = np.asarray(plain["detections/0.jpg"]), np.asarray(drawn)
    changed = (before != after).any(axis=(0, 2))
    assert changed[: len(changed) // 2].any() and changed[len(changed) // 2 :].any()
    assert np.array_equal(np.asarray(without_truth), before)

    # masks on both sides, a polygon and run lengths
    whole = np.zeros((600, 900), np.uint8, order="F")
    whole[150:350, 150:350] = 1
    polygon = [150, 150, 350, 150, 350, 350, 150, 350]
    truth[0] = [{**truth[0][0], "image_id": 0, "segmentation": [polygon]}]
    dataset.coco = COCO()
    dataset.coco.imgs, dataset.coco.imgToAnns = {0: {"height": 600, "width": 900}}, truth
    masked = detection_pictures(dataset, [sure | {"segmentation": mask_utils.encode(whole)}])
    tinted = (np.asarray(masked["detections/0.jpg"]) != np.asarray(drawn)).any(-1)
    left, right = np.array_split(tinted, 2, axis=1)
    assert left.sum() == right.sum() > 15000


# ---- what goes wrong


def test_without_a_folder_nothing_is_written_or_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    board = Board(None)
    board.step({"a": 1.0}, 1)
    board.epoch({"epoch": 0})
    board.pictures(lambda: pytest.fail("made for nobody"), 0)
    board.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_t_be_written_costs_one_warning(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file")
    board = Board(tmp_path / "tensorboard")
    for i in range(3):
        board.step({"a": 1.0}, i)
        board.epoch({"epoch": i, "train_loss": 1.0})
    board.close()
    assert caplog.text.count("TensorBoard gets no more of this run") == 1


def test_a_full_disk_costs_one_warning(tmp_path, caplog, capfd, monkeypatch):
    """The event file's own write fails, in the writer's thread, as on a full disk."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    board = Board(tmp_path / "tensorboard")
    board.step({"a": 1.0}, 1)

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    for i in range(2, 200):
        board.step({"a": 1.0}, i)
        board.epoch({"epoch": i, "train_loss": 1.0})
    board.close()
    assert caplog.text.count("TensorBoard gets no more of this run") == 1 and "No space left" in caplog.text
    assert "Traceback" not in capfd.readouterr().err


def test_a_picture_that_fails_ends_no_run(tmp_path, caplog):
    board = Board(tmp_path / "tensorboard")
    board.pictures(lambda: {"a": object()}, 0)
    board.close()
    assert "TensorBoard gets no more of this run" in caplog.text


def test_a_missing_package_is_named(monkeypatch):
    check_tensorboard(True)
    monkeypatch.setattr(util.run.tensorboard.importlib.util, "find_spec", lambda name: None)
    check_tensorboard(False)
    with pytest.raises(UserError, match="pip install tensorboard"):
        check_tensorboard(True)
