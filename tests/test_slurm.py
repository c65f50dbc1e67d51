"""Slurm and submitit: tasks get their ranks, and a job is started again when it must be and only then.

Slurm's commands are stand-ins here that answer as the real ones were seen to; tests/faults/slurm runs the real ones.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests.helpers import ROOT
from tests.processes import wait_until
from tests.test_launch import AWKWARD, REPORT_COMMAND, environment, executable, finish, reports, run, start
from util.errors import EXIT_LOST_PROCESS, EXIT_PREEMPTED
from util.slurm_job import job_fields

# tools/run_dist_slurm.sh

# Stands for Slurm: notes its own flags and runs the command once for each task.
SRUN = f"""#!{sys.executable}
import os, subprocess, sys
arguments = sys.argv[1:]
first = arguments.index("bash")
flags = arguments[:first]
open(os.environ["REPORT"] + "/flags", "w").write("\\n".join(flags))
options = dict(flag[2:].split("=", 1) for flag in flags if flag.startswith("--") and "=" in flag)
tasks, on_node = int(options["ntasks"]), int(options["ntasks-per-node"])
for task in range(tasks):
    slurm = dict(PROCID=task, NTASKS=tasks, LOCALID=task % on_node, JOB_ID=41, STEP_ID=1, STEP_NODELIST="gpu[7-8]")
    env = os.environ | dict(("SLURM_" + name, str(value)) for name, value in slurm.items())
    subprocess.run(arguments[first:], env=env, check=True)
"""
SCONTROL = '#!/usr/bin/env bash\n[[ $* == "show hostnames gpu[7-8]" ]] && printf "gpu7\\ngpu8\\n" || echo JobState=COMPLETED\n'


def test_slurm_tasks_get_the_variables_of_torchrun(tmp_path: Path) -> None:
    executable(tmp_path / "bin/srun", SRUN)
    executable(tmp_path / "bin/scontrol", SCONTROL)
    command = executable(tmp_path / "report", REPORT_COMMAND)
    variables = {"GPUS_PER_NODE": "2", "CPUS_PER_TASK": "3", "SIGNAL_SECONDS": "90", "SRUN_ARGS": "--account=vision --exclusive"}
    env = environment(tmp_path, **variables)
    status, output = run(["./tools/run_dist_slurm.sh", "main part", "my job", "4", command, *AWKWARD], env)
    assert status == 0, output
    assert (tmp_path / "flags").read_text().split("\n") == [
        "-p", "main part", "--job-name=my job", "--gres=gpu:2", "--ntasks=4", "--ntasks-per-node=2",
        "--cpus-per-task=3", "--kill-on-bad-exit=1", "--signal=USR1@90", "--account=vision", "--exclusive",
    ]  # fmt: skip
    common = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu7", "MASTER_PORT": "10042"}
    common |= {"OMP_NUM_THREADS": "1", "arguments": AWKWARD}
    for rank, report in enumerate(reports(tmp_path, 4)):
        assert report == common | {"RANK": str(rank), "LOCAL_RANK": str(rank % 2)}


def test_slurm_without_gpus_asks_for_none(tmp_path: Path) -> None:
    executable(tmp_path / "bin/srun", SRUN)
    executable(tmp_path / "bin/scontrol", SCONTROL)
    command = tmp_path / "report.py"
    command.write_text(REPORT_COMMAND)
    env = environment(tmp_path, GRES="none")
    status, output = run(["./tools/run_dist_slurm.sh", "main", "job", "2", str(command)], env)
    assert status == 0, output
    assert "--gres=none" in (tmp_path / "flags").read_text().split("\n")
    assert [report["OMP_NUM_THREADS"] for report in reports(tmp_path, 2)] == ["4", "4"]


@pytest.mark.parametrize(
    ("arguments", "variables", "reason"),
    [
        (["main", "job", "8"], {}, "usage:"),
        (["main", "job", "many", "true"], {}, "positive integer, not 'many'"),
        (["main", "job", "12", "true"], {}, "12 processes do not divide into nodes of 8"),
        (["main", "job", "8", "true"], {"MAX_REQUEUES": "often"}, "MAX_REQUEUES must be an integer of at least 0, not 'often'"),
        (["main", "job", "8", "true"], {"SIGNAL_SECONDS": "-1"}, "SIGNAL_SECONDS must be an integer of at least 0, not '-1'"),
    ],
)
def test_slurm_refuses_in_one_line(tmp_path: Path, arguments: list[str], variables: dict, reason: str) -> None:
    executable(tmp_path / "bin/srun", SRUN)
    status, output = run(["./tools/run_dist_slurm.sh", *arguments], environment(tmp_path, **variables))
    assert status == 2
    assert output.count("\n") == 1
    assert reason in output


def without_slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine that has no Slurm, also where this one has it."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    for tool in ("bash", "env", "dirname"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    return environment(tmp_path) | {"PATH": str(tmp_path / "bin")}


def test_slurm_not_installed_is_said_in_one_line(tmp_path: Path) -> None:
    status, output = run(["./tools/run_dist_slurm.sh", "main", "job", "8", "true"], without_slurm(tmp_path))
    assert status == 2
    assert output.count("\n") == 1
    assert "there is no srun here" in output


# tools/run_srun.py: each start of srun is an entry of a list: what it prints, its exit status, what scontrol says after it

PLAYED_SRUN = f"""#!{sys.executable}
import json, os, sys
folder = os.environ["REPORT"]
with open(folder + "/starts", "a") as file:
    file.write((os.environ["SLURM_RESTART_COUNT"] or "first") + "\\n")
number = len(open(folder + "/starts").readlines()) - 1
play = json.load(open(folder + "/play"))[number]
print(f"run_dist_slurm.sh: job {{41 + number}} on gpu7", file=sys.stderr)
print(play["messages"], file=sys.stderr)
sys.exit(play["status"])
"""
PLAYED_SCONTROL = f"""#!{sys.executable}
import json, os, sys
folder = os.environ["REPORT"]
if sys.argv[1] == "requeue":
    open(folder + "/requeued", "a").write(sys.argv[2] + "\\n")
else:
    print("JobId=" + sys.argv[-1], json.load(open(folder + "/play"))[int(sys.argv[-1]) - 41]["fields"])
"""
# as the real ones print it
LEFT = "srun: error: gpu7: tasks 0-1: Exited with exit code 75"
MISTAKE = "srun: error: gpu7: task 0: Exited with exit code 2\nsrun: error: gpu8: task 1: Exited with exit code 75"
LOST = "srun: error: gpu7: task 1: Exited with exit code 76"
KILLED = "srun: error: gpu[7-8]: task 1: Killed\nsrun: error: gpu7: task 0: Exited with exit code 75"
NODE = "srun: error: Node failure on gpu7"
MEMORY = "srun: error: gpu7: task 1: Out Of Memory"
DONE = {"messages": "", "status": 0, "fields": "JobState=COMPLETED"}


@pytest.fixture
def run_srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, with Slurm's commands played as the file `play` says, and without a pause."""
    executable(tmp_path / "bin/srun", PLAYED_SRUN)
    executable(tmp_path / "bin/scontrol", PLAYED_SCONTROL)
    for name in [name for name in os.environ if name.startswith(("SLURM", "MAX_REQUEUES"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "")  # main() sets it
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("REPORT", str(tmp_path))
    module = load("run_srun")
    monkeypatch.setattr(module, "PAUSE", 0)
    signals = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in signals}
    yield module
    for number, handler in before.items():
        signal.signal(number, handler)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def play(tmp_path: Path, run_srun: ModuleType, *starts: dict) -> tuple[int, list[str]]:
    """The exit status, and the SLURM_RESTART_COUNT of each start."""
    (tmp_path / "play").write_text(json.dumps(starts))
    status = run_srun.main(["true"])
    return status, (tmp_path / "starts").read_text().split()


@pytest.mark.parametrize(
    ("messages", "status", "state", "reason"),
    [
        (LEFT, 75, "PREEMPTED", "was preempted"),
        (LEFT, 75, "FAILED", "was asked to leave"),  # preempted with a GraceTime, or signalled before the time limit
        ("", 143, "TIMEOUT", "ran out of time"),
        (NODE, 0, "NODE_FAIL", "lost a node"),
        (NODE, 0, "", "lost a node"),  # the controller has forgotten it
        (LOST, 137, "FAILED", "lost a process"),
        (KILLED, 137, "FAILED", "lost a process"),
    ],
)
def test_srun_job_is_submitted_again(tmp_path, run_srun, capfd, messages, status, state, reason) -> None:
    first = {"messages": messages, "status": status, "fields": f"JobState={state}"}
    assert play(tmp_path, run_srun, first, first, DONE) == (0, ["first", "1", "2"])
    shown = capfd.readouterr().err
    assert f"run_dist_slurm.sh: job 41 {reason}: submitted again (restart 1 of at most 50)" in shown
    assert f"run_dist_slurm.sh: job 42 {reason}: submitted again (restart 2 of at most 50)" in shown
    assert messages in shown, "what srun says is passed on"


@pytest.mark.parametrize(
    ("messages", "status", "state", "ends_with"),
    [
        ("", 0, "COMPLETED", 0),
        (MISTAKE, 75, "FAILED", 2),  # the second left because Slurm ended it
        (LEFT, 75, "CANCELLED", 75),
        (KILLED, 137, "CANCELLED", 137),
        (MEMORY, 137, "OUT_OF_MEMORY", 137),
        (MEMORY, 137, "FAILED", 137),
        ("srun: error: gpu7: task 0: Exited with exit code 1", 1, "FAILED", 1),
        ("srun: Job allocation 41 has been revoked", 1, "", 1),  # interrupted while it waited for nodes
    ],
)
def test_srun_job_stays_ended(tmp_path, run_srun, capfd, messages, status, state, ends_with) -> None:
    ended = {"messages": messages, "status": status, "fields": f"JobState={state}"}
    assert play(tmp_path, run_srun, ended) == (ends_with, ["first"])
    assert "again" not in capfd.readouterr().err


def test_srun_job_is_submitted_again_a_bounded_number_of_times(tmp_path, run_srun, capfd, monkeypatch) -> None:
    monkeypatch.setenv("MAX_REQUEUES", "2")
    lost = {"messages": NODE, "status": 0, "fields": "JobState=NODE_FAIL"}
    assert play(tmp_path, run_srun, lost, lost, lost) == (EXIT_LOST_PROCESS, ["first", "1", "2"])
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("run_dist_slurm.sh: job 43 lost a node; it stays ended, because it was started again 2 times already")


@pytest.mark.parametrize(
    ("messages", "fields", "requeued"),
    [
        (LEFT, "JobState=RUNNING", True),
        (KILLED, "JobState=RUNNING", True),
        (LEFT, "JobState=COMPLETING Reason=TimeLimit PreemptTime=None", True),
        (LEFT, "JobState=COMPLETING Reason=None PreemptTime=2026-11-22T14:57:59", True),  # PreemptMode=CANCEL
        (LEFT, "JobState=COMPLETING Reason=None Restarts=1", False),  # PreemptMode=REQUEUE: Slurm has done it
        (LEFT, "JobState=COMPLETING Reason=None PreemptTime=None", False),  # scancel
        (MISTAKE, "JobState=RUNNING", False),
        ("", "JobState=RUNNING", False),
    ],
)
def test_batch_job_is_requeued_unless_slurm_does_it_or_nobody_wants_it(
    tmp_path, run_srun, monkeypatch, messages, fields, requeued
) -> None:  # fmt: skip
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    status = 75 if messages else 0
    ended = {"messages": messages, "status": status, "fields": f"BatchFlag=1 {fields}"}
    play(tmp_path, run_srun, ended)
    assert (tmp_path / "requeued").exists() == requeued
    assert not requeued or (tmp_path / "requeued").read_text() == "41\n", "once"
    assert len((tmp_path / "starts").read_text().split()) == 1, "the tasks start with the job"


def test_batch_job_is_requeued_a_bounded_number_of_times(tmp_path, run_srun, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "50")
    lost = {"messages": LOST, "status": 76, "fields": "BatchFlag=1 JobState=RUNNING"}
    assert play(tmp_path, run_srun, lost) == (EXIT_LOST_PROCESS, ["50"])
    assert not (tmp_path / "requeued").exists()


def test_allocation_of_salloc_is_its_users(tmp_path, run_srun, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    lost = {"messages": LOST, "status": 76, "fields": "BatchFlag=0 JobState=RUNNING"}
    assert play(tmp_path, run_srun, lost) == (EXIT_LOST_PROCESS, ["first"])
    assert not (tmp_path / "requeued").exists()


# as the real one: SIGTERM ends the tasks at once, SIGUSR1 is passed on and lets them save
PATIENT_SRUN = f"""#!{sys.executable}
import os, signal, sys, time

def handle(number, frame):
    note(signal.Signals(number).name)
    if number == signal.SIGTERM:
        sys.exit(137)
    if os.environ["LEAVES"]:
        print({LEFT!r}, file=sys.stderr, flush=True)
        sys.exit(75)

def note(text):
    open(os.environ["REPORT"] + "/noted", "a").write(text + "\\n")

for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, handle)
note("started")
time.sleep(600)
"""


def wait_for_line(path: Path, line: str) -> None:
    wait_until(lambda: path.exists() and line in path.read_text().split(), f"no {line} in {path}")


@pytest.mark.parametrize(("signals", "leaves", "status"), [(["TERM"], "yes", 75), (["HUP"], "yes", 75), (["TERM"] * 2, "", 137)])
def test_signals_let_the_tasks_save_and_the_second_does_not_wait(tmp_path, signals, leaves, status) -> None:
    executable(tmp_path / "bin/srun", PATIENT_SRUN)
    executable(tmp_path / "bin/scontrol", SCONTROL)
    script = start(["./tools/run_dist_slurm.sh", "main", "job", "2", "true"], environment(tmp_path, LEAVES=leaves))
    wait_for_line(tmp_path / "noted", "started")
    for name, reaches_srun in zip(signals, ("SIGUSR1", "SIGTERM"), strict=False):
        script.send_signal(getattr(signal, f"SIG{name}"))
        wait_for_line(tmp_path / "noted", reaches_srun)
    ended_with, output = finish(script)
    assert ended_with == status, output
    assert "submitted again" not in output
    assert (tmp_path / "noted").read_text().split().count("started") == 1


def test_job_that_the_controller_does_not_know_has_no_fields(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert job_fields("41") == {}


# tools/run_with_submitit.py

# Stands for main.py: notes what it was given; in the first run SIGUSR2 reaches rank 0, and all leave.
PREEMPTED_MAIN = """
import json, os, pathlib, signal, time
from util.errors import Preempted

def main(config):
    flags = config.flags()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "SLURM_RESTART_COUNT")
    report = {name: os.environ[name] for name in names} | {"resume": flags["resume"], "bf": flags["bf"]}
    output = pathlib.Path(flags["output_dir"])
    with open(output / ("rank" + report["RANK"]), "a") as file:
        file.write(json.dumps(report) + "\\n")
    if report["SLURM_RESTART_COUNT"] == "0":
        signal.signal(signal.SIGUSR2, lambda *_: None)
        if report["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(2)  # the others leave first
        raise Preempted("asked to leave; saved")
"""
FLAGS = ["--bf", "1", "--insert_idx", "0"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose main.py is a stand-in; the script and the flags are the real ones."""
    root = tmp_path / "project"
    (root / "tools").mkdir(parents=True)
    shutil.copy(ROOT / "tools/run_with_submitit.py", root / "tools")
    shutil.copytree(ROOT / "util", root / "util", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "main.py").write_text(PREEMPTED_MAIN)
    return root


def submitit_command(*arguments: str) -> list[str]:
    return [sys.executable, "tools/run_with_submitit.py", *arguments]


def test_submitit_requeued_job_knows_that_it_is_started_again(project: Path, tmp_path: Path) -> None:
    own = ["--job_dir", "exps/x", "--cluster", "local", "--gpus-per-node", "0", "--tasks_per_node", "2"]
    command = submitit_command(*own, "--cpus_per_task", "3", "--", *FLAGS, "--resume", "start.pth")
    status, output = run(command, environment(tmp_path), cwd=project)
    assert status == 0, output
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "3", "bf": 1}
    for rank in "01":
        runs = [json.loads(line) for line in (project / f"exps/x/rank{rank}").read_text().splitlines()]
        same = common | {"RANK": rank, "LOCAL_RANK": rank, "resume": "start.pth"}
        assert runs == [same | {"SLURM_RESTART_COUNT": count} for count in "01"]
    assert "asked to leave; saved" in next((project / "exps/x/submitit").glob("*_0_log.err")).read_text()


@pytest.fixture
def submitit_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module; scontrol answers with the file `fields`."""
    executable(tmp_path / "bin/scontrol", '#!/usr/bin/env bash\ncat "$REPORT/fields"\n')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("REPORT", str(tmp_path))
    yield load("run_with_submitit")
    signal.set_wakeup_fd(-1)


@pytest.mark.parametrize(
    ("fields", "number", "comes_back"),
    [
        ("JobState=RUNNING Reason=None PreemptTime=None", signal.SIGUSR2, True),  # before the time limit
        ("JobState=RUNNING Reason=None PreemptTime=2026-11-22T14:57:59", signal.SIGTERM, True),  # preempted with a GraceTime
        ("JobState=COMPLETING Reason=None PreemptTime=2026-11-22T14:57:59", signal.SIGTERM, True),  # PreemptMode=CANCEL
        ("JobState=COMPLETING Reason=TimeLimit PreemptTime=None", signal.SIGTERM, True),
        ("JobState=COMPLETING Reason=None Restarts=1", signal.SIGTERM, False),  # Slurm has requeued it
        ("JobState=COMPLETING Reason=None PreemptTime=None", signal.SIGTERM, False),  # scancel
        ("JobState=RUNNING Reason=None PreemptTime=None", signal.SIGTERM, False),  # another task has failed
    ],
)
def test_submitit_first_task_requeues_what_must_come_back(tmp_path, submitit_script, fields, number, comes_back) -> None:
    (tmp_path / "fields").write_text(f"JobId=41 {fields}\n")
    called = []

    def requeue(number: int, frame: object) -> None:
        called.append(number)
        sys.exit(-1)  # as submitit's does

    job = SimpleNamespace(cluster="slurm", job_id="41", global_rank=0)
    with pytest.raises(SystemExit) as end:
        submitit_script.leave(job, requeue, number)
    assert called == [number] * comes_back
    assert end.value.code == (-1 if comes_back else EXIT_PREEMPTED)


def test_submitit_other_tasks_leave_without_a_failure(submitit_script) -> None:
    with pytest.raises(SystemExit) as end:
        submitit_script.leave(SimpleNamespace(global_rank=1), pytest.fail, signal.SIGUSR2)
    assert end.value.code == 0, "another status would make Slurm end the first task before it has requeued the job"


def test_submitit_job_that_slurm_has_requeued_meanwhile_is_no_failure(tmp_path, submitit_script) -> None:
    (tmp_path / "fields").write_text("JobState=COMPLETING PreemptTime=2026-11-22T14:57:59\n")

    def refused(number: int, frame: object) -> None:
        raise subprocess.CalledProcessError(1, "scontrol requeue")

    with pytest.raises(SystemExit) as end:
        submitit_script.leave(SimpleNamespace(cluster="slurm", job_id="41", global_rank=0), refused, signal.SIGTERM)
    assert end.value.code == EXIT_PREEMPTED


def test_submitit_knows_which_signal_came_first(submitit_script) -> None:
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGCONT, signal.SIGUSR2, signal.SIGTERM)}
    try:
        record = submitit_script.SignalRecord()
        assert record.first() == 0
        for number in before:
            os.kill(os.getpid(), number)
        assert record.first() == signal.SIGUSR2, "SIGCONT only wakes"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_submitit_asks_slurm_for_a_signal_before_the_limit_and_for_requeues(project: Path, tmp_path: Path) -> None:
    executable(tmp_path / "bin/sbatch", '#!/usr/bin/env bash\ncp "$1" "$REPORT/submitted"; echo Submitted batch job 41\n')
    executable(tmp_path / "bin/srun", "#!/usr/bin/env bash\n")
    own = ["--job_dir", "exps/x", "--gpus_per_node", "0", "--tasks_per_node", "2", "--partition", "low", "--timeout", "90"]
    status, output = run(submitit_command(*own, "--", *FLAGS), environment(tmp_path), cwd=project)
    assert status == 0, output
    assert "job 41: logs in" in output
    submitted = (tmp_path / "submitted").read_text()
    for line in ("--requeue", "--signal=USR2@120", "--ntasks-per-node=2", "--partition=low", "--time=90"):
        assert f"\n#SBATCH {line}\n" in submitted
    assert "--kill-on-bad-exit=1" in submitted


def test_submitit_failure_of_a_local_job_is_shown(project: Path, tmp_path: Path) -> None:
    (project / "main.py").write_text("def main(config):\n    raise OSError('the disk is full')\n")
    own = ["--job_dir", "exps/x", "--cluster", "local", "--gpus_per_node", "0"]
    status, output = run(submitit_command(*own, "--", *FLAGS), environment(tmp_path), cwd=project)
    assert status != 0
    assert "the disk is full" in output


def test_submitit_mistake_costs_a_line_in_the_log_of_the_job(project: Path, tmp_path: Path) -> None:
    (project / "main.py").write_text(
        "from util.errors import UserError\ndef main(config):\n    raise UserError('no such file')\n"
    )  # fmt: skip
    own = ["--job_dir", "exps/x", "--cluster", "local", "--gpus_per_node", "0"]
    status, output = run(submitit_command(*own, "--", *FLAGS), environment(tmp_path), cwd=project)
    log = next((project / "exps/x/submitit").glob("*_0_log.err"))
    assert status == 2
    assert output.splitlines()[1:] == [f"error: job {log.name.split('_')[0]} has ended early, see the last line of {log}"]
    assert log.read_text().splitlines()[-1] == "error: no such file"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "--job_dir"),
        (["--job_dir", "exps/x", "--nodes", "0"], "at least 1"),
        (["--job_dir", "exps/x", "--batch_size", "2"], "--batch_size"),
        (["--job_dir", "exps/x", "--", "--output-dir", "exps/y"], "--job_dir"),
        (["--job_dir", "exps/x", "--", "--no_such_flag"], "--no_such_flag"),
        (["--job_dir", "exps/x", "--cluster", "local", "--nodes", "2", "--", *FLAGS], "one node"),
        (["--job_dir", "exps/x", "--", *FLAGS], "srun"),
    ],
)
def test_submitit_refuses_in_one_line(project: Path, tmp_path: Path, arguments: list[str], reason: str) -> None:
    status, output = run(submitit_command(*arguments), without_slurm(tmp_path), cwd=project)
    assert status == 2
    assert output.count("\n") == 1
    assert reason in output
