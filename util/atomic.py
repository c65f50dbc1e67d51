"""Files that are replaced as a whole: a crash leaves the old file or the new one, never a part."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A temporary path to write to. At the end of the block it takes the place of `path`.

    After an error nothing of the attempt is left. Raises OSError.
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        os.replace(temporary, path)
        # the new name must survive a loss of power, where the file system can do that
        with contextlib.suppress(OSError):
            handle = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """Write a whole text file in UTF-8. Raises OSError."""
    with (
        written_aside(path) as temporary,
        open(temporary, "w", encoding="utf-8", errors="replace") as file,
    ):
        file.write(text)
        file.flush()
        # before the rename: after a power failure the name must not lead to an empty file
        os.fsync(file.fileno())


def temporary_name(path: Path) -> Path:
    """Where `path` is prepared. A process that is killed meanwhile leaves this file behind."""
    # hidden, so that no pattern for checkpoints matches it
    return path.with_name(f".{path.name}.tmp")
