"""How the program ends: mistakes that a user can correct, and the exit codes that launchers and
schedulers get.

| code | meaning |
|---|---|
| 0 | done |
| 2 | a mistake in flags, files or data, described in one line |
| 74 | checkpoints can't be written any more; the earlier ones are intact |
| 75 | a signal stopped the run: all is saved, start again with --resume auto |
| 76 | another process died, hangs or can't be reached; start again with --resume auto |
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
from typing import NoReturn, TypeVar

T = TypeVar("T")

# sent by schedulers, launchers and a closed terminal; main.py saves and leaves (util/run/stop.py)
ASK_TO_LEAVE = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
SIGNALS = (*ASK_TO_LEAVE, signal.SIGINT)
EXIT_USER_ERROR = 2
EXIT_NOT_SAVED = 74  # EX_IOERR of sysexits.h
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: the same command again resumes
EXIT_LOST_PROCESS = 76  # EX_PROTOCOL: the other side failed
EXIT_INTERRUPTED = 130


class UserError(ValueError):
    """A mistake in flags, files or data. Its message is one line with the culprit and the remedy."""

    exit_code = EXIT_USER_ERROR


class NotSavedError(UserError):
    """Checkpoints can't be written."""

    exit_code = EXIT_NOT_SAVED


class LostProcessError(UserError):
    """Another process of the job is dead, hangs or can't be reached."""

    exit_code = EXIT_LOST_PROCESS


class Preempted(BaseException):
    """A signal asked the program to leave, and all is saved. It is no Exception, so that code that
    handles failures does not catch it.

    signal: the name of the signal; "" if another process got it, and after Ctrl-C.
    """

    def __init__(self, message: str, exit_code: int = EXIT_PREEMPTED, signal: str = "") -> None:
        super().__init__(message)
        self.exit_code, self.signal = exit_code, signal


def run_as_command(command: Callable[[], T]) -> T:
    """Run `command` and return its value.

    A UserError, a request to exit and Ctrl-C end the program with one line on stderr, without a
    traceback, and with their exit code.
    """
    try:
        return command()
    except UserError as error:
        _leave(f"error: {error}", error.exit_code)
    except Preempted as reason:
        # the line is the same for all processes
        _leave(str(reason), reason.exit_code, silent=os.environ.get("RANK", "0") != "0")
    except KeyboardInterrupt:
        _leave("interrupted", EXIT_INTERRUPTED)
    finally:
        # output that can't be written, to a full disk for example, must not fail at Python's end
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave(message: str, code: int, silent: bool = False) -> NoReturn:
    # PyTorch's elastic launcher (torchrun) reads how a process ends from this file
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        reason = {"message": message, "errorCode": code, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": reason}))
    if not silent:
        # a bar of progress may be on this line
        clear = "\r\033[K" if sys.stderr.isatty() else ""
        # print() would write the line's end separately, between the words of other processes
        sys.stderr.write(f"{clear}{message}\n")
        sys.stderr.flush()
    sys.exit(code)
