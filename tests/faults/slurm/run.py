"""Preempts, cancels, times out and kills training jobs of a real Slurm: those that go on must end as one never disturbed.

    python -m tests.faults.slurm.run [--folder /tmp/slurm-test] [--only <case> ...]

Sets up a Slurm on this machine by setup.sh (root, Debian packages) unless SLURM_CONF names one with its partitions `low` and
`high`. Two CPU processes train a small detector on generated images, two epochs. The last lines are a table in Markdown.
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
from util.errors import EXIT_PREEMPTED, EXIT_USER_ERROR
from util.slurm_job import job_fields

SETUP = Path(__file__).with_name("setup.sh")
MIDDLE = r"epoch 1 \[ *5/15\]"
START_UP = r"on slurm-test"
ANY = r"SIG\w+"  # Slurm sends SIGTERM to all processes of a batch job, and the script passes one on as SIGUSR1
TRAINING = (
    *SMALL_IMAGES, *SMALL_MODEL, *BATCHFORMER, "--epochs", "2", "--batch_size", "2", "--log_every", "1", "--num_workers", "1",
    "--device", "cpu", "--save_every", "3",
)  # fmt: skip


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


class Run:
    """A training run in a folder of its own; what it prints goes to the file `output`, or to `outputs`."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder = folder
        self.output = folder.parent / f"{folder.name}.out"
        self.outputs = [self.output]
        self.flags = ("--coco_path", str(data), *TRAINING)
        self.job = ""

    @property
    def text(self) -> str:
        return "".join(file.read_text(errors="replace") for file in self.outputs if file.exists())

    def wait_for(self, pattern: str) -> None:
        wait_for(f"{pattern!r} in {self.output}", lambda: re.search(pattern, self.text))

    def stop_in_the_middle(self) -> None:
        """Stop the tasks in the middle of an epoch: Slurm takes up to 30 seconds to act, and wakes what it signals."""
        self.wait_for(MIDDLE)
        for rank in range(2):
            os.kill(task_pid(rank, self.job or self.own_jobs()[0]), signal.SIGSTOP)

    def own_jobs(self) -> list[str]:
        return re.findall(r"run_dist_slurm\.sh: job (\d+) on ", self.text)

    def published(self, *flags: str) -> list[str]:
        """The published command."""
        return ["./tools/run_dist_slurm.sh", "low", self.folder.name, "2", "main.py", *self.flags, *flags,
                "--output_dir", str(self.folder)]  # fmt: skip

    def start(self, *flags: str, **variables: str) -> subprocess.Popen:
        """The published command on a login node."""
        with self.output.open("a") as output:
            return subprocess.Popen(
                self.published(*flags), cwd=ROOT, env=os.environ | variables, stdout=output, stderr=subprocess.STDOUT
            )  # fmt: skip

    def submit_batch(self, *options: str) -> None:
        """The published command within a batch job."""
        flags = ("-p", "low", "--nodes=1", "--ntasks=2", "--requeue", "--open-mode=append", f"--job-name={self.folder.name}")
        command = " ".join(self.published())
        self.job = slurm("sbatch", "--parsable", *flags, f"--output={self.output}", *options, "--wrap", command)

    def submit_submitit(self, *options: str) -> None:
        """Through tools/run_with_submitit.py; its logs of the first task are the output."""
        command = [sys.executable, "tools/run_with_submitit.py", "--partition", "low", "--gpus_per_node", "0", "--tasks_per_node",
                   "2", "--cpus_per_task", "1", *options, "--job_dir", str(self.folder), "--", *self.flags]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60)
        self.job = re.search(r"job (\d+):", done.stdout)[1]
        self.outputs = [self.folder / "submitit" / f"{self.job}_0_log.{kind}" for kind in ("out", "err")]

    def wait_for_requeue(self) -> None:
        """Until the batch job is pending again. Slurm would leave it so for two minutes; within a second it can't start anew."""
        wait_for(f"requeue of job {self.job}", lambda: job_fields(self.job).get("JobState") == "PENDING", 120)
        time.sleep(3)
        slurm("scontrol", "update", f"jobid={self.job}", "starttime=now")

    def wait_for_completion(self) -> None:
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        wait_for(f"end of job {self.job}", lambda: job_fields(self.job).get("JobState") in over)
        fields = job_fields(self.job)
        expect(fields["JobState"] == "COMPLETED", f"job {self.job}: {fields['JobState']}, see {self.output}")
        expect(fields["Restarts"] == "1", f"job {self.job} was restarted {fields['Restarts']} times")


def preempt() -> None:
    """A short job in `high` that needs all of both nodes."""
    slurm("srun", "-p", "high", "-N2", "-n2", "--exclusive", "true")


def end_soon(job: str, seconds: int) -> None:
    """Slurm's time limits are whole minutes; the end of a job can be set more exactly."""
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + seconds))
    slurm("scontrol", "update", f"jobid={job}", f"endtime={end}")


def task_pid(rank: int, job: str) -> int:
    """The process id of a job's task: what Slurm's daemon has started in a step, and not the batch script."""
    wanted = {"SLURM_JOB_ID": job, "SLURM_PROCID": str(rank), "SLURM_STEP_ID": "0"}.items()
    for pid, parent, variables in variables_of_processes():
        with contextlib.suppress(OSError):  # the parent has ended meanwhile
            if wanted <= variables.items() and Path(f"/proc/{parent}/comm").read_text().startswith("slurmstepd"):
                return pid
    raise AssertionError(f"no process of rank {rank} of job {job}")


@dataclass(frozen=True)
class Case:
    """do(run) disturbs a run and returns what happened to it. identical: it must end as the undisturbed run."""

    title: str
    do: Callable[[Run], str]
    identical: bool = True


def undisturbed(run: Run) -> str:
    expect(run.start().wait(600) == 0, f"see {run.output}")
    expect(len(run.own_jobs()) == 1, "one job")
    return "exit status 0"


def saved_mid_epoch(run: Run, who: str) -> str:
    found = re.search(rf"asked to leave by {who}; (saved in epoch \d+, after \d+ of \d+ images)", run.text)
    expect(found, f"{run.output} says nothing of {who}")
    return found[1]


def resubmitted(run: Run, process: subprocess.Popen, reason: str, jobs: int = 2) -> str:
    expect(process.wait(600) == 0, f"exit status {process.returncode}, see {run.output}")
    told = re.findall(r"run_dist_slurm.sh: job \d+ (.*): submitted again", run.text)
    expect(told == [reason] * (jobs - 1), f"told: {told}")
    expect(len(run.own_jobs()) == jobs, f"{len(run.own_jobs())} jobs")
    return f"{reason}: submitted again"


def requeued(run: Run, by: str, reason: str = "") -> str:
    """Wait until the job is pending again and has ended well; the script must have told the reason, if it was the script."""
    run.wait_for_requeue()
    run.wait_for_completion()
    expect(f"{reason}: requeued" in run.text or not reason, "told")
    return f"requeued by {by}"


def preempted(run: Run) -> str:
    process = run.start()
    run.stop_in_the_middle()
    preempt()
    end = resubmitted(run, process, "was preempted")
    return f"{saved_mid_epoch(run, 'SIGTERM')}; {end}"


def preempted_at_start_up(run: Run) -> str:
    process = run.start()
    run.wait_for(START_UP)
    preempt()
    return resubmitted(run, process, "was preempted")


def preempted_with_grace(run: Run) -> str:
    slurm("scontrol", "update", "partition=low", "gracetime=20")
    try:
        process = run.start()
        run.stop_in_the_middle()
        preempt()
        end = resubmitted(run, process, "was asked to leave")
        return f"{saved_mid_epoch(run, 'SIGTERM')}; {end}"
    finally:
        slurm("scontrol", "update", "partition=low", "gracetime=0")


def time_limit(run: Run) -> str:
    process = run.start(SIGNAL_SECONDS="60")
    run.stop_in_the_middle()
    end_soon(run.own_jobs()[0], 60)
    end = resubmitted(run, process, "was asked to leave")
    return f"{saved_mid_epoch(run, 'SIGUSR1')}; {end}"


def node_lost(run: Run) -> str:
    process = run.start()
    run.wait_for(MIDDLE)
    node = job_fields(run.own_jobs()[0])["NodeList"]
    slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    try:
        return resubmitted(run, process, "lost a node")
    finally:
        subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], capture_output=True, check=False)
        wait_for("return of the node", lambda: slurm("sinfo", "-h", "-p", "high", "-t", "idle", "-o", "%D") == "2")


def task_killed(run: Run) -> str:
    process = run.start()
    run.wait_for(MIDDLE)
    os.kill(task_pid(1, run.own_jobs()[0]), signal.SIGKILL)
    return resubmitted(run, process, "lost a process")


def batch_preempted(run: Run) -> str:
    run.submit_batch()
    run.stop_in_the_middle()
    preempt()
    end = requeued(run, "Slurm")
    return f"{saved_mid_epoch(run, ANY)}; {end}"


def batch_preempted_by_cancelling(run: Run) -> str:
    slurm("scontrol", "update", "partition=low", "preemptmode=cancel")
    try:
        run.submit_batch()
        run.stop_in_the_middle()
        preempt()
        end = requeued(run, "the script", "was preempted")
    finally:
        slurm("scontrol", "update", "partition=low", "preemptmode=requeue")
    return f"{saved_mid_epoch(run, ANY)}; {end}"


def batch_time_limit(run: Run) -> str:
    run.submit_batch()
    run.stop_in_the_middle()
    end_soon(run.job, 1)
    end = requeued(run, "the script", "ran out of time")
    return f"{saved_mid_epoch(run, ANY)}; {end}"


def batch_signal(run: Run) -> str:
    run.submit_batch("--signal=USR1@60")
    run.stop_in_the_middle()
    end_soon(run.job, 60)
    end = requeued(run, "the script", "was asked to leave")
    return f"{saved_mid_epoch(run, 'SIGUSR1')}; {end}"


def batch_task_killed(run: Run) -> str:
    run.submit_batch()
    run.wait_for(MIDDLE)
    os.kill(task_pid(1, run.job), signal.SIGKILL)
    return requeued(run, "the script", "lost a process")


def submitit_preempted(run: Run) -> str:
    run.submit_submitit()
    run.stop_in_the_middle()
    preempt()
    end = requeued(run, "Slurm")
    return f"{saved_mid_epoch(run, ANY)}; {end}"


def submitit_time_limit(run: Run) -> str:
    run.submit_submitit()
    run.stop_in_the_middle()
    end_soon(run.job, 120)
    end = requeued(run, "submitit")
    return f"{saved_mid_epoch(run, 'SIGUSR2')}; {end}"


def wrong_flag(run: Run) -> str:
    process = run.start("--coco_path", "no/such/folder")
    expect(process.wait(300) == EXIT_USER_ERROR, f"exit status {process.returncode}")
    expect(len(run.own_jobs()) == 1 and "submitted again" not in run.text, "not submitted again")
    return "exit status 2, not submitted again"


def cancelled(run: Run) -> str:
    process = run.start()
    run.stop_in_the_middle()
    slurm("scancel", run.own_jobs()[0])
    expect(process.wait(300) == EXIT_PREEMPTED, f"exit status {process.returncode}")
    expect(len(run.own_jobs()) == 1 and "submitted again" not in run.text, "not submitted again")
    return f"{saved_mid_epoch(run, 'SIGTERM')}; exit status 75, not submitted again"


def batch_cancelled(run: Run) -> str:
    run.submit_batch()
    run.stop_in_the_middle()
    slurm("scancel", run.job)
    wait_for("the end", lambda: job_fields(run.job)["JobState"] == "CANCELLED", 120)
    expect("requeued" not in run.text, "not requeued")
    return f"{saved_mid_epoch(run, ANY)}; not requeued"


def submitit_cancelled(run: Run) -> str:
    run.submit_submitit()
    run.stop_in_the_middle()
    slurm("scancel", run.job)
    wait_for("the end", lambda: job_fields(run.job)["JobState"] == "CANCELLED", 120)
    return f"{saved_mid_epoch(run, ANY)}; not requeued"


def ended_and_started_again(run: Run) -> str:
    process = run.start()
    run.stop_in_the_middle()
    process.send_signal(signal.SIGTERM)
    slurm("scancel", "--signal=CONT", run.own_jobs()[0])
    expect(process.wait(300) == EXIT_PREEMPTED, f"exit status {process.returncode}")
    expect("submitted again" not in run.text, "not submitted again")
    expect(run.start("--resume", "auto").wait(600) == 0, f"see {run.output}")
    return f"{saved_mid_epoch(run, 'SIGUSR1')}; exit status 75, not submitted again; `--resume auto` went on"


CASES = {
    "undisturbed": Case("published command, undisturbed", undisturbed),
    "preempted": Case("preempted in the middle of an epoch", preempted),
    "preempted_at_start_up": Case("preempted during start-up", preempted_at_start_up),
    "preempted_with_grace": Case("preempted with a GraceTime", preempted_with_grace),
    "time_limit": Case("time limit, USR1 before it", time_limit),
    "node_lost": Case("node lost", node_lost),
    "task_killed": Case("`kill -9` of a task", task_killed),
    "ended_and_started_again": Case("SIGTERM to the script, then the same with `--resume auto`", ended_and_started_again),
    "batch_preempted": Case("in a batch job: preempted", batch_preempted),
    "batch_preempted_by_cancelling": Case("in a batch job: preempted, PreemptMode=CANCEL", batch_preempted_by_cancelling),
    "batch_time_limit": Case("in a batch job: time limit without a signal before it", batch_time_limit),
    "batch_signal": Case("in a batch job: time limit, `--signal=USR1@60`", batch_signal),
    "batch_task_killed": Case("in a batch job: `kill -9` of a task", batch_task_killed),
    "submitit_preempted": Case("submitit: preempted", submitit_preempted),
    "submitit_time_limit": Case("submitit: time limit", submitit_time_limit),
    "wrong_flag": Case("a wrong path", wrong_flag, identical=False),
    "cancelled": Case("scancel", cancelled, identical=False),
    "batch_cancelled": Case("in a batch job: scancel", batch_cancelled, identical=False),
    "submitit_cancelled": Case("submitit: scancel", submitit_cancelled, identical=False),
}


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
            end = f"differs: {' '.join(wrong)[:200]}" if wrong else "identical" if case.identical else "as it should"
        except (AssertionError, subprocess.SubprocessError, OSError) as error:
            happened, end, wrong = str(error).replace("\n", " "), "FAILED", ["failed"]
            slurm("scancel", f"--name={name}")
        good = good and not wrong
        rows.append(f"| {case.title} | {happened} | {end} |")
        print(rows[-1], flush=True)
    print("\n| Slurm | what happened | weights, optimiser, log.txt |\n|---|---|---|")
    print("\n".join(rows))
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/slurm-test"), help="for Slurm, and the runs in its folder runs")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE", help=" ".join(CASES))
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
