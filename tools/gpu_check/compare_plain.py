"""Times the compiled CUDA kernels against tools/gpu_check/plain.cu, at the encoder's and the
decoder's shape.

python -m tools.gpu_check.compare_plain, once tools/gpu_check/plain.so is made
(tools/gpu_check/prepare.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from models.ops import compiled
from models.ops.benchmark import Load, make_inputs, seconds_of
from models.ops.functions import flat_shapes
from tools.gpu_check.prepare import PLAIN

LOADS = [Load(what, (800, 1333), batch) for what in ("encoder", "decoder") for batch in (1, 4)]
FLAT = flat_shapes(LOADS[0].shapes)
TARGET = 2.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    torch.ops.load_library(str(PLAIN))
    if missing := compiled.missing("cuda"):
        sys.exit(f"no compiled kernels to compare: {missing}")
    check_plain()
    rows = [compare(load) for load in LOADS]
    slow = [
        row["shape"] for row in rows if row["shape"].startswith("encoder") and row["times faster"] < TARGET
    ]
    print(
        f"less than {TARGET} times as fast as the plain kernels in the encoder: {', '.join(slow) or 'none'}"
    )
    return 1 if slow else 0


def compare(load: Load) -> dict[str, object]:
    """Medians in microseconds: forward, forward + backward in float32 of both, and of ours in
    bfloat16.
    """
    ours, plain = torch.ops.deformable, torch.ops.deformable
    grad, value, locations, weights = inputs(load)
    row: dict[str, object] = {"shape": load.name}
    row["plain forward"] = microseconds(lambda: plain.plain_forward(value, FLAT, locations, weights))
    row["forward"] = microseconds(lambda: ours.compiled_forward(value, FLAT, locations, weights))
    row["plain backward"] = microseconds(lambda: plain.plain_backward(grad, value, FLAT, locations, weights))
    row["backward"] = microseconds(
        lambda: ours.compiled_backward(grad, value, FLAT, locations, weights, False)
    )
    row["ordered backward"] = microseconds(
        lambda: ours.compiled_backward(grad, value, FLAT, locations, weights, True)
    )
    small_grad, small = grad.bfloat16(), value.bfloat16()
    row["bf16 forward"] = microseconds(lambda: ours.compiled_forward(small, FLAT, locations, weights))
    row["bf16 backward"] = microseconds(
        lambda: ours.compiled_backward(small_grad, small, FLAT, locations, weights, False)
    )
    row["times faster"] = (row["plain forward"] + row["plain backward"]) / (row["forward"] + row["backward"])
    print(
        row["shape"],
        *(f"  {key:<17}{number:10.1f}" for key, number in row.items() if key != "shape"),
        sep="\n",
        flush=True,
    )
    return row


def inputs(load: Load, device: str = "cuda") -> list[Tensor]:
    """grad, value, locations and weights of the benchmark, in float32."""
    value, locations, weights = (x.detach() for x in make_inputs(load, torch.device(device), torch.float32))
    grad = torch.randn(load.batch, locations.shape[1], value.shape[2] * value.shape[3], device=device)
    return [grad, value, locations, weights]


def microseconds(call: Callable[[], object]) -> float:
    return round(1e6 * seconds_of(call), 1)


def check_plain() -> None:
    """The plain kernels must be right to be compared with."""
    grad, value, locations, weights = inputs(Load("decoder", (800, 1333), 1))
    ops = torch.ops.deformable
    ours = ops.compiled_forward(value, FLAT, locations, weights)
    pairs = [(ours, ops.plain_forward(value, FLAT, locations, weights))]
    grads = ops.compiled_backward(grad, value, FLAT, locations, weights, False)
    pairs += zip(grads, ops.plain_backward(grad, value, FLAT, locations, weights), strict=True)
    for seen, wanted in pairs:
        torch.testing.assert_close(seen, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


if __name__ == "__main__":
    sys.exit(main())
