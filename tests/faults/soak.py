"""A long run: memory and open files of all its processes must stay flat.

    python -m tests.faults.soak [--iterations 5000]

Trains a small detector with two loader workers, evaluating and saving all along, and looks at every
process of the run in the middle of each epoch: its memory (of loader workers, which are born as
copies, what they have of their own) and its open files. A line is fitted through the sums after the
first 500 iterations.

Images have two sizes here. With random crops a CPU run grows at first by some 100 KiB for every new
shape, as oneDNN keeps the code that it makes for a shape, up to 1024 pieces
(ONEDNN_PRIMITIVE_CACHE_CAPACITY).
"""

from __future__ import annotations

import argparse
import atexit
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.helpers import BATCHFORMER, ROOT, SMALL_IMAGES, SMALL_MODEL, environment, write_coco

STEPS = 50  # iterations of an epoch
START = 500  # from here on memory must be flat
LIMIT = 1.0  # KiB an iteration: 5 MiB over 5,000
FILES_LIMIT = (
    # an iteration: 10 over 5,000; every batch on its way from a loader worker is some open files
    0.002
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=5000, help="how long (5000)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        samples = run(Path(work), args.iterations // STEPS)
    return judge(np.array(samples, dtype=float))


def run(work: Path, epochs: int) -> list[tuple[int, int, int]]:
    """(iteration, KiB, open files) once an epoch."""
    write_coco(work / "data", num_train=2 * STEPS, num_val=4)
    command = [
        sys.executable,
        "-u",
        "main.py",
        "--coco_path",
        str(work / "data"),
        *SMALL_IMAGES,
        *SMALL_MODEL,
        *BATCHFORMER,
        "--epochs",
        str(epochs),
        "--lr_drop",
        str(epochs),
        "--batch_size",
        "2",
        "--num_workers",
        "2",
        "--augmentation",
        "flip",
        "--log_every",
        str(STEPS // 2),
        "--lr_backbone",
        "0",
        "--ema_decay",
        "0.999",
        "--output_dir",
        str(work / "out"),
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    atexit.register(process.kill)  # nothing goes on when this is interrupted
    samples, output = [], []
    for line in process.stdout or ():
        output.append(line)
        middle = re.search(rf"epoch (\d+) \S+ \[{STEPS // 2}/{STEPS}\]", line)
        if middle:
            family = processes(process.pid)
            iteration = int(middle[1]) * STEPS + STEPS // 2
            kib = memory(family[0], "Anonymous") + sum(memory(pid, "Private_Dirty") for pid in family[1:])
            files = sum(map(open_files, family))
            samples.append((iteration, kib, files))
            if len(samples) % 10 == 1:
                print(
                    f"iteration {iteration}: {len(family)} processes, {kib} KiB, {files} open files",
                    flush=True,
                )
    assert process.wait() == 0, "".join(output[-20:])
    return samples


def judge(samples: np.ndarray) -> int:
    late = samples[samples[:, 0] >= START]
    memory_slope, files_slope = (np.polyfit(late[:, 0], late[:, column], 1)[0] for column in (1, 2))
    flat = memory_slope < LIMIT and files_slope < FILES_LIMIT
    first, last = late[0], late[-1]
    print(f"iterations {first[0]:.0f} to {last[0]:.0f}: {'flat: passed' if flat else 'NOT FLAT'}")
    memory_told = f"{first[1] / 1024:.1f} MiB at first, {last[1] / 1024:.1f} at last"
    print(f"memory: {memory_told}, slope {memory_slope:+.3f} KiB an iteration (limit {LIMIT})")
    files_told = f"{late[:, 2].min():.0f} to {late[:, 2].max():.0f}"
    print(f"open files: {files_told}, slope {files_slope:+.5f} an iteration (limit {FILES_LIMIT})")
    return 0 if flat else 1


def processes(parent: int) -> list[int]:
    """A process and all below it."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    family = [parent]
    for pid in family:
        family += children.get(pid, [])
    return family


def memory(pid: int, kind: str) -> int:
    """KiB of a kind that /proc/<pid>/smaps_rollup tells."""
    match = re.search(rf"^{kind}: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    return int(match[1]) if match else 0


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


if __name__ == "__main__":
    sys.exit(main())
