"""A process of a two-process run is stopped, killed or starved of data: the run ends in time, names it, and goes on alike.

    python -m tests.faults.one_node [--timeout 15]

The launcher starts all again (MAX_RESTARTS=1), and the end is compared with that of a run that was left alone. When the launcher
itself is killed, the processes it leaves behind must end by themselves.
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
from pathlib import Path

from tests.faults import kill
from tests.faults.compare import differences
from tests.helpers import SMALL_IMAGES, SMALL_MODEL, write_coco


class Run(kill.Run):
    def kill_launcher(self) -> None:
        self._process.kill()


LEAVING = 15  # seconds that may pass after --dist_timeout until all is ended and starts again


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timeout", type=int, default=15, help="--dist_timeout of the runs, in seconds (15)")
    args = parser.parse_args()
    host = os.uname().nodename
    at_work = r"'(epoch 1, step \d+: |saving after \d+ images of epoch 1)"  # what it did up to a second before
    cases = (
        ("stopped", stop, rf"no sign of life from rank 1 on {host} .* last known operation: {at_work}"),
        ("killed", kill_one, r"rank 1 was killed by SIGKILL"),
        ("loader stopped", stop_loader, rf"rank 1 on {host} .* no progress for \d+ s in 'epoch 1, step \d+: waiting for "),
    )
    with tempfile.TemporaryDirectory() as work:
        flags, whole = prepare(Path(work), args.timeout)
        sound = [survives(name, fault, told, flags, Path(work), whole, args.timeout) for name, fault, told in cases]
        sound.append(orphans_end(flags, Path(work), args.timeout))
    return 0 if all(sound) else 1


def training_flags(work: Path, timeout: int) -> list[str]:
    """Of a run on data that are made here; the output folder is to follow them."""
    write_coco(work / "data", num_train=26, num_val=6)
    return [
        "--coco_path", str(work / "data"), *SMALL_IMAGES, *SMALL_MODEL, "--epochs", "3", "--batch_size", "1", "--log_every", "1",
        "--save_every", "4", "--num_workers", "1", "--dist_timeout", str(timeout), "--resume", "auto", "--output_dir",
    ]  # fmt: skip


def prepare(work: Path, timeout: int) -> tuple[list[str], Path]:
    flags = training_flags(work, timeout)
    run = Run([*flags, str(work / "whole")], restarts=0)
    assert run.wait() == 0, run.output()
    return flags, work / "whole"


def survives(
    name: str, fault: Callable[[Run], None], told: str, flags: list[str], work: Path, whole: Path, timeout: int
) -> bool:  # fmt: skip
    folder = work / name.replace(" ", "_")
    run = Run([*flags, str(folder)], restarts=1)
    wait_for(run, r"^(\[0\] )?epoch 1 \[ *6/")
    fault(run)
    start = time.monotonic()
    wait_for(run, "starting again: attempt 1 of 1")
    seconds = time.monotonic() - start
    code = run.wait()
    wrong = differences(whole, folder) if code == 0 else [f"exit code {code}"]
    named = re.search(told, run.output())
    sound = bool(named) and not wrong and seconds < timeout + LEAVING and "Traceback" not in run.output()
    print(f"{'ok' if sound else 'FAILED'}: {name}: all ended {seconds:.0f} s after it, then: {wrong or 'identical'}", flush=True)
    print("\n".join(f"    {line}" for line in run.output().splitlines() if re.search(told, line)) if sound else run.output())
    return sound


def orphans_end(flags: list[str], work: Path, timeout: int) -> bool:
    run = Run([*flags, str(work / "orphans")], restarts=0)
    wait_for(run, r"^(\[0\] )?epoch 1 \[ *6/")
    orphans = run.trainers()
    run.kill_launcher()
    start = time.monotonic()
    while any(map(alive, orphans)) and time.monotonic() < start + timeout + LEAVING:
        time.sleep(0.1)
    run.wait()
    sound = not any(map(alive, orphans)) and "has closed the connection" in run.output()
    seconds = time.monotonic() - start
    print(f"{'ok' if sound else 'FAILED'}: launcher killed: its processes ended by themselves {seconds:.0f} s after it")
    print("\n".join(f"    {line}" for line in run.output().splitlines() if line.startswith("error: ")) if sound else run.output())
    return sound


def stop(run: Run) -> None:
    os.kill(run.trainers()[1], signal.SIGSTOP)


def kill_one(run: Run) -> None:
    os.kill(run.trainers()[1], signal.SIGKILL)


def stop_loader(run: Run) -> None:
    """The loader worker of rank 1, as one that waits for a file server that has gone."""
    trainer = run.trainers()[1]
    for child in (int(pid) for path in Path(f"/proc/{trainer}/task").glob("*/children") for pid in path.read_text().split()):
        os.kill(child, signal.SIGSTOP)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(run: Run, pattern: str) -> None:
    deadline = time.monotonic() + 300
    while not re.search(pattern, run.output(), re.MULTILINE):
        if not run.alive() or time.monotonic() > deadline:
            raise SystemExit(f"the run never said {pattern!r}:\n{run.output()}")
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main())
