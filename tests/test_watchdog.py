"""After an exchange that failed, every process that is left names the process at fault, its host
and what it did.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.distributed import HashStore

from tests.processes import free_port
from tests.test_launch import environment, executable, finish, run, start
from util.distributed import watchdog
from util.distributed.watchdog import State, Watchdog
from util.errors import (
    EXIT_INTERRUPTED,
    EXIT_LOST_PROCESS,
    EXIT_NOT_SAVED,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    Preempted,
)

# who is at fault


def working(rank: int, exchanges: int = 0, notes: int = 0, **more) -> State:
    return State("aab"[rank], 100 + rank, exchanges, notes, **{"doing": f"step {exchanges}"} | more)


@pytest.fixture
def explained(monkeypatch):
    """What rank 0 of three says, given all states, for how many seconds each rank was silent and
    the store, and how long each rank has made no progress.
    """
    monkeypatch.setattr(watchdog.time, "sleep", lambda seconds: None)

    def explain(*states: State, silent=(0, 0, 0), store=0, still=(0, 0, 0)) -> BaseException:
        watch = Watchdog(HashStore(), 0, len(states), "a:29500")
        watch.stop()
        now = time.monotonic()
        watch._states, watch._answered = list(states), now - store
        watch._written, watch._moved = (
            [now - seconds for seconds in silent],
            [now - seconds for seconds in still],
        )
        return watch.explain("Connection closed")

    return explain


def test_a_silent_process_is_at_fault_and_not_those_that_wait_for_it(explained):
    end = explained(working(0, 7, waits=True), working(1, 7, waits=True), working(2, 7), silent=(0, 0, 51))
    assert end.exit_code == EXIT_LOST_PROCESS
    assert str(end) == (
        "no sign of life for 51 s from rank 2 on b (process 102); last known operation: 'step 7'; "
        "start again with --resume auto (Connection closed)"
    )


def test_a_process_that_left_for_the_loss_of_another_is_not_at_fault(explained):
    lost = working(1, 7, left=EXIT_LOST_PROCESS, doing="lost rank 2")
    line = str(explained(working(0, 7), lost, working(2, 7), silent=(0, 9, 12)))
    assert line.startswith("no sign of life for 12 s from rank 2 on b")
    assert "rank 1" not in line


@pytest.mark.parametrize(
    ("left", "code"), [(EXIT_USER_ERROR, EXIT_USER_ERROR), (EXIT_NOT_SAVED, EXIT_NOT_SAVED), (1, 76)]
)
def test_a_process_that_failed_is_quoted_and_its_final_exit_codes_are_the_others_too(explained, left, code):
    """Also where it made a third one leave on request, as launchers do."""
    failed, asked = working(1, left=left, doing="x.jpg is bad"), working(2, left=EXIT_PREEMPTED)
    end = explained(working(0), failed, asked, silent=(0, 6, 6))
    assert (str(end), end.exit_code) == (f"rank 1 on a left with exit code {left}: x.jpg is bad", code)


def test_a_killed_process_is_no_request_to_leave(explained):
    end = explained(working(0), working(1), working(2, left=EXIT_PREEMPTED), silent=(0, 9, 6))
    assert str(end).startswith("no sign of life for 9 s from rank 1 on a")


@pytest.mark.parametrize("code", [EXIT_PREEMPTED, EXIT_INTERRUPTED])
def test_where_another_process_was_asked_to_leave_this_one_leaves_alike(explained, code):
    end = explained(working(0), working(1, left=code, doing="stopped by SIGTERM; saved"), silent=(0, 6))
    assert isinstance(end, Preempted)
    assert (end.exit_code, str(end)) == (code, "stopped by SIGTERM; saved")


def test_of_those_that_make_no_progress_the_one_furthest_behind_is_at_fault(explained):
    line = str(explained(working(0, 8), working(1, 8), working(2, 7, 1), still=(20, 20, 17)))
    assert line.startswith(
        "no progress for 17 s of rank 2 on b (process 102); last known operation: 'step 7'; "
    )


def test_a_process_that_waits_for_others_is_not_at_fault_even_if_it_had_less_to_do(explained):
    """Evaluation: processes have different numbers of batches, and meet at the end."""
    done = working(0, 3, 2, waits=True)
    assert "of rank 1 on a" in str(explained(done, working(1, 3, 5), done._replace(pid=102), still=(9, 9, 9)))


def test_where_all_are_equally_far_all_are_named(explained):
    line = str(explained(working(0, 3), working(1, 3), working(2, 3), still=(9, 9, 9)))
    assert all(f"rank {rank} on " in line for rank in range(3))


def test_a_store_that_does_not_answer_explains_all_silence_after_its_last_answer(explained):
    states = working(0, 3), working(1, 3), working(2, 3)
    line = str(explained(*states, silent=(21, 21, 22), store=21))
    assert line.startswith(
        "no answer for 21 s from the job's store at a:29500 and rank 0 on a (process 100); last known "
    )
    line = str(explained(*states, silent=(21, 21, 30), store=21))
    assert line.startswith("no sign of life for 30 s from rank 2 on b")


def test_states_travel_through_the_store_and_notes_count_from_the_last_exchange():
    store = HashStore()
    watch = Watchdog(store, 0, 1, "a:29500")
    watchdog.note("epoch %d, step %d", 3, 12)
    with watchdog.waiting("gather"):
        assert (watch.own.waits, watch.own.doing) == (True, "epoch 3, step 12 (waits in gather)")
    watchdog.note("epoch %d, step %d", 3, 13)
    watch.stop(2, "x.jpg is bad")
    state = State(*json.loads(store.get("watchdog 0")))
    assert (state.exchanges, state.notes, state.waits, state.left, state.doing) == (
        1,
        1,
        False,
        2,
        "x.jpg is bad",
    )
    assert Watchdog.current is None


def test_a_warning_is_written_where_no_exception_comes(capfd, monkeypatch):
    """As on NCCL, whose time-out ends the process."""
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", "/tmp/recorder_")
    # so that the note has been read back
    watch = Watchdog(HashStore(), 0, 1, "a:29500", warn_after=2.5)
    watchdog.note("stuck")
    watch._threads[1].join()
    watch.stop()
    assert capfd.readouterr().err.endswith(
        "'stuck'; NCCL's flight recorder will be in /tmp/recorder_<rank> of each host\n"
    )


def test_without_a_job_nothing_is_written():
    watchdog.note("nobody %s", "hears")
    with watchdog.waiting("nobody"):
        pass
    assert Watchdog.current is None


# processes

# Trains a little: notes, and exchanges. At step 30 rank 1 does what $FAULT says, at its first
# start.
WORKER = f"""#!{sys.executable}
import os, pathlib, signal, sys, time
sys.path.insert(0, {str(Path(watchdog.__file__).parents[2])!r})
import torch
from util.distributed import processes as distributed
from util.distributed import watchdog
from util.errors import Preempted, UserError, run_as_command

def train():
    rank = os.environ["RANK"]
    started = pathlib.Path(os.environ["REPORT"], os.environ.get("NAME", "") + "started" + rank)
    first = not started.exists()
    started.touch()
    with distributed.process_group("cpu", float(os.environ["TIMEOUT"])):
        for step in range(40):
            watchdog.note("epoch 0, step %d: loading", step)
            time.sleep(0.02)
            if step == 30 and rank == "1" and first:
                time.sleep(2.5)  # until the others can know the note
                exec(os.environ["FAULT"])
            watchdog.note("epoch 0, step %d: training", step)
            distributed.sum_over_processes(torch.ones(3))
    print(f"rank {{rank}} is done", flush=True)  # in one piece: others write too
"""
# Forks all processes of several jobs: importing torch takes longer than all else. Nothing ends one
# job's processes for the failure of another of them, and rank 0 serves the store, as under Slurm.
FLEET = f"""{WORKER}
import json
torch.set_num_threads(1)
running = dict()
for name, variables in json.loads(sys.argv[1]).items():
    running[os.fork()] = name
    if 0 in running:
        output = os.open(os.environ["REPORT"] + "/" + name, os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1), os.dup2(output, 2)
        os.environ.update(variables)
        code = 0
        try:
            run_as_command(train)
        except SystemExit as end:
            code = end.code
        sys.stdout.flush()
        os._exit(code)  # Python's own end takes seconds where many processes come to it
ended = dict()
faulty = [pid for pid, name in running.items() if name in ("stopped 1", "hangs 1")]
while running:
    pid, status = os.wait()
    ended[running.pop(pid)] = os.waitstatus_to_exitcode(status)
    if set(running) <= set(faulty):  # as a launcher would
        for pid in running:
            os.kill(pid, signal.SIGKILL)
print(json.dumps(ended), flush=True)
"""
HOST = os.uname().nodename
TIMEOUT = 8  # seconds
FAULTS = {
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "hangs": "time.sleep(1000)",
    "fails": "raise UserError('x.jpg is bad')",
    "asked to leave": "raise Preempted('stopped by SIGUSR1')",
}


class Ended(NamedTuple):
    status: int
    output: str
    port: str

    def said(self) -> str:
        """Its one line of an error, and the last; PyTorch may have lines of its own."""
        *before, last = self.output.splitlines()
        assert last.startswith("error: "), self.output
        assert not any(line.startswith("error: ") for line in before), self.output
        return last


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> dict[tuple[str, int], Ended]:
    """By fault and rank how a process ended. All at the same time: most of it is waiting."""
    folder = tmp_path_factory.mktemp("jobs")
    processes = {}
    for name, fault in FAULTS.items():
        port = free_port()
        for rank in "01":
            processes[f"{name} {rank}"] = {"NAME": name, "FAULT": fault, "RANK": rank, "MASTER_PORT": port}
    for rank in "01":  # which the other never joins
        processes[f"alone {rank}"] = {"NAME": "alone", "RANK": rank, "MASTER_PORT": free_port()}
    (folder / "fleet.py").write_text(FLEET)
    env = environment(
        folder,
        MASTER_ADDR="127.0.0.1",
        WORLD_SIZE="2",
        TIMEOUT=str(TIMEOUT),
        TORCH_CPP_LOG_LEVEL="ERROR",
        OMP_NUM_THREADS="1",
    )
    status, output = run([sys.executable, str(folder / "fleet.py"), json.dumps(processes)], env)
    assert status == 0, output
    ended = json.loads(output.splitlines()[-1])
    return {
        (name[:-2], int(name[-1])): Ended(status, (folder / name).read_text(), processes[name]["MASTER_PORT"])
        for name, status in ended.items()
    }


@pytest.mark.parametrize(
    ("fault", "reason", "status"),
    [
        ("stopped", "no sign of life for", -signal.SIGKILL),
        ("killed", "no sign of life for", -signal.SIGKILL),
        ("hangs", "no progress for", -signal.SIGKILL),
        ("fails", "left with exit code 2: x.jpg is bad", EXIT_USER_ERROR),
    ],
)
def test_a_fault_of_one_process_is_named_by_the_other(jobs, fault, reason, status):
    first, second = jobs[fault, 0], jobs[fault, 1]
    assert first.status == (EXIT_USER_ERROR if fault == "fails" else EXIT_LOST_PROCESS), first.output
    said = first.said()
    assert reason in said
    assert f"rank 1 on {HOST} " in said
    assert fault == "fails" or "'epoch 0, step 30: loading'" in said
    assert second.status == status, second.output


def test_a_process_that_leaves_alone_on_request_takes_the_other_along(jobs):
    for rank in (0, 1):
        ended = jobs["asked to leave", rank]
        assert ended.status == EXIT_PREEMPTED, ended.output
        assert ended.output.count("stopped by SIGUSR1") == (rank == 0), "one process says it"
        assert "error" not in ended.output


@pytest.mark.parametrize("rank", [0, 1])
def test_at_the_start_a_process_that_does_not_come_is_missed_in_time(jobs, rank):
    ended = jobs["alone", rank]
    assert ended.status == EXIT_LOST_PROCESS
    assert (
        f"not all processes met at 127.0.0.1:{ended.port} within {TIMEOUT} s (--dist_timeout)" in ended.said()
    )


@pytest.mark.parametrize("nodes", ["one", "c10d", "static"])
def test_processes_that_torchrun_starts_again_meet_none_of_the_keys_of_those_before(tmp_path, nodes):
    """torchrun as everyone types it, without the settings of run_dist_launch.sh."""
    worker = executable(tmp_path / "worker", WORKER + "\nrun_as_command(train)\n")
    port = free_port()
    flags = {
        "one": [["--standalone", "--nproc_per_node=2"]],
        "c10d": [["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=x"]]
        * 2,
        "static": [
            ["--nnodes=2", f"--node_rank={n}", "--master_addr=127.0.0.1", f"--master_port={port}"]
            for n in (0, 1)
        ],
    }[nodes]
    env = environment(tmp_path, FAULT=FAULTS["killed"], TIMEOUT="60", OMP_NUM_THREADS="1")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--no_python", "--max_restarts=1"]
    started = [start([*torchrun, *node, worker], env) for node in flags]
    ended = [finish(node) for node in started]
    output = "".join(output for _, output in ended)
    assert all(status == 0 for status, _ in ended), output
    assert all(f"rank {rank} is done" in output for rank in "01")
