"""--ema_decay: the average by hand, evaluated and saved beside the weights."""

from __future__ import annotations

import json

import pytest
import torch

from tests.helpers import SMALL_IMAGES, SMALL_MODEL, write_coco
from tests.processes import run_main_forked
from util.checkpoint import read_checkpoint
from util.config import parse_config
from util.optim import build_optimizer
from util.step.updater import AveragedWeights, Updater


def test_the_average_is_that_of_the_formula():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    model[0].bias.requires_grad_(False)
    averaged = AveragedWeights(model, 0.9)
    updater = Updater(
        build_optimizer(model, parse_config(["--lr", "0.1"])), clip_max_norm=0.0, averaged=averaged
    )
    expected = None
    for _ in range(4):
        updater.backward(model(torch.randn(5, 3)).square().sum(), 1)
        updater.step()
        now = model[0].weight.detach().clone()
        expected = now if expected is None else 0.9 * expected + 0.1 * now
    torch.testing.assert_close(averaged.model[0].weight, expected)
    assert not torch.equal(averaged.model[0].weight, now)
    state = averaged.state_dict()
    assert torch.equal(state["model"]["1.running_mean"], model[1].running_mean), "statistics are the model's"
    assert not any(p.requires_grad for p in averaged.model.parameters())
    again = AveragedWeights(model, 0.9)
    again.load_state_dict(state)
    again.update()
    averaged.update()
    assert torch.equal(again.model[0].weight, averaged.model[0].weight)


def test_averages_are_evaluated_and_saved_beside_the_weights(tmp_path):
    write_coco(tmp_path / "data", 4, 2)
    out = tmp_path / "out"
    flags = (
        "--coco_path",
        str(tmp_path / "data"),
        *SMALL_IMAGES,
        *SMALL_MODEL,
        "--output_dir",
        str(out),
        "--save_predictions",
    )
    result = run_main_forked(*flags, "--epochs", "2", "--ema_decay", "0.5")
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    assert all(
        len(line["test_ema_coco_eval_bbox"]) == len(line["test_coco_eval_bbox"]) == 12 for line in lines
    )
    assert lines[1]["test_ema_loss"] != lines[1]["test_loss"]
    checkpoint = read_checkpoint(out / "checkpoint.pth")
    assert checkpoint["ema"]["updates"] == 4
    assert checkpoint["ema"]["model"].keys() == checkpoint["model"].keys()
    while_training = [(out / f"predictions{suffix}.json").read_bytes() for suffix in ("", "_ema")]
    evaluated = run_main_forked(*flags, "--eval", "--resume", str(out / "checkpoint.pth"))
    assert evaluated.returncode == 0, evaluated.stderr
    assert evaluated.stdout.count("AP50") == 2
    assert "averaged weights: " in evaluated.stdout
    found = [
        json.loads((out / "evaluation-1" / f"predictions{suffix}.json").read_text())
        for suffix in ("", "_ema")
    ]
    for rows, content in zip(found, while_training, strict=True):  # of the same weights
        assert [row["score"] for row in rows] == pytest.approx(
            [row["score"] for row in json.loads(content)], abs=1e-5
        )
    assert while_training == [(out / f"predictions{suffix}.json").read_bytes() for suffix in ("", "_ema")]
    assert len(found[0]) == len(found[1])
    assert found[0] != found[1]
