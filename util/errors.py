"""The one exception for mistakes that the user can mend."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake in flags, files or data. Its message is one line that names the culprit and the remedy."""


def run_as_command(command: Callable[[], object]) -> None:
    """Run `command`; a UserError ends the process with its one line on stderr and exit code 2, without a traceback."""
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
