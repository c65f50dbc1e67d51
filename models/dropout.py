"""Dropout that is fast on CPUs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
        dropped = round(self.p * 2**16)
        if not self.training or x.device.type != "cpu" or dropped in (0, 2**16):
            return super().forward(x)
        draws = torch.ops.dropout.random_bits((x.numel() + 3) // 4)
        numbers = draws.view(torch.int16)[: x.numel()].view(x.shape)
        # those that stay are scaled, so that the mean is the same
        return x.masked_fill(numbers < dropped - 2**15, 0.0).mul_(2**16 / (2**16 - dropped))
