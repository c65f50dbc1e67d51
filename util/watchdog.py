"""Watches the processes of a distributed job: the first that dies, hangs or is cut off ends all of them, and is named.

Every process tells the store about once a second that it lives and what it is doing, and reads the same of the others
(`_Talk`). What is read, and for how long nothing was, goes to `Jury`, which decides. A thread of its own asks the jury
(`Watchdog._judge`), because a store or a network that is gone may block the talking thread for ever, and the main thread
with it. The first verdict is left in the store, so that all processes give the same reason.

    watchdog.note("epoch %d, step %d: loading", epoch, step)       # what this process does now; nothing without a job
    with watchdog.waiting("gather"): ...                            # here it waits for the other processes
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from torch.distributed import Store

from util.errors import EXIT_INTERRUPTED, EXIT_LOST_PROCESS, EXIT_PREEMPTED, LostProcessError, Preempted
from util.processes import born, machine

# Of the time-out. The rest is for telling the others, and for the last words.
SHARE_OF_TIMEOUT = 0.85
REMEDY = "start again with --resume auto"
# A closed store and a broken exchange are certain, and only the culprit is not: wait so many seconds for news of it.
SHORT_WAIT = 2.5
# Seconds between two looks for those that have not arrived.
ARRIVAL_TICK = 0.1
# Seconds that a process may take to leave after an error, before it is ended.
LEAVE_WITHIN = 30.0


class Peer(NamedTuple):
    """Who a process is. `machine` and `born` tell whether `pid` is that process on this machine."""

    host: str
    machine: str
    pid: int
    born: str


class State(NamedTuple):
    """What a process does. `beat` counts its signs of life, (`exchanges`, `notes`) is how far it has come."""

    beat: int = 0
    exchanges: int = 0
    notes: int = 0
    waits: bool = False  # for other processes
    doing: str = "starting"
    left: bool = False  # has done all that it had to


class Verdict(NamedTuple):
    """The reason for which the job ends, in one line; `ranks` are the processes at fault, if any of them is."""

    ranks: list[int]
    line: str
    status: int = EXIT_LOST_PROCESS  # with which the others leave

    @property
    def asked(self) -> bool:
        """Whether a process was asked to leave, rather than lost."""
        return self.status in (EXIT_PREEMPTED, EXIT_INTERRUPTED)

    def tell(self) -> str:
        return self.line if self.asked else f"error: {self.line}"

    def exception(self) -> BaseException:
        return Preempted(self.line, self.status) if self.asked else LostProcessError(self.line)


class Progress:
    """What the main thread does, as a tuple that is replaced whole: read by other threads without a lock."""

    def __init__(self) -> None:
        self._now: tuple[int, int, str, tuple[object, ...], str] = (0, 0, "starting", (), "")

    def note(self, text: str, args: tuple[object, ...]) -> None:
        exchanges, notes, *_ = self._now
        self._now = exchanges, notes + 1, text, args, ""

    def wait(self, what: str) -> None:
        exchanges, notes, text, args, _ = self._now
        self._now = exchanges, notes, text, args, what

    def go_on(self) -> None:
        """After an exchange all are equally far, whatever they did before: notes count from here."""
        exchanges, _, text, args, _ = self._now
        self._now = exchanges + 1, 0, text, args, ""

    def state(self, beat: int, left: bool) -> State:
        exchanges, notes, text, args, waits_in = self._now
        try:
            doing = text % args if args else text
        except (TypeError, ValueError):  # a note must never end a run
            doing = text
        doing += f" (waits in {waits_in})" if waits_in else f" (at {line})" if (line := _line_of_main_thread()) else ""
        return State(beat, exchanges, notes, bool(waits_in), doing, left)


class Jury:
    """Decides from what was heard, and for how long nothing was, which process the job has lost. Holds no clock and no store.

    Args:
        rank: this process's, whose main thread may hang as any other.
        peers: all processes, in order of rank.
        address: where the store is.
    """

    def __init__(self, rank: int, peers: Sequence[Peer], address: str) -> None:
        self._rank, self._peers, self._address = rank, peers, address
        self._states = [State()] * len(peers)
        self._silent = [0.0] * len(peers)  # seconds since a process gave a sign of life
        self._still = [0.0] * len(peers)  # seconds since it came further
        self._store_silent = 0.0
        self._lock = threading.Lock()

    def hear(self, states: Sequence[State]) -> None:
        """The store has answered: the states of all processes."""
        with self._lock:
            self._store_silent = 0.0
            for rank, (old, new) in enumerate(zip(self._states, states, strict=True)):
                if new.beat != old.beat:
                    self._silent[rank] = 0.0
                if new[1:4] != old[1:4]:
                    self._still[rank] = 0.0
            self._states = list(states)

    def pass_time(self, seconds: float) -> None:
        with self._lock:
            self._store_silent += seconds
            self._silent = [value + seconds for value in self._silent]
            self._still = [value + seconds for value in self._still]

    def all_left(self, except_for: Sequence[int] = ()) -> bool:
        """Whether no other process is still at work."""
        return all(state.left or rank == self._rank or rank in except_for for rank, state in enumerate(self._states))

    def first_of_host(self, verdict: Verdict) -> bool:
        """Whether this process is the one of its machine that tells the verdict: the lowest rank that is not at fault."""
        here = [r for r, peer in enumerate(self._peers) if peer.machine == self._peers[self._rank].machine]
        return self._rank == min([r for r in here if r not in verdict.ranks and not self._states[r].left] or here)

    def verdict(self, limit: float) -> Verdict | None:
        """Who has been silent, or has stood still, for `limit` seconds.

        What one process's fault does to the others shows at almost the same time; so once anything has lasted for `limit`,
        all that has lasted for half of it is weighed: a store that can't be reached explains silent processes, and these
        explain processes that stand still, as they wait for them.
        """
        with self._lock:
            if max(self._store_silent, *(self._silent[r] for r in self._present()), *self._stand_still()) < limit:
                return None
            if self._store_silent >= limit / 2:
                return self._store_lost(f"has not answered for {self._store_silent:.0f} s")
            return self._silent_verdict(limit / 2) or self._hang_verdict(limit / 2)

    def silent(self, limit: float) -> Verdict | None:
        """Who has been silent for `limit` seconds."""
        with self._lock:
            return self._silent_verdict(limit)

    def silent_peers(self, ranks: Sequence[int], limit: float) -> list[Peer]:
        """Those of `ranks` that have been silent for `limit` seconds."""
        with self._lock:
            return [self._peers[r] for r in self._silent_ranks(limit) if r in ranks]

    def store_closed(self) -> Verdict:
        with self._lock:
            return self._store_lost("has closed the connection")

    def broken(self, reason: str) -> Verdict:
        """An exchange broke off, and nobody knows who is to blame."""
        with self._lock:
            told = f"{self._who(self._rank)} lost its connection to another process in {self._doing(self._rank)}"
            return Verdict([], f"{told} ({reason}); {REMEDY}")

    def _present(self) -> list[int]:
        """The other processes that have not left."""
        return [r for r, state in enumerate(self._states) if r != self._rank and not state.left]

    def _stand_still(self) -> list[float]:
        return [self._still[r] for r in [*self._present(), self._rank]]

    def _silent_ranks(self, limit: float) -> list[int]:
        return [r for r in self._present() if self._silent[r] >= limit]

    def _silent_verdict(self, limit: float) -> Verdict | None:
        ranks = self._silent_ranks(limit)
        if not ranks:
            return None
        seconds = max(self._silent[r] for r in ranks)
        told = f"no sign of life from {self._names(ranks)} for {seconds:.0f} s: dead, stopped, or the host is cut off"
        return Verdict(ranks, f"{told}; last known operation: {self._doing(ranks[0])}{self._reporter()}; {REMEDY}")

    def _hang_verdict(self, limit: float) -> Verdict:
        """Those that are least far hold up all others; one that waits for others is not to blame while one is there that
        does not."""
        still = [r for r in [*self._present(), self._rank] if self._still[r] >= limit]
        suspects = [r for r in still if not self._states[r].waits] or still
        ranks = sorted(r for r in suspects if self._how_far(r) == min(map(self._how_far, suspects)))
        seconds = max(self._still[r] for r in ranks)
        told = f"{self._names(ranks)} made no progress for {seconds:.0f} s in {self._doing(ranks[0])}"
        if len(ranks) > 1:
            told += " (which of them is at fault can't be told)"
        return Verdict(ranks, f"{told}{'' if self._rank in ranks else self._reporter()}; {REMEDY}")

    def _store_lost(self, what: str) -> Verdict:
        where = f"the network, the host of rank 0 ({self._peers[0].host}) or the process there that serves the store is gone"
        told = f"the job's store at {self._address} {what}: {where}; last known operation of rank 0: {self._doing(0)}"
        return Verdict([], f"{told}{self._reporter() if self._rank else ''}; {REMEDY}")

    def _how_far(self, rank: int) -> tuple[int, int]:
        return self._states[rank].exchanges, self._states[rank].notes

    def _who(self, rank: int) -> str:
        return f"rank {rank} on {self._peers[rank].host} (process {self._peers[rank].pid})"

    def _names(self, ranks: Sequence[int]) -> str:
        more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
        return ", ".join(map(self._who, ranks[:4])) + more

    def _doing(self, rank: int) -> str:
        return f"'{self._states[rank].doing}'"

    def _reporter(self) -> str:
        return f"; {self._who(self._rank)}, which tells this, was in {self._doing(self._rank)}"


class _Talk(threading.Thread):
    """Tells the store what this process does and hears what the others do, until told to stop.

    A large job reads the others' states less often: each of n processes reads n of them.
    """

    def __init__(self, store: Store, rank: int, world_size: int, tick: float, progress: Progress, stays: bool) -> None:
        super().__init__(name="watchdog: talk", daemon=True)
        self._store, self._rank, self._world_size, self._tick, self._progress = store, rank, world_size, tick, progress
        self._stays = stays  # goes on listening when this process has left
        self.reads_every = 1 + world_size // 64
        self.peers: list[Peer | None] = [None] * world_size
        self.all_here = threading.Event()
        self.closed = threading.Event()
        self.heard: Callable[[list[State]], None] = lambda states: None
        self.verdict: Verdict | None = None  # the store's
        self._proposed: Verdict | None = None
        self._left = self._stopped = False
        self._round = 0
        self._wake, self._told = threading.Event(), threading.Event()

    def run(self) -> None:
        try:
            self._tell()
            self._store.set(f"peer {self._rank}", json.dumps(_this_process()))
            while not self._stopped:
                self._wake.wait(self._tick if self.all_here.is_set() else min(self._tick, ARRIVAL_TICK * self.reads_every))
                self._wake.clear()
                told, self._told = self._told, threading.Event()
                self._round += 1
                self._tell()
                if self._left and not self._stays:
                    self._stopped = True  # rank 0 may end now, and the store with it
                else:
                    self._hear()
                told.set()
        except RuntimeError:  # the store is gone
            self.closed.set()

    def propose(self, verdict: Verdict, seconds: float = 2.0) -> Verdict:
        """Leave the verdict in the store; gives the one that counts, which is the first. A silent store keeps nobody long."""
        self._proposed = verdict
        self._wait_for_a_round(seconds)
        return self.verdict or verdict

    def leave(self, seconds: float = 2.0) -> None:
        """Tell the others that this process has done its part."""
        self._left = True
        self._wait_for_a_round(seconds)

    def stop(self) -> None:
        self._stopped = True
        self._wake.set()

    def _wait_for_a_round(self, seconds: float) -> None:
        told, deadline = self._told, time.monotonic() + seconds
        self._wake.set()
        while not (told.wait(self._tick / 4) or self.closed.is_set() or time.monotonic() > deadline):
            pass

    def _tell(self) -> None:
        if self._proposed:
            self._store.compare_set("verdict", "", json.dumps(self._proposed))
        if self.verdict is None and self._store.check(["verdict"]):
            self.verdict = Verdict(*json.loads(self._store.get("verdict")))
        self._store.set(f"state {self._rank}", json.dumps(self._progress.state(self._round, self._left)))

    def _hear(self) -> None:
        if not self.all_here.is_set():
            self._look_for_peers()
        elif self._round % self.reads_every == 0:
            states = self._store.multi_get([f"state {r}" for r in range(self._world_size)])
            self.heard([State(*json.loads(state)) for state in states])

    def _look_for_peers(self) -> None:
        for rank, peer in enumerate(self.peers):
            if peer is None and self._store.check([f"peer {rank}"]):
                self.peers[rank] = Peer(*json.loads(self._store.get(f"peer {rank}")))
        if None not in self.peers:
            self.all_here.set()


class Watchdog:
    """Guards a block in which the processes of a job work together.

    Entering waits for all processes, and raises LostProcessError if some do not come in time. Leaving tells the others:
    that all is done, or the error that ends this process, which then ends them. In between, the process is ended with
    EXIT_LOST_PROCESS within `timeout` seconds of another's death or hang.

    Args:
        store: a connection to the job's store that nobody else uses.
        timeout: seconds.
        address: where the store is, for messages.
        serves_store: whether the store ends with this process, which then has to leave last.
    """

    def __init__(
        self, store: Store, rank: int, world_size: int, timeout: float, address: str, serves_store: bool = False
    ) -> None:
        self._rank, self._timeout, self._address, self._serves_store = rank, timeout, address, serves_store
        self._limit = SHARE_OF_TIMEOUT * timeout
        self._tick = min(1.0, timeout / 20)
        self._progress = Progress()
        self._talk = _Talk(store, rank, world_size, self._tick, self._progress, stays=serves_store)
        self._judge_thread = threading.Thread(target=self._judge, name="watchdog: judge", daemon=True)
        self._jury: Jury | None = None
        self._stopped, self._decided = threading.Event(), threading.Event()
        self._verdict: Verdict | None = None
        self._broken = ""  # an exchange broke off, for this reason, and the main thread waits to hear why
        self._listens = True  # the main thread waits for the verdict, and ends the process itself
        self._leaving: tuple[float, str, int] | None = None  # by when, the error, the exit status

    def __enter__(self) -> Watchdog:
        global _current
        _current = self
        self._talk.start()
        self._judge_thread.start()
        try:
            self._wait_for_arrivals()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            self.stop()
            raise
        self._listens = False
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Tell the others. The watchdog stays, until `stop`, to end a process that an error leaves hanging."""
        global _current
        _current = None
        if error is None:
            self._leaving = time.monotonic() + self._timeout + LEAVE_WITHIN, "", EXIT_LOST_PROCESS
        else:
            line, status = _one_line(error), getattr(error, "exit_code", 1)
            told = Verdict([self._rank], f"rank {self._rank} on {socket.gethostname()} ended with: {line}")
            if isinstance(error, Preempted):  # the others may not have been asked
                told = Verdict([self._rank], str(error), status)
            self._leaving = time.monotonic() + LEAVE_WITHIN, line, status
            if not isinstance(error, LostProcessError):
                self._talk.propose(told)
        self._talk.leave()
        self._wait_for_the_others(SHORT_WAIT if error else self._timeout)

    def _wait_for_arrivals(self) -> None:
        while not (self._jury or self._decided.wait(self._tick / 4)):
            pass
        if self._verdict:
            raise self._verdict.exception()

    def stop(self) -> None:
        """A thread inside the store while Python shuts down would end the process with an abort: none is left behind, except
        one that a dead network holds for ever."""
        global _current
        _current = None
        self._stopped.set()
        self._talk.stop()
        self._talk.join(SHORT_WAIT)
        self._judge_thread.join(SHORT_WAIT)

    def note(self, text: str, args: tuple[object, ...]) -> None:
        self._progress.note(text, args)

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        self._progress.wait(what)
        yield
        self._progress.go_on()  # not after an error: the exchange has not taken place

    def explain(self, error: BaseException) -> BaseException:
        """Why an exchange with the other processes broke off, as the exception to leave with: LostProcessError, or Preempted
        where the other was asked to leave. Waits some seconds for news of the culprit."""
        self._listens, self._broken = True, _one_line(error)
        self._decided.wait(self._timeout)
        return self._verdict.exception() if self._verdict else LostProcessError(f"lost another process: {self._broken}")

    def _wait_for_the_others(self, seconds: float) -> None:
        """Until they have left, but for those that never will. Only where the store ends with this process."""
        deadline = time.monotonic() + seconds
        while self._serves_store and time.monotonic() < deadline and not self._talk.closed.is_set():
            if self._jury and self._jury.all_left(except_for=self._verdict.ranks if self._verdict else []):
                return
            time.sleep(self._tick / 4)

    def _judge(self) -> None:
        """The judging thread: from the first process's arrival to the verdict, which it carries out."""
        verdict = self._wait_for_verdict()
        if verdict is None:
            return
        if verdict is not self._talk.verdict:
            verdict = self._talk.propose(verdict)
        elif not self._listens:
            self._stopped.wait(SHORT_WAIT)  # where all fail alike, each shall tell its own error
        self._verdict = verdict
        self._decided.set()
        patience = LEAVE_WITHIN if self._listens or self._leaving else 0.0
        if not self._stopped.wait(patience):
            self._end(verdict)

    def _wait_for_verdict(self) -> Verdict | None:
        last, waited, closed_for, broken_for = time.monotonic(), 0.0, 0.0, 0.0
        while not self._stopped.wait(self._tick if self._jury else min(self._tick, ARRIVAL_TICK)):
            now = time.monotonic()
            # a process that was stopped and goes on must not take its own sleep for the silence of others
            seconds, last = min(now - last, self._limit / 4), now
            waited += seconds
            closed_for += seconds if self._talk.closed.is_set() else 0.0
            broken_for += seconds if self._broken else 0.0
            if self._leaving and now > self._leaving[0]:
                return Verdict([], self._leaving[1] or "the other processes have not left in time")
            verdict = self._talk.verdict or (None if self._leaving else self._look(seconds, waited, closed_for, broken_for))
            if verdict:
                return verdict
        return None

    def _look(self, seconds: float, waited: float, closed_for: float, broken_for: float) -> Verdict | None:
        """What the last `seconds` have brought to light."""
        if self._jury is None:
            return self._look_for_missing(waited, closed_for)
        self._jury.pass_time(seconds)
        if closed_for > SHORT_WAIT:
            return self._jury.store_closed()
        if self._broken:
            certain = max(SHORT_WAIT, 3 * self._tick * self._talk.reads_every)
            silent = self._jury.silent(certain)
            return silent or (self._jury.broken(self._broken) if broken_for > certain + SHORT_WAIT else None)
        return self._jury.verdict(self._limit)

    def _look_for_missing(self, waited: float, closed_for: float) -> Verdict | None:
        if self._talk.all_here.is_set():
            jury = Jury(self._rank, [peer for peer in self._talk.peers if peer], self._address)
            self._talk.heard = jury.hear
            self._jury = jury
            return None
        if waited < self._limit and closed_for <= SHORT_WAIT:
            return None
        missing = [r for r, peer in enumerate(self._talk.peers) if peer is None]
        here = [f"rank {r} on {peer.host}" for r, peer in enumerate(self._talk.peers) if peer]
        if closed_for or not here:
            what = "has closed the connection" if closed_for else f"has not answered for {waited:.0f} s"
            return Verdict([], f"the job's store at {self._address} {what} before all processes had arrived; {REMEDY}")
        told = f"rank(s) {_short(missing)} of {len(self._talk.peers)} did not arrive within {waited:.0f} s"
        return Verdict(missing, f"{told} (here: {_short(here)}); see the output of those that are missing, and {REMEDY}")

    def _end(self, verdict: Verdict) -> None:
        """Tell the verdict, unless another process of this machine does, and end a silent culprit and this process.

        A culprit that gives signs of life reads the verdict, and ends by itself, however slow the machine.
        """
        jury = self._jury
        if jury is None or self._leaving or jury.first_of_host(verdict):
            if self._rank == 0 or not verdict.asked:
                _bounded(2, lambda: os.write(2, f"{verdict.tell()}\n".encode()))
            _kill(jury.silent_peers(verdict.ranks, self._limit / 2) if jury else [])
        self._talk.leave()
        self._wait_for_the_others(SHORT_WAIT)
        _bounded(1, lambda: (sys.stdout.flush(), sys.stderr.flush()))
        os._exit(self._leaving[2] if self._leaving else verdict.status)


_current: Watchdog | None = None


def note(text: str, *args: object) -> None:
    """Say what this process does from now on: `text % args`, put together only when it is told. Cheap; once or more a step."""
    if _current is not None:
        _current.note(text, args)


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """A block in which this process waits for the others, all of which come through it in the same order."""
    if _current is None:
        yield
        return
    with _current.waiting(what):
        yield


def _one_line(error: BaseException) -> str:
    """A UserError's message; other errors with their type."""
    text = (str(error).strip().splitlines() or [""])[0]
    return text if hasattr(error, "exit_code") else f"{type(error).__name__}: {text}".removesuffix(": ")


def _short(items: Sequence[object]) -> str:
    return ", ".join(map(str, items[:8])) + (f" and {len(items) - 8} more" if len(items) > 8 else "")


def _line_of_main_thread() -> str:
    """The line of this project that the main thread is in; empty where there is none."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PROJECT) and "site-packages" not in path.parts and path not in _AROUND:
            return f"{path.relative_to(_PROJECT)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


_PROJECT = Path(__file__).resolve().parent.parent
_AROUND = (Path(__file__).resolve(), _PROJECT / "util" / "errors.py")  # what every process is in


def _this_process() -> Peer:
    return Peer(socket.gethostname(), machine(), os.getpid(), born(os.getpid()))


def _kill(peers: Sequence[Peer]) -> None:
    """Kill those of this machine that are still there after two seconds, with their loader workers where these can be told
    by the group that a launcher made. A stopped process does not answer SIGTERM."""
    for _ in range(20):
        there = [peer for peer in peers if peer.machine == machine() and peer.born and peer.born == born(peer.pid)]
        if not there:
            return
        time.sleep(0.1)
    for peer in there:
        with contextlib.suppress(OSError):
            (os.killpg if os.getpgid(peer.pid) == peer.pid else os.kill)(peer.pid, signal.SIGKILL)


def _bounded(seconds: float, action: Callable[[], object]) -> None:
    """Do it, but do not wait longer: a full pipe, or a lock that a hanging thread holds, may block for ever."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(seconds)
