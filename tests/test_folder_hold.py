"""One writer for a run's folder: who else comes is refused, and the hold of a process that has
ended is taken over.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers import ROOT, SMALL_IMAGES, SMALL_MODEL, environment, run_main, write_coco
from tests.processes import run_main_forked
from util.errors import NotSavedError, UserError
from util.run import hold as folder_hold
from util.run.hold import NAME, FolderHold, Holder, born, still_runs


@pytest.fixture(autouse=True)
def _quickly(monkeypatch):
    monkeypatch.setattr(folder_hold, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(folder_hold, "BEAT", 0.01)
    for name in ("SLURM_JOB_ID", "SLURM_CLUSTER_NAME", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def ended() -> Holder:
    """A process of this machine that has been."""
    with subprocess.Popen(["true"]) as process:
        started = born(process.pid)
    return dataclasses.replace(Holder.this_process(), pid=process.pid, born=started)


def elsewhere(**changes) -> Holder:
    """A process of another machine, which may well have a process of that number here."""
    return dataclasses.replace(Holder.this_process(), host="node9", machine="node9 boot", **changes)


def write(folder: Path, holder: Holder) -> Path:
    path = folder / NAME
    path.write_text(json.dumps(dataclasses.asdict(holder)))
    return path


def holder_in(folder: Path) -> Holder:
    return Holder(**json.loads((folder / NAME).read_text()))


def test_a_folder_is_held_for_the_block_and_says_by_whom(tmp_path):
    with FolderHold(tmp_path) as hold:
        hold.check()
        found = holder_in(tmp_path)
        assert (found.pid, found.host) == (os.getpid(), os.uname().nodename)
        told = (
            rf"--output_dir {tmp_path} is held by process {os.getpid()} on {found.host} since "
            rf"{found.since}, .*"
        )
        with pytest.raises(UserError, match=told), FolderHold(tmp_path):
            pass
        assert holder_in(tmp_path) == found
    assert list(tmp_path.iterdir()) == []


def test_the_hold_of_a_process_that_has_ended_is_taken_over_at_once_and_said(tmp_path, ended, caplog):
    write(tmp_path, ended)
    with caplog.at_level(logging.WARNING), FolderHold(tmp_path):
        assert holder_in(tmp_path).pid == os.getpid()
        assert [path.name for path in tmp_path.iterdir()] == [NAME]
    assert f"was held by {ended}, which has ended: taken over" in caplog.text
    assert "waiting" not in caplog.text


def test_a_process_with_the_number_of_one_that_has_ended_is_another(tmp_path):
    write(tmp_path, dataclasses.replace(Holder.this_process(), born="1"))
    with FolderHold(tmp_path) as hold:
        hold.check()


def test_a_process_that_is_ended_and_not_asked_for_has_ended():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = born(process.pid)
    assert still_runs(process.pid, started)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    assert not still_runs(process.pid, started)
    process.wait()
    assert not still_runs(process.pid, started)


def test_another_machines_process_that_gives_signs_of_life_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_hold, "LOOKS", 10**6)
    holder = elsewhere(pid=2**22 + 1)  # no such process here
    path = write(tmp_path, holder)
    touched = threading.Timer(0.05, os.utime, (path, (1, 1)))
    touched.start()
    with pytest.raises(UserError, match=re.escape(f"is held by {holder}")), FolderHold(tmp_path):
        pass
    touched.join()
    assert holder_in(tmp_path) == holder


def test_another_machines_process_without_a_sign_of_life_is_taken_for_dead(tmp_path, caplog, monkeypatch):
    write(tmp_path, elsewhere())
    with caplog.at_level(logging.WARNING), FolderHold(tmp_path) as hold:
        hold.check()
    assert "on node9 since" in caplog.text
    assert "waiting up to" in caplog.text
    assert "without a sign of life" in caplog.text
    monkeypatch.setattr(folder_hold, "LOOKS", 10**9)  # a silence of days needs no watching
    path = write(tmp_path, elsewhere())
    os.utime(path, (1, 1))
    with FolderHold(tmp_path) as hold:
        hold.check()


def test_a_clock_that_is_ahead_makes_nobody_alive(tmp_path):
    path = write(tmp_path, elsewhere())
    os.utime(path, (4e9, 4e9))
    with FolderHold(tmp_path) as hold:
        hold.check()


@pytest.mark.parametrize(("job", "attempt", "waits"), [("7", 0, False), ("7", 1, True), ("8", 0, True)])
def test_a_requeued_slurm_job_takes_over_from_itself_at_once(
    tmp_path, monkeypatch, caplog, job, attempt, waits
):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    write(tmp_path, elsewhere(job=job, attempt=attempt))
    with caplog.at_level(logging.WARNING), FolderHold(tmp_path) as hold:
        hold.check()
    assert ("waiting up to" in caplog.text) == waits
    assert ("before this job was requeued: taken over" in caplog.text) == (not waits)


def test_a_hold_that_was_never_finished_is_taken_over(tmp_path, caplog):
    (tmp_path / NAME).touch()
    with caplog.at_level(logging.WARNING), FolderHold(tmp_path) as hold:
        hold.check()
    assert "held by an unknown process" in caplog.text


def test_a_live_holder_touches_its_file(tmp_path):
    with FolderHold(tmp_path):
        os.utime(tmp_path / NAME, (1, 1))
        while (tmp_path / NAME).stat().st_mtime == 1:
            pass


def test_who_was_taken_for_dead_writes_no_more_and_leaves_the_others_hold(tmp_path):
    with FolderHold(tmp_path) as hold:
        other = elsewhere()
        write(tmp_path, other)
        with pytest.raises(NotSavedError, match=re.escape(f"was taken over by {other}")):
            hold.check()
    assert holder_in(tmp_path) == other


def test_a_folder_that_was_cleared_is_held_again(tmp_path):
    with FolderHold(tmp_path) as hold:
        (tmp_path / NAME).unlink()
        hold.check()
        assert holder_in(tmp_path).pid == os.getpid()


def test_of_two_that_find_the_same_dead_holder_the_slower_one_leaves_the_quicker_one_its_hold(
    tmp_path, ended
):
    slow = FolderHold(tmp_path)
    with FolderHold(tmp_path) as quick:
        assert not slow._replace(ended)
        quick.check()
        assert holder_in(tmp_path).pid == os.getpid()
        assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_one_that_died_while_it_took_over_is_not_waited_for(tmp_path, ended, monkeypatch):
    monkeypatch.setattr(folder_hold, "TURN", 0.05)
    write(tmp_path, ended)
    (tmp_path / f"{NAME}.turn").touch()
    with FolderHold(tmp_path) as hold:
        hold.check()
        assert [path.name for path in tmp_path.iterdir()] == [NAME]


def compete(folder: Path, barrier, held) -> None:
    barrier.wait()
    try:
        with FolderHold(folder):
            held.put(os.getpid())
            barrier.wait()  # until all have tried
    except UserError:
        barrier.wait()


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_that_come_at_once_one_holds_the_folder(tmp_path, ended, stale):
    context = multiprocessing.get_context("fork")
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        if stale:
            write(folder, ended)
        barrier, held = context.Barrier(6), context.SimpleQueue()
        processes = [context.Process(target=compete, args=(folder, barrier, held)) for _ in range(6)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        held.get()
        assert held.empty(), "one of them"


# ---- the program


@pytest.fixture
def flags(tmp_path):
    write_coco(tmp_path / "data", num_train=8, num_val=2)
    return (
        "--coco_path",
        str(tmp_path / "data"),
        *SMALL_IMAGES,
        *SMALL_MODEL,
        "--log_every",
        "1",
        "--num_workers",
        "0",
    )


@contextmanager
def running(command):
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_second_run_is_refused_while_an_evaluation_is_not_and_after_a_kill_the_folder_is_taken_over(
    tmp_path, flags
):
    out = tmp_path / "out"
    command = [sys.executable, "-u", "main.py", *flags, "--epochs", "1000", "--output_dir", str(out)]
    with running(command) as first:
        for line in first.stdout:
            if "epoch 1 (" in line:
                break
        saved = (out / "resume_0001_000000000.pth").read_bytes()
        told = (
            rf"error: --output_dir {out} is held by process {first.pid} on {os.uname().nodename} "
            rf"since \d{{4}}-.*"
        )
        for extra in ((), ("--resume", "auto")):
            second = run_main_forked(*flags, *extra, "--output_dir", str(out))
            assert second.returncode == 2
            assert re.fullmatch(told, second.stderr.strip()), second.stderr
        together = run_main(*flags, "--output_dir", str(out), processes=2)
        assert together.returncode == 2
        assert re.search(told, together.stderr)
        assert not list(out.glob("earlier-*"))
        evaluated = run_main_forked(
            *flags, "--resume", str(out / "checkpoint.pth"), "--eval", "--output_dir", str(out)
        )
        assert evaluated.returncode == 0, evaluated.stderr
        assert (out / "evaluation-1" / "eval.pth").exists()
        assert not (out / "eval.pth").exists()
        assert first.poll() is None
    assert saved
    resumed = run_main_forked(*flags, "--epochs", "1", "--output_dir", str(out), "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert f"was held by process {first.pid}" in resumed.stdout
    assert not (out / NAME).exists()
    assert first.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("variables", "remedy"),
    [
        (
            {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_ID": "0"},
            "run_dist_slurm.sh <partition> <job name> 2 ",
        ),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "run_dist_slurm.sh"),
        (
            {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"},
            "torchrun or ./tools/run_dist_launch.sh 4 main.py",
        ),
        (
            {"PMI_RANK": "0", "PMI_SIZE": "2", "SLURM_PTY_PORT": "1"},
            "torchrun or ./tools/run_dist_launch.sh 2 main.py",
        ),
        ({"PMIX_RANK": "3"}, "torchrun"),
        ({"LOCAL_RANK": "1"}, "torchrun"),
    ],
)
def test_a_process_of_several_that_knows_no_others_is_refused(tmp_path, variables, remedy):
    result = run_main_forked("--output_dir", str(tmp_path / "out"), env=variables)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert remedy in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "variables",
    [
        {
            "SLURM_PROCID": "0",
            "SLURM_STEP_NUM_TASKS": "1",
            "SLURM_NTASKS": "1",
            "SLURM_STEP_ID": "0",
            "PMI_SIZE": "1",
        },
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"},  # a batch job's script
        {
            "SLURM_PROCID": "0",
            "SLURM_STEP_NUM_TASKS": "4",
            "SLURM_PTY_PORT": "40000",
        },  # a shell of srun --pty
    ],
)
def test_one_process_of_slurm_works_alone(tmp_path, variables):
    result = run_main_forked("--coco_path", str(tmp_path / "none"), "--device", "cpu", env=variables)
    assert "1 process(es)" in result.stdout
    assert "--coco_path" in result.stderr, "it came as far as the data"


def test_the_older_launcher_of_pytorch_is_understood(tmp_path, flags):
    command = [sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node", "2", "main.py", *flags]
    result = subprocess.run(
        [*command, "--epochs", "1", "--output_dir", str(tmp_path / "out")],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "2 process(es)" in result.stdout
    alone = run_main_forked("--local_rank", "1")
    assert alone.returncode == 2
    assert "start with torchrun" in alone.stderr
