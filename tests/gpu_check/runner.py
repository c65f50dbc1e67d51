"""Runs the steps within a number of minutes, and keeps the results in a folder up to date."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.gpu_check.steps import CHECKS, CHECKS_TAKE, PREPARE, SIZES, TIMINGS, CheckStep
from util.atomic import replace_text

LAST_SECONDS = 15  # kept for ending what runs, and for the results
CLOCK_FLAGS = "--query-gpu=clocks.sm,utilization.gpu,power.draw,temperature.gpu --format=csv --loop=1"


@dataclass
class Outcome:
    """result: "passed", "FAILED: ...", "skipped: ..." or "left out: ..."; lines: of the output."""

    result: str
    seconds: int = 0
    lines: list[str] = field(default_factory=list)


class Check:
    """All steps on "cuda" or "cpu", within some minutes.

    `folder` gets summary.md and logs.tar.gz, rewritten after every step, so that an early end loses
    nothing. Everything else is written to `work`.
    """

    def __init__(self, folder: Path, work: Path, device: str, minutes: float) -> None:
        # Only `folder` is kept: logs are packed into it.
        self.folder, self.work, self.device = folder, work, device
        self.logs = work / "logs"
        self.end = time.monotonic() + 60 * minutes - LAST_SECONDS
        self.results: dict[str, Outcome] = {}
        # this Python first, and the programs of the CUDA toolkit
        toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        self.path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:{toolkit}/bin"
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PATH": self.path}
        if device == "cpu":  # at small sizes more threads make it slower
            self.environment["OMP_NUM_THREADS"] = "1"
        self._writing = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self.logs.mkdir(parents=True, exist_ok=True)

    def run(self) -> bool:
        """True if no step failed."""
        self.do(PREPARE, self.end)

        # Nothing else may use the GPU while steps are timed.
        clock = self._log_clock()
        for step in TIMINGS:
            self.do(step, self.end - CHECKS_TAKE)
            # the other timings are still of use without the compiled kernels
            if step.name == "kernels" and self.results[step.name].result.startswith("FAILED"):
                self.environment["MS_DEFORM_ATTN_BACKEND"] = "triton"
        if clock:
            clock.terminate()

        self.do_side_by_side(CHECKS)
        return not any(outcome.result.startswith("FAILED") for outcome in self.results.values())

    def do_side_by_side(self, steps: Sequence[CheckStep]) -> None:
        """Run as many steps at a time as the machine has cores for."""
        futures: dict[str, Future] = {}
        with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2)) as pool:
            for step in steps:
                futures[step.name] = pool.submit(self.do, step, self.end, futures.get(step.after))
        for future in futures.values():
            future.result()  # raises what the thread raised

    def do(self, step: CheckStep, end: float, before: Future | None = None) -> None:
        """Wait for the step before, run this one if possible, and write the results."""
        # its result decides whether this step can run
        if before is not None:
            before.result()

        left = int(end - time.monotonic())
        if reason := self._obstacle(step):
            outcome = Outcome(f"skipped: {reason}")
        elif left < step.usual:
            outcome = Outcome(f"left out: takes {step.usual} s, {max(left, 0)} s left")
        else:
            outcome = self._execute(step, left)

        # Steps run side by side, and each rewrites the same files.
        with self._writing:
            self.results[step.name] = outcome
            self._write()
        print(f"== {step.name}: {outcome.result}", *outcome.lines, sep="\n   ", flush=True)

    def _obstacle(self, step: CheckStep) -> str | None:
        """Why a step can't run here; None if it can."""
        if step.needs_gpu and self.device != "cuda":
            return "there is no GPU"
        missing = [name for name in step.modules.split() if importlib.util.find_spec(name) is None]
        if missing:
            return f"Python has no {', '.join(missing)}"
        if step.after and self.results[step.after].result != "passed":
            return f"it needs the files of {step.after}"
        for program in {"ncu", "compute-sanitizer"}.intersection(self.command(step)):
            if not shutil.which(program, path=self.path):
                return f"there is no {program}"
        return None

    def _execute(self, step: CheckStep, left: int) -> Outcome:
        limit = min(left, step.limit)
        log = self.logs / f"{re.sub('[^a-z]+', '_', step.name.lower())}.log"
        # unlike subprocess's own limit, `timeout` ends the children of the command too
        command = ["timeout", "-k", "5", str(limit), *self.command(step)]

        begin = time.monotonic()
        with log.open("w") as output:
            done = subprocess.run(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                check=False,
            )
        seconds = time.monotonic() - begin

        # A failed step shows its last lines.
        lines = log.read_text(errors="replace").splitlines()
        if done.returncode:
            return Outcome(_failure(done.returncode, seconds, limit, step), round(seconds), lines[-15:])
        shown = [line for line in lines if step.shows and re.match(step.shows, line)]
        return Outcome("passed", round(seconds), shown)

    def command(self, step: CheckStep) -> list[str]:
        """The words of a step's command, its fields filled in."""
        folders = {"data": self.work / "data", "work": self.work, "logs": self.logs}
        quoted = {name: shlex.quote(str(path)) for name, path in folders.items()}
        return shlex.split(step.command.format(**SIZES[self.device], **quoted, device=self.device))

    def _log_clock(self) -> subprocess.Popen | None:
        """Write the GPU's clock, load, power and temperature once a second into clock.csv."""
        program = shutil.which("nvidia-smi")
        if self.device != "cuda" or program is None:
            return None
        with (self.logs / "clock.csv").open("w") as output:
            return subprocess.Popen([program, *CLOCK_FLAGS.split()], stdout=output)

    def _write(self) -> None:
        replace_text(self.folder / "summary.md", summary(self.results))
        with tarfile.open(self.work / "logs.tar.gz", "w:gz") as archive:
            archive.add(self.logs, "logs")
        shutil.move(self.work / "logs.tar.gz", self.folder / "logs.tar.gz")


def _failure(code: int, seconds: float, limit: int, step: CheckStep) -> str:
    # `timeout` has its own exit statuses, but so may a command have
    if seconds < limit:
        return f"FAILED: exit status {code}"
    # not the step's fault: the time of the whole check was over
    if limit < step.limit:
        return f"left out: cut off after {limit} s"
    return f"FAILED: ended after {limit} s"


def summary(results: dict[str, Outcome]) -> str:
    """Markdown: a table of the results, then the lines that the steps show."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    page = ["# GPU check", "", f"{time.strftime('%Y-%m-%d')}, commit {git.stdout.strip() or 'unknown'}", ""]
    page += ["| step | result | seconds |", "|---|---|---|"]
    page += [f"| {name} | {one.result} | {one.seconds or ''} |" for name, one in results.items()]
    for name, one in results.items():
        if one.lines:
            page += ["", f"## {name}", "", "```", *one.lines, "```"]
    return "\n".join(page) + "\n"
