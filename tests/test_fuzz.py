"""A short run of tests/faults/fuzz_data.py, and whether it would see what it looks for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults import fuzz_data, fuzz_watch
from tests.faults.fuzz_data import Outcome, fuzz
from tests.faults.fuzz_watch import Watch
from util.errors import UserError


@pytest.mark.parametrize(
    ("kind", "cases"),
    [
        ("annotations", 300),
        ("images", 250),
        ("checkpoints", 150),
        ("unsealed", 150),
    ],
)
def test_damaged_files_load_or_are_refused_in_one_line(tmp_path, kind, cases):
    outcome = fuzz(kind, range(cases), 1, tmp_path)
    assert not outcome.misbehaved, outcome.misbehaved[0]
    assert outcome.loaded > cases / 20, "cases that are all refused would not test what comes after"
    assert sum(outcome.refused.values()) > cases / 20


def test_a_case_can_be_made_again_from_its_number(tmp_path):
    alone = fuzz("annotations", range(17, 18), 1, tmp_path)
    written = (tmp_path / "instances.json").read_bytes()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    assert fuzz("annotations", range(17, 18), 1, tmp_path / "a") == alone
    assert (tmp_path / "a/instances.json").read_bytes() == written
    fuzz("annotations", range(17, 18), 2, tmp_path / "b")
    assert (tmp_path / "b/instances.json").read_bytes() != written


def two_lines() -> None:
    raise UserError("one\ntwo")


def hangs() -> None:
    while True:
        time.sleep(0.1)


def swallowed() -> None:
    try:
        os.system("true")
    except BaseException:  # noqa: B036 - what the code under test might do
        return


def runs_a_program() -> None:
    subprocess.run([sys.executable, "-c", ""], check=False)


BAD = {
    "ZeroDivisionError": lambda: 1 // 0,
    "not one short line": two_lines,
    "took more than 1 s": hangs,
    "os.system": swallowed,
    "subprocess.Popen": runs_a_program,
    "os.fork": os.fork,
    "opened '/etc/hosts'": Path("/etc/hosts").read_bytes,
    "for writing": lambda: Path("inside").write_text(""),
}


@pytest.mark.parametrize("named", BAD)
def test_misbehaviour_is_seen(tmp_path, monkeypatch, named):
    monkeypatch.chdir(tmp_path)
    outcome = Outcome()
    failure = fuzz_data._run_case(
        BAD[named], Watch(tmp_path, 1 if named.startswith("took") else 60, hard=False), outcome
    )
    assert failure is not None
    assert named in failure
    assert not outcome.loaded
    assert not outcome.refused
    assert not list(tmp_path.iterdir())


def test_memory_is_watched(tmp_path, monkeypatch):
    peaks = iter([5 * 2**30, 5 * 2**30, 5 * 2**30, 8 * 2**30, 8 * 2**30])
    monkeypatch.setattr(fuzz_watch, "_peak_memory", lambda: next(peaks))
    outcomes = [
        fuzz_data._run_case(lambda: None, Watch(tmp_path, 60, hard=False), Outcome()) for _ in range(2)
    ]
    assert outcomes[0] is None
    assert "took 3.0 GiB" in outcomes[1]


def test_what_is_allowed_is_not_taken_for_misbehaviour(tmp_path):
    (tmp_path / "file").write_text("text")
    outcome = Outcome()

    def reads() -> None:
        (tmp_path / "file").read_text()
        Path(os.__file__).read_bytes()
        raise UserError("file is refused; replace it")

    assert fuzz_data._run_case(reads, Watch(tmp_path, 60, hard=False), outcome) is None
    assert fuzz_data._run_case(lambda: None, Watch(tmp_path, 60, hard=False), outcome) is None
    assert (outcome.loaded, sum(outcome.refused.values())) == (1, 1)
