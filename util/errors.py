"""How the program ends: mistakes that the user can mend, and the exit codes that launchers and
schedulers see.

| code | meaning |
|---|---|
| 0 | done |
| 2 | a mistake in flags, files or data, told in one line |
| 74 | checkpoints can't be written any more; the earlier ones are intact |
| 75 | a signal asked to leave: all is saved, start again with --resume auto |
| 76 | another process died, hung or can't be reached; start again with --resume auto |
| 130 | interrupted from the keyboard; a training run has saved first, as with 75 |
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

# what schedulers, launchers and a closed terminal send; main.py saves and leaves
# (util/run/stop.py)
ASK_TO_LEAVE = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
EXIT_USER_ERROR = 2
EXIT_NOT_SAVED = 74  # EX_IOERR of sysexits.h
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: the same command again goes on
EXIT_LOST_PROCESS = 76  # EX_PROTOCOL: the other side failed
EXIT_INTERRUPTED = 130


class UserError(ValueError):
    """A mistake in flags, files or data. Its message is one line that names the culprit and the
    remedy.
    """

    exit_code = EXIT_USER_ERROR


class NotSavedError(UserError):
    """Checkpoints can't be written."""

    exit_code = EXIT_NOT_SAVED


class LostProcessError(UserError):
    """Another process of the job is dead, hung or out of reach."""

    exit_code = EXIT_LOST_PROCESS


class Preempted(BaseException):
    """A signal asked the program to leave, and it is ready to. No Exception, so that nobody takes
    it for a failure.

    signal: the name of the signal; "" if another process got it, and after Ctrl-C.
    """

    def __init__(self, message: str, exit_code: int = EXIT_PREEMPTED, signal: str = "") -> None:
        super().__init__(message)
        self.exit_code, self.signal = exit_code, signal


def run_as_command(command: Callable[[], object]) -> None:
    """Run `command`; an end that is no success costs one line on stderr, without a traceback, and
    its exit code.
    """
    try:
        command()
    except UserError as error:
        _leave(f"error: {error}", error.exit_code)
    except Preempted as reason:
        _leave(
            str(reason), reason.exit_code, silent=os.environ.get("RANK", "0") != "0"
        )  # the same for all processes
    except KeyboardInterrupt:
        _leave("interrupted", EXIT_INTERRUPTED)
    finally:
        _give_up_lost_output()


def _leave(message: str, code: int, silent: bool = False) -> None:
    _write_error_file(message, code)
    if not silent:
        sys.stderr.write(
            f"{message}\n"
        )  # print() writes the end of the line by itself, between the words of other processes
        sys.stderr.flush()
    sys.exit(code)


def _write_error_file(message: str, code: int) -> None:
    """Tell PyTorch's elastic launcher (torchrun) how this process ends, in the format of its error
    files.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        reason = {"message": message, "errorCode": code, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": reason}))


def _give_up_lost_output() -> None:
    """What could not be printed, to a full disk say, must not make Python's own end a failure."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
