"""Thousands of damaged annotation files, images and checkpoints: each loads, or is refused in one line.

    FUZZ_CASES=10000 python -m pytest tests/test_fuzz.py -k annotations --hypothesis-show-statistics

The statistics list the refusals. A case is made from the Random that hypothesis names; a failure leaves its files in the test's
folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from tests.faults import fuzz_watch
from tests.faults.fuzz_data import CASES, LOADED, attempt
from tests.faults.fuzz_watch import Misbehaviour, Watch
from util.errors import UserError

SECONDS = 20


@pytest.mark.parametrize(("kind", "cases"), [("annotations", 300), ("images", 250), ("checkpoints", 150)])
def test_damaged_files_load_or_are_refused_in_one_line(tmp_path, kind, cases):
    case, watch = CASES[kind](tmp_path), Watch(tmp_path, SECONDS)
    case.prepare(None)
    case.run()  # imports what is imported late, before opening files is watched
    outcomes = Counter()
    cases = int(os.environ.get("FUZZ_CASES", cases))

    @settings(max_examples=cases, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=True))
    def check(rng: Random) -> None:
        case.prepare(rng)
        outcome = attempt(case.run, watch)
        event(outcome)
        outcomes["loaded" if outcome == LOADED else "refused"] += 1

    check()
    assert sum(outcomes.values()) >= cases
    print(kind, dict(outcomes))
    assert outcomes["loaded"] > cases / 20, "cases that are all refused would not test what comes after"
    assert outcomes["refused"] > cases / 20


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
    "division": lambda: 1 // 0, "not one short line": two_lines, "took more than 1 s": hangs, "os.system": swallowed,
    "subprocess.Popen": runs_a_program, "os.fork": os.fork, "opened '/etc/hosts'": Path("/etc/hosts").read_bytes,
    "for writing": lambda: Path("inside").write_text(""),
}  # fmt: skip


@pytest.mark.parametrize("named", BAD)
def test_misbehaviour_is_seen(tmp_path, monkeypatch, named):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((AssertionError, Misbehaviour, ZeroDivisionError), match=named):
        attempt(BAD[named], Watch(tmp_path, 1 if named.startswith("took") else 60))
    assert not list(tmp_path.iterdir())


def test_memory_is_watched(tmp_path, monkeypatch):
    peaks = iter([5 * 2**30, 5 * 2**30, 5 * 2**30, 8 * 2**30, 8 * 2**30])
    monkeypatch.setattr(fuzz_watch, "_peak_memory", lambda: next(peaks))
    assert attempt(lambda: None, Watch(tmp_path, 60)) == LOADED
    with pytest.raises(Misbehaviour, match="took 3.0 GiB"):
        attempt(lambda: None, Watch(tmp_path, 60))


def test_what_is_allowed_is_not_taken_for_misbehaviour(tmp_path):
    (tmp_path / "file").write_text("text")

    def reads() -> None:
        (tmp_path / "file").read_text()
        Path(os.__file__).read_bytes()
        raise UserError("file is refused; replace it")

    assert attempt(reads, Watch(tmp_path, 60)) == "file is refused; replace it"
