"""Leaving on a signal and being killed: the run that goes on ends as the run that was never
disturbed.
"""

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
from util.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, SIGNALS, Preempted
from util.run.stop import StopRequest, StopVote

# two epochs of 9 steps; mid-epoch states have dropout, augmentation, loader workers, unfinished
# accumulation, averages, a scaler
EVERYTHING = (
    *BATCHFORMER,
    "--accumulate_steps",
    "3",
    "--ema_decay",
    "0.9",
    "--amp",
    "bf16",
    "--num_workers",
    "2",
)
# the backbone is frozen, because many processors take seconds for its gradients in float16
FROZEN = ("--backbone_norm", "bn", "--lr_backbone", "0")
OTHER = ("--amp", "fp16", *FROZEN, "--sgd", "--num_workers", "0", "--save_every", "4")


@pytest.fixture
def flags(tmp_path):
    write_coco(tmp_path / "data", num_train=9, num_val=3)
    sizes = (*SMALL_IMAGES, *SMALL_MODEL, "--epochs", "2", "--batch_size", "1")
    return ("--coco_path", str(tmp_path / "data"), *sizes, "--log_every", "1")


def start(*flags: str, processes: int = 1) -> subprocess.Popen:
    command = (
        [sys.executable, "-u", "main.py"]
        if processes == 1
        else ["./tools/run_dist_launch.sh", str(processes), "main.py"]
    )
    return subprocess.Popen(
        [*command, *flags],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # tests that run in the background ignore it
    )


def interrupt(process: subprocess.Popen, line: str, number: int, rank: int | None = None) -> tuple[int, str]:
    """Send signal `number` when `line` (a pattern) is printed, to the launcher's process of a rank
    or to the process itself.

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
    code, output = interrupt(start(*run), r"epoch 0 \S+ \[ *3/", signal.SIGUSR1)
    assert code == EXIT_PREEMPTED, output
    told = (
        r"^stopped by SIGUSR1; saved in epoch 0, after [3-9] of 9 images; "
        r"start again with --resume auto$"
    )
    assert re.search(told, output, re.MULTILINE)
    assert "Traceback" not in output
    (saved,) = list(parts.glob("resume_0000_00000000[3-9].pth")) or [None]
    assert saved, "it left in the middle"
    code, output = interrupt(start(*run), r"  evaluate \[", signal.SIGTERM)
    assert code == EXIT_PREEMPTED, output
    assert (
        "stopped by SIGTERM; epoch 0 is saved, its evaluation is next; start again with --resume "
        "auto\n" in output
    )
    assert read_checkpoint(parts / "checkpoint.pth")["history"]["unfinished"] is not None
    code, output = interrupt(start(*run), r"epoch 1 \S+ \[ *5/", signal.SIGKILL)
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
    run_main_together(
        *flags, "--ema_decay", "0.9", "--output_dir", str(whole), processes=2, output=tmp_path / "printed"
    )
    run = (*flags, "--ema_decay", "0.9", "--output_dir", str(parts), "--resume", "auto")
    code, output = interrupt(start(*run, processes=2), r"epoch 0 \S+ \[ *2/", signal.SIGUSR1, rank=1)
    assert code == EXIT_PREEMPTED, output
    assert len(list(parts.glob("resume_*.pth"))) == 1, "saved once"
    run_main_together(*run, processes=2, output=tmp_path / "printed")
    assert differences(whole, parts) == []


@pytest.mark.parametrize("rank", [None, 1], ids=["the launcher", "one process"])
def test_ctrl_c_saves_says_so_in_one_line_and_nobody_has_failed(tmp_path, flags, rank):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_main_together(*flags, "--output_dir", str(whole), processes=2, output=tmp_path / "printed")
    run = (*flags, "--output_dir", str(parts), "--resume", "auto")
    code, output = interrupt(start(*run, processes=2), r"epoch 0 \S+ \[ *2/", signal.SIGINT, rank=rank)
    assert code == EXIT_INTERRUPTED, output
    (last,) = re.findall(r"^interrupted; .*\n", output, re.MULTILINE)
    images = re.fullmatch(
        r"interrupted; saved in epoch 0, after ([4-8]) of 8 images; start again with --resume "
        r"auto\n",
        last,
    )[1]
    assert [path.name for path in parts.glob("resume_*.pth")] == [f"resume_0000_{int(images):09}.pth"]
    assert output.endswith(last), "the launcher has nothing to add"
    code, output = interrupt(start(*run, processes=2), r"  evaluate \[", signal.SIGINT, rank=rank)
    assert code == EXIT_INTERRUPTED, output
    assert output.endswith(
        "interrupted; epoch 0 is saved, its evaluation is next; start again with --resume auto\n"
    )
    assert output.count("interrupted") == 1
    assert "failed" not in output
    run_main_together(*run, processes=2, output=tmp_path / "printed")
    assert differences(whole, parts) == []


def test_ctrl_c_in_one_process_and_without_a_folder(flags, tmp_path):
    code, output = interrupt(start(*flags), r"epoch 0 \S+ \[ *3/", signal.SIGINT)
    assert code == EXIT_INTERRUPTED, output
    assert "warning: nothing is saved without --output_dir" in output
    assert output.endswith("interrupted; nothing is saved without --output_dir\n")
    code, output = interrupt(
        start(*flags, "--output_dir", str(tmp_path / "out")), "trainable parameters", signal.SIGINT
    )
    assert code == EXIT_INTERRUPTED, output
    assert "warning: nothing is saved" not in output
    assert re.search(r"^interrupted; .*; start again with --resume auto$", output, re.MULTILINE)


@pytest.mark.usefixtures("_handlers_put_back")
def test_a_second_ctrl_c_waits_for_nothing():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with (
        pytest.raises(Preempted, match="interrupted; saved") as end,
        StopRequest("").installed() as stop,
        stop.deferred(),
    ):
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop.signal, stop.interrupted) == ("SIGINT", True)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL, (
            "the next one ends the process, even in an exchange that hangs"
        )
        assert callable(signal.getsignal(signal.SIGTERM)), "others change nothing"
        stop.leave("saved")
    assert end.value.exit_code == EXIT_INTERRUPTED
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


@pytest.mark.usefixtures("_handlers_put_back")
def test_in_the_background_of_a_shell_ctrl_c_is_for_others():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopRequest("").installed() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert not stop.signal
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_another_number_of_processes_goes_on_and_says_what_changes(tmp_path, flags):
    run = (
        *flags,
        "--epochs",
        "1",
        "--output_dir",
        str(tmp_path),
        "--resume",
        "auto",
        "--accumulate_steps",
        "2",
    )
    code, output = interrupt(start(*run), r"epoch 0 \S+ \[ *3/", signal.SIGUSR1)
    assert code == EXIT_PREEMPTED, output
    seen = read_checkpoint(tmp_path / "checkpoint.pth")["position"]["images"]
    printed = run_main_together(*run, processes=2, output=tmp_path / "printed")
    assert "No longer exact" in printed
    steps = int(re.search(r"epoch 0 \S+ \[ *\d+/(\d+)\]", printed)[1])
    assert steps == (9 - seen) // 2, "only the images that are left"


@pytest.mark.usefixtures("_handlers_put_back")
def test_a_signal_outside_of_training_leaves_at_once_and_within_only_when_it_is_saved():
    with pytest.raises(Preempted, match="SIGTERM"), StopRequest("all was saved").installed():
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Preempted, match="SIGTERM; all was saved"), StopRequest("all was saved").installed():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(
                os.getpid(), signal.SIGTERM
            )  # a scheduler and a launcher may both ask; this one must not raise again
            left = True
    assert left
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with (
        pytest.raises(Preempted, match="all is on the disk"),
        StopRequest("all was saved").installed() as stop,
        stop.deferred(),
    ):
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.signal == "SIGUSR2"
        stop.leave("all is on the disk")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN, "leaving is not disturbed by a second signal"


@pytest.mark.usefixtures("_handlers_put_back")
def test_a_signal_between_the_last_vote_and_the_end_of_an_epoch_is_not_forgotten():
    later = []
    with (
        pytest.raises(Preempted, match="SIGUSR1; all was saved"),
        StopRequest("all was saved").installed() as stop,
    ):
        with stop.deferred():
            with stop.deferred():
                assert not StopVote(stop).agreed_now()
                os.kill(os.getpid(), signal.SIGUSR1)
            later.append("in the outer block")
        later.append("in the evaluation")
    assert later == ["in the outer block"]
    with (
        pytest.raises(OSError, match="full"),
        StopRequest("all was saved").installed() as stop,
        stop.deferred(),
    ):
        os.kill(os.getpid(), signal.SIGUSR1)
        raise OSError("full: an error is told rather than that it was asked to leave")
