"""Losses and gradients that are not finite: stopped or skipped on all processes alike, saved, and
replayed.
"""

from __future__ import annotations

import json
import re

import pytest
import torch

from tests.helpers import BATCHFORMER, SMALL_IMAGES, SMALL_MODEL, write_coco
from tests.processes import run_forked, run_main_forked, run_main_together
from util.checkpoint import read_checkpoint

# a weight so large that a batch overflows
EXPLODING = ("--lr", "1e30", "--clip_max_norm", "0", "--sgd")


@pytest.fixture
def flags(tmp_path):
    write_coco(tmp_path / "data", num_train=8, num_val=2)
    common = (
        "--coco_path",
        str(tmp_path / "data"),
        *SMALL_IMAGES,
        *SMALL_MODEL,
        "--epochs",
        "1",
        "--batch_size",
        "1",
    )
    return (*common, "--output_dir", str(tmp_path / "out"))


def test_a_bad_step_is_skipped_counted_bounded_and_replayed(tmp_path, flags):
    """Learning explodes: after the first step every loss is nan."""
    result = run_main_forked(*flags, *BATCHFORMER, *EXPLODING, "--on_nan", "skip", "--max_nan_steps", "3")
    assert result.returncode == 2
    assert "step 4 that is not finite, more than --max_nan_steps 3" in result.stderr
    assert result.stdout.count("; skipped; saved to ") == 4
    dumps = sorted((tmp_path / "out").glob("nonfinite_0000_*_process0.pth"))
    assert len(dumps) == 4
    replayed = run_forked("tools/replay.py", str(dumps[0]))
    assert replayed.returncode == 0, replayed.stderr
    module = re.search(r"first wrong: (\S+) \(forward\)", replayed.stdout)[1]
    stopped = run_main_forked(*flags, *BATCHFORMER, *EXPLODING)
    assert stopped.returncode == 2
    assert f"first wrong: {module} (forward)" in stopped.stderr, "the run itself found the same"
    assert "resume with --resume auto" in stopped.stderr


def test_a_gradient_that_overflows_is_replayed_to_the_bit(tmp_path, flags):
    """Without exploding weights: dropout's choices, the scale and the precision are those of the
    run.
    """
    result = run_main_forked(*flags, *EXPLODING)
    assert result.returncode == 2
    (path,) = (tmp_path / "out").glob("nonfinite_*.pth")
    step = read_checkpoint(path)
    first = run_forked("tools/replay.py", str(path)).stdout
    assert run_forked("tools/replay.py", str(path)).stdout == first
    assert f"epoch 0, step {step['step']}, process 0 of 1" in first
    # weights that are good again: nothing to be seen
    step["model"] = {name: torch.zeros_like(value) for name, value in step["model"].items()}
    torch.save(step, tmp_path / "good.pth")
    good = run_forked("tools/replay.py", str(tmp_path / "good.pth"))
    assert good.returncode == 1
    assert "not reproduced" in good.stdout


def test_processes_skip_the_same_steps(tmp_path, flags):
    skipping = ("--on_nan", "skip", "--max_nan_steps", "100")
    run_main_together(*flags, *EXPLODING, *skipping, processes=2, output=tmp_path / "printed")
    processes = read_checkpoint(tmp_path / "out" / "checkpoint.pth")["processes"]
    counts = [process["not_finite"]["skipped"] for process in processes]
    assert counts[0] == counts[1] >= 2
    line = json.loads((tmp_path / "out" / "log.txt").read_text())
    assert line["train_skipped_steps"] == counts[0]
    assert line["train_loss"] == pytest.approx(line["train_loss"]), (
        "a mean over the steps that count is no nan"
    )


def test_a_file_that_is_no_saved_step_is_refused(tmp_path):
    torch.save({"model": {}}, tmp_path / "a.pth")
    result = run_forked("tools/replay.py", str(tmp_path / "a.pth"))
    assert result.returncode == 2
    assert "name a nonfinite_*.pth" in result.stderr
    assert run_forked("tools/replay.py", "--help").stdout.count("example:") == 1
