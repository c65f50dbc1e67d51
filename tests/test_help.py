"""--help of every program: complete, with defaults and an example."""

from __future__ import annotations

import re

import pytest

from tests.helpers import ROOT, run

LAUNCHERS = {"launch.py"}  # called by the shell script that has the usage
PROGRAMS = [
    ("main.py",),
    ("benchmark.py",),
    ("-m", "datasets.synthetic"),
    *[
        (f"tools/{path.name}",)
        for path in sorted((ROOT / "tools").glob("*.py"))
        if path.name not in LAUNCHERS
    ],
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program[-1])
def test_help_says_what_every_flag_does_and_shows_an_example(program):
    result = run("python", *program, "--help")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^examples?:|^    python benchmark.py", result.stdout, re.MULTILINE), "no example"
    assert f"python {' '.join(program)}" in result.stdout, "the example is another program's"
    flags = re.findall(r"^  (--[^\n]*(?:\n {8,}[^\n]*)*)", result.stdout, re.MULTILINE)
    for flag in flags:
        name, *described = re.split(r"\n {20,}| {2,}", flag, maxsplit=1)
        assert described, f"{name} is not explained"
