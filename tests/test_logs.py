"""What a run shows: plain lines in a file, a bar on a terminal."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
import torch

from tests.helpers import BATCHFORMER, ROOT, SMALL_IMAGES, SMALL_MODEL, run_main, write_coco
from util.errors import UserError, run_as_command
from util.step import progress
from util.step.metrics import MeanOnDevice

LINE = re.compile(
    r"\d\d:\d\d:\d\d  epoch 0 \(1/1\) \[ *\d+/3\]  "
    r"loss [\d.]+  lr [\de.+-]+  grad norm [\d.e+]+  [\d.]+ images/s  mem "
    r"[\d.]+ GiB  left \d:\d\d:\d\d"
)

SUMMARY = (
    r"epoch 0 \(1/1\) done in \d:\d\d:\d\d  loss [\d.]+  validation loss [\d.]+  AP [\d.]+  "
    r"best AP [\d.]+ \(epoch 0\)  saved .*checkpoint.pth"
)


@pytest.fixture
def flags(tmp_path):
    write_coco(tmp_path / "data", num_train=6, num_val=2)
    return (
        "--coco_path",
        str(tmp_path / "data"),
        *SMALL_IMAGES,
        *SMALL_MODEL,
        "--epochs",
        "1",
        "--log_every",
        "2",
    )


def test_plain_lines_every_so_many_steps(flags, tmp_path):
    result = run_main(*flags, *BATCHFORMER, "--output_dir", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if "epoch 0 (1/1) [" in line]
    assert len(lines) == 2, "after step 2 and after the last"
    assert all(LINE.fullmatch(line) for line in lines), lines
    assert "multi-scale deformable attention on cpu: " in result.stdout, "the operator's backend is said"
    assert "device: cpu" in result.stdout
    assert re.search(SUMMARY, result.stdout), result.stdout
    assert re.search(r"best AP [\d.]+ \(epoch 0\): .*checkpoint_best.pth", result.stdout)
    assert "flags that differ from their defaults: --lr" not in result.stdout
    assert result.stderr == "", "no warnings"
    entry = json.loads((tmp_path / "out" / "log.txt").read_text())
    assert entry["n_parameters"] > 1e6
    assert {
        "train_loss_ce",
        "train_loss_bbox_0",
        "train_loss_giou_unscaled",
        "train_class_error",
        "test_loss",
    } <= set(entry)


def test_a_bar_on_a_terminal(flags):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "main.py", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    os.close(theirs)
    output, shown = process.stdout.read(), b""
    assert process.wait() == 0
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    assert "epoch 0 (1/1) [" not in output, "no lines beside the bar"
    bar = (
        r"epoch 0 \(1/1\) 3/3 \|█+\| left 00:00, loss [\d.]+  lr [\d.e-]+  grad norm [\d.e+]+  [\d.]+ "
        r"images/s  mem [\d.]+ GiB"
    )
    assert re.search(bar, shown.decode()), shown.decode()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_without_a_width_gets_lines(monkeypatch, caplog):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress, "_columns", lambda: 0)
    with caplog.at_level("INFO"):
        progress.Progress("epoch 0 (1/1)", 1, 1).step(["loss 1.0"])
    assert "epoch 0 (1/1) [1/1]  loss 1.0" in caplog.text


def test_the_last_line_clears_the_bar_before_it(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "_columns", lambda: 100)

    def fail():
        progress.Progress("epoch 0 (1/1)", 2, 1).step(["loss 1.0"])
        raise UserError("a mistake")

    with pytest.raises(SystemExit):
        run_as_command(fail)
    assert "\r\033[Kerror: a mistake\n" in terminal.getvalue()


def test_means_are_kept_for_windows_and_for_the_whole():
    meter = MeanOnDevice()
    assert meter.window() == {}
    for value in (1.0, 3.0, 8.0):
        meter.update({"a": torch.tensor(value), "b": torch.tensor(-value)})
        if value == 3.0:
            assert meter.window() == {"a": 2.0, "b": -2.0}
    assert meter.window() == {"a": 8.0, "b": -8.0}
    assert meter.totals() == {"a": 4.0, "b": -4.0}
