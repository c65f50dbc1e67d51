"""Being asked to leave: by a scheduler that needs the machine, because the time is over, or from
the keyboard.

SIGTERM, SIGUSR1, SIGUSR2, SIGHUP (a closed terminal) and SIGINT (Ctrl-C) ask. In the training loop
the request is noted, all processes agree on the step after which they stop (any of them may have
been asked), the state is saved, and `Preempted` ends the program: with exit code 75, or 130 after
Ctrl-C. Everywhere else nothing is left to save, and the program leaves at once. A second Ctrl-C
waits for nothing.
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
from util.errors import ASK_TO_LEAVE, EXIT_INTERRUPTED, Preempted

SIGNALS = (*ASK_TO_LEAVE, signal.SIGINT)


class StopRequest:
    """What the signals have asked for. `signal` is the first one's name, "" without; `interrupted`:
    Ctrl-C, here or elsewhere.

    saved: what to say of the state when the program leaves where nothing is left to save.
    """

    def __init__(self, saved: str) -> None:
        self.signal, self.interrupted = "", False
        self.saved = saved
        self._deferred = 0

    @contextmanager
    def installed(self) -> Iterator[StopRequest]:
        """Listen to the signals for the length of the block; after a request all but Ctrl-C are
        ignored, to leave undisturbed.
        """
        # the only one that may listen
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        # a shell lets what it runs in the background ignore Ctrl-C, and nohup lets it ignore a
        # closed terminal
        may_be_ignored = (signal.SIGINT, signal.SIGHUP)
        wanted = [n for n in SIGNALS if n not in may_be_ignored or signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._handle) for number in wanted}
        try:
            yield self
        finally:
            for number, handler in before.items():
                after_request = signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN
                signal.signal(number, after_request if self.signal else handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block a request is only noted; whoever runs there asks `agreed`, saves and
        leaves.

        Who comes to the end has saved everything. A request since the last vote is followed there,
        as one a moment later would be: without a vote, as the other processes have nothing to save
        either.
        """
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
        if self.signal and not self._deferred:
            self.leave(self.saved)

    def leave(self, saved: str) -> NoReturn:
        """Raise Preempted; `saved` says what is on the disk, and how to go on."""
        if self.interrupted:
            raise Preempted(f"interrupted; {saved}", EXIT_INTERRUPTED)
        raise Preempted(
            f"asked to leave by {self.signal or 'a signal to another process'}; {saved}", signal=self.signal
        )

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(
                number, signal.SIG_DFL
            )  # even where Python is not asked, in an exchange that hangs, say
        if self.signal:  # is leaving already, or about to
            return
        self.signal, self.interrupted = signal.Signals(number).name, number == signal.SIGINT
        if not self._deferred:
            self.leave(self.saved)


class StopVote:
    """Whether any process has been asked to leave; all get the same answer in the same step.

    The votes of a step are counted while the next one runs, so nobody waits for them.
    """

    def __init__(self, request: StopRequest) -> None:
        self._request = request
        self._running: tuple[dist.Work, torch.Tensor] | None = None

    def agreed(self) -> bool:
        """To be called once a step by every process."""
        if world_size() == 1:
            return bool(self._request.signal)
        stop = self._result()
        vote = 2.0 if self._request.interrupted else 1.0 if self._request.signal else 0.0
        votes = torch.tensor([vote])
        self._running = dist.all_reduce(votes, dist.ReduceOp.MAX, async_op=True), votes
        return stop

    def agreed_now(self) -> bool:
        """The same, waiting for the votes of this very moment."""
        earlier = self.agreed()
        return self._result() or earlier if world_size() > 1 else earlier

    def _result(self) -> bool:
        if self._running is None:
            return False
        work, votes = self._running
        self._running = None
        work.wait()
        self._request.interrupted |= votes.item() == 2
        return votes.item() > 0
