"""Being asked to leave: by a scheduler that needs the machine, or because the time is over.

SIGTERM, SIGUSR1 and SIGUSR2 ask. In the training loop the request is noted, all processes agree on the step after which they stop
(any of them may have been asked), the state is saved, and `Preempted` ends the program with exit code 75. Everywhere else
the newest checkpoint holds everything already, and the program leaves at once.
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

from util.distributed import world_size
from util.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
NOTHING_LOST = "nothing that is not in the newest checkpoint was lost"


class StopRequest:
    """What the signals have asked for. `signal` is the first one's name, "" without."""

    def __init__(self) -> None:
        self.signal = ""
        self._deferred = 0

    @contextmanager
    def installed(self) -> Iterator[StopRequest]:
        """Listen to the signals for the length of the block; after a request they are ignored, to leave undisturbed."""
        if threading.current_thread() is not threading.main_thread():  # the only one that may listen
            yield self
            return
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if self.signal else handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block a request is only noted; whoever runs there asks `agreed`, saves and leaves.

        Who comes to the end has saved everything. A request since the last vote is followed there, as one a moment later would
        be: without a vote, as the other processes have nothing to save either.
        """
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
        if self.signal and not self._deferred:
            self.leave(NOTHING_LOST)

    def leave(self, saved: str) -> NoReturn:
        """Raise Preempted; `saved` says what is on the disk."""
        who = self.signal or "a signal to another process"
        raise Preempted(f"asked to leave by {who}; {saved}; start again with --resume auto")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal:  # is leaving already, or about to
            return
        self.signal = signal.Signals(number).name
        if not self._deferred:
            self.leave(NOTHING_LOST)


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
        votes = torch.tensor([1.0 if self._request.signal else 0.0])
        self._running = dist.all_reduce(votes, async_op=True), votes
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
        return bool(votes.item())
