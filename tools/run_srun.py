"""Runs srun, and starts its tasks again when they were preempted, ran out of time, or lost a process or a node.

    MAX_REQUEUES=50 python tools/run_srun.py <arguments of srun>        tools/run_dist_slurm.sh calls it

On a login node srun makes a job of its own, which Slurm never requeues, because only batch jobs can be: it is submitted again.
Within a batch job that job is requeued. In both cases the tasks see SLURM_RESTART_COUNT, and main.py goes on with its newest
checkpoint. An allocation made by salloc is its user's, and not renewed.

SIGTERM and SIGHUP let the tasks save and leave, for good; a second SIGTERM does not wait for them. SIGUSR1 and SIGUSR2 are the
tasks'. Two interrupts within a second end everything, as with srun.

srun's exit status alone says too little: it is the highest of all tasks', those included that it ended because another had
failed, and 0 if a node was lost. So the state of the job decides, then the first failure that srun's messages tell:

| what happened | srun's status | state of the job |
|---|---|---|
| preempted, whatever PreemptMode | 75 | PREEMPTED |
| preempted with a GraceTime; signalled before the time limit | 75 | FAILED |
| time limit, not left in time | 75, 143 or 137 | TIMEOUT |
| scancel | 75 | CANCELLED |
| node lost | 0 | NODE_FAIL |
| a task killed, a mistake of the user's | the highest of the tasks' | FAILED |
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees only its own folder, not the project
from util.errors import EXIT_LOST_PROCESS, EXIT_PREEMPTED
from util.slurm_job import job_fields, restart_count, why_job_is_ended

PAUSE = 5.0  # seconds before a job is submitted again: what fails at once should not keep Slurm busy
PATIENCE = 300  # seconds to wait for the state of a job whose nodes are being cleaned up

BY_SIGNAL, OUT_OF_MEMORY, NODE_LOST = -1, -2, -3  # failures of tasks that are no exit statuses


class Messages(threading.Thread):
    """Shows what srun and the tasks write to standard error, and notes what it says about the job.

    `job` is its number, "" if no task has started; `failure` how the first task that failed ended: its exit status, one of
    the constants above, or None.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(daemon=True)
        self.job, self.failure = "", None
        self._stream = stream
        self.start()

    def run(self) -> None:
        unfinished = b""
        while chunk := os.read(self._stream.fileno(), 1 << 16):
            with contextlib.suppress(OSError):  # the terminal is gone; srun must not block for that
                os.write(sys.stderr.fileno(), chunk)
            *lines, unfinished = (unfinished + chunk).split(b"\n")
            for line in lines:
                self._note(line.decode(errors="replace"))

    def _note(self, line: str) -> None:
        if found := re.search(r"run_dist_slurm\.sh: job (\d+) on ", line):
            self.job = found[1]
        if self.failure is None and (found := re.match(r"srun: error: .*: tasks? [\d,-]+: (.*)", line)):
            code = re.match(r"Exited with exit code (\d+)", found[1])
            self.failure = int(code[1]) if code else OUT_OF_MEMORY if found[1].startswith("Out Of Memory") else BY_SIGNAL
        elif self.failure is None and line.startswith("srun: error: Node failure on "):
            self.failure = NODE_LOST


class Srun:
    """srun once more each time `run` is called; signals to this process reach its tasks.

    told_to_end: the last signal's name if this process was asked to end, else "". In a batch job, whose processes get Slurm's
    signals all at once, that says nothing of what becomes of the job.
    """

    def __init__(self, arguments: Sequence[str], in_batch_job: bool) -> None:
        self._command = ["srun", *arguments]
        self._in_batch_job = in_batch_job
        self._process: subprocess.Popen[bytes] | None = None
        self._starting = False
        self.told_to_end = ""
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._handle)

    def run(self) -> tuple[int, Messages]:
        """srun's exit status as a shell gives it, and its messages."""
        self._starting = True
        self._process = process = subprocess.Popen(self._command, stderr=subprocess.PIPE)
        self._starting = False
        if self.told_to_end:
            process.send_signal(signal.SIGUSR1)
        assert process.stderr
        messages = Messages(process.stderr)
        status = process.wait()
        self._process = None
        messages.join(10)  # a process that srun left behind may hold the stream
        return (status if status >= 0 else 128 - status), messages

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.told_to_end == "SIGTERM"
        if number not in (signal.SIGUSR1, signal.SIGUSR2):
            self.told_to_end = signal.Signals(number).name
        if self._process is None:
            if self.told_to_end and not self._starting and not self._in_batch_job:
                sys.exit(128 + number)
        elif number == signal.SIGINT:  # the terminal has sent it to srun as well
            say("interrupted: when these tasks end they are not started again")
        else:  # at SIGTERM srun would kill the tasks
            self._process.send_signal(number if again or not self.told_to_end else signal.SIGUSR1)


def main(arguments: Sequence[str]) -> int:
    """Run srun until its tasks are done or must not be started again; gives the exit status."""
    allocation = os.environ.get("SLURM_JOB_ID", "")
    in_batch_job = bool(allocation) and job_fields(allocation).get("BatchFlag") == "1"
    srun = Srun(arguments, in_batch_job)
    while True:
        status, messages = srun.run()
        failure = messages.failure
        if failure is not None:
            status = failure if failure > 0 else status or EXIT_LOST_PROCESS
        if in_batch_job:
            reason = why_batch_step_ended(job_fields(allocation), failure)
            if reason and may_start_again(allocation, reason, "requeued"):
                subprocess.run(["scontrol", "requeue", allocation], check=False)
            return status
        if allocation or srun.told_to_end:
            return status
        reason = why_own_job_ended(state_of(messages.job), failure)
        if not reason:
            return status
        if not may_start_again(messages.job, reason, "submitted again"):
            return status or EXIT_LOST_PROCESS
        os.environ["SLURM_RESTART_COUNT"] = str(restart_count() + 1)
        time.sleep(PAUSE)


def why_own_job_ended(state: str, failure: int | None) -> str:
    """The reason to submit a job again that srun had made and that has ended in `state`; "" if there is none."""
    reasons = {
        "PREEMPTED": "was preempted", "TIMEOUT": "ran out of time", "NODE_FAIL": "lost a node", "BOOT_FAIL": "lost a node",
        "COMPLETED": "", "CANCELLED": "", "DEADLINE": "", "OUT_OF_MEMORY": "",
    }  # fmt: skip
    return reasons[state] if state in reasons else why_tasks_ended(failure)


def why_batch_step_ended(fields: dict[str, str], failure: int | None) -> str:
    """The reason to requeue the batch job whose tasks have ended; "" if there is none, or Slurm does it."""
    return why_tasks_ended(failure) if fields.get("JobState") == "RUNNING" else why_job_is_ended(fields)


def why_tasks_ended(failure: int | None) -> str:
    """The reason to start the tasks again that lies in themselves; "" if there is none."""
    reasons = {
        EXIT_PREEMPTED: "was asked to leave", EXIT_LOST_PROCESS: "lost a process", BY_SIGNAL: "lost a process",
        NODE_LOST: "lost a node",
    }  # fmt: skip
    return reasons.get(failure, "") if failure is not None else ""


def state_of(job: str) -> str:
    """The state that a job has ended in; "" if the controller does not tell."""
    for _ in range(PATIENCE if job else 0):
        state = job_fields(job).get("JobState", "")
        if state not in ("RUNNING", "COMPLETING"):
            return state
        time.sleep(1)
    return ""


def may_start_again(job: str, reason: str, how: str) -> bool:
    """Whether it has not been done too often; says so."""
    limit = int(os.environ.get("MAX_REQUEUES", "50"))
    if restart_count() >= limit:
        say(f"job {job} {reason}; it stays ended, because it was started again {restart_count()} times already (MAX_REQUEUES)")
        return False
    say(f"job {job} {reason}: {how} (restart {restart_count() + 1} of at most {limit})")
    return True


def say(message: str) -> None:
    print(f"run_dist_slurm.sh: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
