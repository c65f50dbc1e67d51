"""A process that dies, hangs or is cut off ends all others in time, and they say which one it was and what it did."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.processes import free_port
from tests.test_launch import environment, executable, run
from util import watchdog
from util.errors import EXIT_LOST_PROCESS, EXIT_PREEMPTED, EXIT_USER_ERROR
from util.watchdog import Jury, Peer, Progress, State

LIMIT = 10.0


# who is to blame


def jury(rank: int = 0, hosts: str = "aab") -> Jury:
    return Jury(rank, [Peer(host, host, 100 + r, "1") for r, host in enumerate(hosts)], "a:29500")


def working(beat: int, exchanges: int = 0, notes: int = 0, **more) -> State:
    return State(beat, exchanges, notes, doing=f"step {exchanges}", **more)


def after(judges: Jury, seconds: int, *states) -> None:
    """Every second each process's state is heard; a state is a function of the second."""
    for second in range(1, seconds + 1):
        judges.pass_time(1.0)
        judges.hear([state(second) for state in states])


def test_processes_that_make_progress_are_left_alone():
    judges = jury()
    after(judges, 100, *[lambda t: working(t, exchanges=t // 5)] * 3)
    assert judges.verdict(LIMIT) is None


def test_a_silent_process_is_to_blame_and_not_those_that_wait_for_it():
    judges = jury(rank=1)
    waits = lambda t: working(t, exchanges=7, waits=True)  # noqa: E731
    after(judges, 11, waits, waits, lambda t: working(3, exchanges=7))
    verdict = judges.verdict(LIMIT)
    assert verdict.ranks == [2]
    assert verdict.status == EXIT_LOST_PROCESS
    assert "no sign of life from rank 2 on b (process 102) for 10 s" in verdict.line
    assert "last known operation: 'step 7'" in verdict.line
    assert "rank 1 on a (process 101), which tells this, was in 'step 7'" in verdict.line
    assert "--resume auto" in verdict.line
    assert "\n" not in verdict.line


def test_of_the_culprits_only_a_silent_one_is_killed():
    """One that lives reads the verdict, and leaves with its own exit status."""
    judges = jury()
    after(judges, 11, *[lambda t: working(t, exchanges=3)] * 2, lambda t: working(3, exchanges=3))
    assert [peer.pid for peer in judges.silent_peers([1, 2], LIMIT)] == [102]
    assert judges.silent_peers([1], LIMIT) == []


def test_of_those_that_stand_still_the_one_least_far_is_to_blame():
    """Not the one that has stood still longest: rank 0 may have waited for a slow process that hung later."""
    judges = jury()
    ahead = lambda t: working(t, exchanges=8)  # noqa: E731
    after(judges, 4, ahead, ahead, lambda t: working(t, exchanges=7, notes=0))
    after(judges, 8, ahead, ahead, lambda t: working(t, exchanges=7, notes=1))
    verdict = judges.verdict(LIMIT)
    assert verdict.ranks == [2]
    assert "rank 2 on b (process 102) made no progress for 7 s in 'step 7'" in verdict.line


def test_a_process_that_waits_for_others_is_not_to_blame_even_if_it_had_less_to_do():
    """Evaluation: processes have different numbers of batches, and meet at the end."""
    judges = jury()
    done = lambda t: working(t, exchanges=3, notes=2, waits=True)  # noqa: E731
    after(judges, 11, done, lambda t: working(t, exchanges=3, notes=5), done)
    assert judges.verdict(LIMIT).ranks == [1]


def test_where_all_stand_at_the_same_point_all_are_named():
    judges = jury()
    after(judges, 11, *[lambda t: working(t, exchanges=3)] * 3)
    verdict = judges.verdict(LIMIT)
    assert verdict.ranks == [0, 1, 2]
    assert "can't be told" in verdict.line


def test_a_store_that_does_not_answer_explains_all_silence():
    judges = jury(rank=2)
    after(judges, 5, *[lambda t: working(t, exchanges=3)] * 3)
    for _ in range(6):
        judges.pass_time(1.0)
    verdict = judges.verdict(LIMIT)
    assert verdict.ranks == []
    assert "the job's store at a:29500 has not answered for 6 s: the network, the host of rank 0 (a)" in verdict.line
    assert "last known operation of rank 0: 'step 3'" in verdict.line


def test_a_process_that_has_left_is_missed_by_nobody():
    judges = jury()
    at_work = lambda t: working(t, exchanges=t)  # noqa: E731
    after(judges, 50, at_work, at_work, lambda t: working(3, left=True))
    assert judges.verdict(LIMIT) is None
    assert not judges.all_left()


def test_one_process_of_each_machine_tells_and_never_the_culprit():
    """Names of machines may be alike; what is compared is the machine itself."""
    tell = [r for r in range(4) if jury(r, "aabb").first_of_host(watchdog.Verdict([0], "x"))]
    assert tell == [1, 2]


def test_a_note_is_put_together_when_it_is_told_and_a_bad_one_ends_nothing():
    progress = Progress()
    progress.note("epoch %d, step %d", (3, 12))
    assert progress.state(0, False).doing.startswith("epoch 3, step 12 (at tests/test_watchdog.py:")
    progress.note("epoch %d", ("three",))
    assert progress.state(0, False).doing.startswith("epoch %d")
    before = progress.state(0, False)
    progress.wait("gather")
    assert progress.state(0, False).waits
    progress.go_on()
    assert progress.state(0, False)[1:4] == (before.exchanges + 1, 0, False)


def test_without_a_job_nothing_is_watched():
    watchdog.note("nobody %s", "hears")
    with watchdog.waiting("nobody"):
        pass
    assert watchdog._current is None


# processes

# Trains a little: notes, and exchanges. At step 30 rank 1 of the first attempt does what $FAULT says.
WORKER = f"""#!{sys.executable}
import os, signal, sys, time
sys.path.insert(0, {str(Path(watchdog.__file__).parents[1])!r})
import torch
from util import distributed, watchdog
from util.errors import Preempted, UserError, run_as_command

def train():
    rank, first = os.environ["RANK"], os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    with distributed.process_group("cpu", float(os.environ["TIMEOUT"])):
        for step in range(40):
            watchdog.note("epoch 0, step %d: loading", step)
            time.sleep(0.02)
            if step == 30 and rank == "1" and first:
                talk = watchdog._current._talk
                told = talk._round + 2
                while talk._round < told:  # until the others can know the note
                    time.sleep(0.01)
                exec(os.environ["FAULT"])
            watchdog.note("epoch 0, step %d: training", step)
            distributed.sum_over_processes(torch.ones(3))
    print(f"rank {{rank}} is done", flush=True)  # in one piece: others write too
"""
# Forks all processes of several jobs: importing torch takes longer than all else. Nobody ends one job's processes for the
# failure of another of them, and rank 0 serves the store, as under Slurm.
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
while running:
    pid, status = os.wait()
    ended[running.pop(pid)] = os.waitstatus_to_exitcode(status)
print(json.dumps(ended), flush=True)
"""
HOST = os.uname().nodename
TIMEOUT = 8  # seconds
FAULTS = {
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "hangs": "time.sleep(1000)",
    "fails": "raise UserError('x.jpg is bad')",
    "asked to leave": "raise Preempted('asked to leave by SIGUSR1')",
}


class Ended(NamedTuple):
    status: int
    output: str

    def told(self) -> str:
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
            processes[f"{name} {rank}"] = {"FAULT": fault, "RANK": rank, "MASTER_PORT": port}
    for rank in "01":  # which the other never joins
        processes[f"alone {rank}"] = {"RANK": rank, "MASTER_PORT": free_port()}
    (folder / "fleet.py").write_text(FLEET)
    env = environment(
        folder, MASTER_ADDR="127.0.0.1", WORLD_SIZE="2", TIMEOUT=str(TIMEOUT), TORCH_CPP_LOG_LEVEL="ERROR", OMP_NUM_THREADS="1"
    )
    status, output = run([sys.executable, str(folder / "fleet.py"), json.dumps(processes)], env)
    assert status == 0, output
    ended = json.loads(output.splitlines()[-1])
    return {(name[:-2], int(name[-1])): Ended(status, (folder / name).read_text()) for name, status in ended.items()}


@pytest.mark.parametrize(
    ("fault", "reason", "status"),
    [
        ("stopped", f"no sign of life from rank 1 on {HOST}", -signal.SIGKILL),
        ("killed", f"no sign of life from rank 1 on {HOST}", -signal.SIGKILL),
        ("hangs", f"rank 1 on {HOST} (process", EXIT_LOST_PROCESS),
        ("fails", f"rank 1 on {HOST} ended with: x.jpg is bad", EXIT_USER_ERROR),
    ],
)
def test_a_fault_of_one_process_ends_all_and_is_named(jobs, fault, reason, status):
    first, second = jobs[fault, 0], jobs[fault, 1]
    assert first.status == EXIT_LOST_PROCESS, first.output
    told = first.told()
    assert reason in told
    assert fault == "fails" or "'epoch 0, step 30: loading" in told
    assert second.status == status, second.output


def test_a_process_that_leaves_alone_on_request_takes_the_others_along(jobs):
    for rank in (0, 1):
        ended = jobs["asked to leave", rank]
        assert ended.status == EXIT_PREEMPTED, ended.output
        assert ended.output.count("asked to leave by SIGUSR1") == (rank == 0), "one process tells it"
        assert "error" not in ended.output


@pytest.mark.parametrize(
    ("rank", "reason"), [(0, "rank(s) 1 of 2 did not arrive within"), (1, "nobody served the job's store at 127.0.0.1:")]
)
def test_at_the_start_too_who_does_not_come_is_named_in_time(jobs, rank, reason):
    ended = jobs["alone", rank]
    assert ended.status == EXIT_LOST_PROCESS
    assert reason in ended.told()


def test_torchruns_restarts_meet_none_of_the_keys_of_the_attempt_before(tmp_path):
    worker = executable(tmp_path / "worker", WORKER + "\nrun_as_command(train)\n")
    flags = ["--no_python", "--nproc_per_node=2", "--max_restarts=1", f"--master_port={free_port()}"]
    env = environment(tmp_path, FAULT=FAULTS["killed"], TIMEOUT="60", OMP_NUM_THREADS="1")
    status, output = run([sys.executable, "-m", "torch.distributed.run", *flags, worker], env)
    assert status == 0, output
    assert all(f"rank {rank} is done" in output for rank in "01")
