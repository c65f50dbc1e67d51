"""One writer for a run's folder: the file `.held` in it names the process that writes there.

A process that finds the file asks whether the holder is alive. On the same machine the kernel
knows. A holder on another machine touches the file every few seconds, and the file is watched for
as long as a touch may take. Clocks are not compared, because machines and file servers have their
own. A Slurm job that was requeued takes over from its earlier attempt at once.

A process that was taken for dead (suspended, cut off from the file server) finds another name in
the file, and writes nothing more.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from util.distributed.launchers import slurm_job, slurm_restarts
from util.distributed.watchdog import note
from util.errors import NotSavedError, UserError

log = logging.getLogger(__name__)

NAME = ".held"
BEAT = 10.0  # seconds between two touches
LOOK_EVERY = 5.0
TURN = 5.0  # seconds after which a process that is taking over, which takes milliseconds, has died
# Looks without a touch until a process counts as dead. Reading large annotations can block its
# threads for a minute. Looks are counted and not seconds: a file server that is down for a while
# blocks both sides.
LOOKS = 24
LONG = 600.0  # seconds: more than clocks differ and a process can be silent, so that nothing needs watching


@dataclass(frozen=True)
class Holder:
    """A process that writes into a folder.

    machine: equal for two processes only if they see each other's process ids. born: when the
    process started. attempt: how often Slurm has requeued its `job` ("" without Slurm).
    """

    host: str = ""
    machine: str = ""
    pid: int = 0
    born: str = ""
    since: str = ""
    job: str = ""
    attempt: int = 0

    @classmethod
    def this_process(cls) -> Holder:
        host, pid = socket.gethostname(), os.getpid()
        # containers may share a host name, but not all of these
        machine = host
        with contextlib.suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            machine = f"{host} {boot} {os.readlink('/proc/self/ns/pid')}"
        now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
        return cls(host, machine, pid, born(pid), now, slurm_job(), slurm_restarts())

    def __str__(self) -> str:
        if not self.pid:
            return "an unknown process"
        job = f" (Slurm job {self.job})" if self.job else ""
        return f"process {self.pid} on {self.host}{job} since {self.since}"


class FolderHold:
    """Holds `folder`, for the length of a `with` block, as its only writer.

    Entering raises UserError if another process holds it, and OSError if it can't be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / NAME
        self._own = Holder.this_process()
        self._aside = folder / f"{NAME}.{self._own.host}.{self._own.pid}.tmp"
        self._text = json.dumps(asdict(self._own))
        self._left = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="hold of the folder", daemon=True)

    def __enter__(self) -> FolderHold:
        while not self._create():
            holder = _holder_in(self._path)
            if holder is None:  # it has just left
                continue
            reason = self._why_ended(holder)
            if reason and self._replace(holder):
                log.warning("%s was held by %s, %s: taken over", self.folder, holder, reason)
                break
        self._beating.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()  # ends the touching
        # a file that stays names a process that has ended
        with contextlib.suppress(OSError):
            if _holder_in(self._path) == self._own:
                self._path.unlink()

    def check(self) -> None:
        """Call before writing.

        Raises NotSavedError if another process holds the folder now, because it waited in vain for
        a touch of this one.
        """
        try:
            if not self._path.exists():  # the folder was cleared
                self._create()
            holder = _holder_in(self._path)
        except OSError:  # the writing itself will say what is wrong
            return
        if holder not in (None, self._own):
            raise NotSavedError(
                f"--output_dir {self.folder} was taken over by {holder}, because this process seemed "
                "dead (suspended, or cut off from the file server); it writes nothing more"
            )

    def _create(self) -> bool:
        """Whether this process holds the folder now. If several try, one succeeds."""
        # O_EXCL holds over NFS too; locks do not on every server
        try:
            file = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(file, self._text.encode())
        except OSError:  # a full disk
            self._path.unlink()
            raise
        finally:
            os.close(file)
        return True

    def _why_ended(self, holder: Holder) -> str:
        """Why `holder` counts as ended; "" if it no longer holds the folder.

        Raises UserError if it is alive.
        """
        if holder.machine == self._own.machine:
            if not still_runs(holder.pid, holder.born):
                return "which has ended"
        elif holder.job and holder.job == self._own.job and holder.attempt < self._own.attempt:
            return "before this job was requeued"
        elif reason := self._silence(holder):
            return reason
        elif _holder_in(self._path) != holder:
            return ""
        raise UserError(
            f"--output_dir {self.folder} is held by {holder}, and only one run may write there; "
            "wait for its end, or give another --output_dir"
        )

    def _silence(self, holder: Holder) -> str:
        """Why a process on another machine counts as dead; "" if it touches its file, or it is gone."""
        before = self._touched()
        if not before:
            return ""
        if self._server_time() - before > LONG:
            return f"without a sign of life for more than {LONG / 60:.0f} minutes"
        waiting = "%s is held by %s: waiting up to %.0f s for a sign of life"
        log.warning(waiting, self.folder, holder, LOOKS * LOOK_EVERY)
        for look in range(LOOKS):
            note("waiting for a sign of life of the process that holds the folder, look %d", look)
            time.sleep(LOOK_EVERY)
            if self._touched() != before:
                return ""
        return f"without a sign of life for {LOOKS * LOOK_EVERY:.0f} s"

    def _server_time(self) -> float:
        """The clock of the file server: clocks of two machines are never compared."""
        with open(self._aside, "wb") as file:
            now = os.fstat(file.fileno()).st_mtime
        self._aside.unlink()
        return now

    def _touched(self) -> float:
        """When the file was touched, by the server's clock; 0 if it does not exist."""
        try:
            # NFS asks the server only for files that are opened
            with open(self._path, "rb") as file:
                return os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return 0.0

    def _replace(self, holder: Holder) -> bool:
        """Replace `holder` by this process, unless another one has done so; whether it did.

        If several want to, only the one that creates `.held.turn` compares and replaces.
        """
        turn = self.folder / f"{NAME}.turn"
        try:
            os.close(os.open(turn, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            deadline = time.monotonic() + TURN
            while turn.exists() and time.monotonic() < deadline:
                time.sleep(TURN / 100)
            if time.monotonic() >= deadline:
                turn.unlink(missing_ok=True)
            return False
        try:
            if _holder_in(self._path) != holder:
                return False
            self._aside.write_text(self._text)
            os.replace(self._aside, self._path)
            return True
        finally:
            turn.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._left.wait(BEAT):
            # never touch the file of a process that has taken over
            with contextlib.suppress(OSError):
                if _holder_in(self._path) == self._own:
                    os.utime(self._path)


def holder_of(folder: Path) -> Holder | None:
    """Who holds the folder and is not known to have ended; None if nobody does.

    A process of another machine counts as alive until it was silent for LONG seconds by this clock.
    """
    holder = _holder_in(folder / NAME)
    if holder is None:
        return None
    if holder.machine == Holder.this_process().machine:
        return holder if still_runs(holder.pid, holder.born) else None
    with contextlib.suppress(OSError):
        if time.time() - (folder / NAME).stat().st_mtime < LONG:
            return holder
    return None


def _holder_in(path: Path) -> Holder | None:
    """Who holds the folder; None if nobody does. An unfinished file names no process."""
    try:
        return Holder(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return Holder()


def born(pid: int) -> str:
    """When a process was started, in the kernel's ticks: process ids are used again. "" if unknown."""
    fields = _stat(pid)
    return fields[19] if fields else ""


def still_runs(pid: int, started: str) -> bool:
    """Whether the process of this machine for which `born` gave `started` is alive."""
    fields = _stat(pid)
    if fields:
        return fields[0] not in "ZX" and fields[19] == started  # a zombie has ended
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True


def _stat(pid: int) -> list[str]:
    """What Linux says about a process, from its state on; [] on other systems."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
