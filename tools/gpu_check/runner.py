"""Runs the steps within a number of minutes, and keeps the results in a folder up to date."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tools.gpu_check.steps import CHECKS_TAKE, Step, checks, preparation, timings
from util.atomic import replace_text

LAST_WORDS = 15  # seconds kept for ending what runs, and for the results
TOOLS = ("ncu", "compute-sanitizer", "nvidia-smi")
CLOCK = (
    "--query-gpu=clocks.sm,utilization.gpu,power.draw,temperature.gpu",
    "--format=csv,noheader,nounits",
    "--loop=1",
)


@dataclass
class Outcome:
    """What became of a step: "passed", "FAILED: ...", "skipped: ..." or "left out: ...". Seconds
    that it took.
    """

    result: str
    expected: str
    seconds: int = 0
    figures: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return self.result.startswith("FAILED")


class Check:
    """The steps on "cuda" or "cpu", within some minutes.

    `folder` gets summary.md, figures.json and logs.tar.gz, after every step anew, so that an early
    end loses nothing; `work` everything else.
    """

    def __init__(self, folder: Path, work: Path, device: str, minutes: float) -> None:
        self.folder, self.work, self.logs, self.device, self.minutes = (
            folder,
            work,
            work / "logs",
            device,
            minutes,
        )
        self.end = time.monotonic() + 60 * minutes - LAST_WORDS
        self.results: dict[str, Outcome] = {}
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if device == "cpu":  # threads gain nothing at small sizes, and get in each other's way
            self.environment["OMP_NUM_THREADS"] = "1"
        self._writing = threading.Lock()
        for path in (self.folder, self.logs):
            path.mkdir(parents=True, exist_ok=True)

    def run(self) -> bool:
        """Whether no step failed."""
        self.do(preparation(self.device), self.end)
        with self._clock():
            for step in timings(self.device):
                self.do(step, self.end - CHECKS_TAKE)
                if step.name == "kernels" and self.results[step.name].failed:
                    self.environment["MS_DEFORM_ATTN_BACKEND"] = "triton"
        self.do_side_by_side(checks(self.device))
        return not any(result.failed for result in self.results.values())

    def do_side_by_side(self, steps: Sequence[Step]) -> None:
        """As many at a time as the machine has cores for; a step waits for the one before it whose
        files it reads.
        """
        begun: dict[str, Future] = {}

        def in_turn(step: Step) -> None:
            if step.after in begun:
                begun[step.after].result()
            self.do(step, self.end)

        with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2)) as pool:
            for step in steps:
                begun[step.name] = pool.submit(in_turn, step)
        for future in begun.values():
            future.result()

    def do(self, step: Step, end: float) -> None:
        """Run a step if it can run here and has the time to; note the result."""
        left = int(end - time.monotonic())
        if reason := self._hindrance(step):
            result = Outcome(f"skipped: {reason}", step.expected)
        elif left < step.usual:
            result = Outcome(f"left out: takes {step.usual} s, {max(left, 0)} s left", step.expected)
        else:
            result = self._execute(step, left)
        with self._writing:
            self.results[step.name] = result
            self._write()
        print(
            f"== {step.name}: {result.result}",
            *(f"   {k} {v}" for k, v in result.figures.items()),
            sep="\n",
            flush=True,
        )

    def _hindrance(self, step: Step) -> str | None:
        """Why a step can't run here; None if it can."""
        if step.needs_gpu and self.device != "cuda":
            return "there is no GPU"
        if missing := [name for name in step.modules if importlib.util.find_spec(name) is None]:
            return f"Python has no {', '.join(missing)}"
        if step.after and self.results[step.after].result != "passed":
            return f"it goes on from {step.after}"
        program = shlex.split(step.command)[0]
        return f"there is no {program}" if program in TOOLS and not find_tool(program) else None

    def _execute(self, step: Step, left: int) -> Outcome:
        limit = min(left, step.limit)
        begin, log = time.monotonic(), self.logs / f"{re.sub('[^a-z]+', '_', step.name.lower())}.log"
        command = ["timeout", "-k", "5", str(limit), *self.command(step)]
        with log.open("w") as output:
            settings = [f"{name}={value}" for name, value in step.environment.items()]
            print("$", *settings, shlex.join(command), file=output, flush=True)
            environment = self.environment | dict(step.environment)
            code = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        text = log.read_text(errors="replace").partition("\n")[2]
        if code:
            print(f"== {step.name}", *text.splitlines()[-15:], sep="\n    ", flush=True)
        seconds = time.monotonic() - begin
        result = "passed" if code == 0 else f"FAILED: exit status {code}"
        if (
            code in (124, 137) and seconds >= limit
        ):  # what timeout gives, and a process that something else killed
            result = (
                f"FAILED: ended after {limit} s"
                if limit == step.limit
                else f"left out: cut off after {limit} s"
            )
        return Outcome(result, step.expected, round(seconds), read_figures(step.figures, text))

    def command(self, step: Step) -> list[str]:
        """The words of a step's command, with this Python, these folders, and tools where they are."""
        words = [
            word.format(data=self.work / "data", work=self.work, logs=self.logs)
            for word in shlex.split(step.command)
        ]
        found = {"python3": sys.executable} | {name: find_tool(name) or name for name in TOOLS}
        return [found.get(word, word) for word in words]

    @contextlib.contextmanager
    def _clock(self) -> Iterator[None]:
        """Once a second the GPU's clock in MHz, its load, power and temperature into clock.csv."""
        smi = find_tool("nvidia-smi") if self.device == "cuda" else None
        if smi is None:
            yield
            return
        with (
            (self.logs / "clock.csv").open("w") as output,
            subprocess.Popen([smi, *CLOCK], stdout=output) as process,
        ):
            try:
                yield
            finally:
                process.terminate()

    def _write(self) -> None:
        about = {"date": f"{datetime.date.today()}", "commit": commit(), "minutes": self.minutes}
        about |= self.results["prepare"].figures
        if clock := busy_clock(self.logs / "clock.csv"):
            about["SM clock at work, MHz"] = clock
        steps = {name: asdict(result) for name, result in self.results.items()}
        replace_text(self.folder / "figures.json", json.dumps(about | {"steps": steps}, indent=1) + "\n")
        replace_text(self.folder / "summary.md", summary(about, self.results))
        with tarfile.open(self.work / "logs.tar.gz", "w:gz") as archive:
            archive.add(self.logs, "logs")
        shutil.move(self.work / "logs.tar.gz", self.folder / "logs.tar.gz")


def summary(about: Mapping[str, object], results: Mapping[str, Outcome]) -> str:
    """The page of the results; what is expected was counted for an H100."""
    rows = [f"{name}: {value}  " for name, value in about.items()]
    rows += ["", "| step | result | seconds | figures | expected on an H100 |", "|---|---|---|---|---|"]
    for name, one in results.items():
        figures = "; ".join(f"{what} {value}" for what, value in one.figures.items())
        rows.append(f"| {name} | {one.result} | {one.seconds or ''} | {figures} | {one.expected} |")
    return "\n".join(["# GPU check", "", *rows, ""])


def read_figures(patterns: Mapping[str, str], text: str) -> dict[str, str]:
    """The first match of every pattern that has one."""
    found = {name: re.search(pattern, text, re.MULTILINE) for name, pattern in patterns.items()}
    return {name: match[1] for name, match in found.items() if match}


def busy_clock(path: Path) -> float | None:
    """The median MHz while the GPU had work for half the time and more."""
    rows = [line.split(",") for line in path.read_text().splitlines()] if path.exists() else []
    busy = [float(clock) for clock, load, *_ in rows if load.strip().isdigit() and int(load) >= 50]
    return statistics.median(busy) if busy else None


def find_tool(name: str) -> str | None:
    """A program on PATH or in the CUDA toolkit."""
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name, path=f"{os.environ['PATH']}:{toolkit}/bin")


def commit() -> str:
    """Of the sources, as git says."""
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return said.stdout.strip() or "unknown"
