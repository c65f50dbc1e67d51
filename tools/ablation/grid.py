"""Variants of a training from a grid over main.py's flags.

`bf=0,1 insert_idx=0,2` is every combination. `mixed: bf=1 insert_idx=0+2` is one variant with a name; `+`
joins the values of one flag.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from util.config import FLAGS
from util.errors import UserError

# the ablation sets these itself
OWN_FLAGS = ("seed", "output_dir", "resume", "save_predictions", "eval")
_BATCHFORMER = {name for name, flag in FLAGS.items() if flag.group == "batchformer"}


@dataclass(frozen=True)
class Variant:
    """A name, which is a folder too, and the words that it adds to the command of a run.

    off: switches that must not be on. No word says that, so the command must not set them either.
    """

    name: str
    words: tuple[str, ...]
    off: tuple[str, ...] = ()


def read_grid(grids: Sequence[str]) -> list[Variant]:
    """The variants of all grids, in order. Each grid is a text, or a file with a text on each line.

    Combinations that are the same run occur once: with bf=0 the other flags of BatchFormerV2 have
    no effect. Raises UserError.
    """
    lines = []
    for grid in grids:
        if "=" in grid:
            lines.append(grid)
        elif Path(grid).is_file():
            lines += [line.partition("#")[0].strip() for line in Path(grid).read_text().splitlines()]
        else:
            raise UserError(
                f"--grid {grid}: there is no such file, and a grid is <flag>=<values>, as in bf=0,1"
            )
    variants: dict[tuple[str, ...], Variant] = {}
    for text in filter(None, lines):
        for variant in _variants_of(text):
            known = variants.setdefault((*variant.words, *variant.off), variant)
            # a name that somebody gave must not be lost
            if known.name != variant.name and ":" in text:
                raise UserError(f"--grid: {variant.name} and {known.name} are the same run; leave one out")
    # names are folders
    names = [variant.name for variant in variants.values()]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--grid: two different variants are named {name}")
    if len(variants) < 2:
        raise UserError("--grid must give two variants or more, for example --grid bf=0,1")
    return list(variants.values())


def _variants_of(text: str) -> list[Variant]:
    # a name before the first flag
    given, colon, rest = text.partition(":")
    name = ""
    if colon and "=" not in given:
        name, text = given.strip(), rest
        if not re.fullmatch(r"[\w.+-]+", name):
            raise UserError(f"--grid: {name!r} must be letters, digits, and . + - _: it names a folder")
    # every combination of the flags' values
    choices = [_choices_of(item) for item in text.split()]
    combinations = [dict(one) for one in itertools.product(*choices)]
    if any(len(one) < len(choices) for one in combinations):
        raise UserError(f"--grid: {text.strip()!r} names a flag twice; give its values as in bf=0,1")
    if name and len(combinations) != 1:
        raise UserError(f"--grid: {name} names {len(combinations)} variants; give each a line of its own")
    return [_variant(name, values) for values in combinations]


def _choices_of(item: str) -> list[tuple[str, tuple[str, ...]]]:
    """bf=0,1 -> [("bf", ("0",)), ("bf", ("1",))]."""
    words, equals, text = item.partition("=")
    flag_name = words.removeprefix("--").replace("-", "_")
    if flag_name in OWN_FLAGS:
        raise UserError(f"--grid: {flag_name} is set by the ablation itself; leave it out")
    if not equals or flag_name not in FLAGS:
        near = difflib.get_close_matches(flag_name, FLAGS, 1)
        hint = f"; did you mean {near[0]}=...?" if near else ""
        raise UserError(f"--grid: {item!r} must be <flag of main.py>=<values>, as in bf=0,1{hint}")
    choices = [(flag_name, tuple(value.split("+"))) for value in text.split(",")]
    for _, values in choices:
        if len(values) > 1 and not isinstance(FLAGS[flag_name].default, list | tuple):
            raise UserError(f"--grid: {flag_name} takes one value, not {' and '.join(values)}")
        for value in values:
            _check(flag_name, value)
    return choices


def _check(name: str, text: str) -> None:
    """Raises UserError for a value that main.py would refuse hours later."""
    flag = FLAGS[name]
    if isinstance(flag.default, bool):
        if text not in ("0", "1"):
            raise UserError(f"--grid: {name} is a switch, so its values are 0 and 1, not {text!r}")
        return
    try:
        value = flag.parse(text)
    except (TypeError, ValueError):
        raise UserError(f"--grid: {name}={text!r} is no {flag.parse.__name__}") from None
    if flag.choices and value not in flag.choices:
        raise UserError(f"--grid: {name}={text} must be one of {flag.choices}")
    if isinstance(value, int | float) and not flag.in_range(value):
        raise UserError(f"--grid: {name}={text} must be {flag.range}")


def _variant(name: str, values: dict[str, tuple[str, ...]]) -> Variant:
    # what has no effect is no part of the variant
    if values.get("bf") == ("0",):
        values = {flag: value for flag, value in values.items() if flag == "bf" or flag not in _BATCHFORMER}
    # switches have no value on a command line
    words: list[str] = []
    off = []
    for flag, value in values.items():
        if not isinstance(FLAGS[flag].default, bool):
            words += [f"--{flag}", *value]
        elif value == ("1",):
            words.append(f"--{flag}")
        else:
            off.append(flag)
    shown = "_".join(f"{flag}{'+'.join(value)}" for flag, value in values.items())
    return Variant(name or re.sub(r"[^\w.+-]", "-", shown), tuple(words), tuple(off))
