"""Explains why an exchange between the processes of a job failed. It ends nothing.

The launcher ends a job whose process dies, and the time-out of an exchange (`--dist_timeout`) ends
one that hangs. Neither says which process is at fault. So each process writes its last operation
into the job's store, about once a second, and reads those of the others. After a failed exchange it
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
FINAL = (errors.EXIT_USER_ERROR, errors.EXIT_NOT_SAVED)  # another start would end in the same way


class State(NamedTuple):
    """What a process writes about itself."""

    host: str
    pid: int
    exchanges: int = 0
    notes: int = 0  # since the last exchange
    waits: bool = False  # for other processes
    doing: str = "starting"
    left: int | None = None  # its exit code, once it leaves
    beat: int = 0

    def progress(self) -> tuple[int, int]:
        return self.exchanges, self.notes


class Watchdog:
    """Writes the state of this process and reads all states, in a thread, from now until `stop`.

    store: a connection to the job's store that nothing else uses; `address` is for messages.
    warn_after: seconds without progress after which the explanation is written to standard error,
    because NCCL's time-out raises no exception. None: never.
    """

    current: "ClassVar[Watchdog | None]" = None  # of this process

    def __init__(
        self, store: Store, rank: int, size: int, address: str, warn_after: float | None = None
    ) -> None:
        self._store, self._rank, self._address, self._warn_after = store, rank, address, warn_after
        self.own = State(socket.gethostname(), os.getpid())
        self._states = [self.own] * size
        self._seconds = 1 + size // 64  # between two beats: each of `size` processes reads `size` states
        # when this process and each process made progress, wrote its state, and when the store answered
        now = time.monotonic()
        self._progressed = self._answered = now
        self._written, self._moved = [now] * size, [now] * size

        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._talk, self._warn)]
        for thread in self._threads:
            thread.start()
        Watchdog.current = self

    def set(self, state: State) -> None:
        """Replace the state of this process; it has made progress."""
        self.own = state
        self._progressed = time.monotonic()

    def stop(self, left: int = 0, last_words: str = "") -> None:
        """Write the exit code and the last words, if the store answers, and end the threads."""
        Watchdog.current = None
        self.set(self.own._replace(left=left, doing=last_words or self.own.doing))
        self._stopped.set()
        # a thread inside the store while Python shuts down would abort the process
        for thread in self._threads:
            thread.join(2 * self._seconds)

    def explain(self, error: str) -> errors.UserError | errors.Preempted:
        """Why an exchange failed with `error`. Takes some seconds, in which dead processes become
        silent.
        """
        time.sleep(6 * self._seconds)
        asked = None
        for rank, state in enumerate(self._states):
            if state.left in ASKED:
                asked = asked or state
            elif state.left and state.left != errors.EXIT_LOST_PROCESS:
                failure = errors.UserError(
                    f"rank {rank} on {state.host} left with exit code {state.left}: {state.doing}"
                )
                failure.exit_code = state.left if state.left in FINAL else errors.EXIT_LOST_PROCESS
                return failure
        if asked and asked.left and not self._silent():
            return errors.Preempted(asked.doing, asked.left)
        return errors.LostProcessError(f"{self._blame()}; start again with --resume auto ({error})")

    def _silent(self) -> list[int]:
        """The ranks that have not left, and stopped writing before the store stopped answering."""
        # without a sign for so long: dead, stopped or cut off
        limit, now = 4 * self._seconds, time.monotonic()
        last_answer = self._answered if now - self._answered > limit else now
        silent = []
        for rank, state in enumerate(self._states):
            if rank != self._rank and state.left is None and last_answer - self._written[rank] > limit:
                silent.append(rank)
        return silent

    def _blame(self) -> str:
        """The ranks at fault, each with its host and last operation."""
        now, silent = time.monotonic(), self._silent()
        if silent:
            seconds = now - min(self._written[rank] for rank in silent)
            return f"no sign of life for {seconds:.0f} s from {self._describe(silent)}"
        unanswered = now - self._answered
        if unanswered > 4 * self._seconds:
            store = f"the job's store at {self._address}"
            return f"no answer for {unanswered:.0f} s from {store} and {self._describe([0])}"

        # a process that waits for others is at fault only if all processes wait
        present = [rank for rank, state in enumerate(self._states) if not state.left]
        working = [rank for rank in present if not self._states[rank].waits] or present
        least = min(self._states[rank].progress() for rank in working)
        behind = [rank for rank in working if self._states[rank].progress() == least]
        seconds = now - max(self._moved[rank] for rank in behind)
        return f"no progress for {seconds:.0f} s of {self._describe(behind)}"

    def _describe(self, ranks: list[int]) -> str:
        named = []
        for rank in ranks[:4]:
            state = self._states[rank]
            process = f"rank {rank} on {state.host} (process {state.pid})"
            named.append(f"{process}; last known operation: '{state.doing}'")
        more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
        return ", ".join(named) + more

    def _talk(self) -> None:
        names = [f"watchdog {rank}" for rank in range(len(self._states))]
        beat, last = 0, False
        with contextlib.suppress(RuntimeError):  # the store is gone: `_answered` shows it
            while not last:
                last = self._stopped.wait(self._seconds if beat else 0)
                beat += 1
                self._store.set(names[self._rank], json.dumps(self.own._replace(beat=beat)))
                texts = self._store.multi_get(names)
                self._answered = time.monotonic()
                for rank, text in enumerate(texts):
                    old, new = self._states[rank], State(*json.loads(text))
                    if new.beat != old.beat:
                        self._written[rank] = self._answered
                    if new.progress() != old.progress():
                        self._moved[rank] = self._answered
                    self._states[rank] = new

    def _warn(self) -> None:
        while self._warn_after is not None and not self._stopped.wait(self._seconds):
            if time.monotonic() - self._progressed > self._warn_after:
                dump = os.environ.get("TORCH_FR_DUMP_TEMP_FILE")
                recorder = f"NCCL's flight recorder will be in {dump}<rank> of each host"
                os.write(2, f"warning: {self._blame()}; {recorder}\n".encode())
                return


def note(text: str, *args: object) -> None:
    """Say what this process does from now on: `text % args`. Call it once or more a step."""
    if watchdog := Watchdog.current:
        own = watchdog.own
        watchdog.set(own._replace(notes=own.notes + 1, doing=text % args))


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """A block in which this process waits for the others. All processes come through it in the same
    order.
    """
    watchdog = Watchdog.current
    if watchdog is None:
        yield
        return
    doing = watchdog.own.doing
    watchdog.set(watchdog.own._replace(waits=True, doing=f"{doing} (waits in {what})"))
    yield
    # After an exchange all processes have come equally far. After an error this is not known.
    exchanges = watchdog.own.exchanges + 1
    watchdog.set(watchdog.own._replace(waits=False, doing=doing, exchanges=exchanges, notes=0))
