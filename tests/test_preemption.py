"""Leaving on a signal and being killed: the run that goes on ends as the run that was never disturbed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading

import pytest

from tests.faults.compare import differences
from tests.helpers import BATCHFORMER, PATIENCE, ROOT, SMALL_IMAGES, SMALL_MODEL, environment, write_coco
from tests.processes import run_main_forked, run_main_together, training_processes
from util.checkpoint import read_checkpoint
from util.errors import EXIT_PREEMPTED, Preempted
from util.preemption import SIGNALS, StopRequest, StopVote

# two epochs of 9 steps; mid-epoch states have dropout, augmentation, loader workers, unfinished accumulation, averages, a scaler
EVERYTHING = (*BATCHFORMER, "--accumulate_steps", "3", "--ema_decay", "0.9", "--amp", "bf16", "--num_workers", "2")
OTHER = ("--amp", "fp16", "--backbone_norm", "bn", "--sgd", "--num_workers", "0", "--save_every", "4")


@pytest.fixture
def flags(tmp_path):
    write_coco(tmp_path / "data", num_train=9, num_val=3)
    sizes = (*SMALL_IMAGES, *SMALL_MODEL, "--epochs", "2", "--batch_size", "1")
    return ("--coco_path", str(tmp_path / "data"), *sizes, "--log_every", "1")


def start(*flags: str, processes: int = 1) -> subprocess.Popen:
    command = [sys.executable, "-u", "main.py"] if processes == 1 else ["./tools/run_dist_launch.sh", str(processes), "main.py"]
    return subprocess.Popen(
        [*command, *flags], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip


def interrupt(process: subprocess.Popen, line: str, number: int, rank: int | None = None) -> tuple[int, str]:
    """Send signal `number` when `line` (a pattern) is printed, to the launcher's process of a rank or to the process itself.

    Gives the exit code and the output.
    """
    output = []
    timer = threading.Timer(PATIENCE, process.kill)
    timer.start()
    for text in process.stdout:
        output.append(text)
        if re.search(line, text) and number:
            os.kill(process.pid if rank is None else training_processes(process.pid)[rank], number)
            number = 0
    timer.cancel()
    return process.wait(), "".join(output)


@pytest.fixture
def _handlers_put_back():
    """A request leaves the signals ignored."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("extra", [EVERYTHING, OTHER])
def test_leaving_in_the_middle_of_an_epoch_and_going_on_is_never_having_stopped(tmp_path, flags, extra):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_main_forked(*flags, *extra, "--output_dir", str(whole)).returncode == 0
    run = (*flags, *extra, "--output_dir", str(parts), "--resume", "auto")
    code, output = interrupt(start(*run), r"epoch 0 \[ *3/", signal.SIGUSR1)
    assert code == EXIT_PREEMPTED, output
    assert "asked to leave by SIGUSR1; saved after epoch 0, " in output
    assert "Traceback" not in output
    (saved,) = list(parts.glob("resume_0000_00000000[3-9].pth")) or [None]
    assert saved, "it left in the middle"
    code, output = interrupt(start(*run), r"^evaluate \[", signal.SIGTERM)
    assert code == EXIT_PREEMPTED, output
    assert read_checkpoint(parts / "checkpoint.pth")["history"]["unfinished"] is not None
    code, output = interrupt(start(*run), r"epoch 1 \[ *5/", signal.SIGKILL)
    assert code == -signal.SIGKILL
    resumed = run_main_forked(*run)
    assert resumed.returncode == 0, resumed.stderr
    assert differences(whole, parts) == []
    assert not list(parts.glob("earlier-*"))
    again = run_main_forked(*run)
    assert again.returncode == 0
    assert "nothing is left to do" in again.stdout


def test_one_of_two_processes_is_signalled_and_both_leave_together(tmp_path, flags):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_main_together(*flags, "--ema_decay", "0.9", "--output_dir", str(whole), processes=2, output=tmp_path / "printed")
    run = (*flags, "--ema_decay", "0.9", "--output_dir", str(parts), "--resume", "auto")
    code, output = interrupt(start(*run, processes=2), r"epoch 0 \[ *2/", signal.SIGUSR1, rank=1)
    assert code == EXIT_PREEMPTED, output
    assert len(list(parts.glob("resume_*.pth"))) == 1, "saved once"
    run_main_together(*run, processes=2, output=tmp_path / "printed")
    assert differences(whole, parts) == []


def test_another_number_of_processes_goes_on_and_says_what_changes(tmp_path, flags):
    run = (*flags, "--epochs", "1", "--output_dir", str(tmp_path), "--resume", "auto", "--accumulate_steps", "2")
    code, output = interrupt(start(*run), r"epoch 0 \[ *3/", signal.SIGUSR1)
    assert code == EXIT_PREEMPTED, output
    seen = read_checkpoint(tmp_path / "checkpoint.pth")["position"]["images"]
    printed = run_main_together(*run, processes=2, output=tmp_path / "printed")
    assert "No longer exact" in printed
    steps = int(re.search(r"epoch 0 \[ *\d+/(\d+)\]", printed)[1])
    assert steps == (9 - seen) // 2, "only the images that are left"


@pytest.mark.usefixtures("_handlers_put_back")
def test_a_signal_outside_of_training_leaves_at_once_and_within_only_when_it_is_saved():
    with pytest.raises(Preempted, match="SIGTERM"), StopRequest().installed():
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Preempted, match="nothing that is not in the newest checkpoint was lost"), StopRequest().installed():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # a scheduler and a launcher may both ask; this one must not raise again
            left = True
    assert left
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with pytest.raises(Preempted, match="all is on the disk"), StopRequest().installed() as stop, stop.deferred():
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.signal == "SIGUSR2"
        stop.leave("all is on the disk")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN, "leaving is not disturbed by a second signal"


@pytest.mark.usefixtures("_handlers_put_back")
def test_a_signal_between_the_last_vote_and_the_end_of_an_epoch_is_not_forgotten():
    later = []
    with pytest.raises(Preempted, match="SIGUSR1.*not in the newest checkpoint"), StopRequest().installed() as stop:
        with stop.deferred():
            with stop.deferred():
                assert not StopVote(stop).agreed_now()
                os.kill(os.getpid(), signal.SIGUSR1)
            later.append("in the outer block")
        later.append("in the evaluation")
    assert later == ["in the outer block"]
    with pytest.raises(OSError, match="full"), StopRequest().installed() as stop, stop.deferred():
        os.kill(os.getpid(), signal.SIGUSR1)
        raise OSError("full: an error is told rather than that it was asked to leave")
