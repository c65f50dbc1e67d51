"""One writer for a run's folder: the file `.held` in it names the process that writes there.

Who finds the file asks whether that process lives. On the same machine the kernel knows. Of another
machine's process only the file is seen, which it touches every few seconds: the file is watched for
as long as a sign of life may take. No two clocks are compared for that, as machines and file
servers have their own. A Slurm job that was requeued need not ask.

A process that was taken for dead (suspended, cut off from the file server) finds another name in
the file, and writes no more.
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
from types import TracebackType

from util.distributed.slurm_job import own_job, restart_count
from util.distributed.watchdog import note
from util.errors import NotSavedError, UserError
from util.run.process_identity import born, machine, still_runs

log = logging.getLogger(__name__)

NAME = ".held"
BEAT = 10.0  # seconds between two touches
LOOK_EVERY = 5.0
# Looks without a sign of life until a process counts as dead. Reading large annotations may keep
# its threads from running for a minute; looks are counted, not seconds, as a file server that is
# away silences both sides.
LOOKS = 24
LONG = 600.0  # seconds; silence beyond any difference of clocks


@dataclass(frozen=True)
class Holder:
    """A process that writes into a folder. attempt: how often Slurm has requeued its `job` (""
    without Slurm).
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
        now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
        return cls(
            socket.gethostname(), machine(), os.getpid(), born(os.getpid()), now, own_job(), restart_count()
        )

    def __str__(self) -> str:
        if not self.pid:
            return "a process that did not say which"
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
        self._turn = folder / f"{NAME}.turn"
        self._aside = folder / f"{NAME}.{self._own.host}.{self._own.pid}.tmp"
        self._left = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="hold of the folder", daemon=True)

    def __enter__(self) -> FolderHold:
        while not self._create():
            holder = _holder_in(self._path)
            if holder is not None and self._take_from(holder):
                break
        self._beating.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        # a file that stays behind names a process that has ended
        with contextlib.suppress(OSError):
            if _holder_in(self._path) == self._own:
                self._path.unlink()

    def check(self) -> None:
        """To be called before anything is written.

        Raises NotSavedError if another process holds the folder now: it has waited in vain for a
        sign of life of this one.
        """
        holder: Holder | None = self._own
        with contextlib.suppress(OSError):  # the writing itself will tell what is wrong
            holder = _holder_in(self._path)
            if holder is None:  # somebody has cleared the folder
                self._create()
        if holder not in (None, self._own):
            raise NotSavedError(
                f"--output_dir {self.folder} was taken over by {holder}, to which this process "
                f"seemed dead (suspended, or cut "
                "off from the file server); it leaves the folder to that one, and writes nothing "
                "more"
            )

    def _create(self) -> bool:
        """Whether this process holds the folder now: of several that try, one does."""
        try:
            file = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(file, json.dumps(asdict(self._own)).encode())
        except OSError:  # a full disk
            self._path.unlink()
            raise
        finally:
            os.close(file)
        return True

    def _take_from(self, holder: Holder) -> bool:
        """Take the place of a process that has ended; whether this one has it now. Raises UserError
        if that process lives.
        """
        if holder.machine == self._own.machine:
            reason = "" if still_runs(holder.pid, holder.born) else "which has ended"
        elif holder.job and holder.job == self._own.job and holder.attempt < self._own.attempt:
            reason = "before this job was requeued"
        else:
            reason = self._watch(holder)
            if not reason and _holder_in(self._path) != holder:
                return False
        if not reason:
            raise UserError(
                f"--output_dir {self.folder} is held by {holder}, and only one run may write "
                f"there; wait for its end, or give "
                "another --output_dir"
            )
        taken = self._replace(holder)
        if taken:
            log.warning("%s was held by %s, %s: taken over", self.folder, holder, reason)
        return taken

    def _watch(self, holder: Holder) -> str:
        """Why a process of another machine counts as dead; "" if it gives a sign of life."""
        before = self._touched()
        if not before:
            return ""
        if self._clock_of_the_server() - before > LONG:
            return f"without a sign of life for more than {LONG / 60:.0f} minutes"
        log.warning(
            "%s is held by %s: waiting up to %.0f s for a sign of life",
            self.folder,
            holder,
            LOOKS * LOOK_EVERY,
        )
        for look in range(LOOKS):
            note("waiting for a sign of life of who holds the folder, look %d", look)
            time.sleep(LOOK_EVERY)
            if self._touched() != before:
                return ""
        return f"without a sign of life for {LOOKS * LOOK_EVERY:.0f} s"

    def _touched(self) -> float:
        """When the file was touched, by the server's clock; 0 if it is gone."""
        try:
            with open(
                self._path, "rb"
            ) as file:  # NFS asks the server for what is opened, else it may tell what it remembers
                return os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return 0.0

    def _clock_of_the_server(self) -> float:
        with open(self._aside, "wb") as file:
            os.utime(file.fileno())
            now = os.fstat(file.fileno()).st_mtime
        self._aside.unlink()
        return now

    def _replace(self, holder: Holder) -> bool:
        """Put this process in the place of `holder`, unless another has done so; whether it was put
        there.

        Of several that want to, one at a time looks and replaces: the one that has made the file
        `.held.turn`.
        """
        try:
            os.close(os.open(self._turn, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            self._wait_for_turn()
            return False
        try:
            if _holder_in(self._path) != holder:
                return False
            self._aside.write_text(json.dumps(asdict(self._own)))
            os.replace(self._aside, self._path)
            return True
        finally:
            self._turn.unlink(missing_ok=True)

    def _wait_for_turn(self) -> None:
        """Until the other, who needs milliseconds, is done. One that died meanwhile is not waited
        for.
        """
        deadline = time.monotonic() + LOOK_EVERY
        while self._turn.exists() and time.monotonic() < deadline:
            time.sleep(LOOK_EVERY / 100)
        if time.monotonic() >= deadline:
            self._turn.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._left.wait(BEAT):
            with contextlib.suppress(OSError):
                if _holder_in(self._path) == self._own:
                    os.utime(self._path)


def _holder_in(path: Path) -> Holder | None:
    """Who holds the folder; None if nobody does. One that has not finished writing, or died of it,
    is without a name.
    """
    try:
        return Holder(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return Holder()
