"""The processes of a run: rank and device of this one, and the few exchanges that training and
evaluation need.

The variables of torchrun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) say whether there
are several. Without them every function here handles the single process.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import struct
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from util.allocator import keep_freed_memory
from util.distributed.launchers import number, require_single_process
from util.distributed.watchdog import Watchdog, waiting
from util.errors import ASK_TO_LEAVE, LostProcessError, UserError

_SIOCGIFADDR = 0x8915  # Linux's request for the address of an interface


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


@contextmanager
def process_group(device_flag: str, timeout: float = 1800) -> Iterator[torch.device]:
    """Join the other processes, if there are any, for the length of the block; gives the device of
    this process.

    An exchange that takes longer than `timeout` seconds fails. After a failed exchange
    util/distributed/watchdog.py names the process at fault.

    Raises:
        UserError: the device does not exist, or the variables of the launcher are incomplete.
        LostProcessError: another process did not come, or is lost.
        Preempted: another process was asked to leave.
    """
    device = choose_device(device_flag)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif device.type == "cpu":
        keep_freed_memory()
    if "WORLD_SIZE" not in os.environ:
        require_single_process()
        yield device
        return

    # from now on the others must hear how this process ends
    watchdog = _join(device, timeout)
    code, last_words = 0, ""
    try:
        yield device
    except BaseException as error:
        reason: BaseException = error
        if isinstance(error, RuntimeError) and _lost_a_process(error):
            # a launcher asks to leave while this process still finds out what has failed; only the main
            # thread may set handlers
            if threading.current_thread() is threading.main_thread():
                for request in ASK_TO_LEAVE:
                    signal.signal(request, signal.SIG_IGN)
            reason = watchdog.explain(_first_sentence(error))
        # the watchdog of the others will quote it
        code, last_words = getattr(reason, "exit_code", 1), str(reason)
        if not hasattr(reason, "exit_code"):
            last_words = f"{type(reason).__name__}: {last_words.strip()}".splitlines()[0]
        if reason is error:
            raise
        raise reason from None
    finally:
        watchdog.stop(code, last_words)
        dist.destroy_process_group()


def _join(device: torch.device, timeout: float) -> Watchdog:
    """Initialise the process group with the variables of the launcher."""
    own_rank, world, port = (number(name, -1) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    host = os.environ.get("MASTER_ADDR", "")
    if not (0 <= own_rank < world and 0 < port < 65536 and host):
        raise UserError(
            "WORLD_SIZE is set, so RANK (from 0 to WORLD_SIZE - 1), MASTER_ADDR and MASTER_PORT "
            "must be too; start with tools/run_dist_launch.sh or torchrun, or unset WORLD_SIZE for "
            "a single process"
        )

    limit = timedelta(seconds=timeout)
    backend, warn_after = "gloo", None
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"  # gloo carries Python objects without touching the GPU
        warn_after = 0.95 * timeout
        # record NCCL's exchanges, to be written to a file after a time-out
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", f"{tempfile.gettempdir()}/flight_recorder_rank_")
    try:
        _choose_interface(host, port)
        store, *_ = next(dist.rendezvous("env://", timeout=limit))
        shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if shared and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
            store = _store_of_this_attempt(store, host, own_rank, world, limit)
        dist.init_process_group(backend, store=store, rank=own_rank, world_size=world, timeout=limit)
    except RuntimeError as error:
        if not _lost_a_process(error):
            raise
        raise LostProcessError(
            f"not all processes met at {host}:{port} within {timeout:.0f} s (--dist_timeout): see "
            f"the output of the others, and start again with --resume auto "
            f"({_first_sentence(error)})"
        ) from None
    return Watchdog(store.clone(), own_rank, world, f"{host}:{port}", warn_after)


def _store_of_this_attempt(
    launchers: dist.Store, host: str, own_rank: int, world: int, limit: timedelta
) -> dist.Store:
    """A store in the process of rank 0, which sends its port to the others through the launcher's
    store.

    With restarts the store of torchrun keeps the keys of the processes before (PyTorch issue
    135712), and torchrun has no number that is equal on all nodes and changes with each restart. So
    every other process takes a new name, and rank 0 answers to these names.
    """
    if own_rank > 0:
        name = uuid.uuid4().hex
        launchers.set(f"rank {own_rank}", name)
        store = dist.TCPStore(host, int(launchers.get(f"port for {name}")), is_master=False, timeout=limit)
        store.set(f"rank {own_rank}", "here")
        return store

    # until all have connected: names of earlier attempts are answered too, which does no harm
    store = dist.TCPStore(host, 0, is_master=True, timeout=limit, wait_for_workers=False)
    missing, deadline = list(range(1, world)), time.monotonic() + limit.total_seconds()
    while missing:
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"missing ranks: {', '.join(map(str, missing))}")
        for other in missing:
            if launchers.check([f"rank {other}"]):
                launchers.set(f"port for {launchers.get(f'rank {other}').decode()}", str(store.port))
        time.sleep(0.1)
        missing = [other for other in missing if not store.check([f"rank {other}"])]
    return store


def _lost_a_process(error: RuntimeError) -> bool:
    """Whether an exchange failed because of another process."""
    # the backends have no error type of their own
    by_message = re.search(r"\bgloo\b|caused pair closure|\bNCCL\b", str(error))
    return isinstance(error, dist.DistError) or by_message is not None


def _first_sentence(error: BaseException) -> str:
    """The message without the place in the source and the advice that gloo adds."""
    return re.sub(r"^\[\S*\] |\. .*|\n.*", "", str(error), flags=re.DOTALL)


def _choose_interface(host: str, port: int) -> None:
    """Make gloo use the interface that leads to rank 0.

    It would take the one of this machine's name, which on many systems stands for 127.0.1.1, where
    the others can't reach it.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    with contextlib.suppress(ImportError, OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        import fcntl  # not on Windows

        probe.connect((host, port))  # sends nothing
        # the system has chosen the interface: look for its name
        own_address = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an IPv4 address
                request = struct.pack("256s", name.encode())
                if fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24] == own_address:
                    os.environ["GLOO_SOCKET_IFNAME"] = name
                    return


def choose_device(flag: str) -> torch.device:
    """`--device`, by default CUDA if it is available, else the CPU. Raises UserError."""
    if not flag:
        flag = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(flag)
    except RuntimeError:
        raise UserError(f"--device {flag!r} is no device; use cuda, cuda:<index>, cpu or mps") from None
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps is not available on this machine; use --device cpu")
    if device.type != "cuda":
        return device

    # every process of a machine has a GPU of its own
    if not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device on this machine; use --device cpu")
    # --device cuda:1 names one by itself
    index = number("LOCAL_RANK") if device.index is None else device.index
    count = torch.cuda.device_count()
    if index >= count:
        raise UserError(
            f"process {index + 1} of this machine needs a GPU of its own and there are {count}; "
            "start fewer processes or use --device cpu"
        )
    return torch.device("cuda", index)


def average_number(number: float, device: torch.device) -> Tensor:
    """The mean of a host number over all processes, as a scalar on `device`, without synchronising."""
    # full() launches a kernel; tensor(number, device=...) would be a copy, which synchronises
    value = torch.full((), float(number), device=device)
    return sum_over_processes(value) / world_size()


def sum_over_processes(values: Tensor) -> Tensor:
    """Elementwise sum of equally shaped tensors of all processes."""
    if world_size() > 1:
        with waiting("sum_over_processes"):
            dist.all_reduce(values)
    return values


def gather_on_main(item: Any) -> list[Any]:
    """The items of all processes by rank, on the main process; an empty list on the others."""
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
    # the backend fills the list on the other processes
    box = [item]
    with waiting("broadcast_from_main"):
        dist.broadcast_object_list(box)
    return box[0]


def equalise_buffers(model: nn.Module) -> None:
    """Copy the main process's buffers to all: their running statistics are of different images."""
    if world_size() == 1:
        return
    with waiting("equalise_buffers"):
        # a few small tensors, once an epoch: no need to join them
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
