"""Several processes: the same figures as one, and one end for all."""

from __future__ import annotations

import json
import time

import pytest
import torch

from models import build_model
from tests.golden import recipe
from tests.helpers import BATCHFORMER, SMALL_IMAGES, SMALL_MODEL, run_main, write_coco
from util.checkpoint import read_checkpoint
from util.config import parse_config


def flags_for(folder):
    return ("--coco_path", str(folder), *SMALL_IMAGES, *SMALL_MODEL, "--num_workers", "0", "--device", "cpu")


@pytest.mark.parametrize("processes", [2, 3])
def test_evaluation_is_exactly_that_of_one_process(tmp_path, processes):
    """Seven images in batches of two: an odd batch, and processes that get different numbers of batches."""
    write_coco(tmp_path / "data", num_train=7)
    torch.manual_seed(0)
    model, _, _ = build_model(parse_config([*SMALL_MODEL]))
    recipe.fill(model)
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    results, predictions = [], []
    for count in (1, processes):
        out = tmp_path / f"out{count}"
        result = run_main(
            *flags_for(tmp_path / "data"), "--resume", str(tmp_path / "w.pth"), "--eval", "--save_predictions",
            "--output_dir", str(out), processes=count,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        results.append(read_checkpoint(out / "eval.pth")["stats"])
        predictions.append(json.loads((out / "predictions.json").read_text()))
    assert predictions[0] == predictions[1]
    assert len({p["image_id"] for p in predictions[0]}) == 7
    assert results[0] == results[1]


def test_two_processes_train_one_model(tmp_path):
    """With BatchFormerV2 and accumulation; both processes end with the same weights, and the log counts both's images."""
    write_coco(tmp_path / "data", num_train=8, num_val=3)
    out = tmp_path / "out"
    result = run_main(
        *flags_for(tmp_path / "data"), *BATCHFORMER, "--epochs", "2", "--accumulate_steps", "2", "--backbone_norm", "bn",
        "--output_dir", str(out), processes=2,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    checkpoint = read_checkpoint(out / "checkpoint.pth")
    assert len(checkpoint["random_states"]) == 2
    assert not torch.equal(checkpoint["random_states"][0]["torch"], checkpoint["random_states"][1]["torch"])
    lines = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert "2 process(es)" in result.stdout


def test_two_processes_take_the_step_of_one_with_the_total_batch(tmp_path):
    """Without dropout and augmentation, gradients averaged over processes are those of the whole batch, up to the number
    of boxes, which is averaged too."""
    write_coco(tmp_path / "data", num_train=4, num_val=1)
    weights = []
    for processes, batch in ((1, "4"), (2, "2")):
        out = tmp_path / f"out{processes}"
        result = run_main(
            *flags_for(tmp_path / "data"), "--dropout", "0", "--augmentation", "none", "--train_sizes", "64", "--epochs", "2",
            "--sgd", "--lr", "0.05", "--clip_max_norm", "0", "--batch_size", batch, "--output_dir", str(out), processes=processes,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        weights.append(read_checkpoint(out / "checkpoint.pth")["model"])
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=2e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


def test_an_error_in_one_process_ends_all(tmp_path):
    write_coco(tmp_path / "data", num_train=6, num_val=2)
    image = sorted((tmp_path / "data/train2017").iterdir())[3]
    image.write_bytes(image.read_bytes()[:100])
    start = time.monotonic()
    result = run_main(*flags_for(tmp_path / "data"), "--epochs", "50", processes=2)
    assert result.returncode == 2
    assert image.name in result.stderr
    assert "Traceback" not in result.stderr
    assert time.monotonic() - start < 120
