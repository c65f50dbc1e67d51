"""Small data sets, models and runs of the program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 600  # seconds until a process is taken to hang, on a machine that has other work too

SMALL_IMAGES = (
    "--train_sizes",
    "48",
    "64",
    "--eval_size",
    "64",
    "--max_size",
    "96",
    "--crop_resize_sizes",
    "56",
    "--crop_sizes",
    "32",
    "56",
)
SMALL_MODEL = (
    "--backbone",
    "resnet18",
    "--backbone_weights",
    "none",
    "--backbone_norm",
    "gn",
    "--hidden_dim",
    "64",
    "--nheads",
    "4",
    "--enc_layers",
    "2",
    "--dec_layers",
    "2",
    "--dim_feedforward",
    "64",
    "--num_queries",
    "12",
    "--num_classes",
    "4",
)
BATCHFORMER = ("--bf", "1", "--share_bf", "0", "--insert_idx", "0")


def write_coco(
    folder: Path,
    num_train: int,
    num_val: int | None = None,
    annotations: dict[int, list] | None = None,
    size: tuple = (64, 48),
) -> None:
    """A tiny data set of noise images (width, height), two boxes each unless `annotations` says
    otherwise by image index.
    """
    rng = np.random.default_rng(0)
    for split, count in (("train", num_train), ("val", num_val if num_val is not None else num_train)):
        (folder / f"{split}2017").mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": i, "name": name} for i, name in enumerate(("one", "two", "three"), 1)],
        }
        for i in range(count):
            name = f"{i:06}.png"
            Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(
                folder / f"{split}2017" / name
            )
            content["images"].append({"id": 10 + i, "file_name": name, "width": size[0], "height": size[1]})
            default = [
                {"bbox": [4 + i, 5, 20, 16], "category_id": 1},
                {"bbox": [20, 10 + i, 12, 18], "category_id": 1 + i % 3},
            ]
            for box in default if annotations is None else annotations.get(i, []):
                area = box["bbox"][2] * box["bbox"][3]
                entry = {
                    "id": len(content["annotations"]) + 1,
                    "image_id": 10 + i,
                    "iscrowd": 0,
                    "area": area,
                    **box,
                }
                content["annotations"].append(entry)
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def keep_newest(folder: Path, pattern: str) -> Path:
    """Delete all checkpoints but the last one of this pattern, as if the run had been killed after it."""
    newest = sorted(folder.glob(pattern))[-1]
    for path in folder.glob("*.pth"):
        if path != newest:
            path.unlink()
    return newest


def run_main(
    *flags: str, processes: int = 1, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """main.py as a user starts it: by itself, or under the launcher.

    Loading the libraries takes seconds: tests.processes.run_main_forked is for what is not about
    starting or ending.
    """
    command = (
        [sys.executable, "main.py"]
        if processes == 1
        else ["./tools/run_dist_launch.sh", str(processes), "main.py"]
    )
    return run(*command, *flags, env=env)


def run(
    *command: str, env: dict[str, str] | None = None, cwd: Path = ROOT, timeout: float = PATIENCE
) -> subprocess.CompletedProcess:
    """A command in the project's root, in this environment, with one thread a process."""
    variables = environment(**(env or {}))
    return subprocess.run(
        command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=timeout, check=False
    )


def environment(**variables: str) -> dict[str, str]:
    """This process's environment for a child: this Python first on PATH, one thread a process, and
    `variables`.

    What a library announces for a later version is not told: it is no part of what a run says.
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    quiet = {"PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning"}
    return {
        **os.environ,
        "PATH": path,
        "OMP_NUM_THREADS": "1",
        "VIRTUAL_ENV": sys.prefix,
        **quiet,
        **variables,
    }
