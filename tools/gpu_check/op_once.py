"""The compiled fused operator of the encoder at 800 x 1333, forward and backward three times: for
ncu, which slows each launch.

    ncu -k regex:'^(forward|backward)_kernel$' python -m tools.gpu_check.op_once

The kernels are called directly: the comparison with the reference before their first use would be
profiled too.
"""

from __future__ import annotations

import argparse
import sys

import torch

from models.ops import compiled
from models.ops.benchmark import CHANNELS, HEADS, TYPES, Load, make_inputs

CALLS = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--type", default="float32", choices=TYPES, help="of the values (float32)")
    args = parser.parse_args()
    if missing := compiled.missing(args.device):
        sys.exit(f"no compiled kernels: {missing}")
    load = Load("encoder", (800, 1333), batch=1, fused=True)
    value, *points = (
        tensor.detach() for tensor in make_inputs(load, torch.device(args.device), TYPES[args.type])
    )
    grad = torch.ones(1, value.shape[1], HEADS * CHANNELS, device=value.device, dtype=value.dtype)
    for _ in range(CALLS):
        compiled.fused_forward(value, load.shapes, *points)
        compiled.fused_backward(grad, value, load.shapes, *points)
    if args.device == "cuda":
        torch.cuda.synchronize()
    print(f"{CALLS} calls of forward and backward")


if __name__ == "__main__":
    sys.exit(main())
