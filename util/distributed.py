"""Processes: who am I, which device is mine, and the few exchanges that training and evaluation need.

The variables of torchrun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) say whether there are several;
without them everything here is the single-process case.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from util.errors import LostProcessError, UserError
from util.launchers import require_single_process
from util.watchdog import Watchdog, waiting

log = logging.getLogger(__name__)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


@contextmanager
def process_group(device_flag: str, timeout: float = 1800) -> Iterator[torch.device]:
    """Join the other processes, if there are any, for the length of the block; gives this process's device.

    The job is watched (util/watchdog.py): within `timeout` seconds of the death or hang of any process all others end.

    Raises UserError for a device that is not there or a process that knows nothing of others, and LostProcessError where
    another process did not come, or is lost.
    """
    device = choose_device(device_flag)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        require_single_process()
        yield device
        return
    own_rank, world = _place_among_processes()
    store, address = _reach_store(own_rank, timeout)
    watch = Watchdog(
        dist.PrefixStore("watchdog", store.clone()), own_rank, world, timeout, address, serves_store=_serves_store(own_rank)
    )
    try:
        with watch:
            # gloo beside NCCL carries Python objects without touching the GPU
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            # longer than the watchdog's: that one knows the culprit
            limit = timedelta(seconds=2 * timeout)
            interface = os.environ.get("GLOO_SOCKET_IFNAME", "of this machine's name")
            watch.note("connecting to the other processes through the network interface %s (GLOO_SOCKET_IFNAME)", (interface,))
            try:
                dist.init_process_group(backend, store=store, rank=own_rank, world_size=world, timeout=limit)
                yield device
            except RuntimeError as error:
                if not _lost_a_process(error):
                    raise
                raise watch.explain(error) from None
    finally:
        # after an error the others may never arrive: leave without waiting for them
        if dist.is_initialized():
            dist.destroy_process_group()
        watch.stop()


def _place_among_processes() -> tuple[int, int]:
    """Rank and number of processes. Raises UserError unless all of torchrun's variables are there."""
    numbers = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")]
    if not all(map(str.isdecimal, numbers)) or not os.environ.get("MASTER_ADDR"):
        raise UserError(
            "WORLD_SIZE is set, so RANK, MASTER_ADDR and MASTER_PORT must be too; start with tools/run_dist_launch.sh or "
            "torchrun, or unset WORLD_SIZE for a single process"
        )
    return int(numbers[0]), int(numbers[1])


def _lost_a_process(error: RuntimeError) -> bool:
    """Whether an exchange broke off because the other side is gone; gloo has no error type of its own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def _serves_store(own_rank: int) -> bool:
    """Whether the store lives in this process, and not in a launcher that works as torchrun does."""
    return own_rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _reach_store(own_rank: int, timeout: float) -> tuple[dist.Store, str]:
    """The job's store, and its address for messages. Raises LostProcessError if nobody serves it within `timeout` seconds."""
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    deadline = time.monotonic() + timeout
    if not _serves_store(own_rank):
        _wait_for_port(host, int(port), deadline, timeout)
    _choose_interface(host, int(port))
    left = timedelta(seconds=max(5.0, deadline - time.monotonic()))
    try:
        # with the true world size it would wait for all processes here, and not know which are missing
        store, _, _ = next(dist.rendezvous(f"env://?rank={own_rank}&world_size=1", timeout=left))
    except dist.DistNetworkError as error:
        raise LostProcessError(f"the job's store at {host}:{port} can't be opened ({str(error).splitlines()[0]})") from None
    # processes that torchrun has started again may find the keys of those before
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store), f"{host}:{port}"


def _wait_for_port(host: str, port: int, deadline: float, timeout: float) -> None:
    """Until somebody listens there. TCPStore would too, but deaf to signals and with pages of warnings."""
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise LostProcessError(
                    f"nobody served the job's store at {host}:{port} within {timeout:.0f} s ({error.strerror or error}): rank 0 "
                    "or its launcher has not started there, or can't be reached; start again with --resume auto"
                ) from None
        time.sleep(0.2)


def _choose_interface(host: str, port: int) -> None:
    """Let gloo use the interface that leads to rank 0. It would take the one of this machine's name, which need not reach
    the others: on many systems the name stands for 127.0.1.1."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # sends nothing
        own_address = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            if _address_of(name, probe) == own_address:
                os.environ["GLOO_SOCKET_IFNAME"] = name
                return


def _address_of(interface: str, any_socket: socket.socket) -> bytes:
    """The four bytes of an interface's IPv4 address; none if it has none, or on a system other than Linux."""
    try:
        import fcntl

        get_address = 0x8915  # SIOCGIFADDR
        return fcntl.ioctl(any_socket, get_address, struct.pack("256s", interface.encode()))[20:24]
    except (ImportError, OSError):
        return b""


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
        with waiting("average_number"):
            dist.all_reduce(value)
    return value / world_size()


def sum_over_processes(values: Tensor) -> Tensor:
    """Elementwise sum of equally shaped tensors of all processes."""
    if world_size() > 1:
        with waiting("sum_over_processes"):
            dist.all_reduce(values)
    return values


def gather_on_main(item: Any) -> list[Any]:
    """The items of all processes in order of rank, on the main process; an empty list on the others."""
    if world_size() == 1:
        return [item]
    items = [None] * world_size() if is_main() else None
    with waiting("gather_on_main"):
        dist.gather_object(item, items)
    return items or []


def broadcast_from_main(item: Any) -> Any:
    """The main process's item, on every process."""
    if world_size() == 1:
        return item
    box = [item]
    with waiting("broadcast_from_main"):
        dist.broadcast_object_list(box)
    return box[0]


def equalise_buffers(model: nn.Module) -> None:
    """Give every process the main process's buffers: running statistics differ, as each sees its own images."""
    if world_size() == 1:
        return
    with waiting("equalise_buffers"):
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
