"""Dropout that is fast on CPUs and keeps little for the backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_DRAWS = 2**16  # a draw is an int16

# An operator of its own: torch.compile has none for a draw of all 64 bits. The tag says that two
# calls give different numbers, and that none may be left out.
torch.library.define(
    "dropout::random_bits", "(SymInt count) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,)
)


@torch.library.impl("dropout::random_bits", "CompositeExplicitAutograd")
def _random_bits(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int64).random_(-(2**63), None)


@torch.library.register_fake("dropout::random_bits")
def _(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int64)


class Dropout(nn.Dropout):
    """nn.Dropout, which on a CPU draws bits instead of floats.

    There PyTorch's `bernoulli_` takes a sixth of a training step, and the backward keeps a float
    for each number. Here a draw of 64 bits decides for four numbers, and a byte is kept for each.
    The probability is rounded to a multiple of 2**-16.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[...] -> [...] of the same type."""
        return _dropped(x, self.p) if self.training else x


class ReLUDropout(Dropout):
    """ReLU and then dropout, which keep one tensor for the backward instead of three.

    Where the result is above 0, the input was above 0 and was not dropped: the gradient needs to
    know no more.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[...] -> [...] of the same type."""
        if not self.training:
            # new memory costs more time than the ReLU; a backward needs its input
            return F.relu(x, inplace=not torch.is_grad_enabled())
        return _ReLUDropout.apply(x, self.p)


class _ReLUDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        out = _dropped(F.relu(x), p)
        ctx.save_for_backward(out)
        ctx.scale = _scale(p, x.device)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (out,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(grad, out, 0).mul_(ctx.scale), None


def _dropped(x: Tensor, p: float) -> Tensor:
    dropped = round(p * _DRAWS)
    if x.device.type != "cpu" or dropped in (0, _DRAWS):
        return F.dropout(x, p)
    draws = torch.ops.dropout.random_bits((x.numel() + 3) // 4)
    numbers = draws.view(torch.int16)[: x.numel()].view(x.shape)
    return x.masked_fill(numbers < dropped - _DRAWS // 2, 0.0).mul_(_scale(p, x.device))


def _scale(p: float, device: torch.device) -> float:
    """What stays is multiplied by this, so that the mean is the same."""
    if device.type == "cpu":
        p = round(p * _DRAWS) / _DRAWS
    return 1 / (1 - p) if p < 1 else 0.0
