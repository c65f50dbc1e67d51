"""What a case of the fuzzer may not do: hang, take gigabytes, write, run anything, open a file
outside its folder.

Python's audit events tell what its own functions open and start. What a C library opened by itself
would not be seen; the images reach Pillow's as bytes, so that none has a reason to.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import signal
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# a prefix of an audit event's name -> what it would mean
_FORBIDDEN = (
    "subprocess.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.startfile",
    "pty.",
    "ctypes.dlopen",
    "socket.",
    "pickle.find_class",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.truncate",
    "os.putenv",
    "shutil.",
    "tempfile.",
    "webbrowser.",
    "ftplib.",
    "urllib.",
)
_GIBIBYTE = 2**30


class Misbehaviour(BaseException):
    """A case did what it may not. No Exception, so that no code under test takes it for an error of
    its own.
    """


class Watch:
    """Watches the code run in `case()` blocks.

    Args:
        folder: the only folder whose files may be opened, beside those of Python and its libraries.
        seconds: for a case.
        hard: end the whole process when a case hangs in code that no Python signal handler
            interrupts.
    """

    def __init__(self, folder: Path, seconds: int, hard: bool) -> None:
        self._seconds, self._hard = seconds, hard
        self._allowed = tuple(f"{os.path.realpath(root)}{os.sep}" for root in [folder, *_library_roots()])
        self._seen: str | None = None

    @contextlib.contextmanager
    def case(self) -> Iterator[None]:
        """Raises Misbehaviour, at once or, if that was swallowed, at the end of the block."""
        global _active
        self._seen = None
        peak = _peak_memory()
        before = signal.signal(signal.SIGALRM, self._alarm)
        signal.setitimer(signal.ITIMER_REAL, self._seconds)
        if self._hard:
            faulthandler.dump_traceback_later(2 * self._seconds, exit=True)
        _active = self
        try:
            yield
        finally:
            _active = None
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            if self._hard:
                faulthandler.cancel_dump_traceback_later()
        if _peak_memory() - peak > _GIBIBYTE:
            self._seen = f"took {(_peak_memory() - peak) / _GIBIBYTE:.1f} GiB"
        if self._seen:
            raise Misbehaviour(self._seen)

    def event(self, name: str, args: tuple[Any, ...]) -> None:
        """Judge an audit event."""
        if name == "open":
            self._judge_open(*args)
        elif name.startswith(_FORBIDDEN):
            self._report(f"{name} {args!r}"[:300])

    def _judge_open(self, path: Any, mode: str | None, flags: int) -> None:
        if isinstance(path, int):  # a file that is open already
            return
        real = os.path.realpath(os.fsdecode(path))
        if not real.startswith(self._allowed):
            self._report(f"opened {real!r}"[:300])
        elif flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or set(mode or "") & set("wax+"):
            self._report(f"opened {real!r} for writing")

    def _report(self, what: str) -> None:
        self._seen = what
        raise Misbehaviour(what)

    def _alarm(self, number: int, frame: Any) -> None:
        self._report(f"took more than {self._seconds} s")


_active: Watch | None = None


def _hook(name: str, args: tuple[Any, ...]) -> None:
    if _active is not None:
        _active.event(name, args)


sys.addaudithook(_hook)  # there is no way to take it off again


def _library_roots() -> list[str]:
    project = [str(Path(__file__).resolve().parents[2] / name) for name in ("datasets", "models", "util")]
    return [sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), *site.getsitepackages(), *project]


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
