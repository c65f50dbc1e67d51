"""The runs of an ablation: which are done, and running the others one after another or at once."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tools.ablation.grid import Variant
from util.draw.curves import Row, read_log
from util.errors import ASK_TO_LEAVE, EXIT_INTERRUPTED, EXIT_PREEMPTED, Preempted
from util.run.hold import Holder, holder_of
from util.run.record import read_record

log = logging.getLogger(__name__)

LOOK_EVERY = 0.5  # seconds
_SUBMITIT = "run_with_submitit.py"


@dataclass(frozen=True)
class Cell:
    """One run: a variant with a seed, in a folder of its own."""

    variant: Variant
    seed: int
    folder: Path
    console: Path

    @property
    def name(self) -> str:
        return f"{self.variant.name}, seed {self.seed}"

    def command(self, base: Sequence[str]) -> list[str]:
        """The command of a run with this cell's flags. The same command starts and resumes it."""
        folder = ["--output_dir", str(self.folder)]
        start = list(base)
        # submitit names the run's folder itself
        if any(word.endswith(_SUBMITIT) for word in base):
            folder = []
            place = start.index("--") if "--" in start else len(start)
            start = [*start[:place], "--job_dir", str(self.folder), "--", *start[place + 1 :]]
        own = [*folder, "--seed", str(self.seed), "--resume", "auto", "--save_predictions"]
        return [*start, *self.variant.words, *own]

    def rows(self) -> list[Row]:
        """The finished epochs."""
        try:
            return read_log(self.folder / "log.txt")
        except FileNotFoundError:
            return []

    def is_done(self) -> bool:
        flags, rows = self._flags(), self.rows()
        last = bool(rows) and rows[-1].get("epoch") == flags.get("epochs", 0) - 1
        return last and not self._wrongly_on(flags)

    def wrongly_on(self) -> list[str]:
        """Switches that should be off in this run, and were on: a script of configs/ may set them."""
        return self._wrongly_on(self._flags())

    def _wrongly_on(self, flags: dict[str, Any]) -> list[str]:
        return [name for name in self.variant.off if flags.get(name)]

    def _flags(self) -> dict[str, Any]:
        """Those of the last start; {} before the first."""
        return read_record(self.folder).get("flags", {})

    def is_elsewhere(self) -> bool:
        """Whether another process is at work on it, or it waits in a queue of Slurm."""
        return holder_of(self.folder) is not None or _is_queued(self.folder)

    def is_here(self) -> bool:
        """Whether a process of this machine is at work on it."""
        holder = holder_of(self.folder)
        return holder is not None and holder.machine == Holder.this_process().machine


def cells_of(variants: Sequence[Variant], seeds: Sequence[int], folder: Path) -> list[Cell]:
    """The runs in their order: a seed in all variants, then the next, so that early results are pairs."""
    cells = []
    for seed in seeds:
        for variant in variants:
            name = f"{variant.name}_seed{seed}"
            cells.append(Cell(variant, seed, folder / name, folder / "consoles" / f"{name}.txt"))
    return cells


def _is_queued(folder: Path) -> bool:
    jobs = {path.name.split("_")[0] for path in folder.glob("submitit/*_submitted.pkl")}
    if not jobs:
        return False
    command = ["squeue", "--noheader", "--jobs", ",".join(sorted(jobs))]
    try:
        return bool(subprocess.run(command, capture_output=True, text=True).stdout.strip())
    except FileNotFoundError:  # submitit on this machine alone
        return False


class Runner:
    """Runs cells, at most `jobs` at once.

    Args:
        base: the command of a run.
        on_end: called with a cell, the seconds of this attempt, and why it failed ("" if it did
            not).
    """

    def __init__(self, base: Sequence[str], jobs: int, on_end: Callable[[Cell, float, str], None]) -> None:
        self._base, self._jobs, self._on_end = base, jobs, on_end
        self._running: dict[int, tuple[Cell, subprocess.Popen[bytes], float]] = {}  # by place

    def run(self, cells: Sequence[Cell]) -> list[Cell]:
        """Run the cells that are not done; returns those that a queue of Slurm has.

        Raises Preempted if a signal asked this process, or a run, to leave. The runs have saved
        then.
        """
        before = {number: signal.signal(number, _leave) for number in (*ASK_TO_LEAVE, signal.SIGINT)}
        try:
            return self._run([cell for cell in cells if not cell.is_done()])
        finally:
            for number in before:
                signal.signal(number, signal.SIG_IGN)
            self._end_all()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run(self, waiting: list[Cell]) -> list[Cell]:
        while waiting or self._running:
            # fill the free places; a killed ablation has left runs that still go on
            others = sum(cell.is_here() for cell in waiting)
            for cell in list(waiting):
                if len(self._running) + others >= self._jobs:
                    break
                if not cell.is_elsewhere():
                    waiting.remove(cell)
                    if not cell.is_done():  # another process may have finished it meanwhile
                        self._start(cell)
            # nothing left but what others do: a queue may take days, a process is waited for
            if not self._running and waiting:
                if all(_is_queued(cell.folder) for cell in waiting):
                    return waiting
                log.info("waiting for other processes, which run %s", ", ".join(c.name for c in waiting))
                time.sleep(10)
            time.sleep(LOOK_EVERY)
            # what has ended
            for place in list(self._running):
                if self._running[place][1].poll() is not None:
                    waiting += self._finish(place)
        return []

    def _start(self, cell: Cell) -> None:
        # the place decides which cores and GPUs it gets
        place = next(i for i in range(self._jobs) if i not in self._running)
        cell.console.parent.mkdir(parents=True, exist_ok=True)
        command = cell.command(self._base)
        if command[0] == "python":  # of this environment
            command[0] = sys.executable
        with open(cell.console, "ab") as output:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | _share(place, self._jobs),
            )
        log.info("%s: started, see %s", cell.name, cell.console)
        self._running[place] = cell, process, time.monotonic()

    def _finish(self, place: int) -> list[Cell]:
        """Report the end of a run; returns the cell if it waits in a queue now."""
        cell, process, start = self._running.pop(place)
        if process.returncode in (EXIT_PREEMPTED, EXIT_INTERRUPTED):
            raise Preempted(f"{cell.name} was asked to leave and has saved; the same command goes on")
        if process.returncode == 0 and not cell.is_done() and _is_queued(cell.folder):
            log.info("%s: submitted", cell.name)
            return [cell]
        reason = ""
        if wrong := cell.wrongly_on():
            switches = ", ".join(f"--{name}" for name in wrong)
            reason = f"{switches} should be off, but the command sets it, and a switch can't be taken back"
        elif process.returncode or not cell.is_done():
            reason = f"exit code {process.returncode}: {_last_line(cell.console)}"
        self._on_end(cell, time.monotonic() - start, reason)
        return []

    def _end_all(self) -> None:
        # all first: each takes a step to save
        for _, process, _ in self._running.values():
            process.terminate()
        for cell, process, start in self._running.values():
            process.wait()
            self._on_end(cell, time.monotonic() - start, "interrupted")
        self._running.clear()


def _leave(number: int, _: object) -> NoReturn:
    code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED
    raise Preempted("the runs have saved; the same command goes on", code)


def _share(place: int, jobs: int) -> dict[str, str]:
    """The variables that give a run its share of the machine's cores and GPUs."""
    variables = {}
    if "OMP_NUM_THREADS" not in os.environ and jobs > 1:
        variables["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    # with more runs than GPUs, several share one
    gpus = _visible_gpus()
    if gpus and jobs > 1:
        own = gpus[place * len(gpus) // jobs : (place + 1) * len(gpus) // jobs] or [gpus[place % len(gpus)]]
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    return variables


def _visible_gpus() -> list[str]:
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    import torch  # takes seconds

    return [str(i) for i in range(torch.cuda.device_count())]


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"see {path}"


def as_shell(cells: Sequence[Cell], base: Sequence[str]) -> str:
    """The commands of the cells that are not done, one on each line."""
    return "\n".join(shlex.join(cell.command(base)) for cell in cells if not cell.is_done())
