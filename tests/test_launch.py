"""The launch scripts: arguments and ranks arrive, a failure or a signal ends every process,
mistakes cost one line.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import PATIENCE
from tests.processes import free_port, wait_until
from util.errors import EXIT_INTERRUPTED, EXIT_LOST_PROCESS, EXIT_PREEMPTED, EXIT_USER_ERROR

ROOT = Path(__file__).resolve().parents[1]
SAID = re.escape("run_dist_launch.sh: ")
AWKWARD = ["--batch-size", "3", "two words", 'it\'s "quoted"', "", "$HOME", "*"]
CONFIGS = {
    "r50_deformable_detr": [],
    "r50_deformable_detr_single_scale": ["--num_feature_levels", "1"],
    "r50_deformable_detr_single_scale_dc5": ["--num_feature_levels", "1", "--dilation"],
    "r50_deformable_detr_plus_iterative_bbox_refinement": ["--with_box_refine"],
    "r50_deformable_detr_plus_iterative_bbox_refinement_plus_plus_two_stage": [
        "--with_box_refine",
        "--two_stage",
    ],
    "r101_deformable_detr": ["--backbone", "resnet101"],
}
# Writes what it was told to a file for each rank. REPORT names the folder.
REPORT_COMMAND = f"""#!{sys.executable}
import json, os, sys
names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS".split()
report = dict((name, os.environ[name]) for name in names) | dict(arguments=sys.argv[1:])
open(os.environ["REPORT"] + "/" + os.environ["RANK"], "w").write(json.dumps(report))
"""
# A shell with a child: both must end. The rank FAILS says why and fails.
SLEEP_COMMAND = """#!/usr/bin/env bash
sleep 300 &
echo "$$ $!" >"$REPORT/$RANK.tmp" && mv "$REPORT/$RANK.tmp" "$REPORT/$RANK"
until [[ -e $REPORT/0 && -e $REPORT/1 ]]; do sleep 0.1; done
if [[ $RANK == "${FAILS:-none}" ]]; then
  kill $!
  echo "the data of rank $RANK is not there" >&2
  exit 3
fi
wait
"""


def environment(tmp_path: Path, **variables: str) -> dict[str, str]:
    """This process's environment without what launchers set, on the CPU, with `tmp_path`/bin first
    on PATH.
    """
    ours = ("MAX_RESTARTS", "PREEMPT_SECONDS", "JOIN_SECONDS", "GPUS_PER_NODE", "NODE_RANK")
    launchers = (
        *ours,
        "SLURM",
        "SUBMITIT",
        "TORCHELASTIC",
        "MASTER_",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_",
        "OMP_",
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    path = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), clean["PATH"]])
    set_here = {"PATH": path, "VIRTUAL_ENV": sys.prefix, "CUDA_VISIBLE_DEVICES": "", "REPORT": str(tmp_path)}
    return clean | set_here | variables


def executable(path: Path, text: str) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def start(command: list[str], env: dict[str, str], cwd: Path = ROOT) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=env,
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # tests that run in the background ignore it
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and output. A process that does not end is terminated, with its own, and fails
    the test.
    """
    try:
        output, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.communicate()
        raise
    return process.returncode, output


def run(command: list[str], env: dict[str, str], cwd: Path = ROOT) -> tuple[int, str]:
    return finish(start(command, env, cwd))


def said_by_the_launcher(output: str) -> list[str]:
    """Its lines; PyTorch's connections may say something too."""
    return [line for line in output.splitlines() if line.startswith("run_dist_launch.sh: ")]


def reports(tmp_path: Path, processes: int) -> list[dict]:
    return [json.loads((tmp_path / str(rank)).read_text()) for rank in range(processes)]


def sleepers(tmp_path: Path) -> list[int]:
    """The process ids of both ranks of SLEEP_COMMAND and their children, once both have started."""
    wait_until(lambda: all((tmp_path / rank).exists() for rank in "01"), "the ranks did not start")
    return [int(pid) for rank in "01" for pid in (tmp_path / rank).read_text().split()]


def wait_for_the_end_of(pids: list[int]) -> None:
    """A zombie has ended: who reaps it is not the launcher's affair."""

    def ended() -> bool:
        listed = subprocess.run(
            ["ps", "-o", "stat=", "-p", ",".join(map(str, pids))], capture_output=True, text=True
        )
        return all(state.startswith("Z") for state in listed.stdout.split())

    wait_until(ended, f"some of the processes {pids} have not ended")


def start_two_nodes(
    tmp_path: Path, command: str, only: tuple[str, ...] = ("0", "1"), **variables: str
) -> list[subprocess.Popen[str]]:
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "GPUS_PER_NODE": "1"} | variables
    return [
        start(
            ["./tools/run_dist_launch.sh", "2", command, *AWKWARD],
            environment(tmp_path, NODE_RANK=node, **meeting),
        )
        for node in only
    ]


# configs/ and tools/dev/env.sh


@pytest.mark.parametrize("name", CONFIGS)
def test_config_passes_its_flags_and_the_users(tmp_path: Path, name: str) -> None:
    executable(tmp_path / "bin/python", '#!/usr/bin/env bash\n[[ $1 == -c ]] || printf "%s\\n" "$$" "$@"\n')
    process = start([f"./configs/{name}.sh", *AWKWARD], environment(tmp_path))
    status, output = finish(process)
    assert status == 0
    pid, *arguments = output.split("\n")[:-1]
    assert arguments == ["-u", "main.py", "--output_dir", f"exps/{name}", *CONFIGS[name], *AWKWARD]
    assert int(pid) == process.pid, "python must take the place of the shell, or signals do not reach it"


def test_every_config_is_listed_here() -> None:
    assert {path.stem for path in (ROOT / "configs").glob("*.sh")} == {*CONFIGS, "synthetic"}


def test_outside_the_root_a_script_says_where_to_go(tmp_path: Path) -> None:
    status, output = run([str(ROOT / "configs/r50_deformable_detr.sh")], environment(tmp_path), cwd=tmp_path)
    assert status == 2
    assert output == f"r50_deformable_detr.sh: run this from the project's root: cd {ROOT}\n"


def test_without_torch_a_script_says_what_to_run(tmp_path: Path) -> None:
    executable(tmp_path / "bin/python", "#!/usr/bin/env bash\nexit 1\n")
    status, output = run(["./configs/r50_deformable_detr.sh"], environment(tmp_path))
    assert status == 2
    assert output.count("\n") == 1
    assert "has no torch" in output
    assert "quickstart.sh" in output


@pytest.mark.parametrize("active", ["VIRTUAL_ENV", "CONDA_PREFIX", None])
def test_dot_venv_serves_unless_another_environment_is_active(tmp_path: Path, active: str | None) -> None:
    (tmp_path / "tools/dev").mkdir(parents=True)
    shutil.copy(ROOT / "tools/dev/env.sh", tmp_path / "tools/dev")
    executable(tmp_path / "bin/python", "")
    (tmp_path / ".venv").mkdir()
    own = executable(tmp_path / ".venv/bin/python", "")
    variables = {"VIRTUAL_ENV": "", "CONDA_PREFIX": ""} | ({active: "/elsewhere"} if active else {})
    script = "set -euo pipefail; source tools/dev/env.sh; command -v python"
    status, output = run(["bash", "-c", script], environment(tmp_path, **variables), cwd=tmp_path)
    assert status == 0
    assert output.strip() == (str(tmp_path / "bin/python") if active else own)


# tools/run_dist_launch.sh


def test_launch_gives_ranks_and_keeps_arguments(tmp_path: Path) -> None:
    command = executable(tmp_path / "report command", REPORT_COMMAND)
    status, output = run(["./tools/run_dist_launch.sh", "2", command, *AWKWARD], environment(tmp_path))
    assert status == 0, output
    first, second = reports(tmp_path, 2)
    assert first["arguments"] == second["arguments"] == AWKWARD
    assert (first["RANK"], first["LOCAL_RANK"]) == ("0", "0")
    assert (second["RANK"], second["LOCAL_RANK"]) == ("1", "1")
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        assert first[name] == second[name] == value
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert 1 <= int(first["OMP_NUM_THREADS"]) <= max(1, len(os.sched_getaffinity(0)) // 2)


def test_launch_two_nodes_make_one_group(tmp_path: Path) -> None:
    nodes = start_two_nodes(tmp_path, executable(tmp_path / "report", REPORT_COMMAND), OMP_NUM_THREADS="5")
    for node in nodes:
        status, output = finish(node)
        assert status == 0, output
    for rank, report in enumerate(reports(tmp_path, 2)):
        assert report["arguments"] == AWKWARD
        assert (report["RANK"], report["WORLD_SIZE"], report["LOCAL_RANK"]) == (str(rank), "2", "0")
        assert report["OMP_NUM_THREADS"] == "5"


def test_launch_a_failing_rank_ends_all_and_is_named(tmp_path: Path) -> None:
    command = executable(tmp_path / "sleep", SLEEP_COMMAND)
    status, output = run(["./tools/run_dist_launch.sh", "2", command], environment(tmp_path, FAILS="1"))
    assert status == 3
    assert "the data of rank 1 is not there" in output
    assert re.fullmatch(
        SAID + r"rank 1 \(process \d+\) failed with exit code 3: see its output above",
        output.splitlines()[-1],
    )
    assert "Traceback" not in output
    wait_for_the_end_of(sleepers(tmp_path))


def test_launch_two_jobs_share_the_machine_and_a_signal_ends_its_own(tmp_path: Path) -> None:
    # python, not a shell: a shell's children in the background ignore SIGINT
    command = tmp_path / "sleep.py"
    command.write_text(
        "import os, time\n"
        "path = os.environ['REPORT'] + '/' + os.environ['RANK']\n"
        "open(path + '.tmp', 'w').write(str(os.getpid()))\n"
        "os.rename(path + '.tmp', path)\n"
        "time.sleep(300)\n"
    )
    jobs = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        folder = tmp_path / number.name
        folder.mkdir()
        env = environment(tmp_path, REPORT=str(folder))
        jobs[number] = folder, start(["./tools/run_dist_launch.sh", "2", str(command)], env)
    pids = {number: sleepers(folder) for number, (folder, _) in jobs.items()}
    for number, (_, launcher) in jobs.items():
        assert launcher.poll() is None
        launcher.send_signal(number)
        status, output = finish(launcher)
        assert status == 128 + number
        assert (
            f"run_dist_launch.sh: ended by {number.name}; not every process reported that it had "
            f"saved" in output
        )
        wait_for_the_end_of(pids[number])


@pytest.mark.parametrize(
    ("arguments", "variables", "reason"),
    [
        ([], {}, "usage:"),
        (["2"], {}, "usage:"),
        (["two", "true"], {}, "positive integer, not 'two'"),
        (["0", "true"], {}, "positive integer, not '0'"),
        (["12", "true"], {}, "12 processes do not divide into nodes of 8"),
        (["2", "true"], {"GPUS_PER_NODE": "8"}, "2 processes do not divide into nodes of 8"),
        (["2", "true"], {"GPUS_PER_NODE": "0"}, "GPUS_PER_NODE must be a positive integer"),
        (["2", "./configs/no_such.sh"], {}, "'./configs/no_such.sh' is not an executable command"),
        (["16", "true"], {}, "set MASTER_ADDR"),
        (
            ["2", "true"],
            {"MAX_RESTARTS": "often"},
            "MAX_RESTARTS must be a whole number below 100000, not 'often'",
        ),
        (["16", "true"], {"MASTER_ADDR": "127.0.0.1"}, "NODE_RANK"),
        (["16", "true"], {"MASTER_ADDR": "127.0.0.1", "NODE_RANK": "2"}, "NODE_RANK must be from 0 to 1"),
    ],
)
def test_launch_refuses_in_one_line(
    tmp_path: Path, arguments: list[str], variables: dict, reason: str
) -> None:
    status, output = run(["./tools/run_dist_launch.sh", *arguments], environment(tmp_path, **variables))
    assert status == 2
    assert output.count("\n") == 1
    assert reason in output


def test_launch_help_has_an_example(tmp_path: Path) -> None:
    status, output = run(["./tools/run_dist_launch.sh", "--help"], environment(tmp_path))
    assert status == 0
    assert [line.split(":")[0] for line in output.splitlines()] == ["usage", "example"]


# What rank 1 does at its first start, once both are there, is in $FAULT; a later start ends well.
# Every process notes each start, with the launcher's count.
FAULTY_COMMAND = """#!/usr/bin/env bash
echo "$TORCHELASTIC_RESTART_COUNT" >>"$REPORT/attempts$RANK"
[[ $(wc -l <"$REPORT/attempts$RANK") == 1 ]] || exit 0
until [[ -e $REPORT/attempts0 && -e $REPORT/attempts1 ]]; do sleep 0.1; done
if [[ $RANK == 1 ]]; then eval "$FAULT"; fi
sleep 300
"""


def attempts(tmp_path: Path) -> list[list[str]]:
    """For each of two ranks the launcher's count at each of its starts."""
    return [(tmp_path / f"attempts{rank}").read_text().split() for rank in "01"]


def test_launch_all_processes_start_again_after_a_crash(tmp_path: Path) -> None:
    command = executable(tmp_path / "faulty", FAULTY_COMMAND)
    env = environment(tmp_path, FAULT="kill -9 $$", MAX_RESTARTS="3")
    status, output = run(["./tools/run_dist_launch.sh", "2", command], env)
    assert status == 0, output
    assert attempts(tmp_path) == [["0", "1"], ["0", "1"]]
    assert re.search(r"failed \(exitcode: -9\) local_rank: 1 ", output), "PyTorch's line says why"


@pytest.mark.parametrize("code", [EXIT_USER_ERROR, EXIT_PREEMPTED, EXIT_INTERRUPTED])
def test_launch_the_first_exit_code_counts(tmp_path: Path, code: int) -> None:
    """The other process is ended by SIGTERM afterwards."""
    command = executable(tmp_path / "faulty", FAULTY_COMMAND)
    status, output = run(
        ["./tools/run_dist_launch.sh", "2", command], environment(tmp_path, FAULT=f"exit {code}")
    )
    assert status == code, output
    assert attempts(tmp_path) == [["0"], ["0"]]
    assert len(said_by_the_launcher(output)) == (code == EXIT_USER_ERROR), "to leave on request is no failure"


def test_launch_the_line_of_the_first_failure_is_the_last(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from util.errors import UserError, run_as_command\n"
        "def command(): raise UserError('x.jpg is bad; mend it')\n"
        "run_as_command(command)\n"
    )
    status, output = run(
        ["./tools/run_dist_launch.sh", "1", str(tmp_path / "fails.py")], environment(tmp_path)
    )
    assert status == EXIT_USER_ERROR
    first, last = output.splitlines()
    assert first == "error: x.jpg is bad; mend it"
    assert re.fullmatch(
        SAID + r"rank 0 \(process \d+\) failed with exit code 2: error: x.jpg is bad; mend it", last
    )


# Saves when it is asked to leave: once, however many signals come. Rank 1 takes longer.
SAVING_COMMAND = f"""
import os, pathlib, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from util.errors import Preempted, run_as_command
folder, rank = pathlib.Path(os.environ["REPORT"]), os.environ["RANK"]
got = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: got.append(number))
(folder / (rank + ".tmp")).write_text(str(os.getpid()))
(folder / (rank + ".tmp")).rename(folder / rank)
def work():
    while not got and not (folder / "leave").exists():
        time.sleep(0.05)
    (folder / "leave").touch()
    time.sleep(1 + int(rank))
    (folder / ("signals" + rank)).write_text(str(len(got)))
    raise Preempted("saved")
run_as_command(work)
"""


def test_launch_a_signal_reaches_the_processes_once_and_they_save(tmp_path: Path) -> None:
    (tmp_path / "saving.py").write_text(SAVING_COMMAND)
    jobs = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        folder = tmp_path / number.name
        folder.mkdir()
        env = environment(tmp_path, REPORT=str(folder), MAX_RESTARTS="3")
        jobs.append(
            (number, folder, start(["./tools/run_dist_launch.sh", "2", str(tmp_path / "saving.py")], env))
        )
    for number, folder, launcher in jobs:
        pids = sleepers(folder)
        launcher.send_signal(number)
        status, output = finish(launcher)
        assert status == EXIT_PREEMPTED, output
        assert output.splitlines() == ["saved"], "rank 0 says it, and nothing is started again"
        assert [(folder / f"signals{rank}").read_text() for rank in "01"] == ["1", "1"]
        wait_for_the_end_of(pids)


def test_launch_a_process_that_leaves_on_a_signal_of_its_own_takes_all_along(tmp_path: Path) -> None:
    (tmp_path / "saving.py").write_text(SAVING_COMMAND)
    launcher = start(["./tools/run_dist_launch.sh", "2", str(tmp_path / "saving.py")], environment(tmp_path))
    os.kill(sleepers(tmp_path)[0], signal.SIGUSR1)
    status, output = finish(launcher)
    assert status == EXIT_PREEMPTED, output
    assert all((tmp_path / f"signals{rank}").exists() for rank in "01")


DEAF_COMMAND = SLEEP_COMMAND.replace("sleep", "trap 'touch $REPORT/asked$RANK' TERM; sleep", 1).replace(
    "\nwait\n", "\nwhile kill -0 $!; do wait $!; done\n"
)


def test_launch_a_process_that_does_not_leave_is_killed(tmp_path: Path) -> None:
    command = executable(tmp_path / "deaf", DEAF_COMMAND)
    launcher = start(["./tools/run_dist_launch.sh", "2", command], environment(tmp_path, PREEMPT_SECONDS="1"))
    pids = sleepers(tmp_path)
    launcher.send_signal(signal.SIGTERM)
    status, output = finish(launcher)
    assert status == 128 + signal.SIGTERM
    assert len(list(tmp_path.glob("asked[01]"))) == 2
    assert "not every process reported that it had saved" in output
    wait_for_the_end_of(pids[::2])  # what they started themselves is in their session


def test_launch_under_nohup_a_closed_terminal_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "waits.sh").write_text(
        'touch "$REPORT/up"; until [[ -e $REPORT/go ]]; do sleep 0.1; done; echo finished'
    )
    launch = ["nohup", "./tools/run_dist_launch.sh", "1", "bash", str(tmp_path / "waits.sh")]
    launcher = start(launch, environment(tmp_path))
    wait_until((tmp_path / "up").exists, "the process did not start")
    launcher.send_signal(signal.SIGHUP)
    (tmp_path / "go").touch()
    status, output = finish(launcher)
    assert status == 0, output
    assert output.endswith("finished\n")


def test_launch_a_file_that_is_no_program_costs_one_line(tmp_path: Path) -> None:
    status, output = run(
        ["./tools/run_dist_launch.sh", "1", executable(tmp_path / "text", "no program")],
        environment(tmp_path),
    )
    assert status == EXIT_USER_ERROR
    assert "text can't be started: " in output
    assert output.count("\n") == 1


def test_launch_two_nodes_start_again_together(tmp_path: Path) -> None:
    command = executable(tmp_path / "faulty", FAULTY_COMMAND)
    nodes = start_two_nodes(tmp_path, command, FAULT="kill -9 $$", MAX_RESTARTS="1")
    for node in nodes:
        status, output = finish(node)
        assert status == 0, output
    assert [len(counts) for counts in attempts(tmp_path)] == [2, 2], "each node has a count of its own"


# Waits until $REPORT/go exists.
WAITING_COMMAND = """#!/usr/bin/env bash
echo $$ >"$REPORT/pid$NODE_RANK"
until [[ -e $REPORT/go ]]; do sleep 0.1; done
"""


@pytest.mark.parametrize("down", [0, 1])
def test_launch_a_node_that_went_down(tmp_path: Path, down: int) -> None:
    """The launcher and the process of a node are killed. The same command on node 1 brings it back
    into the running job; the loss of node 0 ends the job.
    """
    command = executable(tmp_path / "waiting", WAITING_COMMAND)
    meeting = {"MASTER_PORT": free_port()}
    nodes = start_two_nodes(tmp_path, command, **meeting)
    pids = [tmp_path / f"pid{node}" for node in (0, 1)]
    wait_until(
        lambda: all(path.exists() and path.read_text() for path in pids), "the processes did not start"
    )
    nodes[down].kill()
    os.killpg(int(pids[down].read_text()), signal.SIGKILL)
    nodes[down].communicate()
    if down == 0:
        status, output = finish(nodes[1])
        assert status == EXIT_LOST_PROCESS
        assert "or lost each other" in said_by_the_launcher(output)[-1]
        return
    before = [path.read_text() for path in pids]
    (back,) = start_two_nodes(tmp_path, command, only=("1",), **meeting)
    wait_until(
        lambda: all(path.read_text() not in ("", old) for path, old in zip(pids, before, strict=True)),
        "no new start",
    )
    (tmp_path / "go").touch()
    for node in (nodes[0], back):
        status, output = finish(node)
        assert status == 0, output


@pytest.mark.parametrize("node", ["0", "1"])
def test_launch_a_node_that_waits_in_vain_says_so(tmp_path: Path, node: str) -> None:
    (waiting,) = start_two_nodes(tmp_path, "true", only=(node,), JOIN_SECONDS="2")
    status, output = finish(waiting)
    assert status == EXIT_LOST_PROCESS, output
    said = said_by_the_launcher(output)
    assert len(said) == 2, "what it waits for, and the end"
    assert "2 nodes did not meet at 127.0.0.1:" in said[-1]
    assert "JOIN_SECONDS=2" in said[-1]
    assert "run the command on all" in said[-1]


def test_launch_a_port_in_use_is_said_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        (node,) = start_two_nodes(tmp_path, "true", only=("0",), MASTER_PORT=str(taken.getsockname()[1]))
        status, output = finish(node)
    assert status == EXIT_LOST_PROCESS
    said = said_by_the_launcher(output)
    assert len(said) == 2
    assert "a free port in MASTER_PORT" in said[-1]
