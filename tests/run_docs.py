"""Runs every command and all Python of README.md and docs/ at a small size.

    python -m tests.run_docs [docs/own_data.md ...]

Each page runs in its own copy of the project. Configurations get a small network, few epochs and
small images; 8 processes become 2; COCO is a synthetic data set in the same layout; placeholders
get a value. Files that a page assumes (pictures, a folder in Pascal VOC's layout, checkpoints) are
made before. Commands that need a cluster or a GPU are not run: tests/faults/slurm/run.py and the
tests marked gpu do that. Prints one line per command. The exit code is 1 if any failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models import build_model
from tests.helpers import ROOT, SMALL_IMAGES, SMALL_MODEL
from tests.test_docs import PAGES, blocks, commands
from util.config import parse_config
from util.images.video import VideoWriter

SECONDS = 900
# names that the Python of a page assumes
GIVEN = {"fine_tuning.md": "from PIL import Image\nimage = Image.open('street.jpg').convert('RGB')\n"}
SMALL = (*SMALL_IMAGES, *SMALL_MODEL[:-2], "--epochs", "1", "--num_workers", "0", "--batch_size", "2")
ELSEWHERE = {
    "cluster": ("run_dist_slurm", "sbatch", "scancel"),
    "gpu": ("gpu_check.sh", "test.sh -m gpu"),
}
# replacements that make a command small; their order matters
REPLACED = (
    (r"<ip of node \d>", "127.0.0.1"),
    (r"<path to a checkpoint>", "exps/small/checkpoint.pth"),
    (r"<your data>|<COCO layout>", "data/small"),
    (r"<partition>", "gpu"),
    (r"<a folder in [^>]*>", "data/voc"),
    (r"<pictures, folders, a video>", "photos street.jpg drive.mp4"),
    (r"/path/to/coco", "small"),
    (r"--classes person car dog", "--classes square star"),
    (
        r"quickstart\.sh$",
        "quickstart.sh --short && rm -rf {exps,data}/synthetic && for folder in exps data; do "
        "cp -r $folder/synthetic_short $folder/synthetic; done",
    ),
    (r"tools/test\.sh$", "tools/test.sh tests/test_layers.py"),
    (r"run_with_submitit\.py ", "run_with_submitit.py --cluster local --tasks_per_node 2 "),
    (r"--nodes \d+ --gpus_per_node \d+", "--nodes 1 --gpus_per_node 0"),
)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m tests.run_docs", description=__doc__)
    parser.add_argument("pages", nargs="*", type=Path, help="pages to run; all if none is named")
    chosen = [page.resolve() for page in parser.parse_args(arguments).pages] or PAGES
    failed = []
    with tempfile.TemporaryDirectory(prefix="docs-") as folder:
        given, root = Path(folder) / "given", Path(folder) / "project"
        lay_out(given)
        for page in chosen:
            if not commands(page) + blocks(page, "python"):
                continue
            shutil.copytree(given, root, symlinks=True)
            print(f"== {page.relative_to(ROOT)}", flush=True)
            failed += [f"{page.name}: {command}" for command in commands(page) if not run(command, root)]
            failed += [f"{page.name}: its Python"] if not run_python(page, root) else []
            shutil.rmtree(root)
    print(f"{len(failed)} commands failed", *failed, sep="\n  ")
    return bool(failed)


def lay_out(root: Path) -> None:
    """Copy the project with kernels and environment, and make the files that the pages assume."""
    ls = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(ls, cwd=ROOT, check=True, capture_output=True).stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    (root / ".venv").symlink_to(Path(sys.executable).parents[1])
    for kernel in (ROOT / "models/ops").glob("_c*.*"):
        shutil.copy2(kernel, root / "models/ops")
    here = [
        "python -m datasets.synthetic --output_dir data/small --train_images 16 --val_images 8 "
        "--image_size 96",
        f"python main.py --coco_path data/small --output_dir exps/small {' '.join(SMALL)}",
        "ln -s small data/coco",
        "cp -r data/small data/synthetic",
        "python -m tests.layouts data",  # the same images in other layouts
        # a step that is not finite, for the page that runs it again
        f"! python main.py --coco_path data/small --output_dir exps/x --lr 1e30 --clip_max_norm 0 "
        f"{' '.join(SMALL)}",
        "mv exps/x/nonfinite_*.pth exps/x/nonfinite_0003_000120_process0.pth",
        "for name in baseline batchformer synthetic; do cp -r exps/small exps/$name; done",
    ]
    for command in here:
        if not run(command, root):
            raise SystemExit("the files that the pages need can't be made")
    write_published(root / "r50_deformable_detr.pth", SMALL_MODEL)
    write_pictures(root)


def write_published(path: Path, flags: Sequence[str]) -> None:
    """Write a checkpoint like the published ones: frozen statistics, COCO's 91 logits, a Namespace."""
    config = parse_config([*flags, "--backbone_norm", "frozen_bn", "--num_classes", "91"])
    torch.save(
        {"model": build_model(config)[0].state_dict(), "args": argparse.Namespace(**config.flags())}, path
    )


def write_pictures(root: Path) -> None:
    """Write a folder of pictures, single pictures and a video."""
    pictures = sorted((root / "data/small/val2017").iterdir())
    shutil.copytree(root / "data/small/val2017", root / "photos")
    for picture, name in zip(pictures, ("street", "a", "b", "c"), strict=False):
        for folder in (root, root / "photos"):
            shutil.copy2(picture, folder / f"{name}.jpg")
    image = np.asarray(Image.open(pictures[0]).convert("RGB").resize((96, 96)))
    video = VideoWriter(root / "drive.mp4", (96, 96), Fraction(10))
    for i in range(4):
        video.add(Image.fromarray(np.roll(image, 8 * i, axis=1)), Fraction(i, 10))
    video.close()


def run(command: str, root: Path) -> bool:
    where = next((name for name, parts in ELSEWHERE.items() if any(part in command for part in parts)), None)
    if where:
        print(f"   {where:7}         {command}", flush=True)
        return True
    started, small = time.monotonic(), made_small(command)
    environment = {
        **os.environ,
        "PATH": f"{root}/.venv/bin:{os.environ['PATH']}",
        "VIRTUAL_ENV": f"{root}/.venv",
    }
    done = subprocess.run(
        ["bash", "-c", small],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    print(
        f"   {'ok     ' if done.returncode == 0 else 'FAILED '} {time.monotonic() - started:4.0f} "
        f"s  {command}",
        flush=True,
    )
    if done.returncode:
        print("      " + small, *done.stdout.splitlines()[-15:], sep="\n      ", flush=True)
    return done.returncode == 0


def run_python(page: Path, root: Path) -> bool:
    """Run all blocks of a page as one program, because later blocks use names of earlier ones."""
    code = "".join(blocks(page, "python"))
    if "transformers" in code and not all(
        importlib.util.find_spec(name) for name in ("transformers", "timm")
    ):
        print("   transformers    its Python", flush=True)
        return True
    (root / "page.py").write_text(GIVEN.get(page.name, "") + code)
    return not code or run("python page.py", root)


def made_small(command: str) -> str:
    """The command at its small size."""
    for pattern, value in REPLACED:
        command = re.sub(pattern, value, command)
    command = command.replace("ln -s ", "ln -sfn ")
    if "MASTER_ADDR" in command:  # both nodes on this machine
        command = re.sub(r"GPUS_PER_NODE=\d+", "GPUS_PER_NODE=1", command).replace(
            "_launch.sh 16", "_launch.sh 2"
        )
        command = re.sub(r"NODE_RANK=\S+", "NODE_RANK=0", command) + small_flags(command)
        return f"{command.replace('NODE_RANK=0', 'NODE_RANK=1')} & {command} && wait"
    command = re.sub(r"GPUS_PER_NODE=\d+", "GPUS_PER_NODE=2", command)
    command = re.sub(r"_launch\.sh (8|16)\b", "_launch.sh 2", command)
    return command + small_flags(command)


def small_flags(command: str) -> str:
    """Flags to append to a training or evaluation; they replace earlier ones."""
    if (
        not re.search(r"configs/|main\.py|finetune\.py|run_with_submitit|benchmark\.py", command)
        or " op" in command
    ):
        return ""
    small = " ".join(SMALL) + (" --epochs 2" if re.search(r"--epochs \d", command) else "")
    return f" {small}" + (" --size 96 96 --num_iters 2 --warm_iters 1" if "benchmark.py" in command else "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
