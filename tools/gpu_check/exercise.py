"""The compiled CUDA operators in all types on small and large shapes: python -m tools.gpu_check.exercise [--short].

Against the reference in float64 on the CPU; the same bits twice in the deterministic mode; on a stream of its own and in a
CUDA graph. --short leaves out the large shapes, for compute-sanitizer.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product

import torch
from torch import Tensor

from models.ops import compiled, reference

SMALL = [(6, 9), (3, 4), (0, 5), (1, 1)]
LARGE = [(100, 167), (50, 84), (25, 42), (13, 21)]
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of the largest element


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="small shapes only")
    args = parser.parse_args()
    if missing := compiled.missing("cuda"):
        sys.exit(f"no compiled kernels: {missing}")
    results = [check_types(dtype, channels) for dtype, channels in product(TOLERANCES, (1, 30, 32, 64))]
    results.append(check_fused_kinds())
    if not args.short:
        results += [check_types(torch.float32, 1025), check_large(), check_graph(), check_stream()]
    return 0 if all(results) else 1


def check_types(dtype: torch.dtype, channels: int) -> bool:
    problem = Problem(SMALL, batch=2, queries=7, heads=3, channels=channels, points=3, dtype=dtype)
    return say(problem.agrees() and problem.repeats(), f"{name(dtype)}, {channels} channels a head")


def check_fused_kinds() -> bool:
    fits = []
    for coordinates, raw in product((2, 4), (torch.float32, torch.bfloat16)):
        problem = Problem(SMALL, 2, 7, 3, 32, 3, torch.bfloat16, coordinates, raw)
        fits.append(problem.agrees() and problem.repeats())
    return say(all(fits), "points and boxes, offsets in float32 and bfloat16")


def check_large() -> bool:
    problem = Problem(LARGE, batch=1, queries=2000, heads=8, channels=32, points=4, dtype=torch.float32)
    return say(problem.agrees() and problem.repeats(), "800 x 1333, 2000 queries")


def check_graph() -> bool:
    """Capture fails on any wait for the device or copy to it."""
    problem = Problem(SMALL, 2, 7, 3, 32, 3, torch.float32)
    wanted = problem.run(deterministic=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seen = problem.run(deterministic=True)
    graph.replay()
    torch.cuda.synchronize()
    return say(all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True)), "forward and backward in a CUDA graph")


def check_stream() -> bool:
    """On a stream that first has to wait, and then makes the inputs: on another stream they would be read too early."""
    problem = Problem(SMALL, 2, 7, 3, 32, 3, torch.float32)
    wanted = problem.run(deterministic=True)
    stream, value = torch.cuda.Stream(), problem.value.clone()
    torch.cuda.synchronize()
    problem.value.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        problem.value.copy_(value)
        seen = problem.run(deterministic=True)
    torch.cuda.synchronize()
    return say(all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True)), "the current stream")


class Problem:
    """Random inputs of both operators on the GPU."""

    def __init__(self, shapes, batch, queries, heads, channels, points, dtype, coordinates=2, raw=None) -> None:
        generator = torch.Generator().manual_seed(0)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.shapes, self.dtype = shapes, dtype

        def random(*size: int, dtype=dtype) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64).to("cuda", dtype)

        points_shape = (batch, queries, heads, len(shapes), points)
        self.value = random(batch, sum(h * w for h, w in shapes), heads, channels)
        self.grad = random(batch, queries, heads * channels)
        self.ready = (random(*points_shape, 2, dtype=wide) * 0.4 + 0.5, random(*points_shape, dtype=wide))
        boxes = random(batch, queries, len(shapes), coordinates, dtype=wide) * 0.3 + 0.5
        self.raw = (boxes, random(*points_shape, 2, dtype=raw or dtype), random(*points_shape, dtype=raw or dtype))

    def run(self, deterministic: bool) -> list[Tensor]:
        """Outputs and gradients of both operators."""
        flat, ops = [size for shape in self.shapes for size in shape], torch.ops.deformable
        return [
            ops.compiled_forward(self.value, flat, *self.ready),
            *ops.compiled_backward(self.grad, self.value, flat, *self.ready, deterministic),
            ops.compiled_fused_forward(self.value, flat, *self.raw),
            *ops.compiled_fused_backward(self.grad, self.value, flat, *self.raw, deterministic),
        ]

    def wanted(self) -> list[Tensor]:
        """The same from the reference."""
        value, grad, *rest = (x.cpu().double() for x in (self.value, self.grad, *self.ready, *self.raw))
        ready, raw = rest[:2], rest[2:]
        return [
            reference.forward(value, self.shapes, *ready),
            *reference.backward(grad, value, self.shapes, *ready),
            reference.fused_forward(value, self.shapes, *raw),
            *reference.fused_backward(grad, value, self.shapes, *raw),
        ]

    def agrees(self) -> bool:
        wanted = self.wanted()
        runs = [self.run(deterministic) for deterministic in (False, True)]
        return all(self.close(a, b) for run in runs for a, b in zip(run, wanted, strict=True))

    def close(self, seen: Tensor, wanted: Tensor) -> bool:
        """Within the tolerance, but for a few of many: a point that rounding moves over a pixel's centre has another slope."""
        tolerance = TOLERANCES[self.dtype] * max(1.0, wanted.abs().max().item())
        far = (seen.cpu().double() - wanted).abs() > tolerance
        return bool(seen.isfinite().all()) and far.double().mean().item() < 1e-4

    def repeats(self) -> bool:
        first, second = self.run(deterministic=True), self.run(deterministic=True)
        return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def say(passed: bool, what: str) -> bool:
    print(f"{bool(passed)}  {what}", flush=True)
    return bool(passed)


if __name__ == "__main__":
    sys.exit(main())
