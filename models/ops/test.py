"""Self-test of multi-scale deformable attention on this machine's devices: `cd models/ops && python test.py`.

Every line begins with True, or the exit status is not 0.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # the project's root

from models.ops import reference
from models.ops.functions import ms_deform_attn

SHAPES = [(6, 4), (3, 2)]
BATCH, HEADS, QUERIES, POINTS = 1, 2, 2, 2
CHANNELS = (30, 32, 64, 71, 1025, 2048, 3096)


def main() -> int:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    results = []
    for device in devices:
        torch.manual_seed(3)
        results += [check_forward(device, torch.float64, 1e-12), check_forward(device, torch.float32, 1e-5)]
        results += [check_gradient(device, channels) for channels in CHANNELS]
    return 0 if all(results) else 1


def check_forward(device: str, dtype: torch.dtype, bound: float) -> bool:
    """The operator against the reference in float64 on the CPU."""
    value, locations, weights = _inputs(channels=2)
    wanted = reference.forward(value, SHAPES, locations, weights)
    got = ms_deform_attn(*(x.to(device, dtype) if isinstance(x, Tensor) else x for x in (value, SHAPES, locations, weights)))
    error = (got.cpu().double() - wanted).abs()
    worst, relative = error.max().item(), (error / wanted.abs()).max().item()
    name = str(dtype).removeprefix("torch.")
    what = f"forward equals the float64 reference, {device} {name}: max abs {worst:.2e}, max rel {relative:.2e}"
    return _say(worst < bound, what)


def check_gradient(device: str, channels: int) -> bool:
    """The gradients of all inputs against finite differences along random directions, in float64."""
    value, locations, weights = (x.to(device).requires_grad_() for x in _inputs(channels))
    function: Callable = lambda v, x, w: ms_deform_attn(v, SHAPES, x, w)  # noqa: E731
    try:
        passed = torch.autograd.gradcheck(function, (value, locations, weights), fast_mode=True)
    except torch.autograd.gradcheck.GradcheckError as error:
        print(error)
        passed = False
    return _say(passed, f"gradients equal numerical ones, {device} float64, {channels} channels a head")


def _inputs(channels: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens = sum(h * w for h, w in SHAPES)
    value = torch.rand(BATCH, tokens, HEADS, channels, dtype=torch.float64) * 0.01
    locations = torch.rand(BATCH, QUERIES, HEADS, len(SHAPES), POINTS, 2, dtype=torch.float64)
    weights = torch.rand(BATCH, QUERIES, HEADS, len(SHAPES), POINTS, dtype=torch.float64) + 1e-5
    return value, locations, weights / weights.sum((-1, -2), keepdim=True)


def _say(passed: bool, what: str) -> bool:
    print(f"{bool(passed)}  {what}")
    return bool(passed)


if __name__ == "__main__":
    sys.exit(main())
