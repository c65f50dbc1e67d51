"""Three calls of the encoder's fused operator, forward and backward, for Nsight Compute.

    ncu -k regex:'(forward|backward)_kernel$' python -m tests.gpu_check.op_once

It calls the kernels directly: otherwise the comparison with the reference would be profiled too.
"""

from __future__ import annotations

import sys

import torch

from models.ops import compiled
from models.ops.benchmark import CHANNELS, HEADS, Load, make_inputs
from tests.gpu_check.prepare import device_parser


def main() -> None:
    device = device_parser(__doc__).parse_args().device
    if missing := compiled.missing(device):
        sys.exit(f"no compiled kernels: {missing}")
    load = Load("encoder", (800, 1333), batch=1, fused=True)
    inputs = make_inputs(load, torch.device(device), torch.float32)
    value, *points = (tensor.detach() for tensor in inputs)
    grad = torch.ones(1, value.shape[1], HEADS * CHANNELS, device=device)
    # the first launches of a process are slower
    for _ in range(3):
        compiled.fused_forward(value, load.shapes, *points)
        # as in the encoder
        compiled.fused_backward(grad, value, load.shapes, *points, needs_reference=False)
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
