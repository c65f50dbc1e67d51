"""Exchanges within a training step, with gradients: BatchFormerV2 over the images of all processes.

One process has all positions of its own images. To relate images, it takes a share of the positions
of all images, and gives them back. So the work is divided, and no process holds all tokens. The
losses are those of DistributedDataParallel: it averages the gradients of the processes, and the sum
over the shares of the positions becomes the gradient of the whole batch.

Shape letters: B images of one process, N = B x processes images, S positions, P the share of this
process, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from util.distributed.processes import rank, world_size
from util.distributed.watchdog import waiting

_separate = False


@contextmanager
def apart() -> Iterator[None]:
    """A block in which this process exchanges nothing: the others are doing something else."""
    global _separate
    before, _separate = _separate, True
    try:
        yield
    finally:
        _separate = before


def exchanges() -> bool:
    """Whether there are other processes to exchange tokens with."""
    return world_size() > 1 and not _separate


def positions_of_images(own: Tensor) -> Tensor:
    """[B, S, ...] of this process -> [N, P, ...], a share of the positions of all images.

    Every process must give equal B and S.
    """
    shares = _shares(own.shape[1])
    received = _exchange(own.transpose(0, 1), shares, [shares[rank()]] * world_size())
    # [processes x P, B] -> [processes, B] and P
    by_process = received.unflatten(0, (world_size(), -1)).transpose(1, 2)
    return by_process.flatten(0, 1)


def images_of_positions(share: Tensor, num_positions: int) -> Tensor:
    """[N, P, ...] -> [B, S, ...]: the inverse of `positions_of_images`; num_positions is S."""
    shares = _shares(num_positions)
    by_process = share.unflatten(0, (world_size(), -1)).transpose(1, 2)
    received = _exchange(by_process.flatten(0, 1), [shares[rank()]] * world_size(), shares)
    return received.transpose(0, 1)


def _shares(num_positions: int) -> list[int]:
    """How many positions each process takes."""
    each, more = divmod(num_positions, world_size())
    return [each + (process < more) for process in range(world_size())]


def _exchange(rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """Send `sent[i]` rows to process i, and receive `received[i]` rows from it."""
    if rows.dtype == torch.bool:  # the backends know none
        return _Exchange.apply(rows.byte(), sent, received).bool()
    return _Exchange.apply(rows, sent, received)


class _Exchange(torch.autograd.Function):
    """PyTorch's own functions with gradients are deprecated in one version and missing in another."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        ctx.sent, ctx.received = sent, received
        gathered = rows.new_empty(sum(received), *rows.shape[1:])
        with waiting("the exchange of tokens"):
            dist.all_to_all_single(gathered, rows.contiguous(), received, sent)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Exchange.apply(gradient, ctx.received, ctx.sent), None, None


def largest_of_processes(sizes: Sequence[int]) -> list[int]:
    """The elementwise maximum over all processes. It is exchanged on the host."""
    largest = torch.tensor(sizes)
    with waiting("the largest image"):
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()
