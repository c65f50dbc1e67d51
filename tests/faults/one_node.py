"""A process of a two-process run is killed, stopped or starved of data: the run ends in time and
names it.

    python -m tests.faults.one_node [--trials 20] [--at_once 3] [--timeout 15]

In each trial every survivor must print one line that names rank 1, and the run must end within
--dist_timeout plus a minute. Then one run for each fault is started again by the launcher
(MAX_RESTARTS=1), and its end is compared with that of a run that was left alone.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.faults.compare import differences
from tests.faults.kill import Run
from tests.helpers import SMALL_IMAGES, SMALL_MODEL, write_coco
from util.errors import EXIT_LOST_PROCESS

LEAVING = 60  # seconds that may pass after --dist_timeout until all processes have ended


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=20, help="of each fault (20)")
    parser.add_argument("--at_once", type=int, default=3, help="runs at the same time (3)")
    parser.add_argument("--timeout", type=int, default=15, help="--dist_timeout of the runs, in seconds (15)")
    args = parser.parse_args()
    faults = {"killed": kill_one, "stopped": stop, "loader stopped": stop_loader}
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(args.at_once) as pool:
        work = Path(name)
        flags = training_flags(work, args.timeout)
        sound = True
        for fault, strike in faults.items():

            def try_once(number: int, fault: str = fault, strike: Callable[[Run], None] = strike) -> Trial:
                return Trial(Run([*flags, str(work / f"{fault} {number}")], restarts=0), strike, args.timeout)

            trials = list(pool.map(try_once, range(args.trials)))
            good = [trial for trial in trials if not trial.wrong]
            seconds = [trial.seconds for trial in good] or [0.0]
            span = f"{min(seconds):.0f} to {max(seconds):.0f} s"
            print(
                f"{fault}: {len(good)} of {len(trials)} runs named rank 1, and ended {span} after the fault"
            )
            for trial in trials[:1] + [trial for trial in trials if trial.wrong]:
                print(f"    {trial.wrong}{trial.line}", flush=True)
            sound &= len(good) == len(trials)
        whole = Run([*flags, str(work / "whole")], restarts=0)
        assert whole.wait() == 0, whole.output()
        for fault, strike in faults.items():
            wrong = ends_alike([*flags, str(work / fault)], work / fault, work / "whole", strike)
            print(f"{fault}, then started again by the launcher: {wrong or 'identical'}", flush=True)
            sound &= not wrong
    return 0 if sound else 1


def training_flags(work: Path, timeout: int) -> list[str]:
    """Of a run on data that are made here; the output folder is to follow them."""
    write_coco(work / "data", num_train=26, num_val=6)
    return [
        "--coco_path",
        str(work / "data"),
        *SMALL_IMAGES,
        *SMALL_MODEL,
        "--epochs",
        "3",
        "--batch_size",
        "1",
        "--log_every",
        "1",
        "--save_every",
        "4",
        "--num_workers",
        "1",
        "--dist_timeout",
        str(timeout),
        "--resume",
        "auto",
        "--output_dir",
    ]


class Trial:
    """A run, disturbed in its first epoch. `wrong` says what is not as it should be; "" if all is."""

    def __init__(self, run: Run, strike: Callable[[Run], None], timeout: int) -> None:
        wait_for(run, r"epoch 0 \S+ \[ *3/")
        at_fault = run.trainers()[1]
        strike(run)
        start = time.monotonic()
        code = run.wait()
        self.seconds = time.monotonic() - start
        self.line = "".join(re.findall(r"^error: .*$", run.output(), re.MULTILINE))
        named = rf"rank 1 on {re.escape(os.uname().nodename)} \(process {at_fault}\)"
        self.wrong = ""
        if not re.match(
            rf"error: no (sign of life|progress) for \d+ s (from|of) {named}; last known "
            rf"operation: ",
            self.line,
        ):
            self.wrong = f"rank 1 was not named:\n{run.output()}\n"
        elif code not in (EXIT_LOST_PROCESS, 128 + signal.SIGKILL) or "Traceback" in run.output():
            self.wrong = f"exit code {code}:\n{run.output()}\n"
        elif self.seconds > timeout + LEAVING:
            self.wrong = f"ended {self.seconds:.0f} s after the fault: "


def ends_alike(flags: list[str], folder: Path, whole: Path, strike: Callable[[Run], None]) -> list[str]:
    run = Run(flags, restarts=1)
    wait_for(run, r"epoch 1 \S+ \[ *6/")
    strike(run)
    code = run.wait()
    return differences(whole, folder) if code == 0 else [f"exit code {code}:\n{run.output()}"]


def stop(run: Run) -> None:
    os.kill(run.trainers()[1], signal.SIGSTOP)


def kill_one(run: Run) -> None:
    os.kill(run.trainers()[1], signal.SIGKILL)


def stop_loader(run: Run) -> None:
    """The loader process of rank 1, as one that waits for a file server that has gone."""
    trainer = run.trainers()[1]
    for child in (
        int(pid)
        for path in Path(f"/proc/{trainer}/task").glob("*/children")
        for pid in path.read_text().split()
    ):
        os.kill(child, signal.SIGSTOP)


def wait_for(run: Run, pattern: str) -> None:
    deadline = time.monotonic() + 300
    while not re.search(pattern, run.output(), re.MULTILINE):
        if not run.alive() or time.monotonic() > deadline:
            raise SystemExit(f"the run never said {pattern!r}:\n{run.output()}")
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main())
