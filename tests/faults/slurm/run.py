"""Preempts, cancels, times out and kills training jobs of a real Slurm: those that go on must end
as one never disturbed.

    python -m tests.faults.slurm.run [--folder /tmp/slurm-test] [--only <case> ...]

Sets up a Slurm on this machine by setup.sh (root, Debian packages) unless SLURM_CONF names one with
its partitions `low` and `high`. Two CPU processes train a small detector on generated images, two
epochs. The batch script is the one of docs/reliability.md. The last lines are a table in Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.compare import differences
from tests.helpers import BATCHFORMER, ROOT, SMALL_IMAGES, SMALL_MODEL, environment, write_coco
from tests.processes import variables_of_processes
from tests.test_docs import blocks
from util.errors import EXIT_PREEMPTED, EXIT_USER_ERROR

SETUP = Path(__file__).with_name("setup.sh")
MIDDLE = r"epoch 1 \S+ \[ *5/15\]"
START_UP = r"device: "
SIGNAL_SECONDS = 120  # of the scripts; Slurm may send the signal a minute earlier
UNDISTURBED_PARTITION = ("preemptmode=requeue", "gracetime=0")
TRAINING = (
    *SMALL_IMAGES,
    *SMALL_MODEL,
    *BATCHFORMER,
    "--epochs",
    "2",
    "--batch_size",
    "2",
    "--log_every",
    "1",
    "--num_workers",
    "1",
    "--device",
    "cpu",
    "--save_every",
    "3",
)


def wait_for(what: str, happened: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not happen in {seconds} s")
        time.sleep(0.05)


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout.strip()


def expect(condition: object, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def job_fields(job: str) -> dict[str, str]:
    """The fields of `scontrol show job` by name."""
    return dict(re.findall(r"(?:^|\s)([^\s=]+)=(\S*)", slurm("scontrol", "-o", "show", "job", job)))


class Run:
    """A training run in a folder of its own; what it prints goes to the file `output`, or to
    `outputs`.
    """

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.name = folder, folder.name
        self.output = folder.parent / f"{folder.name}.out"
        self.outputs = [self.output]
        self.flags = ("--coco_path", str(data), *TRAINING)

    @property
    def text(self) -> str:
        return "".join(file.read_text(errors="replace") for file in self.outputs if file.exists())

    @property
    def job(self) -> str:
        """The number of its newest job."""
        return slurm(
            "squeue", "--noheader", "--states=all", "--sort=i", "--format=%A", f"--name={self.name}"
        ).splitlines()[-1]

    @property
    def state(self) -> str:
        return job_fields(self.job)["JobState"]

    def wait_for(self, pattern: str) -> None:
        wait_for(f"{pattern!r} in {self.output}", lambda: re.search(pattern, self.text))

    def stop_tasks(self) -> None:
        """Until Slurm signals them, which may take it 30 seconds. It also wakes them."""
        for rank in range(2):
            os.kill(task_pid(rank, self.job), signal.SIGSTOP)

    def wait_for_exit(self, status: int) -> None:
        """Until the command on the login node has ended."""
        expect(self.process.wait(600) == status, f"exit status {self.process.returncode}, see {self.output}")

    def command(self, *flags: str) -> list[str]:
        """The published command."""
        return [
            "./tools/run_dist_slurm.sh",
            "low",
            self.name,
            "2",
            "main.py",
            *self.flags,
            *flags,
            "--output_dir",
            str(self.folder),
        ]

    def login(self, *flags: str) -> None:
        """The published command on a login node."""
        with self.output.open("a") as output:
            self.process = subprocess.Popen(
                self.command(*flags), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
            )

    def batch(self, *flags: str) -> None:
        """The batch script of docs/reliability.md, with this run's command."""
        (script,) = blocks(ROOT / "docs/reliability.md", "sh")
        command = " ".join(self.command("--resume", "auto", *flags))
        script, found = re.subn(r"^GPUS_PER_NODE=.*$", command, script, flags=re.MULTILINE)
        expect(found == 1, "the published command in the script")
        path = self.folder.parent / f"{self.name}.sh"
        path.write_text(script.replace("exps/r50", str(self.folder)))
        options = (
            "-p",
            "low",
            "--ntasks-per-node=2",
            "--cpus-per-task=1",
            "--gres=none",
            f"--job-name={self.name}",
        )
        slurm("sbatch", *options, f"--output={self.output}", str(path))

    def submitit(self) -> None:
        """Through tools/run_with_submitit.py; its logs of the first task are the output."""
        command = [
            sys.executable,
            "tools/run_with_submitit.py",
            "--partition",
            "low",
            "--gpus_per_node",
            "0",
            "--tasks_per_node",
            "2",
            "--cpus_per_task",
            "1",
            "--job_dir",
            str(self.folder),
            "--",
            *self.flags,
        ]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
        self.outputs = [self.folder / "submitit" / f"{self.job}_0_log.{kind}" for kind in ("out", "err")]

    def wait_for_tasks_to_end(self) -> None:
        wait_for(
            f"end of the tasks of job {self.job}",
            lambda: not any(task_pids(rank, self.job) for rank in range(2)),
            120,
        )

    def wait_for_requeue(self) -> None:
        """Until the batch job is pending again. Slurm would leave it so for two minutes; within a
        second it can't start anew.
        """
        wait_for(f"requeue of job {self.job}", lambda: self.state == "PENDING", 120)
        time.sleep(3)
        slurm("scontrol", "update", f"jobid={self.job}", "starttime=now")

    def wait_for_state(self, wanted: str, restarts: int = 0) -> None:
        """Until the batch job has ended."""
        wait_for(
            f"end of job {self.job}", lambda: self.state not in ("PENDING", "RUNNING", "COMPLETING"), 600
        )
        fields = job_fields(self.job)
        expect(fields["JobState"] == wanted, f"job {self.job}: {fields['JobState']}, see {self.output}")
        expect(
            int(fields["Restarts"]) == restarts, f"job {self.job} was restarted {fields['Restarts']} times"
        )


def task_pids(rank: int, job: str) -> list[int]:
    """The processes that Slurm's daemon has started as a job's task `rank`."""
    wanted = {"SLURM_JOB_ID": job, "SLURM_PROCID": str(rank), "SLURM_STEP_ID": "0"}.items()
    found = []
    for pid, parent, variables in variables_of_processes():
        with contextlib.suppress(OSError):  # the parent has ended meanwhile
            if wanted <= variables.items() and Path(f"/proc/{parent}/comm").read_text().startswith(
                "slurmstepd"
            ):
                found.append(pid)
    return found


def task_pid(rank: int, job: str) -> int:
    pids = task_pids(rank, job)
    expect(len(pids) == 1, f"processes of rank {rank} of job {job}: {pids}")
    return pids[0]


# What disturbs a run


def nothing(run: Run) -> None:
    pass


def preempt(run: Run) -> None:
    """A short job in `high` needs all of both nodes."""
    slurm("srun", "-p", "high", "-N2", "-n2", "--exclusive", "true")


def end_soon(run: Run) -> None:
    """Set the job's time limit so that its signal is due now."""
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + SIGNAL_SECONDS))
    slurm("scontrol", "update", f"jobid={run.job}", f"endtime={end}")


def kill_task(run: Run) -> None:
    os.kill(task_pid(1, run.job), signal.SIGKILL)


def lose_node(run: Run) -> None:
    """The daemon of the job's node is stopped, and all of the job on the node is killed."""
    job, node = run.job, job_fields(run.job)["NodeList"]
    signal_processes(signal.SIGSTOP, f"slurmd -N {node}")
    signal_processes(signal.SIGKILL, f"slurmstepd: [{job}.")
    for pid, _, variables in variables_of_processes():
        if variables.get("SLURM_JOB_ID") == job:
            os.kill(pid, signal.SIGKILL)
    slurm(
        "scontrol", "update", f"nodename={node}", "state=down", "reason=test"
    )  # else it takes SlurmdTimeout


def signal_processes(number: int, command: str) -> None:
    """Signal the processes whose command line begins so."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if (folder / "cmdline").read_text().replace("\0", " ").startswith(command):
                os.kill(int(folder.name), number)


def cancel(run: Run) -> None:
    slurm("scancel", run.job)


# How it ends: waits for it, and says it


def exits(status: int) -> Callable[[Run], str]:
    def end(run: Run) -> str:
        run.wait_for_exit(status)
        return f"exit status {status}"

    return end


def exits_and_goes_on(status: int) -> Callable[[Run], str]:
    def end(run: Run) -> str:
        run.wait_for_exit(status)
        run.wait_for_tasks_to_end()
        run.login("--resume", "auto")
        run.wait_for_exit(0)
        return f"exit status {status}; the same command with `--resume auto` goes on"

    return end


def refused(run: Run) -> str:
    # Slurm ends the other tasks when one has failed, and srun gives the highest status of all.
    status = run.process.wait(300)
    expect(status in (EXIT_USER_ERROR, EXIT_PREEMPTED, 143), f"exit status {status}, see {run.output}")
    expect("error: --coco_path no/such/folder" in run.text, f"{run.output} does not name the path")
    return f"exit status {status}; `error: --coco_path ...`"


def requeued_by(whom: str) -> Callable[[Run], str]:
    def end(run: Run) -> str:
        run.wait_for_requeue()
        run.wait_for_state("COMPLETED", restarts=1)
        return f"requeued by {whom}"

    return end


def stays_ended(state: str) -> Callable[[Run], str]:
    def end(run: Run) -> str:
        run.wait_for_state(state)
        return "not requeued"

    return end


def stays_ended_and_goes_on(state: str) -> Callable[[Run], str]:
    def end(run: Run) -> str:
        run.wait_for_state(state)
        run.batch()
        run.wait_for_state("COMPLETED")
        return "not requeued; the same `sbatch` goes on"

    return end


@dataclass(frozen=True)
class Case:
    """A run that is started, disturbed, and comes to its end.

    when: what it has printed when it is disturbed. asked: the signal that its tasks get, for which
    they are stopped; "" if none. partition: settings of the partition. identical: it must end as
    the undisturbed run.
    """

    title: str
    start: Callable[[Run], None]
    disturb: Callable[[Run], None]
    end: Callable[[Run], str]
    when: str = MIDDLE
    asked: str = ""
    partition: tuple[str, ...] = ()
    identical: bool = True

    def do(self, run: Run) -> str:
        """Gives what happened. Raises AssertionError if that is not what should happen."""
        slurm("scontrol", "update", "partition=low", *UNDISTURBED_PARTITION, *self.partition)
        self.start(run)
        run.wait_for(self.when)
        if self.asked:
            run.stop_tasks()
        self.disturb(run)
        end = self.end(run)
        if self.identical and self.when == MIDDLE and self.disturb is not nothing:
            expect("resuming from" in run.text, f"{run.output} does not say that the run continues")
        if not self.asked:
            return end
        found = re.search(
            rf"stopped by {self.asked}; (saved in epoch \d+, after \d+ of \d+ "
            rf"images)",
            run.text,
        )
        expect(found, f"{run.output} says nothing of {self.asked}")
        return f"{found[1]}; {end}"


def wrong_path(start: Callable[..., None]) -> Callable[[Run], None]:
    return lambda run: start(run, "--coco_path", "no/such/folder")


CANCEL, GRACE = "preemptmode=cancel", "gracetime=60"
TERM, USR1, USR2 = "SIGTERM", "SIGUSR1", "SIGUSR2"
CASES = {
    "undisturbed": Case("published command, undisturbed", Run.login, nothing, exits(0)),
    "preempted": Case(
        "preempted in the middle of an epoch", Run.login, preempt, exits_and_goes_on(75), asked=TERM
    ),
    "preempted_at_start_up": Case(
        "preempted during start-up", Run.login, preempt, exits_and_goes_on(75), when=START_UP
    ),
    "time_limit": Case("time limit, USR1 before it", Run.login, end_soon, exits_and_goes_on(75), asked=USR1),
    "task_killed": Case("`kill -9` of a task", Run.login, kill_task, exits_and_goes_on(137)),
    "node_lost": Case("node lost", Run.login, lose_node, exits_and_goes_on(0)),
    "batch_preempted": Case("batch script: preempted", Run.batch, preempt, requeued_by("Slurm"), asked=TERM),
    "batch_grace": Case(
        "batch script: preempted with a GraceTime",
        Run.batch,
        preempt,
        requeued_by("the script"),
        asked=TERM,
        partition=(GRACE,),
    ),
    "batch_grace_and_cancel": Case(
        "batch script: PreemptMode=CANCEL with a GraceTime",
        Run.batch,
        preempt,
        requeued_by("the script"),
        asked=TERM,
        partition=(CANCEL, GRACE),
    ),
    "batch_cancel": Case(
        "batch script: PreemptMode=CANCEL",
        Run.batch,
        preempt,
        stays_ended_and_goes_on("PREEMPTED"),
        asked=TERM,
        partition=(CANCEL,),
    ),
    "batch_time_limit": Case(
        "batch script: time limit, USR1 before it", Run.batch, end_soon, requeued_by("the script"), asked=USR1
    ),
    "batch_task_killed": Case(
        "batch script: `kill -9` of a task", Run.batch, kill_task, requeued_by("the script")
    ),
    "batch_node_lost": Case("batch script: node lost", Run.batch, lose_node, requeued_by("Slurm")),
    "submitit_preempted": Case(
        "submitit: preempted", Run.submitit, preempt, requeued_by("Slurm"), asked=TERM
    ),
    "submitit_time_limit": Case(
        "submitit: time limit, USR2 before it", Run.submitit, end_soon, requeued_by("submitit"), asked=USR2
    ),
    "submitit_node_lost": Case("submitit: node lost", Run.submitit, lose_node, requeued_by("Slurm")),
    "submitit_grace": Case(
        "submitit: preempted with a GraceTime",
        Run.submitit,
        preempt,
        stays_ended("FAILED"),
        asked=TERM,
        partition=(GRACE,),
        identical=False,
    ),
    "submitit_task_killed": Case(
        "submitit: `kill -9` of a task", Run.submitit, kill_task, stays_ended("FAILED"), identical=False
    ),
    "wrong_path": Case(
        "a wrong path", wrong_path(Run.login), nothing, refused, when=START_UP, identical=False
    ),
    "batch_wrong_path": Case(
        "batch script: a wrong path",
        wrong_path(Run.batch),
        nothing,
        stays_ended("FAILED"),
        when=START_UP,
        identical=False,
    ),
    "cancelled": Case("scancel", Run.login, cancel, exits(75), asked=TERM, identical=False),
    "batch_cancelled": Case(
        "batch script: scancel", Run.batch, cancel, stays_ended("CANCELLED"), asked=TERM, identical=False
    ),
    "submitit_cancelled": Case(
        "submitit: scancel", Run.submitit, cancel, stays_ended("CANCELLED"), asked=TERM, identical=False
    ),
}


def wait_for_nodes() -> None:
    """Until both nodes are idle. One that was lost comes back."""
    signal_processes(signal.SIGCONT, "slurmd -N ")
    down = slurm("sinfo", "-h", "-p", "high", "-t", "down", "-o", "%N")
    if down:
        slurm("scontrol", "update", f"nodename={down}", "state=resume")
    wait_for("idle nodes", lambda: slurm("sinfo", "-h", "-p", "high", "-t", "idle", "-o", "%D") == "2")


def run_cases(names: Sequence[str], work: Path) -> bool:
    """Run the cases, the undisturbed one first, and print the table; gives whether all held."""
    data = work / "data"
    write_coco(data, num_train=60, num_val=8)
    rows, good = [], True
    for name in dict.fromkeys(["undisturbed", *names]):
        case, run = CASES[name], Run(work / name, data)
        try:
            happened = case.do(run)
            wrong = differences(work / "undisturbed", run.folder) if case.identical else []
            end = (
                f"differs: {' '.join(wrong)[:200]}"
                if wrong
                else "identical"
                if case.identical
                else "as it should"
            )
        except (AssertionError, subprocess.SubprocessError, OSError) as error:
            happened, end, wrong = str(error).replace("\n", " "), "FAILED", ["failed"]
            slurm("scancel", f"--name={name}")
        wait_for_nodes()
        good = good and not wrong
        rows.append(f"| {case.title} | {happened} | {end} |")
        print(rows[-1], flush=True)
    print("\n| Slurm | what happened | weights, optimiser, log.txt |\n|---|---|---|")
    print("\n".join(rows))
    return good


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("/tmp/slurm-test"),
        help="for Slurm, and the runs in its folder runs",
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE", help=" ".join(CASES)
    )
    args = parser.parse_args()
    started_here = "SLURM_CONF" not in os.environ
    if started_here:
        subprocess.run([SETUP, "start", args.folder], check=True)
        os.environ["SLURM_CONF"] = str(args.folder / "slurm.conf")
    work = args.folder / "runs" / time.strftime("%Y%m%d-%H%M%S")
    work.mkdir(parents=True)
    os.environ |= environment(GRES="none", CPUS_PER_TASK="1")
    try:
        return 0 if run_cases(args.only, work) else 1
    finally:
        if started_here:
            subprocess.run([SETUP, "stop", args.folder], check=True)


if __name__ == "__main__":
    sys.exit(main())
