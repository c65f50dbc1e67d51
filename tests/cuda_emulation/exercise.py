"""Calls every operator of a library, for a sanitizer to watch: python -m
tests.cuda_emulation.exercise <library>.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.cuda_emulation.cases import PUBLISHED, Case
from tests.cuda_emulation.ops import TYPES, EmulatedOps, accumulator


def main() -> None:
    ops = EmulatedOps(Path(sys.argv[1]))
    for dtype in TYPES:
        for channels in (3, 16, 32, 40):
            case = Case(
                channels=channels, shapes=((3, 5), (0, 2), (2, 1)), batch=2, queries=2, points=3, dtype=dtype
            )
            exercise(ops, case)
        exercise(ops, PUBLISHED.with_type(dtype))
    print("done")


def exercise(ops: EmulatedOps, case: Case) -> None:
    grad, value, locations, weights = case.located()
    locations.view(-1)[:6] = locations.new_tensor([float("nan"), 0.5, float("inf"), 0.5, 1e30, -1e30])
    ops.forward(value, case.shapes, locations, weights)
    for deterministic in (False, True):
        ops.backward(grad, value, case.shapes, locations, weights, deterministic)
        for coordinates, raw_dtype in ((2, case.dtype), (4, accumulator(case.dtype))):
            grad, value, *raw = case.raw(coordinates, raw_dtype)
            ops.fused_forward(value, case.shapes, *raw)
            for needs_reference in (False, True):
                ops.fused_backward(grad, value, case.shapes, *raw, needs_reference, deterministic)


if __name__ == "__main__":
    main()
