"""Several processes: the same figures as one, and one end for all."""

from __future__ import annotations

import json
import math

import pytest
import torch

from models import build_model
from tests.golden import recipe
from tests.helpers import BATCHFORMER, SMALL_IMAGES, SMALL_MODEL, run_main, write_coco
from tests.processes import run_main_together
from util.checkpoint import read_checkpoint
from util.config import parse_config
from util.distributed.processes import process_group


def flags_for(folder):
    return ("--coco_path", str(folder), *SMALL_IMAGES, *SMALL_MODEL, "--num_workers", "0", "--device", "cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights with which every query says something else; fresh heads would not show an exchange."""
    torch.manual_seed(0)
    model, _, _ = build_model(parse_config([*SMALL_MODEL]))
    recipe.fill(model)
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save({"model": model.state_dict()}, path)
    yield path
    path.unlink()


def test_without_a_launcher_too_the_chosen_gpu_becomes_the_current_one(monkeypatch):
    """What does not name a device goes to the current one."""
    chosen = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with process_group("cuda:1") as device:
        assert chosen == [device] == [torch.device("cuda:1")]


@pytest.mark.parametrize("images", [3, 7, 10])
def test_evaluation_is_exactly_that_of_one_process(images, weights, tmp_path):
    """In batches of two: odd batches, processes with different numbers of batches, and (3 images, 4
    processes) with none.

    A training step with a rate of 0 comes before it, because only the log of a training run holds
    the losses.
    """
    write_coco(tmp_path / "data", num_train=8, num_val=images, annotations=boxes_by_image(max(images, 8)))
    alone = evaluated(tmp_path, weights, 1)
    predictions, line, figures = alone
    assert len({p["image_id"] for p in predictions}) == images
    assert len(line["test_coco_eval_bbox"]) == len(figures) == 12
    assert all(
        math.isfinite(line[f"test_{name}"]) for name in ("loss", "loss_ce", "loss_giou_0", "class_error")
    )
    for processes in (2, 3, 4):
        assert evaluated(tmp_path, weights, processes) == alone


def evaluated(folder, weights, processes):
    """Detections, the log's figures and losses, and the twelve figures of eval/latest.pth."""
    out = folder / f"out{processes}"
    run_main_together(
        *flags_for(folder / "data"),
        "--resume",
        str(weights),
        "--epochs",
        "1",
        "--lr",
        "0",
        "--lr_backbone",
        "0",
        "--batch_size",
        "2",
        "--save_predictions",
        "--output_dir",
        str(out),
        processes=processes,
        output=folder / f"printed{processes}",
    )
    (line,) = log_lines(out)
    losses = {
        name: value for name, value in line.items() if name.startswith("test_") and not name.endswith("time")
    }
    figures = read_checkpoint(out / "eval" / "latest.pth")["stats"]
    return json.loads((out / "predictions.json").read_text()), losses, figures


def log_lines(out):
    return [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]


def boxes_by_image(images):
    """None to four boxes, so that no two processes have equally many."""
    return {
        i: [
            {"bbox": [2 + 3 * k + i, 3 + 5 * k, 14 + 2 * k, 12 + i], "category_id": 1 + (i + k) % 3}
            for k in range(i * 7 % 5)
        ]
        for i in range(images)
    }


def test_the_evaluate_only_program_agrees_with_one_process_too(weights, tmp_path):
    """As users start it, under the launcher."""
    write_coco(tmp_path / "data", num_train=7)
    flags = (
        *flags_for(tmp_path / "data"),
        "--resume",
        str(weights),
        "--eval",
        "--save_predictions",
        "--output_dir",
    )
    run_main_together(*flags, str(tmp_path / "alone"), processes=1, output=tmp_path / "printed")
    result = run_main(*flags, str(tmp_path / "two"), processes=2)
    assert result.returncode == 0, result.stderr
    alone, two = (
        (
            json.loads((tmp_path / name / "predictions.json").read_text()),
            read_checkpoint(tmp_path / name / "eval.pth")["stats"],
        )
        for name in ("alone", "two")
    )
    assert alone == two
    assert len({p["image_id"] for p in alone[0]}) == 7


def test_two_processes_train_one_model(tmp_path):
    """With BatchFormerV2 and accumulation; both processes end with the same weights, and the log
    counts both's images.
    """
    write_coco(tmp_path / "data", num_train=8, num_val=3)
    out = tmp_path / "out"
    printed = run_main_together(
        *flags_for(tmp_path / "data"),
        *BATCHFORMER,
        "--epochs",
        "2",
        "--accumulate_steps",
        "2",
        "--backbone_norm",
        "bn",
        "--output_dir",
        str(out),
        processes=2,
        output=tmp_path / "printed",
    )
    checkpoint = read_checkpoint(out / "checkpoint.pth")
    first, second = (process["random"]["torch"] for process in checkpoint["processes"])
    assert not torch.equal(first, second)
    lines = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert "2 process(es)" in printed


def test_training_is_that_of_one_process_with_the_total_batch(tmp_path):
    """Twelve images a step in 1, 2, 3 and 4 processes: 30 images make two steps an epoch, and six
    of them wait.

    Images are of one size, so that padding does not differ, and there is no dropout; the gradient
    is clipped to a hundredth of its norm. Compared is how far each weight has come, with a
    thousandth of it allowed: sums in another order are off by 1e-7, and where that moves a ReLU to
    its other side a gradient jumps a little. Adam would blow up what rounding makes of the smallest
    gradients; momentum does not.
    """
    write_coco(tmp_path / "data", num_train=30, num_val=1, annotations=boxes_by_image(30))
    (start, _), (alone, log_alone) = (
        trained(tmp_path, 1, "--lr", "0", "--lr_backbone", "0"),
        trained(tmp_path, 1),
    )
    assert [line["epoch"] for line in log_alone] == [0, 1]
    for processes in (2, 3, 4):
        weights, log = trained(tmp_path, processes)
        for name, value in alone.items():
            assert (weights[name] - value).norm() < 1e-3 * (value - start[name]).norm(), name
        for line, wanted in zip(log, log_alone, strict=True):
            means = {name for name in wanted if name.startswith("train_") and not name.endswith("time")}
            assert {
                "train_loss",
                "train_grad_norm",
                "train_class_error",
                "train_cardinality_error_unscaled",
            } <= means
            for name in means:
                assert line[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-7), name


def trained(folder, processes, *flags):
    """Weights after four steps, and the lines of the log."""
    out = folder / f"out{processes}{''.join(flags)}"
    run_main_together(
        *flags_for(folder / "data"),
        "--dropout",
        "0",
        "--augmentation",
        "none",
        "--train_sizes",
        "64",
        "--epochs",
        "2",
        "--sgd",
        "--lr",
        "0.05",
        "--lr_backbone",
        "0.05",
        "--batch_size",
        str(12 // processes),
        "--output_dir",
        str(out),
        *flags,
        processes=processes,
        output=folder / f"printed{processes}",
    )
    return read_checkpoint(out / "checkpoint.pth")["model"], log_lines(out)


def test_an_error_in_one_process_ends_all(tmp_path):
    write_coco(tmp_path / "data", num_train=6, num_val=2)
    image = sorted((tmp_path / "data/train2017").iterdir())[3]
    image.write_bytes(image.read_bytes()[:100])
    result = run_main(*flags_for(tmp_path / "data"), "--epochs", "50", processes=2)
    assert result.returncode == 2
    assert image.name in result.stderr
    assert "Traceback" not in result.stderr
