"""Which part of a piece of work is under way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


class Parts:
    """The part that is under way. Within another, a part counts for itself alone."""

    def __init__(self) -> None:
        self._names: list[str] = []

    @property
    def current(self) -> str:
        return self._names[-1]

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._begin(name)
        yield
        self._end()

    def follow(self, module: nn.Module, name: str) -> None:
        """Every call of the module is of this part."""
        module.register_forward_pre_hook(lambda *_: self._begin(name))
        module.register_forward_hook(lambda *_: self._end())

    def changing(self) -> None:
        """Called before another part becomes the current one."""

    def _begin(self, name: str) -> None:
        self.changing()
        self._names.append(name)

    def _end(self) -> None:
        self.changing()
        self._names.pop()
