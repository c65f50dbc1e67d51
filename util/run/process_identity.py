"""Which process is which: process ids are used again, and mean nothing on another machine."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path


def machine() -> str:
    """The same for two processes only if they see each other's process ids. Containers may share
    names, but not all of these.
    """
    names = [socket.gethostname()]
    with contextlib.suppress(OSError):
        names += [
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            os.readlink("/proc/self/ns/pid"),
        ]
    return " ".join(names)


def born(pid: int) -> str:
    """When a process was started, in the kernel's ticks. Empty where that is not known."""
    fields = _stat(pid)
    return fields[19] if fields else ""


def still_runs(pid: int, started: str) -> bool:
    """Whether the process of this machine that `born` said was started then is still there."""
    fields = _stat(pid)
    if fields:
        # a zombie has ended, and nobody has asked how
        return fields[0] not in "ZX" and fields[19] == started
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's, whose processes are hidden from us
        pass
    return True


def _stat(pid: int) -> list[str]:
    """What Linux says of a process, from its state on; nothing if it does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
