"""A run that resumes in the middle of an epoch must end like one that was never stopped.

    python -m tests.gpu_check.resume <main.py's flags>

Trains in <output_dir>/whole, copies that without its last checkpoints, resumes the copy, and
compares both results bit by bit. Needs --output_dir, --deterministic, --save_every and two epochs.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from util.config import parse_config


def main(flags: Sequence[str]) -> int:
    folder = Path(parse_config(flags).run.output_dir)
    whole, resumed = str(folder / "whole"), str(folder / "resumed")
    # the run that is never stopped
    run("main.py", *flags, "--output_dir", whole)

    # the same run, stopped in the middle of its second epoch
    shutil.copytree(whole, resumed)
    print(f"== resumes from {rewind(Path(resumed)).name}", flush=True)
    run("main.py", *flags, "--output_dir", resumed, "--resume", "auto")
    run("-m", "tests.faults.compare", whole, resumed)
    return 0


def rewind(folder: Path) -> Path:
    """Remove the checkpoints of the end; returns the newest that is left."""
    *_, middle, end = sorted(folder.glob("resume_*.pth"))
    for path in (end, *folder.glob("checkpoint*.pth")):
        path.unlink()
    return middle


def run(*command: str) -> None:
    done = subprocess.run([sys.executable, *command], check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
