"""Requests to stop: from a scheduler that needs the machine, at a time limit, or from the keyboard.

SIGTERM, SIGUSR1, SIGUSR2, SIGHUP (a closed terminal) and SIGINT (Ctrl-C) are requests. In the
training loop a request is only noted: all processes agree on the step after which they stop (any of
them may have got a signal), the state is saved, and `Preempted` ends the program with exit code 75,
or 130 after Ctrl-C. Everywhere else nothing needs saving, and the program exits at once. A second
Ctrl-C ends the process immediately.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import torch
import torch.distributed as dist

from util.distributed.processes import world_size
from util.errors import EXIT_INTERRUPTED, SIGNALS, Preempted


class StopRequest:
    """The requests so far.

    signal: the name of the first signal, or "". interrupted: by Ctrl-C, here or in another process.
    saved: what the last line says about the state if the program exits where nothing needs saving.
    """

    def __init__(self, saved: str) -> None:
        self.signal, self.interrupted = "", False
        self.saved = saved
        self._deferred = 0  # blocks may be nested

    @contextmanager
    def installed(self) -> Iterator[StopRequest]:
        """Handle the signals for the length of the block. After a request all of them but Ctrl-C
        are ignored, so that nothing disturbs the exit.
        """
        # only the main thread may set handlers
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {}
        for number in SIGNALS:
            # a shell makes background commands ignore Ctrl-C, and nohup a closed terminal: keep that
            ignored = signal.getsignal(number) == signal.SIG_IGN
            if not (ignored and number in (signal.SIGINT, signal.SIGHUP)):
                before[number] = signal.signal(number, self._handle)
        try:
            yield self
        finally:
            # a scheduler and a launcher may both ask: the second one must not disturb the exit
            for number, handler in before.items():
                if not self.signal:
                    signal.signal(number, handler)
                else:
                    signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """In the block a request is only noted: the code in it calls `agreed`, saves and leaves.

        At its end everything is saved. A request since the last vote is then followed without
        another vote, because the other processes have nothing to save either.
        """
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
        if self.signal and not self._deferred:
            self.leave(self.saved)

    def leave(self, saved: str) -> NoReturn:
        """Raise Preempted; `saved` says what is on the disk, and how to resume."""
        # a launcher must see the difference between a person and a scheduler
        if self.interrupted:
            raise Preempted(f"interrupted; {saved}", EXIT_INTERRUPTED)
        asked_by = self.signal or "a signal to another process"
        raise Preempted(f"stopped by {asked_by}; {saved}", signal=self.signal)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            # the next Ctrl-C ends the process, even in an exchange that hangs
            signal.signal(number, signal.SIG_DFL)
        if self.signal:  # it is about to exit already
            return
        self.signal, self.interrupted = signal.Signals(number).name, number == signal.SIGINT
        if not self._deferred:
            self.leave(self.saved)


class StopVote:
    """Whether any process has a request. All processes get the same answer in the same step.

    The votes of a step are added up during the next step, so no process waits for them.
    """

    def __init__(self, request: StopRequest) -> None:
        self._request = request
        self._running: tuple[dist.Work, torch.Tensor] | None = None

    def agreed(self) -> bool:
        """Whether to stop, by the votes of the step before. Every process must call it every step."""
        if world_size() == 1:
            return bool(self._request.signal)
        # the maximum of the votes: 2 Ctrl-C, 1 another signal, 0 no request
        stop = self._result()
        vote = 2.0 if self._request.interrupted else float(bool(self._request.signal))
        votes = torch.tensor([vote])
        self._running = dist.all_reduce(votes, dist.ReduceOp.MAX, async_op=True), votes
        return stop

    def agreed_now(self) -> bool:
        """Like `agreed`, but waits for the votes of this moment."""
        earlier = self.agreed()
        return self._result() or earlier

    def _result(self) -> bool:
        if self._running is None:
            return False
        work, votes = self._running
        self._running = None
        work.wait()
        self._request.interrupted |= votes.item() == 2
        return votes.item() > 0
