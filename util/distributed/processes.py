"""Processes: who am I, which device is mine, and the few exchanges that training and evaluation
need.

The variables of torchrun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) say whether there
are several; without them everything here is the single-process case.
"""

from __future__ import annotations

import contextlib
import logging
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
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from util.distributed.launchers import require_single_process
from util.distributed.watchdog import Watchdog, waiting
from util.errors import ASK_TO_LEAVE, LostProcessError, UserError

log = logging.getLogger(__name__)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


@contextmanager
def process_group(device_flag: str, timeout: float = 1800) -> Iterator[torch.device]:
    """Join the other processes, if there are any, for the length of the block; gives this process's
    device.

    An exchange that takes longer than `timeout` seconds fails. After a failed exchange
    util/distributed/watchdog.py names the process at fault.

    Raises:
        UserError: a device that is not there, or a process that knows nothing of the others.
        LostProcessError: another process did not come, or is lost.
        Preempted: another process was asked to leave.
    """
    device = choose_device(device_flag)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        require_single_process()
        yield device
        return
    watchdog = _join(device, timeout)
    code, last_words = 0, ""
    try:
        yield device
    except BaseException as error:
        reason = error
        if isinstance(error, RuntimeError) and _lost_a_process(error):
            _ignore_requests()
            reason = watchdog.explain(_first_sentence(error))
        code, last_words = getattr(reason, "exit_code", 1), str(reason)
        if not hasattr(reason, "exit_code"):
            last_words = f"{type(reason).__name__}: {last_words.strip()}".splitlines()[0]
        if reason is not error:
            raise reason from None
        raise
    finally:
        watchdog.stop(code, last_words)
        dist.destroy_process_group()


def _join(device: torch.device, timeout: float) -> Watchdog:
    """Initialise the process group by what the launcher says in the environment."""
    texts = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")]
    own_rank, world, port = [int(text) if text.isdecimal() else -1 for text in texts]
    host = os.environ.get("MASTER_ADDR")
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
        _start_flight_recorder()
    try:
        _choose_interface(host, port)
        store, *_ = next(dist.rendezvous("env://", timeout=limit))
        if (
            os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
        ):
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
    """A store in the process of rank 0, whose port it tells the others through the launcher's
    store.

    With restarts torchrun's own store keeps the keys of the processes before (PyTorch issue
    135712), and no number that torchrun gives is the same on all nodes and another after each
    restart. So rank 0 answers names that are new.
    """
    if own_rank > 0:
        name = uuid.uuid4().hex
        launchers.set(f"rank {own_rank}", name)
        store = dist.TCPStore(host, int(launchers.get(f"port for {name}")), is_master=False, timeout=limit)
        store.set(f"rank {own_rank}", "here")
        return store
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


def _start_flight_recorder() -> None:
    """Record NCCL's exchanges, to be written to a file after a time-out."""
    prefix = str(Path(tempfile.gettempdir()) / "flight_recorder_rank_")
    settings = {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": prefix,
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _ignore_requests() -> None:
    """The launcher asks the survivors to leave while they still find out why. They leave anyway."""
    if threading.current_thread() is threading.main_thread():
        for number in ASK_TO_LEAVE:
            signal.signal(number, signal.SIG_IGN)


def _lost_a_process(error: RuntimeError) -> bool:
    """Whether an exchange failed because of another process. The backends have no error type of
    their own.
    """
    return (
        isinstance(error, dist.DistError)
        or re.search(r"\bgloo\b|caused pair closure|\bNCCL\b", str(error)) is not None
    )


def _first_sentence(error: BaseException) -> str:
    """Without the place in the source and the advice that gloo adds."""
    return re.sub(r"^\[\S*\] |\. .*|\n.*", "", str(error), flags=re.DOTALL)


def _choose_interface(host: str, port: int) -> None:
    """Let gloo use the interface that leads to rank 0. It would take the one of this machine's
    name, which need not reach the others: on many systems the name stands for 127.0.1.1.
    """
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
    """The four bytes of an interface's IPv4 address; none if it has none, or on a system other than
    Linux.
    """
    try:
        import fcntl

        get_address = 0x8915  # SIOCGIFADDR
        return fcntl.ioctl(any_socket, get_address, struct.pack("256s", interface.encode()))[20:24]
    except (ImportError, OSError):
        return b""


def choose_device(flag: str) -> torch.device:
    """`--device`, by default CUDA where there is one, else the CPU. Raises UserError if it is not
    there.
    """
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
    """The mean of a host number over all processes, as a scalar on `device` and without waiting for
    the device.
    """
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
    """The items of all processes in order of rank, on the main process; an empty list on the
    others.
    """
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
    """Give every process the main process's buffers: running statistics differ, as each sees its
    own images.
    """
    if world_size() == 1:
        return
    with waiting("equalise_buffers"):
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
