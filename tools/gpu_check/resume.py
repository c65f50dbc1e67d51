"""A run that goes on from the middle must end as one that was never stopped: python -m
tools.gpu_check.resume <main.py's flags>.

Trains in <output_dir>/whole, copies that without what came after the last checkpoint within an
epoch, goes on there with --resume auto, and compares both ends to the bit. Needs --output_dir,
--deterministic, --save_every and two epochs.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from util.config import parse_config


def main(arguments: Sequence[str]) -> int:
    folder = Path(parse_config(arguments).run.output_dir)
    whole, resumed = folder / "whole", folder / "resumed"
    run("main.py", *arguments, "--output_dir", whole)
    shutil.copytree(whole, resumed)
    print(f"== goes on from {rewind(resumed).name}", flush=True)
    run("main.py", *arguments, "--output_dir", resumed, "--resume", "auto")
    run("-m", "tests.faults.compare", whole, resumed)
    return 0


def rewind(folder: Path) -> Path:
    """Remove the checkpoints of the end; gives the newest that is left."""
    *_, middle, end = sorted(folder.glob("resume_*.pth"))
    for path in (end, *folder.glob("checkpoint*.pth")):
        path.unlink()
    return middle


def run(*command: str | Path) -> None:
    done = subprocess.run([sys.executable, *command], check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
