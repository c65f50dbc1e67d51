"""Kill -9 at random moments: a two-process run that is started again each time ends as the run that
was never disturbed.

    python -m tests.faults.kill [--kills 50] [--seed 0]
        [--case plain|precision|accumulation|batchformer|together]

Each kill strikes one of the two processes or both, at a random moment of start-up, training, saving
or evaluation. Half of them under the launcher's restarts (MAX_RESTARTS), half with a new start by
hand; always with --resume auto. A run that comes to its end is compared, and another one killed.
Prints the processor, as another one takes other kernels; where the kills struck; and whether every
bit is as in the undisturbed run: weights, optimiser, averages, random states, best result, log.txt.
"""

from __future__ import annotations

import argparse
import atexit
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import torch

from tests.faults.compare import differences
from tests.helpers import BATCHFORMER, ROOT, SMALL_IMAGES, SMALL_MODEL, environment, write_coco
from tests.processes import training_processes
from util.errors import EXIT_LOST_PROCESS

PRECISION = ("--amp", "bf16", "--ema_decay", "0.999")
ACCUMULATION = ("--accumulate_steps", "3")
CASES = {
    "plain": (),
    "precision": PRECISION,
    "accumulation": ACCUMULATION,
    "batchformer": BATCHFORMER,
    "together": (*PRECISION, *ACCUMULATION, *BATCHFORMER),
}
# what libraries choose kernels by, in the names of Linux on x86 and on ARM
INSTRUCTIONS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_fp16",
    "asimd",
    "asimdhp",
    "sve",
    "bf16",
)
# what a line of the output says of the moment
MOMENTS = (
    (r"trainable parameters", "training"),
    (r"epoch \d+ \S+ \[", "training"),
    (r"  evaluate \[", "evaluation"),
    (r"^AP ", "evaluation"),
    (r"training time", "end"),
    (r"^flags that differ", "start-up"),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="how often (50)")
    parser.add_argument("--case", choices=CASES, nargs="*", default=list(CASES), help="which runs (all)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    args = parser.parse_args()
    print(f"{processor()}; torch {torch.__version__}", flush=True)
    failed = False
    for case in args.case:
        with tempfile.TemporaryDirectory() as work:
            failed |= not survives(case, args.kills, random.Random(f"{case} {args.seed}"), Path(work))
    return int(failed)


def processor() -> str:
    """This machine's by name, family and model; its instructions, and which of them oneDNN is
    limited to.
    """
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    name = (
        " / ".join(facts[key] for key in ("model name", "cpu family", "model") if key in facts)
        or platform.machine()
    )
    has = facts.get("flags", facts.get("Features", "")).split()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    known = ", ".join(one for one in INSTRUCTIONS if one in has)
    return f"{name} ({known})" + (f", ONEDNN_MAX_CPU_ISA={limit}" if limit else "")


def survives(case: str, kills: int, rng: random.Random, work: Path) -> bool:
    write_coco(work / "data", num_train=26, num_val=6)
    flags = [
        "--coco_path",
        str(work / "data"),
        *SMALL_IMAGES,
        *SMALL_MODEL,
        *CASES[case],
        "--epochs",
        "6",
        "--batch_size",
        "2",
        "--log_every",
        "1",
        "--save_every",
        "2",
        "--num_workers",
        "1",
        "--dist_timeout",
        "60",
        "--resume",
        "auto",
    ]
    started = time.monotonic()
    run = Run([*flags, "--output_dir", str(work / "sound")], restarts=0)
    assert run.wait() == 0, run.output()
    whole = time.monotonic() - started
    seen: Counter[str] = Counter()
    ended, wrong = 0, []
    while not wrong and (seen.total() < kills or not ended):
        folder = work / f"killed{ended}"
        run = Run([*flags, "--output_dir", str(folder)], restarts=3 if rng.random() < 0.5 else 0)
        while run.alive():
            run.sleep(rng.uniform(0, whole * 0.6) if seen.total() < kills else 600)
            if pids := run.trainers():
                seen[run.moment(folder)] += 1
                for pid in rng.choice([pids[:1], pids[1:], pids]):
                    os.kill(pid, signal.SIGKILL)
        code = run.wait()
        assert code in (0, 128 + signal.SIGKILL, EXIT_LOST_PROCESS), run.output()
        assert "Traceback" not in run.output(), run.output()
        if code == 0:
            wrong, ended = differences(work / "sound", folder), ended + 1
            shutil.rmtree(folder)
    where = ", ".join(f"{count} in {moment}" for moment, count in seen.most_common())
    print(
        f"{case}: {seen.total()} kills ({where}), {ended} runs came to their end: {wrong or 'identical'}",
        flush=True,
    )
    return not wrong


class Run:
    """main.py in two processes under the launcher."""

    def __init__(self, flags: list[str], restarts: int) -> None:
        self._process = subprocess.Popen(
            ["./tools/run_dist_launch.sh", "2", "main.py", *flags],
            cwd=ROOT,
            env=environment(MAX_RESTARTS=str(restarts)),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        atexit.register(self._process.terminate)  # nothing goes on when this is interrupted
        self._lines: list[str] = []
        self._reader = threading.Thread(
            target=lambda: self._lines.extend(self._process.stdout or ()), daemon=True
        )
        self._reader.start()

    def alive(self) -> bool:
        return self._process.poll() is None

    def sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.alive() and time.monotonic() < end:
            time.sleep(0.02)

    def wait(self) -> int:
        code = self._process.wait(600)
        self._reader.join(10)
        return code

    def output(self) -> str:
        return "".join(self._lines)

    def trainers(self) -> list[int]:
        """The training processes that there are, by rank."""
        return [pid for _, pid in sorted(training_processes(self._process.pid).items())]

    def moment(self, folder: Path) -> str:
        if list(folder.glob(".*.tmp")):
            return "saving"
        for line in reversed(self._lines):
            for pattern, name in MOMENTS:
                if re.search(pattern, line.removeprefix("[0] ")):
                    return name
        return "start-up"


if __name__ == "__main__":
    sys.exit(main())
