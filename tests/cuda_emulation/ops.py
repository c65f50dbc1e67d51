"""The CUDA operators run by the CPU: builds models/ops/csrc/cuda with g++ on top of emulate.h, and
calls it with tensors.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("emulated_ops.cpp")
TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
MAX_LEVELS = 32
Shapes = Sequence[tuple[int, int]]


def build(folder: Path, *flags: str) -> Path:
    """Compiles the kernels for the CPU; without a warning, or it fails."""
    library = folder / "emulated_ops.so"
    # pragmas are for nvcc
    common = ("-std=c++20", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
    include = ("-isystem", str(Path(torch.__file__).parent / "include"))
    command = ["g++", *common, *(flags or ("-O1",)), *include, str(SOURCE), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return library


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Geometry(ctypes.Structure):
    """`struct Geometry` of sampling.cuh."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("tokens", "heads", "channels", "queries", "levels", "points")),
        *((name, ctypes.c_int * MAX_LEVELS) for name in ("height", "width", "start")),
    ]

    def __init__(self, value: Tensor, shapes: Shapes, points: Tensor) -> None:
        super().__init__(
            value.shape[1], value.shape[2], value.shape[3], points.shape[1], len(shapes), points.shape[4]
        )
        start = 0
        for level, (height, width) in enumerate(shapes):
            self.height[level], self.width[level], self.start[level] = height, width, start
            start += height * width


_INTEGERS = ("type", "raw_type", "coordinates", "deterministic")
_ARRAYS = (
    "grad",
    "value",
    "reference",
    "locations",
    "weights",
    "out",
    "grad_value",
    "grad_reference",
    "grad_locations",
    "grad_weights",
)


class Call(ctypes.Structure):
    """`struct Call` of emulated_ops.cpp."""

    _fields_ = [
        *((name, ctypes.c_int) for name in _INTEGERS),
        ("images", ctypes.c_int64),
        ("geometry", ctypes.POINTER(Geometry)),
        *((name, ctypes.c_void_p) for name in _ARRAYS),
    ]


class EmulatedOps:
    """The four compiled operators, with the arguments and results of their schemas."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def forward(self, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
        out = _unwritten(value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3]))
        self._call("forward_call", value, shapes, locations=locations, weights=weights, out=out)
        return out

    def backward(
        self,
        grad: Tensor,
        value: Tensor,
        shapes: Shapes,
        locations: Tensor,
        weights: Tensor,
        deterministic: bool,
    ):
        grads = [_unwritten(torch.empty_like(x)) for x in (value, locations, weights)]
        named = dict(zip(("grad_value", "grad_locations", "grad_weights"), grads, strict=True))
        inputs = {"grad": grad, "locations": locations, "weights": weights}
        self._call("backward_call", value, shapes, deterministic=deterministic, **inputs, **named)
        return tuple(grads)

    def fused_forward(
        self, value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor
    ) -> Tensor:
        out = _unwritten(value.new_empty(value.shape[0], offsets.shape[1], value.shape[2] * value.shape[3]))
        inputs = {"reference": reference, "locations": offsets, "weights": logits}
        self._call("fused_forward_call", value, shapes, **inputs, out=out)
        return out

    def fused_backward(
        self,
        grad: Tensor,
        value: Tensor,
        shapes: Shapes,
        reference: Tensor,
        offsets: Tensor,
        logits: Tensor,
        needs_reference: bool,
        deterministic: bool,
    ):
        grads = [_unwritten(torch.empty_like(x)) for x in (value, reference, offsets, logits)]
        names = ("grad_value", "grad_reference", "grad_locations", "grad_weights")
        inputs = {"grad": grad, "reference": reference, "locations": offsets, "weights": logits}
        named = dict(zip(names, grads, strict=True))
        if not needs_reference:
            grads[1] = named.pop("grad_reference").new_empty(0)
        self._call("fused_backward_call", value, shapes, deterministic=deterministic, **inputs, **named)
        return tuple(grads)

    def _call(
        self, function: str, value: Tensor, shapes: Shapes, deterministic: bool = False, **arrays: Tensor
    ) -> None:
        arrays["value"] = value
        assert all(x.is_contiguous() for x in arrays.values())
        points, reference = arrays["locations"], arrays.get("reference")
        geometry = Geometry(value, shapes, points)
        call = Call(
            type=TYPES.index(value.dtype),
            raw_type=int(points.dtype != value.dtype),
            coordinates=0 if reference is None else reference.shape[-1],
            deterministic=deterministic,
            images=value.shape[0],
            geometry=ctypes.pointer(geometry),
            **{name: x.data_ptr() for name, x in arrays.items()},
        )
        getattr(self._library, function)(ctypes.byref(call))


def _unwritten(x: Tensor) -> Tensor:
    """Filled with what a kernel that forgets an element would leave behind."""
    return x.fill_(777.0)
