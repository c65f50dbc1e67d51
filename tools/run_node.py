"""Runs the processes of one node of a job, and all nodes' again after a crash; tools/run_dist_launch.sh calls it.

    python tools/run_node.py <nodes> <this node> <processes> <command> [arguments]

The processes get torchrun's variables, and a store that outlives them. What torchrun does not do:

- SIGTERM, SIGUSR1, SIGUSR2 and SIGINT go to the processes once, which may save and leave with EXIT_PREEMPTED or EXIT_INTERRUPTED
  in PREEMPT_SECONDS. That is this program's exit status too, and nothing is started again. The same signal a second time kills.
- A failure anywhere ends the processes of all nodes; one line names the first that failed, and its exit status is given on.
- MAX_RESTARTS: all processes of all nodes are started again after a crash. The nodes meet before every attempt, so one
  whose machine went down joins when this program is started there again. Not after a mistake of the user's, nor a full disk.
- A node waits JOIN_SECONDS for the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed import TCPStore

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees only its own folder, not the project
from util.errors import (
    EXIT_INTERRUPTED,
    EXIT_LOST_PROCESS,
    EXIT_NOT_SAVED,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    LostProcessError,
    UserError,
)

ASK_TO_LEAVE = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
SIGNALS = (*ASK_TO_LEAVE, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
# Another attempt would end in the same way, or somebody wants the end.
FINAL = (0, EXIT_USER_ERROR, EXIT_NOT_SAVED, EXIT_PREEMPTED, EXIT_INTERRUPTED)
CONSEQUENCES = (EXIT_PREEMPTED, EXIT_LOST_PROCESS)  # a process says so, and the cause is elsewhere
LEAVE_SECONDS = 20.0  # between SIGTERM and SIGKILL, once a process of the job has failed
EXPLAIN_SECONDS = 5.0  # a process that lost another tells so at once, and the other's end may be seen later
BIND_SECONDS = 5.0  # until processes of an earlier job, ended just now, have let go of the port
POLL_SECONDS = 0.1


class Settings(NamedTuple):
    nodes: int
    node: int
    processes: int  # on this node
    address: str
    port: int  # 0: any
    max_restarts: int
    preempt_seconds: float
    join_seconds: float


class Failure(NamedTuple):
    """The end of a process: its exit status as a shell gives it, and what is said of it."""

    status: int
    line: str


class End(NamedTuple):
    """What the first node that fails tells the others; `again`: another attempt may do better."""

    node: int
    status: int
    again: bool


class UnreachableError(Exception):
    """The store, or another node, is not there; in one line."""


class Signals:
    """Keeps the signals to this program until they are asked for."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self._new: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        self._new.put(number)

    def new(self) -> Iterable[tuple[int, bool]]:
        """Signals that have come since, and whether they came for the first time."""
        with contextlib.suppress(queue.Empty):
            while True:
                number = self._new.get_nowait()
                first = number not in self.seen
                self.seen.append(number)
                yield number, first


class Workers:
    """The processes of this node, each in a session of its own."""

    def __init__(self, command: list[str], settings: Settings, port: int, attempt: int) -> None:
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._ended: list[tuple[int, int]] = []  # ranks and return codes in the order in which they ended, if not by our signal
        self._signalled = self.signalled_to_death = False
        for local in range(settings.processes):
            rank = settings.node * settings.processes + local
            environment = os.environ | variables(settings, port, attempt, local)
            try:
                self._running[rank] = subprocess.Popen(command, env=environment, start_new_session=True)
            except OSError as error:
                raise UserError(f"{command[0]} can't be started: {error.strerror}") from None

    def poll(self) -> bool:
        """Whether some still run. What a process that failed has left behind ends with it."""
        for rank, process in list(self._running.items()):
            code = process.poll()
            if code is None:
                continue
            del self._running[rank]
            if code:
                _signal_session(process, signal.SIGKILL)
            if self._signalled and code < 0:
                self.signalled_to_death = True
            else:
                self._ended.append((rank, code))
        return bool(self._running)

    def send(self, number: int) -> None:
        """To the processes themselves: loader processes and others that they started are theirs to end."""
        self._signalled = True
        for process in self._running.values():
            process.send_signal(number)

    def kill(self) -> list[int]:
        """Gives the ranks that had to be killed."""
        self._signalled = True
        for process in self._running.values():
            _signal_session(process, signal.SIGKILL)
        return sorted(self._running)

    def failure(self) -> Failure | None:
        """The first that failed by itself; one that left in good order, or for the loss of another, only if no other failed."""
        failed = [(rank, code) for rank, code in self._ended if code]
        failed.sort(key=lambda item: CONSEQUENCES.index(item[1]) if item[1] in CONSEQUENCES else -1)
        return describe(*failed[0]) if failed else None


def _signal_session(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says the latter of zombies
        os.killpg(process.pid, number)


def variables(settings: Settings, port: int, attempt: int, local: int) -> dict[str, str]:
    """What torchrun tells a process in its environment."""
    numbers = {
        "RANK": settings.node * settings.processes + local,
        "LOCAL_RANK": local,
        "GROUP_RANK": settings.node,
        "WORLD_SIZE": settings.nodes * settings.processes,
        "LOCAL_WORLD_SIZE": settings.processes,
        "GROUP_WORLD_SIZE": settings.nodes,
        "MASTER_ADDR": settings.address,
        "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": attempt,
        "TORCHELASTIC_MAX_RESTARTS": settings.max_restarts,
        "TORCHELASTIC_RUN_ID": "run_dist_launch",
        "TORCHELASTIC_USE_AGENT_STORE": True,
    }
    return {name: str(value) for name, value in numbers.items()}


def describe(rank: int, code: int) -> Failure:
    if code == EXIT_PREEMPTED:
        return Failure(code, "the processes left to be started again (exit status 75)")
    if code == EXIT_INTERRUPTED:
        return Failure(code, "")  # the processes have said all
    if code == EXIT_LOST_PROCESS:
        return Failure(code, f"rank {rank} lost another process (exit status 76), see its message above; all others were ended")
    if code > 0:
        return Failure(code, f"rank {rank} failed with exit status {code}, see its message above; all others were ended")
    hint = " (by another process that says so above, or is the memory exhausted?)" if code == -signal.SIGKILL else ""
    return Failure(128 - code, f"rank {rank} was killed by {signal.Signals(-code).name}{hint}; all others were ended")


class Nodes:
    """The nodes of a job, which meet in a store that node 0 serves, and tell each other there how an attempt ends."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._id = uuid.uuid4().hex  # of this run of this program
        self._store: TCPStore | None = None
        self._beat = 0
        self._seen: dict[int, list[Any]] = {}
        self._missing = list(range(settings.nodes))
        self.ids: list[str] = []
        self.port = settings.port

    def join(self, wanted: int, signals: Signals) -> int:
        """Meet all nodes; gives the number of the attempt that they make now, at least `wanted`.

        Raises UnreachableError if a node does not come, UserError if node 0's port is taken, KeyboardInterrupt for a signal.
        """
        started, reason = time.monotonic(), ""
        self._seen, self._missing = {}, list(range(self._settings.nodes))
        while True:
            try:
                self._store = self._store or self._open_store()
                attempt = within(10, lambda: self._meet(wanted))
                if attempt is not None:
                    return attempt
            except UnreachableError as error:
                self._store, reason = (self._store if self._settings.node == 0 else None), f": {error}"
            if list(signals.new()):
                raise KeyboardInterrupt
            waited = time.monotonic() - started
            if self._settings.node == 0 and self._store is None and waited > BIND_SECONDS:
                raise UserError(f"node 0 can't serve the job's store{reason}; set MASTER_PORT to a port that is free there")
            if waited > self._settings.join_seconds:
                raise UnreachableError(self._who_is_missing(reason))
            time.sleep(0.2)

    def watch(self, attempt: int) -> Watch | None:
        """None for a single node, which has nobody to watch."""
        if self._settings.nodes == 1:
            return None
        assert self._store is not None
        return Watch(self._store.clone(), self._settings, attempt, self.ids)

    def _open_store(self) -> TCPStore:
        address, port = self._settings.address, self._settings.port
        master = self._settings.node == 0
        if not master:  # TCPStore would wait by itself, with pages of warnings
            try:
                socket.create_connection((address, port), timeout=5).close()
            except OSError as error:
                raise UnreachableError(f"node 0 does not answer at {address}:{port}: {error.strerror or error}") from None
        timeout = timedelta(seconds=30)
        store = within(40, lambda: TCPStore(address, port, is_master=master, wait_for_workers=False, timeout=timeout))
        self.port = store.port
        return store

    def _meet(self, wanted: int) -> int | None:
        """One look into the store; the attempt's number once all are there."""
        if self._settings.nodes == 1:
            return wanted
        assert self._store is not None
        self._beat += 1
        self._store.set(f"here {self._settings.node}", json.dumps([self._id, self._beat, wanted]))
        if self._settings.node == 0:
            self._call_the_start()
        if not self._store.check(["start"]):
            return None
        attempt, ids = json.loads(self._store.get("start"))
        if attempt < wanted or ids[self._settings.node] != self._id:
            return None  # that was another meeting
        self.ids = ids
        return attempt

    def _call_the_start(self) -> None:
        """Node 0: once every node has announced itself anew, and not just left a note in the store before it died."""
        assert self._store is not None
        for node in range(self._settings.nodes):
            if not self._store.check([f"here {node}"]):
                continue
            announced = json.loads(self._store.get(f"here {node}"))
            before = self._seen.setdefault(node, announced)
            if announced != before and node in self._missing:
                self._missing.remove(node)
                self._seen[node] = announced
        if not self._missing:
            attempt = max(wanted for _, _, wanted in self._seen.values())
            self._store.set("start", json.dumps([attempt, [self._seen[node][0] for node in range(self._settings.nodes)]]))

    def _who_is_missing(self, reason: str) -> str:
        within_time = f"within {self._settings.join_seconds:.0f} s (JOIN_SECONDS)"
        if self._settings.node:
            return f"node 0 did not call the start {within_time}{reason}"
        return f"node(s) {', '.join(map(str, self._missing))} did not come {within_time}{reason}"


class Watch(threading.Thread):
    """Looks every second whether another node has failed. A thread, as a store behind a dead network answers never."""

    def __init__(self, store: TCPStore, settings: Settings, attempt: int, ids: list[str]) -> None:
        super().__init__(daemon=True)
        self._store, self._settings, self._attempt, self._ids = store, settings, attempt, ids
        self.end: End | None = None
        self.closed = False
        self._own_end: End | None = None
        self._done = self._all_done = self._stopped = False
        self._wake, self._told = threading.Event(), threading.Event()
        self.start()

    def tell(self, end: End) -> End:
        """How this node ends; gives what counts, which is what the first node has told."""
        self._own_end = end
        self._wait_for_the_store()
        return self.end or end

    def finish(self, seconds: float, signals: Signals) -> End | None:
        """This node's part is done. Waits for the others, which need node 0's store, and this node if all start again."""
        self._done = True
        self._wait_for_the_store()
        deadline = time.monotonic() + seconds
        while not (self._all_done or self.end or self.closed or list(signals.new())) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return self.end

    def stop(self) -> None:
        self._stopped = True
        self._wake.set()
        self.join(2)

    def run(self) -> None:
        try:
            while not self._stopped:
                self._wake.wait(1)
                self._wake.clear()
                told, self._told = self._told, threading.Event()
                self._look()
                told.set()
        except RuntimeError:
            self.closed = True

    def _wait_for_the_store(self) -> None:
        told = self._told
        self._wake.set()
        for _ in range(20):
            if told.wait(POLL_SECONDS) or self.closed:
                return

    def _look(self) -> None:
        key = f"end of attempt {self._attempt}"
        if self._settings.node == 0 and not self._own_end:
            self._own_end = self._node_that_came_back()
        if self._own_end:
            self._store.compare_set(key, "", json.dumps(self._own_end))
        if self._store.check([key]):
            self.end = End(*json.loads(self._store.get(key)))
        if self._done:
            self._store.set(f"done {self._attempt} {self._settings.node}", "")
            self._all_done = self._store.check([f"done {self._attempt} {node}" for node in range(self._settings.nodes)])

    def _node_that_came_back(self) -> End | None:
        """A node where this program was started again: its processes of this attempt are lost."""
        for node, known in enumerate(self._ids):
            if json.loads(self._store.get(f"here {node}"))[0] != known:
                return End(node, EXIT_LOST_PROCESS, again=True)
        return None


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """The call's result. Raises UnreachableError if it fails or takes longer: the store may block for ever."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put((call(), None))
        except RuntimeError as error:
            answers.put((None, error))

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise UnreachableError(f"the store of node 0 did not answer for {seconds:.0f} s") from None
    if error is not None:
        raise UnreachableError(str(error).splitlines()[0]) from error
    return answer


class Attempt:
    """One run of all processes, from the start to the end of the last."""

    def __init__(self, settings: Settings, workers: Workers, watch: Watch | None, signals: Signals) -> None:
        self._settings, self._workers, self._watch, self._signals = settings, workers, watch, signals
        self._kill_at = float("inf")
        self._first_loss = float("inf")
        self._end: End | None = None

    def run(self) -> tuple[Failure | None, bool]:
        """How this node failed, if it did, and whether another attempt may do better."""
        while self._workers.poll():
            time.sleep(POLL_SECONDS)
            self._pass_signals_on()
            if self._end is None and (end := self._look_for_failure()):
                self._end = end
                self._end_processes()
            if time.monotonic() > self._kill_at:
                say(f"rank(s) {', '.join(map(str, self._workers.kill()))} did not leave in time and were killed")
                self._kill_at = float("inf")
        failure = self._failure()
        if self._end is None and failure:
            self._end = self._tell(failure)
        elif self._end is None and self._watch:
            self._end = self._watch.finish(self._settings.join_seconds, self._signals)
            failure = self._failure()
        return failure, bool(self._end and self._end.again and not self._signals.seen)

    def _pass_signals_on(self) -> None:
        for number, first in self._signals.new():
            if first:
                self._workers.send(number)
                self._kill_at = min(self._kill_at, time.monotonic() + self._settings.preempt_seconds)
            else:
                self._workers.kill()

    def _end_processes(self) -> None:
        """After a failure anywhere. Those that leave in good order do it together, and are only given some time."""
        assert self._end is not None
        if self._end.status == EXIT_PREEMPTED or self._signals.seen:
            self._kill_at = min(self._kill_at, time.monotonic() + self._settings.preempt_seconds)
        else:
            self._workers.send(signal.SIGTERM)
            self._kill_at = time.monotonic() + LEAVE_SECONDS

    def _look_for_failure(self) -> End | None:
        """Of this node, or told by another. Where a process has only lost another one, wait for that one's reason."""
        if self._watch and self._watch.end:
            return self._watch.end
        if self._watch and self._watch.closed:
            return End(0, EXIT_LOST_PROCESS, again=True)
        failure = self._workers.failure()
        if failure and failure.status == EXIT_LOST_PROCESS:
            self._first_loss = min(self._first_loss, time.monotonic())
            if time.monotonic() < self._first_loss + EXPLAIN_SECONDS:
                return None
        return self._tell(failure) if failure else None

    def _tell(self, failure: Failure) -> End:
        end = End(self._settings.node, failure.status, again=failure.status not in FINAL and not self._signals.seen)
        return self._watch.tell(end) if self._watch else end

    def _failure(self) -> Failure | None:
        """The reason of this node's end: its own, a signal, or another node, in this order."""
        own, seen = self._workers.failure(), self._signals.seen
        if own and own.status not in CONSEQUENCES:
            return own
        if own and own.status == EXIT_PREEMPTED and (seen or self._end is None or self._end.status == EXIT_PREEMPTED):
            return own  # else our own SIGTERM, after another node's failure, was the reason
        if seen and (own or self._workers.signalled_to_death):
            return Failure(128 + seen[0], f"ended by {signal.Signals(seen[0]).name}")
        if self._end and self._end.node != self._settings.node:
            told = f"node {self._end.node} failed, see its output; node {self._settings.node} was ended"
            return Failure(EXIT_LOST_PROCESS, told)
        return own


def main(settings: Settings, command: list[str]) -> int:
    """Run the node's processes, as often as need be; gives the exit status."""
    signals, nodes, number = Signals(), Nodes(settings), 0
    while True:
        try:
            number = nodes.join(number, signals)
        except UnreachableError as error:
            raise LostProcessError(str(error)) from error
        except KeyboardInterrupt:
            say(f"ended by {signal.Signals(signals.seen[0]).name} before the nodes had met")
            return EXIT_PREEMPTED if signals.seen[0] in ASK_TO_LEAVE else 128 + signals.seen[0]
        failure, again = run_once(settings, command, nodes, number, signals)
        if failure and failure.line:
            say(failure.line)
        if not again or number >= settings.max_restarts:
            if failure and settings.nodes > 1 and settings.node == 0:
                time.sleep(2.5)  # the store ends with this process: until all have read there why
            return failure.status if failure else 0
        number += 1
        say(f"starting again: attempt {number} of {settings.max_restarts}")


def run_once(
    settings: Settings, command: list[str], nodes: Nodes, number: int, signals: Signals
) -> tuple[Failure | None, bool]:
    """One attempt: how this node failed, and whether all start again."""
    watch = nodes.watch(number)
    try:
        return Attempt(settings, Workers(command, settings, nodes.port, number), watch, signals).run()
    finally:
        if watch:
            watch.stop()


def say(message: str) -> None:
    print("run_dist_launch.sh:", message, file=sys.stderr, flush=True)


def settings_from_environment(nodes: str, node: str, processes: str) -> Settings:
    environment = os.environ
    return Settings(
        int(nodes), int(node), int(processes),
        address=environment.get("MASTER_ADDR", "127.0.0.1"), port=int(environment.get("MASTER_PORT", 0)),
        max_restarts=int(environment.get("MAX_RESTARTS", 0)), preempt_seconds=float(environment.get("PREEMPT_SECONDS", 120)),
        join_seconds=float(environment.get("JOIN_SECONDS", 1800)),
    )  # fmt: skip


if __name__ == "__main__":
    try:
        sys.exit(main(settings_from_environment(*sys.argv[1:4]), sys.argv[4:]))
    except UserError as error:
        say(str(error))
        sys.exit(error.exit_code)
