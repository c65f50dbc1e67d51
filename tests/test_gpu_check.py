"""The check on a GPU (tools/gpu_check) as far as it gets without one: its commands, its limits,
what it reads and writes.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shutil
import sys
import tarfile

import pytest
import torch

from tests.gpu_check import resume, runner, steps
from tests.gpu_check.runner import Check
from tests.gpu_check.steps import CheckStep
from tests.helpers import ROOT, run

STEPS = (steps.PREPARE, *steps.TIMINGS, *steps.CHECKS)


def test_wrong_arguments():
    done = run("./tools/gpu_check.sh", "one", "two")
    assert done.returncode == 2
    assert "./tools/gpu_check.sh" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path):
    done = run("./tools/gpu_check.sh", str(tmp_path / "results"))
    assert done.returncode == 2
    assert "no GPU" in done.stderr and torch.__version__ in done.stderr and "--device cpu" in done.stderr


def test_python3_alone_will_do(tmp_path):
    """Where `python` is another, or none."""
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for name in ("python", "python3"):
        (tmp_path / name).chmod(0o755)
    done = run("bash", "-c", f'PATH="{tmp_path}:$PATH"; ./tools/gpu_check.sh --help')
    assert done.returncode == 0 and "--minutes" in done.stdout


# ---- the commands


class Parsed(BaseException):
    """The program has taken its command line."""


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_every_command_is_parsed_by_its_program(device, step, tmp_path, monkeypatch):
    words = Check(tmp_path / "out", tmp_path / "work", device, 1).command(step)
    start = words.index("python3")
    if any(map(shutil.which, {"ncu", "compute-sanitizer"}.intersection(words))):
        done = run(*words[:start], "--version")
        assert done.returncode == 0, done.stdout + done.stderr
    assert_program_takes(words[start + 1 :], monkeypatch)


def assert_program_takes(words, monkeypatch):
    """The words behind `python`; for a program without a parser that there are none."""
    if words[0] == "-c":
        compile(words[1], "-c", "exec")
    elif words[:2] == ["-m", "pytest"]:
        # takes the command line, and collects nothing
        done = run(sys.executable, *words, "--markers")
        assert done.returncode == 0, done.stderr
        assert all((ROOT / word).is_file() for word in words if word.startswith("tests/"))
    elif words in (["models/ops/test.py"], ["-m", "tests.gpu_check.compare_plain"]):
        pass
    elif words[:2] == ["-m", "tests.faults.compare"]:
        assert len(words) == 4
    else:
        parse(words, monkeypatch)


def parse(words, monkeypatch):
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        original(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    program, *rest = words[1:] if words[0] == "-m" else words
    monkeypatch.setattr(sys, "argv", [program, *rest])
    monkeypatch.delitem(sys.modules, program, raising=False)  # as a process of its own starts
    start = runpy.run_module if words[0] == "-m" else runpy.run_path
    with pytest.raises(Parsed):
        start(program, run_name="__main__")


def test_the_test_sees_a_wrong_flag(monkeypatch):
    with pytest.raises(SystemExit):
        parse(["benchmark.py", "op", "--nothing"], monkeypatch)


def test_commands_of_stop_and_resume(tmp_path, monkeypatch):
    """The second run goes on within the last epoch, in a copy without the checkpoints of the end."""
    commands = []

    def train(*command):
        commands.append([str(word) for word in command])
        if len(commands) == 1:
            (tmp_path / "whole").mkdir()
            for name in (
                "resume_0001_000000024.pth",
                "resume_0002_000000000.pth",
                "checkpoint.pth",
                "checkpoint0001.pth",
            ):
                (tmp_path / "whole" / name).touch()
        if "--resume" in command:
            assert [path.name for path in (tmp_path / "resumed").iterdir()] == ["resume_0001_000000024.pth"]

    monkeypatch.setattr(resume, "run", train)
    assert resume.main(["--output_dir", str(tmp_path), "--epochs", "2"]) == 0
    assert [command[0] for command in commands] == ["main.py", "main.py", "-m"]
    for command in commands:
        with monkeypatch.context() as patch:
            assert_program_takes(command, patch)


def test_every_step_is_in_the_documentation():
    text = (ROOT / "docs/gpu.md").read_text()
    assert [step.name for step in STEPS[1:] if step.name not in text and step.name != "data"] == []


# ---- running them


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Makes a check of other steps, with seconds to do them in."""

    def make(timings, checks=(), seconds=600.0):
        monkeypatch.setattr(runner, "PREPARE", CheckStep("prepare", 0, 60, "echo device: a tin", "device"))
        monkeypatch.setattr(runner, "TIMINGS", timings)
        monkeypatch.setattr(runner, "CHECKS", checks)
        monkeypatch.setattr(runner, "CHECKS_TAKE", 0)
        return Check(tmp_path / "out", tmp_path / "work", "cpu", (seconds + runner.LAST_SECONDS) / 60)

    return make


def test_no_end_of_a_step_stops_the_next(check):
    done = check(
        [
            CheckStep("hangs", 0, 1, "sleep 600"),
            CheckStep("fails", 0, 60, "sh -c 'echo speed 7; exit 3'"),
            CheckStep("shows", 0, 60, "sh -c 'echo speed 8; echo other 9'", "speed"),
            CheckStep("reads it", 0, 60, "true", after="fails"),
            CheckStep("on a GPU", 0, 60, "true", needs_gpu=True),
            CheckStep("lacks a module", 0, 60, "true", modules="json no_such_module"),
            CheckStep("works", 0, 60, "true"),
        ],
        [CheckStep("first", 0, 60, "true"), CheckStep("second", 0, 60, "true", after="first")],
    )
    assert not done.run()
    assert {name: result.result for name, result in done.results.items()} == {
        "prepare": "passed",
        "hangs": "FAILED: ended after 1 s",
        "fails": "FAILED: exit status 3",
        "shows": "passed",
        "reads it": "skipped: it needs the files of fails",
        "on a GPU": "skipped: there is no GPU",
        "lacks a module": "skipped: Python has no no_such_module",
        "works": "passed",
        "first": "passed",
        "second": "passed",
    }
    assert sorted(path.name for path in done.folder.iterdir()) == ["logs.tar.gz", "summary.md"]
    summary = (done.folder / "summary.md").read_text()
    assert "| fails | FAILED: exit status 3 |" in summary and "device: a tin" in summary
    assert "## fails\n\n```\nspeed 7\n```" in summary, "the last lines of what failed"
    assert "speed 8" in summary and "other 9" not in summary
    with tarfile.open(done.folder / "logs.tar.gz") as logs:
        assert "logs/fails.log" in logs.getnames()


def test_what_does_not_fit_is_left_out(check):
    done = check(
        [
            CheckStep("long", 100, 100, "false"),
            CheckStep("cut", 0, 100, "sleep 600"),
            CheckStep("late", 6, 60, "false"),
        ],
        seconds=5,
    )
    assert done.run(), "nothing failed"
    assert done.results["long"].result.startswith("left out: takes 100 s, ")
    assert done.results["cut"].result.startswith("left out: cut off after ")
    assert done.results["late"].result == "left out: takes 6 s, 0 s left"


def test_wrong_kernels_leave_the_rest_to_triton(check):
    shows = CheckStep("shows", 0, 60, "sh -c 'echo backend $MS_DEFORM_ATTN_BACKEND'", "backend")
    done = check([CheckStep("kernels", 0, 60, "false"), shows])
    done.run()
    assert done.results["shows"].lines == ["backend triton"]


# ---- lines of the summary


def shown(name, text):
    (step,) = [step for step in STEPS if step.name == name]
    return [line for line in text.splitlines() if re.match(step.shows, line)]


@pytest.mark.slow
def test_times_of_the_benchmarks_are_shown():
    """In what they print today."""
    small = f"{steps.SMALL_MODEL} --size 32 32 --num_iters 1 --warm_iters 0 --device cpu".split()
    flags = ("train", *small, "--bf", "1", "--insert_idx", "0", "--amp", "bf16", "--profile")
    train = run("python", "benchmark.py", *flags).stdout.replace(
        "Self CPU time total", "Self CUDA time total"
    )
    lines = shown("training step", train)
    assert sum(" ms" in line and "MiB" in line for line in lines) >= 2 and "Self CUDA" in "".join(lines)
    infer = run("python", "benchmark.py", *small, "--amp", "bf16", "--against_reference").stdout
    assert sum(" ms" in line for line in shown("inference", infer)) >= 3
    op = run(
        "python", "benchmark.py", "op", "--device", "cpu", "--size", "32", "32", "--num_iters", "1"
    ).stdout
    if "compiled" not in op:  # the kernels may not be built
        op = op.replace("reference", "compiled ")
    lines = shown("operator", op)
    assert lines[0].startswith("encoder") and " ms" in lines[1] and len(lines) % 2 == 0


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("plain kernels", "  times faster            3.1"),
        ("counters", "    lts__t_sectors_op_red.sum            sector      40,312,500"),
        ("wrong accesses", "========= ERROR SUMMARY: 0 errors"),
        ("tests", "12 passed, 3 skipped, 40 deselected in 5.00s"),
        ("tests", "====== 1 failed, 2 passed in 9s ======"),
    ],
)
def test_the_line_that_matters_is_shown(name, line):
    assert shown(name, f"..\n{line}\n") == [line]


# ---- the programs


@pytest.mark.slow
def test_data_parallel_in_one_process():
    done = run("python", "-m", "tests.gpu_check.one_rank", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("True ") == 2 and done.stdout.endswith("the group has ended\n")
