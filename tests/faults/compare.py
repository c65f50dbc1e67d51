"""Whether two runs ended alike, to the bit: every entry of their last checkpoints, and log.txt.

python -m tests.faults.compare exps/undisturbed exps/interrupted
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from util.checkpoint import read_checkpoint

# flags that the two runs may be given differently
NOT_COMPARED = {"args": ("output_dir", "resume")}


def differences(a: Path, b: Path) -> list[str]:
    """Names of what differs between the runs in two folders; none if they ended alike."""
    first, second = (read_checkpoint(folder / "checkpoint.pth") for folder in (a, b))
    for entry, names in NOT_COMPARED.items():
        for checkpoint in (first, second):
            checkpoint[entry] = {
                name: value for name, value in checkpoint[entry].items() if name not in names
            }
    found = list(differing("", first, second))
    if (a / "log.txt").read_bytes() != (b / "log.txt").read_bytes():
        found.append("log.txt")
    return found


def differing(name: str, a: Any, b: Any) -> Iterator[str]:
    """Names of what differs between two trees of dicts, lists and tensors that are called `name`."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype or not _same_bits(a, b):
            yield name
    elif isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from differing(f"{name}.{key}", a[key], b[key])
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differing(f"{name}[{i}]", x, y)
    elif type(a) is not type(b) or a != b:
        yield name


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.contiguous().flatten().view(torch.uint8).equal(
        b.contiguous().flatten().view(torch.uint8)
    )


if __name__ == "__main__":
    wrong = differences(Path(sys.argv[1]), Path(sys.argv[2]))
    print(
        "\n".join(wrong)
        or "identical: weights, optimiser, schedule, averages, random states, results, log.txt"
    )
    sys.exit(bool(wrong))
