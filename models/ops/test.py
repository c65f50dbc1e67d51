"""Self-test of multi-scale deformable attention on this machine's devices: `cd models/ops && python
test.py`.

Prints the lines of the published test for each device and every backend that it offers. Every line
says True, or the exit status is not 0.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradcheck

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # the project's root

from models.ops import backends, reference
from models.ops.functions import ms_deform_attn

SHAPES = [(6, 4), (3, 2)]
BATCH, HEADS, QUERIES, POINTS = 1, 2, 2, 2
CHANNELS = (30, 32, 64, 71, 1025, 2048, 3096)


def main() -> int:
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
    results = []
    for device in devices:
        for backend in available(device):
            torch.manual_seed(3)  # the published seed
            results.append(check_forward(device, backend, torch.float64, 1e-12))
            results.append(check_forward(device, backend, torch.float32, 1e-5))
            for channels in CHANNELS:
                results.append(check_gradient(device, backend, channels))
    return int(not all(results))


def available(device: str) -> list[str]:
    """The backends to test: the one that the environment asks for, or all that serve the device."""
    if asked := os.environ.get(backends.VARIABLE):
        return [asked]
    return [name for name in backends.NAMES if backends.missing(name, device) is None]


def check_forward(device: str, backend: str, dtype: torch.dtype, bound: float) -> bool:
    """The operator against the reference in float64 on the CPU."""
    inputs = _inputs(channels=2)
    wanted = reference.forward(inputs[0], SHAPES, inputs[1], inputs[2])
    value, locations, weights = (x.to(device, dtype) for x in inputs)
    got = ms_deform_attn(value, SHAPES, locations, weights, backend)
    # the published lines: the largest absolute and the largest relative error
    error = (got.cpu().double() - wanted).abs()
    worst, relative = error.max().item(), (error / wanted.abs()).max().item()
    name = {torch.float64: "double", torch.float32: "float"}[dtype]
    what = f"check_forward_equal_with_pytorch_{name}: max_abs_err {worst:.2e} max_rel_err {relative:.2e}"
    return _say(worst < bound, what, device, backend)


def check_gradient(device: str, backend: str, channels: int) -> bool:
    """The gradients of all inputs against finite differences along random directions, in float64."""
    value, locations, weights = (x.to(device).requires_grad_() for x in _inputs(channels))

    def function(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn(value, SHAPES, locations, weights, backend)

    # atomic additions come in another order in every run, and the sums differ by rounding
    slack = 0.0
    if device == "cuda":
        slack = 1e-12
    inputs = value, locations, weights
    try:
        passed = gradcheck(function, inputs, fast_mode=True, nondet_tol=slack)
    except GradcheckError as error:
        print(error)
        passed = False
    return _say(passed, f"check_gradient_numerical(D={channels})", device, backend)


def _inputs(channels: int) -> tuple[Tensor, Tensor, Tensor]:
    # as in the published test
    tokens = sum(h * w for h, w in SHAPES)
    value = torch.rand(BATCH, tokens, HEADS, channels, dtype=torch.float64) * 0.01
    locations = torch.rand(BATCH, QUERIES, HEADS, len(SHAPES), POINTS, 2, dtype=torch.float64)
    weights = torch.rand(BATCH, QUERIES, HEADS, len(SHAPES), POINTS, dtype=torch.float64) + 1e-5
    return value, locations, weights / weights.sum((-1, -2), keepdim=True)


def _say(passed: bool, what: str, device: str, backend: str) -> bool:
    print(f"* {bool(passed)} {what} ({device}, {backend})", flush=True)
    return bool(passed)


if __name__ == "__main__":
    sys.exit(main())
