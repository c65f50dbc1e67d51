"""The check on a GPU (tools/gpu_check) as far as it gets without one: its commands, its limits,
what it reads and writes.
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT, run
from tools.gpu_check import resume, runner, steps
from tools.gpu_check.runner import Check, find_tool, read_figures
from tools.gpu_check.steps import Step

EVERY = [
    (device, step)
    for device in ("cuda", "cpu")
    for step in (steps.preparation(device), *steps.timings(device), *steps.checks(device))
]


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


@pytest.mark.parametrize(("device", "step"), EVERY, ids=lambda value: getattr(value, "name", value))
def test_every_command_is_parsed_by_its_program(device, step, tmp_path, monkeypatch):
    words = Check(tmp_path / "out", tmp_path / "work", device, 1).command(step)
    start = words.index(sys.executable)
    if start:
        assert_tool_takes(words[:start])
    assert_program_takes(words[start + 1 :], monkeypatch)


def assert_tool_takes(words):
    """Of NVIDIA's tools, where they are."""
    if Path(words[0]).is_absolute():
        done = run(*words, "--version")
        assert done.returncode == 0, done.stdout + done.stderr


def assert_program_takes(words, monkeypatch):
    """The words behind `python`; for a program without a parser that there are none."""
    if words[0] == "-c":
        compile(words[1], "-c", "exec")
    elif words[:2] == ["-m", "pytest"]:
        # takes the command line, and collects nothing
        done = run(sys.executable, *words, "--markers")
        assert done.returncode == 0, done.stderr
        assert all((ROOT / word).is_file() for word in words if word.startswith("tests/"))
    elif words == ["models/ops/test.py"] or words[:2] == ["-m", "tests.faults.compare"]:
        assert len(words) in (1, 4)
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
    assert [step.name for _, step in EVERY if step.name not in text and step.expected] == []


# ---- running them


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Makes a check of other steps, with seconds to do them in."""

    def make(timings, checks=(), seconds=600.0):
        monkeypatch.setattr(
            runner, "preparation", lambda device: Step("prepare", 0, 60, "echo device: a tin")
        )
        monkeypatch.setattr(runner, "timings", lambda device: list(timings))
        monkeypatch.setattr(runner, "checks", lambda device: list(checks))
        monkeypatch.setattr(runner, "CHECKS_TAKE", 0)
        return Check(tmp_path / "out", tmp_path / "work", "cpu", (seconds + runner.LAST_WORDS) / 60)

    return make


def test_no_end_of_a_step_stops_the_next(check):
    done = check(
        [
            Step("hangs", 0, 1, "sleep 600"),
            Step(
                "fails",
                0,
                60,
                "sh -c 'echo speed 7; exit 3'",
                {"speed": r"^speed (\d+)", "other": r"^other (\d+)"},
                "above 6",
            ),
            Step("reads it", 0, 60, "true", after="fails"),
            Step("on a GPU", 0, 60, "true", needs_gpu=True),
            Step("lacks a module", 0, 60, "true", modules=("json", "no_such_module")),
            Step("works", 0, 60, "true"),
        ],
        [Step("first", 0, 60, "true"), Step("second", 0, 60, "true", after="first")],
    )
    assert not done.run()
    assert {name: result.result for name, result in done.results.items()} == {
        "prepare": "passed",
        "hangs": "FAILED: ended after 1 s",
        "fails": "FAILED: exit status 3",
        "reads it": "skipped: it goes on from fails",
        "on a GPU": "skipped: there is no GPU",
        "lacks a module": "skipped: Python has no no_such_module",
        "works": "passed",
        "first": "passed",
        "second": "passed",
    }
    assert sorted(path.name for path in done.folder.iterdir()) == [
        "figures.json",
        "logs.tar.gz",
        "summary.md",
    ]
    assert json.loads((done.folder / "figures.json").read_text())["steps"]["fails"]["figures"] == {
        "speed": "7"
    }
    assert "| fails | FAILED: exit status 3 |" in (done.folder / "summary.md").read_text()
    with tarfile.open(done.folder / "logs.tar.gz") as logs:
        assert "logs/fails.log" in logs.getnames()


def test_what_does_not_fit_is_left_out(check):
    done = check(
        [Step("long", 100, 100, "false"), Step("cut", 0, 100, "sleep 600"), Step("late", 6, 60, "false")],
        seconds=5,
    )
    assert done.run(), "nothing failed"
    assert done.results["long"].result.startswith("left out: takes 100 s, ")
    assert done.results["cut"].result.startswith("left out: cut off after ")
    assert done.results["late"].result == "left out: takes 6 s, 0 s left"


def test_wrong_kernels_leave_the_rest_to_triton(check):
    shows = Step("shows", 0, 60, "sh -c 'echo backend $MS_DEFORM_ATTN_BACKEND'", {"backend": "backend (.*)"})
    done = check([Step("kernels", 0, 60, "false"), shows])
    done.run()
    assert done.results["shows"].figures == {"backend": "triton"}


# ---- figures


def patterns(name):
    return next(step.figures for device, step in EVERY if device == "cuda" and step.name == name)


@pytest.mark.slow
def test_figures_of_the_benchmarks_are_read():
    """In what they print today."""
    small = (
        *steps.SMALL_MODEL.split(),
        "--size",
        "32",
        "32",
        "--num_iters",
        "1",
        "--warm_iters",
        "0",
        "--device",
        "cpu",
    )
    step = ("train", *small, "--bf", "1", "--insert_idx", "0", "--amp", "bf16", "--profile")
    train = run("python", "benchmark.py", *step).stdout.replace("Self CPU time total", "Self CUDA time total")
    assert read_figures(patterns("training step"), train).keys() == patterns("training step").keys(), train
    infer = run("python", "benchmark.py", *small, "--amp", "bf16", "--against_reference").stdout
    assert read_figures(patterns("inference"), infer).keys() == patterns("inference").keys(), infer
    op = run(
        "python", "benchmark.py", "op", "--device", "cpu", "--size", "32", "32", "--num_iters", "1"
    ).stdout
    only = re.sub(r"^    compiled .*\n", "", op, flags=re.MULTILINE).replace(
        "reference", "compiled "
    )  # they may not be built
    assert read_figures(patterns("operator"), only).keys() == patterns("operator").keys(), op


COUNTERS = """
  forward_kernel (x) (11112, 1, 1)x(512, 1, 1)
    l1tex__t_sector_hit_rate.pct              %           76.10
    lts__t_sectors_op_red.sum            sector               0
    smsp__inst_executed.sum                inst      73,000,001
  backward_kernel (x) (22223, 1, 1)x(256, 1, 1)
    l1tex__t_sector_hit_rate.pct              %           50.00
    lts__t_sectors_op_red.sum            sector      40,312,500
    smsp__inst_executed.sum                inst     126,000,001
"""
PLAIN = """
encoder 800 x 1333, batch 1, around
  plain forward         300.0
  ordered backward     2500.5
  times faster            3.1
encoder 800 x 1333, batch 4, around
  times faster            4.1
"""


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("plain kernels", PLAIN, ["3.1", "2500.5"]),
        ("counters", COUNTERS, ["73,000,001", "126,000,001", "40,312,500", "76.10"]),
        ("wrong accesses", "========= ERROR SUMMARY: 0 errors\n", ["0"]),
        (
            "tests",
            "..\n12 passed, 3 skipped, 40 deselected in 5.00s\n",
            ["12 passed, 3 skipped, 40 deselected in 5.00s"],
        ),
        ("tests", "====== 1 failed, 2 passed in 9s ======\n", ["1 failed, 2 passed in 9s"]),
    ],
)
def test_figures_are_read(name, text, wanted):
    assert list(read_figures(patterns(name), text).values()) == wanted


# ---- the programs


@pytest.mark.slow
def test_data_parallel_in_one_process():
    done = run("python", "-m", "tools.gpu_check.one_rank", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("True ") == 2 and done.stdout.endswith("the group has ended\n")


def test_tools_are_found_in_the_toolkit(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ncu").write_text("")
    (tmp_path / "bin" / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_tool("ncu") == str(tmp_path / "bin" / "ncu")
    assert find_tool("compute-sanitizer") is None
