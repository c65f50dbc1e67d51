"""Runs every command of README.md and docs/, one page after the other, in a copy of the project and at a small size.

    python -m tests.run_docs [docs/own_data.md ...]

What is made small: the published configurations get a small network, few epochs and small images; 8 processes become 2; COCO
is a synthetic data set of the same layout; placeholders get a value. What a page needs and does not make (pictures, a folder in
Pascal VOC's layout, checkpoints) is laid out before. Commands of Slurm are run by tests/faults/slurm/run.py instead. Prints a
line a command, and ends with exit code 1 if any failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from models import build_model
from tests.helpers import ROOT, SMALL_IMAGES, SMALL_MODEL
from tests.test_docs import PAGES, commands
from util.config import parse_config

SECONDS = 600
SMALL = (*SMALL_IMAGES, *SMALL_MODEL[:-2], "--epochs", "1", "--num_workers", "0", "--batch_size", "2")
PLACEHOLDERS = {
    "<ip of node 1>": "127.0.0.1",
    "<path to a checkpoint>": "exps/small/checkpoint.pth",
    "<your data>": "data/small",
    "<partition>": "gpu",
    "<COCO layout>": "data/coco",
    "--classes person car dog": "--classes square star",
    "/path/to/coco": "{root}/data/small",
}
SLURM = ("run_dist_slurm", "sbatch", "scancel", "squeue")
"""Commands that only a cluster takes."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m tests.run_docs", description=__doc__)
    parser.add_argument("pages", nargs="*", type=Path, help="pages to run; all if none is named")
    chosen = [page.resolve() for page in parser.parse_args(arguments).pages] or PAGES
    failed = []
    with tempfile.TemporaryDirectory(prefix="docs-") as folder:
        root = Path(folder) / "project"
        lay_out(root)
        for page in chosen:
            print(f"== {page.relative_to(ROOT)}", flush=True)
            for command in commands(page):
                if not run(command, root):
                    failed.append(command)
    print(f"{len(failed)} commands failed", *failed, sep="\n  ")
    return bool(failed)


def lay_out(root: Path) -> None:
    """The project as git has it, kernels and environment beside, and what the pages take for given."""
    ls = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(ls, cwd=ROOT, check=True, capture_output=True).stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    (root / ".venv").symlink_to(Path(sys.executable).parents[1])
    for kernel in (ROOT / "models/ops").glob("_c*.*"):
        shutil.copy2(kernel, root / "models/ops")
    here = [
        "python -m datasets.synthetic --output_dir data/small --train_images 16 --val_images 8 --image_size 96",
        f"python main.py --coco_path data/small --output_dir exps/small {' '.join(SMALL)}",
        "ln -s small data/coco",
        "python -m tests.layouts data",  # the same images in the layouts of Pascal VOC and YOLO
    ]
    for command in here:
        if not run(command, root):
            raise SystemExit("the pages can't be tried")
    write_published(root / "r50_deformable_detr.pth")


def write_published(path: Path) -> None:
    """A checkpoint as those that were published: frozen statistics, COCO's 91 logits, a Namespace."""
    config = parse_config([*SMALL_MODEL, "--backbone_norm", "frozen_bn", "--num_classes", "91"])
    torch.save({"model": build_model(config)[0].state_dict(), "args": argparse.Namespace(**config.flags())}, path)


def run(command: str, root: Path) -> bool:
    small = made_small(command, root)
    if small is None:
        print(f"   cluster  {command}", flush=True)
        return True
    started = time.monotonic()
    environment = {**os.environ, "PATH": f"{root}/.venv/bin:{os.environ['PATH']}", "VIRTUAL_ENV": f"{root}/.venv"}
    done = subprocess.run(
        ["bash", "-c", small], cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=SECONDS,
    )  # fmt: skip
    print(f"   {'ok     ' if done.returncode == 0 else 'FAILED '} {time.monotonic() - started:4.0f} s  {command}", flush=True)
    if done.returncode:
        print("      " + small, *done.stdout.splitlines()[-15:], sep="\n      ", flush=True)
    return done.returncode == 0


def made_small(command: str, root: Path) -> str | None:
    """The command as it is tried; None for one of Slurm's."""
    if any(name in command for name in SLURM):
        return None
    for placeholder, value in PLACEHOLDERS.items():
        command = command.replace(placeholder, value.format(root=root))
    copied = " && ".join(f"cp -r {folder}/synthetic_short {folder}/synthetic" for folder in ("exps", "data"))
    command = re.sub(r"quickstart\.sh$", f"quickstart.sh --short && {copied}", command)
    command = re.sub(r"run_with_submitit.py ", "run_with_submitit.py --cluster local --tasks_per_node 2 ", command)
    command = re.sub(r"--nodes \d+ --gpus_per_node \d+", "--nodes 1 --gpus_per_node 0", command)
    if "MASTER_ADDR" in command:  # both nodes on this machine
        command = re.sub(r"GPUS_PER_NODE=\d+", "GPUS_PER_NODE=1", command).replace("_launch.sh 16", "_launch.sh 2")
        command = re.sub(r"NODE_RANK=\d", "NODE_RANK=0", command) + small_flags(command)
        return f"{command.replace('NODE_RANK=0', 'NODE_RANK=1')} & {command} && wait"
    command = re.sub(r"GPUS_PER_NODE=\d+", "GPUS_PER_NODE=2", command)
    command = re.sub(r"_launch\.sh (8|16)\b", "_launch.sh 2", command)
    return command + small_flags(command)


def small_flags(command: str) -> str:
    """Flags behind a run of main.py, which replace those before."""
    if not re.search(r"configs/|main\.py|run_with_submitit|benchmark.py", command) or "op" in command.split():
        return ""
    epochs = re.search(r"--epochs (\d+)", command)
    return " " + " ".join(SMALL) + (" --epochs 2" if epochs else "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
