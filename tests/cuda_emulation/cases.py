"""Inputs for the emulated kernels, and what the results must be: the reference in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.ops import reference
from tests.cuda_emulation.ops import Shapes, accumulator

POWERS_OF_TWO = ((4, 8), (2, 4))  # borders and centres are exact in every type


@dataclass(frozen=True)
class Case:
    """Sizes of a call; `shapes` are (height, width) of the levels."""

    channels: int = 8
    shapes: Shapes = ((5, 7), (3, 4), (1, 1))
    points: int = 2
    batch: int = 2
    queries: int = 3
    heads: int = 2
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        sizes = (
            f"B{self.batch}-Q{self.queries}-M{self.heads}-L{len(self.shapes)}-P{self.points}-D{self.channels}"
        )
        return f"{sizes}-{str(self.dtype).removeprefix('torch.')}"

    def with_type(self, dtype: torch.dtype) -> Case:
        return replace(self, dtype=dtype)

    def located(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """grad, value, locations (some outside) and weights."""
        generator = torch.Generator().manual_seed(0)
        grad, value = self._values(generator)
        shape = (self.batch, self.queries, self.heads, len(self.shapes), self.points)
        locations = torch.rand(*shape, 2, generator=generator) * 1.4 - 0.2
        weights = torch.rand(shape, generator=generator)
        return grad, value, locations.to(accumulator(self.dtype)), weights.to(accumulator(self.dtype))

    def raw(self, coordinates: int, raw_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """grad, value, reference, offsets and logits."""
        generator = torch.Generator().manual_seed(1)
        grad, value = self._values(generator)
        points = torch.rand(self.batch, self.queries, len(self.shapes), coordinates, generator=generator)
        shape = (self.batch, self.queries, self.heads, len(self.shapes), self.points)
        offsets = torch.randn(*shape, 2, generator=generator) * 1.5
        logits = torch.randn(shape, generator=generator)
        return grad, value, points.to(accumulator(self.dtype)), offsets.to(raw_dtype), logits.to(raw_dtype)

    def _values(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens = sum(h * w for h, w in self.shapes)
        value = torch.randn(self.batch, tokens, self.heads, self.channels, generator=generator)
        grad = torch.randn(self.batch, self.queries, self.heads * self.channels, generator=generator)
        return grad.to(self.dtype), value.to(self.dtype)


# the sizes of published.cuh
PUBLISHED = Case(shapes=((6, 5), (3, 4), (4, 3), (3, 3)), points=4, channels=32, heads=8, queries=5)


def forward(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The contract in terms of the reference: a sample outside, or on an empty level, is weight *
    0.
    """
    sizes = torch.tensor([[w, h] for h, w in shapes], dtype=locations.dtype).view(len(shapes), 1, 2)
    pixels = locations * sizes - 0.5
    inside = ((pixels > -1) & (pixels < sizes)).all(-1) & (sizes > 0).all(-1)
    outside_sum = torch.where(inside, 0, weights * 0).sum((-1, -2))
    full = [level for level, (h, w) in enumerate(shapes) if h * w]
    batch, _, heads, channels = value.shape
    if not full or 0 in locations.shape:
        sampled = value.sum(1, keepdim=True) * 0 + outside_sum[..., None]
        return sampled.expand(batch, locations.shape[1], heads, channels).flatten(2)
    there = torch.where(inside[..., None], locations, -10.0)[:, :, :, full]
    seen = torch.where(inside, weights, 0.0)[:, :, :, full]
    sampled = reference.forward(value, [shapes[level] for level in full], there, seen)
    return sampled + outside_sum.repeat_interleave(channels, -1)


def fused_forward(value: Tensor, shapes: Shapes, points: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    weights = logits.flatten(-2).softmax(-1).view_as(logits)
    around = points[:, :, None, :, None]
    if points.shape[-1] == 2:
        # an empty level has no pixels to count in; `forward` leaves it out
        sizes = torch.tensor([[max(w, 1), max(h, 1)] for h, w in shapes], dtype=points.dtype).view(
            len(shapes), 1, 2
        )
        locations = around + offsets / sizes
    else:
        locations = around[..., :2] + offsets / logits.shape[-1] * around[..., 2:] * 0.5
    return forward(value, shapes, locations, weights)


def gradients(function, grad: Tensor, value: Tensor, shapes: Shapes, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The gradients of value and inputs, in float64."""
    leaves = [x.double().requires_grad_() for x in (value, *inputs)]
    out = function(leaves[0], shapes, *leaves[1:])
    return torch.autograd.grad(out, leaves, grad.double(), allow_unused=True, materialize_grads=True)
