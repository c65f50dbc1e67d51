"""Slurm and submitit: tasks get their ranks, and jobs are requeued when they should be and only
then.

Slurm's commands are stand-ins here that answer as the real ones were seen to; tests/faults/slurm
runs the real ones.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.test_docs import blocks
from tests.test_launch import AWKWARD, REPORT_COMMAND, environment, executable, reports, run

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
    slurm = dict(PROCID=task, NTASKS=tasks, LOCALID=task % on_node)
    slurm |= dict(JOB_ID=41, STEP_ID=1, STEP_NODELIST="gpu[7-8]")
    env = os.environ | dict(("SLURM_" + name, str(value)) for name, value in slurm.items())
    subprocess.run(arguments[first:], env=env, check=True)
"""
SCONTROL = '#!/usr/bin/env bash\n[[ $* == "show hostnames gpu[7-8]" ]] && printf "gpu7\\ngpu8\\n"\n'


def test_slurm_tasks_get_the_variables_of_torchrun(tmp_path: Path) -> None:
    executable(tmp_path / "bin/srun", SRUN)
    executable(tmp_path / "bin/scontrol", SCONTROL)
    command = executable(tmp_path / "report", REPORT_COMMAND)
    variables = {
        "GPUS_PER_NODE": "2",
        "CPUS_PER_TASK": "3",
        "SIGNAL_SECONDS": "90",
        "SRUN_ARGS": "--account=vision --exclusive",
    }
    env = environment(tmp_path, **variables)
    status, output = run(["./tools/run_dist_slurm.sh", "main part", "my job", "4", command, *AWKWARD], env)
    assert status == 0, output
    assert (tmp_path / "flags").read_text().split("\n") == [
        "-p",
        "main part",
        "--job-name=my job",
        "--gres=gpu:2",
        "--ntasks=4",
        "--ntasks-per-node=2",
        "--cpus-per-task=3",
        "--kill-on-bad-exit=1",
        "--signal=USR1@90",
        "--account=vision",
        "--exclusive",
    ]
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
        (
            ["main", "job", "8", "true"],
            {"SIGNAL_SECONDS": "-1"},
            "SIGNAL_SECONDS must be an integer of at least 0, not '-1'",
        ),
    ],
)
def test_slurm_refuses_in_one_line(
    tmp_path: Path, arguments: list[str], variables: dict, reason: str
) -> None:
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


# The batch script of docs/reliability.md


@pytest.mark.parametrize(
    ("status", "saves", "requeued"),
    [(75, True, True), (137, True, True), (75, False, False), (2, True, False), (0, True, False)],
)
def test_batch_script_requeues_a_lost_run_that_has_saved(
    tmp_path, status: int, saves: bool, requeued: bool
) -> None:
    executable(tmp_path / "bin/scontrol", '#!/usr/bin/env bash\necho "$@" >"$REPORT/requeued"\n')
    checkpoint = tmp_path / "checkpoint.pth"
    checkpoint.touch()
    os.utime(checkpoint, (1, 1))
    (script,) = blocks(ROOT / "docs/reliability.md", "sh")
    command = f"{'touch' if saves else 'ls'} {checkpoint}; (exit {status})"
    script, replaced = re.subn("^GPUS_PER_NODE=.*$", command, script, flags=re.MULTILINE)
    assert replaced == 1
    path = executable(tmp_path / "train.sh", script.replace("exps/r50/checkpoint.pth", str(checkpoint)))
    os.utime(path, (2, 2))
    ended_with, output = run([path], environment(tmp_path, SLURM_JOB_ID="41"))
    assert ended_with == status, output
    assert (tmp_path / "requeued").exists() == requeued
    assert not requeued or (tmp_path / "requeued").read_text() == "requeue 41\n"


# tools/run_with_submitit.py

# Stands for main.py: notes what it was given. In the first run all ranks get the signal SIGNAL, and
# rank 0 leaves last.
PREEMPTED_MAIN = """
import json, os, pathlib, signal, time
from util.run.stop import StopRequest

def main(config):
    flags = config.flags()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
    names += ("SLURM_RESTART_COUNT",)
    report = {name: os.environ[name] for name in names} | {"resume": flags["resume"], "bf": flags["bf"]}
    output = pathlib.Path(flags["output_dir"])
    with open(output / ("rank" + report["RANK"]), "a") as file:
        file.write(json.dumps(report) + "\\n")
    if report["SLURM_RESTART_COUNT"] == "0":
        with StopRequest("saved").installed():
            if report["RANK"] == "0":
                time.sleep(2)
            os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
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
    status, output = run(command, environment(tmp_path, SIGNAL="SIGUSR2"), cwd=project)
    assert status == 0, output
    common = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "3",
        "bf": 1,
    }
    for rank in "01":
        runs = [json.loads(line) for line in (project / f"exps/x/rank{rank}").read_text().splitlines()]
        same = common | {"RANK": rank, "LOCAL_RANK": rank, "resume": "start.pth"}
        assert runs == [same | {"SLURM_RESTART_COUNT": count} for count in "01"]
    assert "stopped by SIGUSR2; saved" in next((project / "exps/x/submitit").glob("*_0_log.err")).read_text()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_submitit_requeues_for_its_own_signal_only(project: Path, tmp_path: Path, name: str) -> None:
    own = ["--job_dir", "exps/x", "--cluster", "local", "--gpus_per_node", "0"]
    status, output = run(
        submitit_command(*own, "--", *FLAGS), environment(tmp_path, SIGNAL=name), cwd=project
    )
    log = next((project / "exps/x/submitit").glob("*_0_log.err"))
    assert status == 2
    assert output.splitlines()[1:] == [
        f"error: job {log.name.split('_')[0]} has ended early, see the last line of {log}"
    ]
    assert log.read_text().splitlines()[-1] == f"stopped by {name}; saved"
    assert len((project / "exps/x/rank0").read_text().splitlines()) == 1


def test_submitit_asks_slurm_for_a_signal_before_the_limit_and_for_requeues(
    project: Path, tmp_path: Path
) -> None:
    executable(
        tmp_path / "bin/sbatch",
        '#!/usr/bin/env bash\ncp "$1" "$REPORT/submitted"; echo Submitted batch job 41\n',
    )
    executable(tmp_path / "bin/srun", "#!/usr/bin/env bash\n")
    own = [
        "--job_dir",
        "exps/x",
        "--gpus_per_node",
        "0",
        "--tasks_per_node",
        "2",
        "--partition",
        "low",
        "--timeout",
        "90",
    ]
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
    )
    own = ["--job_dir", "exps/x", "--cluster", "local", "--gpus_per_node", "0"]
    status, output = run(submitit_command(*own, "--", *FLAGS), environment(tmp_path), cwd=project)
    log = next((project / "exps/x/submitit").glob("*_0_log.err"))
    assert status == 2
    assert output.splitlines()[1:] == [
        f"error: job {log.name.split('_')[0]} has ended early, see the last line of {log}"
    ]
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
def test_submitit_refuses_in_one_line(
    project: Path, tmp_path: Path, arguments: list[str], reason: str
) -> None:
    status, output = run(submitit_command(*arguments), without_slurm(tmp_path), cwd=project)
    assert status == 2
    assert output.count("\n") == 1
    assert reason in output
