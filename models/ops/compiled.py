"""The compiled kernels: schemas of their operators, and the libraries that `make.sh` builds.

The libraries have no Python interface: they implement operators that are declared here. They are
built on LibTorch's stable ABI and work with any later PyTorch and Python.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

Shapes = Sequence[tuple[int, int]]  # (height, width) of the levels

FOLDER = Path(__file__).resolve().parent
HOW_TO_BUILD = f"cd {FOLDER} && sh ./make.sh"

# shapes: height, width of every level. All tensors contiguous; locations, weights and reference in
# the accumulation type (float64 for float64, else float32), offsets and logits in that or in the
# type of value.
_SCHEMAS = {
    "compiled_forward": "(Tensor value, int[] shapes, Tensor locations, Tensor weights) -> Tensor",
    "compiled_backward": "(Tensor grad, Tensor value, int[] shapes, Tensor locations, Tensor "
    "weights, bool deterministic) "
    "-> (Tensor, Tensor, Tensor)",
    "compiled_fused_forward": "(Tensor value, int[] shapes, Tensor reference, Tensor "
    "offsets, Tensor logits) -> Tensor",
    "compiled_fused_backward": "(Tensor grad, Tensor value, int[] shapes, Tensor reference, "
    "Tensor offsets, Tensor logits, bool needs_reference, "
    "bool deterministic) -> (Tensor, Tensor, Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"deformable::{_name}", _schema)


@cache
def missing(device_type: str) -> str | None:
    """Why there are no compiled kernels for a device type, for the log; None if they are loaded."""
    library, record = FOLDER / f"_{device_type}.so", FOLDER / f"_{device_type}.json"
    if device_type not in ("cpu", "cuda"):
        return f"no kernels are written for {device_type}"
    if not library.is_file() or not record.is_file():
        return f"the {device_type} kernels are not built ({HOW_TO_BUILD})"
    # a wheel has no sources to compare with
    built_from = build_record(device_type).get("sources")
    if (FOLDER / "csrc").is_dir() and built_from != hash_of_sources(device_type):
        return f"{library.name} was built from other sources than these: build again ({HOW_TO_BUILD})"
    # a library for another system or a PyTorch before 2.10
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} can't be loaded: {error}; build again ({HOW_TO_BUILD})"
    return None


def build_record(device_type: str) -> dict[str, str]:
    """What setup.py wrote beside the library: sources (hash), torch, compiler, architectures."""
    try:
        return json.loads((FOLDER / f"_{device_type}.json").read_text())
    except (OSError, ValueError):
        return {}


def hash_of_sources(device_type: str) -> str:
    """Hash of the files that a library is built from. A library with another hash is not loaded."""
    sources, digest = FOLDER / "csrc", hashlib.sha256()
    for path in sorted([*sources.glob("*"), *(sources / device_type).glob("*")]):
        if path.is_file():
            digest.update(path.relative_to(sources).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


# ---- the interface of a backend (models/ops/backends.py)


def _flat(shapes: Shapes) -> list[int]:
    return [size for shape in shapes for size in shape]


def forward(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    return torch.ops.deformable.compiled_forward(value, _flat(shapes), locations, weights)


def backward(
    grad: Tensor, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # the kernel then sums in a fixed order
    deterministic = torch.are_deterministic_algorithms_enabled()
    return torch.ops.deformable.compiled_backward(
        grad, value, _flat(shapes), locations, weights, deterministic
    )


def fused_forward(
    value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    return torch.ops.deformable.compiled_fused_forward(value, _flat(shapes), reference, offsets, logits)


def fused_backward(
    grad: Tensor,
    value: Tensor,
    shapes: Shapes,
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    needs_reference: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    deterministic = torch.are_deterministic_algorithms_enabled()
    return torch.ops.deformable.compiled_fused_backward(
        grad, value, _flat(shapes), reference, offsets, logits, needs_reference, deterministic
    )
