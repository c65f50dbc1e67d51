"""Explains why an exchange between the processes of a job failed. It ends nothing.

The launcher ends a job whose process dies, and the time-out of an exchange (`--dist_timeout`) ends
one that hangs. Neither says which process is at fault. So each process writes what it is doing into
the job's store, about once a second, and reads what the others write. After a failed exchange it
names the ranks that stopped writing, or else the ranks that are furthest behind.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

from torch.distributed import Store

from util import errors

ASKED = (errors.EXIT_PREEMPTED, errors.EXIT_INTERRUPTED)  # to leave
FINAL = (errors.EXIT_USER_ERROR, errors.EXIT_NOT_SAVED)  # another start would end alike


class State(NamedTuple):
    """What a process writes of itself. (`exchanges`, `notes`) is how far it has come."""

    host: str
    pid: int
    exchanges: int = 0
    notes: int = 0
    waits: bool = False  # for other processes
    doing: str = "starting"
    left: int | None = None  # its exit code, once it leaves
    beat: int = 0


class Watchdog:
    """Writes this process's state and reads all states, in a thread, from now until `stop`.

    store: a connection to the job's store that nothing else uses; `address` is for messages.
    warn_after: seconds without progress after which the explanation is written to standard error,
    as NCCL's time-out raises no exception. None: never.
    """

    current: "ClassVar[Watchdog | None]" = None  # of this process

    def __init__(
        self, store: Store, rank: int, size: int, address: str, warn_after: float | None = None
    ) -> None:
        self._store, self._rank, self._address, self._warn_after = store, rank, address, warn_after
        self.own = State(socket.gethostname(), os.getpid())
        self._states = [self.own] * size
        # between two beats: each of `size` processes reads `size` states
        self._seconds = 1 + size // 64
        self._progressed = self._answered = (
            time.monotonic()
        )  # when this process came further, and when the store answered
        self._written, self._moved = (
            [self._answered] * size,
            [self._answered] * size,
        )  # of each process, as seen here
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._talk, self._warn)]
        for thread in self._threads:
            thread.start()
        Watchdog.current = self

    def set(self, **changes: object) -> None:
        self.own = self.own._replace(**changes)
        self._progressed = time.monotonic()

    def stop(self, left: int = 0, last_words: str = "") -> None:
        """Write the exit code and the last words, if the store answers, and end the threads."""
        Watchdog.current = None
        self.set(left=left, doing=last_words or self.own.doing)
        self._stopped.set()
        # one inside the store while Python shuts down would abort the process
        for thread in self._threads:
            thread.join(2 * self._seconds)

    def explain(self, error: str) -> errors.UserError | errors.Preempted:
        """Why an exchange failed with `error`. Takes some seconds, in which dead processes become
        silent.
        """
        time.sleep(6 * self._seconds)
        asked = [state for state in self._states if state.left in ASKED]
        for rank, state in enumerate(self._states):
            if state.left and state.left not in (*ASKED, errors.EXIT_LOST_PROCESS):
                failure = errors.UserError(
                    f"rank {rank} on {state.host} left with exit code {state.left}: {state.doing}"
                )
                failure.exit_code = state.left if state.left in FINAL else errors.EXIT_LOST_PROCESS
                return failure
        if asked and not self._silent():
            return errors.Preempted(asked[0].doing, asked[0].left)
        return errors.LostProcessError(f"{self._blame()}; start again with --resume auto ({error})")

    def _silent(self) -> list[int]:
        """The ranks that have not left, and stopped writing before the store stopped answering."""
        limit, now = (
            4 * self._seconds,
            time.monotonic(),
        )  # without a sign for so long: dead, stopped or cut off
        last_answer = self._answered if now - self._answered > limit else now
        others = [
            rank for rank, state in enumerate(self._states) if rank != self._rank and state.left is None
        ]
        return [rank for rank in others if last_answer - self._written[rank] > limit]

    def _blame(self) -> str:
        """The ranks at fault, each with its host and last operation."""
        now, silent = time.monotonic(), self._silent()
        if silent:
            return (
                f"no sign of life for {now - min(self._written[r] for r in silent):.0f} s from "
                f"{self._describe(silent)}"
            )
        if now - self._answered > 4 * self._seconds:
            return (
                f"no answer for {now - self._answered:.0f} s from the job's store at {self._address} and "
                f"{self._describe([0])}"
            )
        # A process that waits for others is at fault only if all processes wait.
        present = [rank for rank, state in enumerate(self._states) if not state.left]
        behind = [rank for rank in present if not self._states[rank].waits] or present
        least = min(self._states[rank][2:4] for rank in behind)
        behind = [rank for rank in behind if self._states[rank][2:4] == least]
        return (
            f"no progress for {now - max(self._moved[r] for r in behind):.0f} s of {self._describe(behind)}"
        )

    def _describe(self, ranks: list[int]) -> str:
        states = [(rank, self._states[rank]) for rank in ranks[:4]]
        named = [
            f"rank {rank} on {s.host} (process {s.pid}); last known operation: '{s.doing}'"
            for rank, s in states
        ]
        return ", ".join(named) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")

    def _talk(self) -> None:
        beat, last = 0, False
        with contextlib.suppress(RuntimeError):  # the store is gone: `_answered` shows it
            while not last:
                last = self._stopped.wait(self._seconds if beat else 0)
                beat += 1
                self._store.set(f"watchdog {self._rank}", json.dumps(self.own._replace(beat=beat)))
                texts = self._store.multi_get([f"watchdog {rank}" for rank in range(len(self._states))])
                self._answered = time.monotonic()
                for rank, text in enumerate(texts):
                    old, new = self._states[rank], State(*json.loads(text))
                    self._written[rank] = self._answered if new.beat != old.beat else self._written[rank]
                    self._moved[rank] = self._answered if new[2:4] != old[2:4] else self._moved[rank]
                    self._states[rank] = new

    def _warn(self) -> None:
        while self._warn_after is not None and not self._stopped.wait(self._seconds):
            if time.monotonic() - self._progressed > self._warn_after:
                dump = os.environ.get("TORCH_FR_DUMP_TEMP_FILE")
                os.write(
                    2,
                    f"warning: {self._blame()}; NCCL's flight recorder will be in "
                    f"{dump}<rank> of each host\n".encode(),
                )
                return


def note(text: str, *args: object) -> None:
    """Say what this process does from now on: `text % args`. Call it once or more a step."""
    if watchdog := Watchdog.current:
        watchdog.set(notes=watchdog.own.notes + 1, doing=text % args)


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """A block in which this process waits for the others. All processes come through it in the same
    order.
    """
    if (watchdog := Watchdog.current) is None:
        yield
        return
    doing = watchdog.own.doing
    watchdog.set(waits=True, doing=f"{doing} (waits in {what})")
    yield
    # After an exchange all processes are equally far. After an error this is not known.
    watchdog.set(waits=False, doing=doing, exchanges=watchdog.own.exchanges + 1, notes=0)
