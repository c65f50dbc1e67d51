"""What is known about a flag, and the field that says it."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# docs/flags.md prints this
ROLES = {
    "architecture": "which detector it is. A checkpoint decides, and refuses another value.",
    "model": "losses, dropout, starting weights. With `--eval` a checkpoint decides what is not given.",
    "evaluation": "image sizes, thresholds of panoptic maps. With `--eval` a checkpoint decides what is "
    "not given.",
    "training": "the course of a training. `--eval` ignores it.",
    "data": "the data, and how they are read.",
    "run": "the process and its files.",
}


@dataclass(frozen=True)
class Flag:
    """A flag of main.py.

    name, group: the field, and the field of Config that it is in.
    parse: makes a value, or one of several values, of the text on the command line.
    of: its role, one of `ROLES`.
    free_on_resume: may change when a run resumes, because it does not change what is learned.
    placeholder: of the value, in --help.
    above, below: limits of a number, or of each of several. Without `above` it is at least 0.
    in_tools: tools that load a checkpoint have it too, because weights alone do not show it.
    repeat: `--x 1 --x 2` is possible besides `--x 1 2`.
    refused: why only the default is accepted. --help does not list such a flag.
    """

    name: str
    group: str
    parse: Callable[[str], Any]
    default: Any
    help: str
    of: str
    free_on_resume: bool
    placeholder: str
    choices: tuple[Any, ...] | None = None
    above: float | None = None
    below: float = math.inf
    in_tools: bool = False
    repeat: bool = False
    refused: str = ""

    @property
    def range(self) -> str:
        """The limits in words."""
        # no flag accepts negative numbers
        limits = "at least 0" if self.above is None else f"above {self.above}"
        if self.below < math.inf:
            limits += f" and below {self.below}"
        return limits

    def in_range(self, number: float) -> bool:
        enough = number >= 0 if self.above is None else number > self.above
        return enough and number < self.below


def flag(default: Any, help: str, placeholder: str = "", **properties: Any) -> Any:
    """A dataclass field that is a flag; `properties` are those of `Flag`."""
    metadata = {"help": help, "placeholder": placeholder, **properties}
    return dataclasses.field(default=default, metadata=metadata)


def table_of(groups: Mapping[str, Any]) -> dict[str, Flag]:
    """Flag name -> flag, for the fields of these dataclasses.

    `of` and `free_on_resume` of a dataclass are for all its flags that say nothing else.
    """
    # annotations are texts: `from __future__ import annotations`
    table = {}
    for group, fields in groups.items():
        types = typing.get_type_hints(fields)
        for field in dataclasses.fields(fields):
            name, kind = field.name, types[field.name]
            properties: dict[str, Any] = {
                # tuple[int, ...] is several values of int
                "parse": (typing.get_args(kind) or (kind,))[0],
                "of": fields.of,
                "free_on_resume": getattr(fields, "free_on_resume", False),
                **field.metadata,
            }
            # lr_backbone_names -> NAMES
            properties["placeholder"] = properties["placeholder"] or name.split("_")[-1].upper()
            table[name] = Flag(name, group, default=field.default, **properties)
    return table
