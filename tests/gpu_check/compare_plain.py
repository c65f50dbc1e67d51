"""Times the compiled CUDA kernels against those of plain.cu, at the encoder's and the decoder's shape.

python -m tests.gpu_check.compare_plain  # after tests.gpu_check.prepare, which builds plain.so
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch

from models.ops import compiled
from models.ops.benchmark import Load, make_inputs, seconds_of
from models.ops.functions import flat_shapes
from tests.gpu_check.prepare import PLAIN

IMAGE = (800, 1333)
TARGET = 2.0  # times as fast as the plain kernels, in the encoder


def main() -> int:
    torch.ops.load_library(str(PLAIN))
    if missing := compiled.missing("cuda"):
        sys.exit(f"no compiled kernels to compare: {missing}")
    check_plain()

    # the target holds for the encoder; the decoder's times are printed only
    encoder = [compare(Load("encoder", IMAGE, batch)) for batch in (1, 4)]
    for batch in (1, 4):
        compare(Load("decoder", IMAGE, batch))
    return 0 if min(encoder) >= TARGET else 1


def compare(load: Load) -> float:
    """Print the medians in microseconds; returns how many times faster ours are, forward and backward."""
    ops = torch.ops.deformable
    grad, inputs = make_arguments(load)
    calls = {
        "plain forward": partial(ops.plain_forward, *inputs),
        "forward": partial(ops.compiled_forward, *inputs),
        "plain backward": partial(ops.plain_backward, grad, *inputs),
        "backward": partial(ops.compiled_backward, grad, *inputs, False),
        "ordered backward": partial(ops.compiled_backward, grad, *inputs, True),
    }

    # each time is the median of repeated calls
    times = {name: 1e6 * seconds_of(call) for name, call in calls.items()}
    plain = times["plain forward"] + times["plain backward"]
    ratio = plain / (times["forward"] + times["backward"])
    print(load.name)
    for name, value in {**times, "times faster": ratio}.items():
        print(f"  {name:<17}{value:10.1f}", flush=True)
    return ratio


def make_arguments(load: Load) -> tuple[torch.Tensor, list[Any]]:
    """The gradient of the output, and value, shapes, locations and weights, in float32."""
    made = make_inputs(load, torch.device("cuda"), torch.float32)
    value, locations, weights = (tensor.detach() for tensor in made)
    channels = value.shape[2] * value.shape[3]
    grad = torch.randn(load.batch, locations.shape[1], channels, device="cuda")
    return grad, [value, flat_shapes(load.shapes), locations, weights]


def check_plain() -> None:
    """Raise AssertionError if the plain kernels are wrong: their times would mean nothing."""
    ops = torch.ops.deformable
    grad, inputs = make_arguments(Load("decoder", IMAGE, 1))
    ours = [ops.compiled_forward(*inputs), *ops.compiled_backward(grad, *inputs, False)]
    plain = [ops.plain_forward(*inputs), *ops.plain_backward(grad, *inputs)]
    for seen, wanted in zip(ours, plain, strict=True):
        torch.testing.assert_close(seen, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


if __name__ == "__main__":
    sys.exit(main())
