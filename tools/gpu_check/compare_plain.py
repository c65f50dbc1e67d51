"""Times the compiled CUDA kernels against tools/gpu_check/plain.cu, at the encoder's and the decoder's shape.

python -m tools.gpu_check.compare_plain --plain <library> --output <folder>: prints a table and writes plain.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from models.ops import compiled

SHAPES = [(100, 167), (50, 84), (25, 42), (13, 21)]  # an image of 800 x 1333
HEADS, CHANNELS, POINTS = 8, 32, 4
FLAT = [size for shape in SHAPES for size in shape]
REPEATS, TARGET = 30, 2.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", required=True, help="the library made of plain.cu")
    parser.add_argument("--output", required=True, type=Path, help="folder for plain.json")
    args = parser.parse_args()
    torch.ops.load_library(args.plain)
    if missing := compiled.missing("cuda"):
        sys.exit(f"no compiled kernels to compare: {missing}")
    check_plain()
    rows = [compare(name, batch, queries) for name, batch, queries in cases()]
    (args.output / "plain.json").write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")
    slow = [row["shape"] for row in rows if row["shape"].startswith("encoder") and row["times faster"] < TARGET]
    print(f"forward and backward at least {TARGET} times as fast as the plain kernels in the encoder: {not slow}")
    return 1 if slow else 0


def cases() -> list[tuple[str, int, int]]:
    tokens = sum(h * w for h, w in SHAPES)
    return [("encoder", 1, tokens), ("encoder", 4, tokens), ("decoder", 1, 300), ("decoder", 4, 300)]


def compare(name: str, batch: int, queries: int) -> dict[str, object]:
    """Medians in microseconds: forward, forward + backward in float32 of both, and of ours in bfloat16."""
    ours, plain = torch.ops.deformable, torch.ops.deformable
    grad, value, locations, weights = inputs(batch, queries)
    row: dict[str, object] = {"shape": f"{name} B={batch} Q={queries}"}
    row["plain forward"] = microseconds(lambda: plain.plain_forward(value, FLAT, locations, weights))
    row["forward"] = microseconds(lambda: ours.compiled_forward(value, FLAT, locations, weights))
    row["plain backward"] = microseconds(lambda: plain.plain_backward(grad, value, FLAT, locations, weights))
    row["backward"] = microseconds(lambda: ours.compiled_backward(grad, value, FLAT, locations, weights, False))
    row["ordered backward"] = microseconds(lambda: ours.compiled_backward(grad, value, FLAT, locations, weights, True))
    small_grad, small = grad.bfloat16(), value.bfloat16()
    row["bf16 forward"] = microseconds(lambda: ours.compiled_forward(small, FLAT, locations, weights))
    row["bf16 backward"] = microseconds(lambda: ours.compiled_backward(small_grad, small, FLAT, locations, weights, False))
    row["times faster"] = (row["plain forward"] + row["plain backward"]) / (row["forward"] + row["backward"])
    print(row["shape"], *(f"  {key:<17}{number:10.1f}" for key, number in row.items() if key != "shape"), sep="\n", flush=True)
    return row


def inputs(batch: int, queries: int, device: str = "cuda") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Encoder queries look around their own pixel, as the layer begins; others anywhere."""
    generator = torch.Generator(device).manual_seed(0)
    tokens = sum(h * w for h, w in SHAPES)
    value = torch.randn(batch, tokens, HEADS, CHANNELS, device=device, generator=generator)
    shape = (batch, queries, HEADS, len(SHAPES), POINTS)
    weights = torch.rand(shape, device=device, generator=generator).flatten(3).softmax(-1).view(shape)
    centres = torch.rand(batch, queries, 2, device=device, generator=generator)
    if queries == tokens:
        grids = [torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(-1) for h, w in SHAPES]
        centres = torch.cat(grids).to(device).expand(batch, -1, -1)
    sizes = torch.tensor([[w, h] for h, w in SHAPES], device=device).view(len(SHAPES), 1, 2)
    offsets = torch.randn(*shape, 2, device=device, generator=generator) * 2  # pixels
    grad = torch.randn(batch, queries, HEADS * CHANNELS, device=device, generator=generator)
    return grad, value, (centres[:, :, None, None, None] + offsets / sizes).contiguous(), weights


def microseconds(call: Callable[[], object]) -> float:
    """The median of REPEATS calls, in the GPU's time."""
    for _ in range(5):
        call()
    times = []
    for _ in range(REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end))
    return round(statistics.median(times), 1)


def check_plain() -> None:
    """The plain kernels must be right to be compared with."""
    grad, value, locations, weights = inputs(1, 300)
    ops = torch.ops.deformable
    ours = ops.compiled_forward(value, FLAT, locations, weights)
    pairs = [(ours, ops.plain_forward(value, FLAT, locations, weights))]
    grads = ops.compiled_backward(grad, value, FLAT, locations, weights, False)
    pairs += zip(grads, ops.plain_backward(grad, value, FLAT, locations, weights), strict=True)
    for seen, wanted in pairs:
        torch.testing.assert_close(seen, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


if __name__ == "__main__":
    sys.exit(main())
