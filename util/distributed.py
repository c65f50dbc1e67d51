"""Processes: who am I, which device is mine, and the few exchanges that training and evaluation need.

The variables of torchrun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) say whether there are several;
without them everything here is the single-process case.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from util.errors import UserError

log = logging.getLogger(__name__)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


@contextmanager
def process_group(device_flag: str) -> Iterator[torch.device]:
    """Join the other processes, if there are any, for the length of the block; gives this process's device.

    Raises UserError for a device that is not there.
    """
    device = choose_device(device_flag)
    if "WORLD_SIZE" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # gloo beside NCCL carries Python objects without touching the GPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    except RuntimeError as error:
        if not _lost_a_process(error):
            raise
        raise UserError(f"process {rank()} lost another process, which ended first; that one's message says why") from None
    finally:
        # after an error the others may never arrive: leave without waiting for them
        dist.destroy_process_group()


def _lost_a_process(error: RuntimeError) -> bool:
    """Whether an exchange broke off because the other side is gone; gloo has no error type of its own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def choose_device(flag: str) -> torch.device:
    """`--device`, by default CUDA where there is one, else the CPU. Raises UserError if it is not there."""
    try:
        device = torch.device(flag or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"--device {flag!r} is no device; use cuda, cuda:<index>, cpu or mps") from None
    if device.type == "cuda":
        return _cuda_device(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps is not available on this machine; use --device cpu")
    return device


def _cuda_device(device: torch.device) -> torch.device:
    if not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device on this machine; use --device cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    index = device.index if device.index is not None else local
    count = torch.cuda.device_count()
    if index >= count:
        raise UserError(
            f"process {index + 1} of this machine needs a GPU of its own and there are {count}; "
            "start fewer processes or use --device cpu"
        )
    return torch.device("cuda", index)


def average_number(number: float, device: torch.device) -> Tensor:
    """The mean of a host number over all processes, as a scalar on `device` and without waiting for the device."""
    # full() launches a kernel; tensor(number, device=...) would be a copy that waits
    value = torch.full((), float(number), device=device)
    if world_size() > 1:
        dist.all_reduce(value)
    return value / world_size()


def sum_over_processes(values: Tensor) -> Tensor:
    """Elementwise sum of equally shaped tensors of all processes."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_on_main(item: Any) -> list[Any]:
    """The items of all processes in order of rank, on the main process; an empty list on the others."""
    if world_size() == 1:
        return [item]
    items = [None] * world_size() if is_main() else None
    dist.gather_object(item, items)
    return items or []


def broadcast_from_main(item: Any) -> Any:
    """The main process's item, on every process."""
    if world_size() == 1:
        return item
    box = [item]
    dist.broadcast_object_list(box)
    return box[0]


def equalise_buffers(model: nn.Module) -> None:
    """Give every process the main process's buffers: running statistics differ, as each sees its own images."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
