"""--finetune: the weights of a trained detector as the start of another run.

Everything but the class heads must fit. A row of a class head goes where the class of its name is
now; classes that the checkpoint did not know start as in any new detector, and so do heads and
queries that somebody removed from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.weights.architecture import HEADS
from models.weights.load import choose_weights
from util.checkpoint import BATCHFORMER, LoadReport, load_state
from util.class_map import ClassMap, classes_of
from util.config import Config

FLAG = "--finetune"
_CLASS_HEAD = re.compile(r"class_embed\.(\d+)\.(weight|bias)")
_REMOVABLE = {**dict(zip(HEADS, ("class heads", "box heads"), strict=True)), "query_embed.": "queries"}
_OBJECT = 0  # in two-stage the encoder's head is trained on this row alone: is there an object?


@dataclass(frozen=True)
class FineTuned:
    """What a run starts with.

    report: the tensors; weights: "model" or "ema", the averaged ones; classes: the run's; known:
    the checkpoint's, None if it does not say; rows: rows of the class heads -> those of the
    checkpoint that were copied.
    """

    report: LoadReport
    weights: str
    classes: ClassMap
    known: ClassMap | None
    rows: Mapping[int, int]

    def __str__(self) -> str:
        return "\n".join([self._weights(), self._classes(), *self._removed(), *self.report.batchformer()])

    def _weights(self) -> str:
        kind = "averaged weights, " if self.weights == "ema" else ""
        return f"fine-tuning from {self.report.source}: {kind}{len(self.report.loaded)} tensors loaded"

    def _classes(self) -> str:
        total = len(self.classes.categories)
        if any(name.startswith("class_embed.") for name in self.report.missing):
            return f"class heads: made anew, for {total} classes; the checkpoint has none"
        if self.known is None:
            how = "taken as they are" if self.rows else f"made anew, for {total} classes"
            return f"class heads: {how}; the checkpoint does not name its classes"
        copied = {label: name for label, name in self.classes.names.items() if label in self.rows}
        new = [name for label, name in self.classes.names.items() if label not in copied]
        skipped = [name for label, name in self.known.names.items() if label not in self.rows.values()]
        parts = [f"{len(copied)} of {total} classes copied by name{_listed(copied.values())}"]
        parts += [f"made anew{_listed(new)}"] if new else []
        parts += [f"{len(skipped)} of the checkpoint skipped{_listed(skipped)}"] if skipped else []
        return f"class heads: {'; '.join(parts)}"

    def _removed(self) -> list[str]:
        others = {part: what for part, what in _REMOVABLE.items() if part != "class_embed."}
        lacking = [
            what
            for part, what in others.items()
            if any(name.startswith(part) for name in self.report.missing)
        ]
        return [f"{' and '.join(lacking)}: made anew; the checkpoint has none"] if lacking else []


def fine_tune(
    model: nn.Module,
    config: Config,
    classes: ClassMap,
    checkpoint: Mapping[str, Any],
    source: str,
    flag: str = FLAG,
    weights: str = "auto",
) -> FineTuned:
    """Load the weights of a checkpoint into `model`, whose class heads are for `classes`.

    Args:
        config: the model's, made for this checkpoint (models/weights/architecture.py).
        checkpoint, source: what `read_trained` gives for the file, and the file, which `flag`
            named.
        weights: see `choose_weights`.

    Raises:
        UserError: the checkpoint is of another detector.
    """
    state, which = choose_weights(checkpoint, source, flag, weights)
    known = classes_of({**checkpoint, "model": state}, f"{flag} {source}")
    rows = matching_rows(known, len(state.get("class_embed.0.weight", ())), classes)
    heads = _class_heads(model, state, rows, config)
    report = load_state(model, {"model": state | heads}, source, flag)
    removed = tuple(part for part in _REMOVABLE if not any(name.startswith(part) for name in state))
    report.require_same_architecture(may_lack=(BATCHFORMER, *removed))
    return FineTuned(report, which, classes, known, rows)


def matching_rows(known: ClassMap | None, num_known: int, classes: ClassMap) -> dict[int, int]:
    """Row of a class head now -> row of the checkpoint's `num_known` to copy. Labels without a
    class go with their like.

    Names are compared without regard to case, spaces, hyphens and underscores. If nobody knows the
    checkpoint's, heads of as many rows are taken as they are.
    """
    if known is None:
        return (
            {label: label for label in range(classes.num_classes)} if num_known == classes.num_classes else {}
        )
    by_name = {_plain(name): label for label, name in reversed(known.names.items())}
    unused = (set(range(classes.num_classes)) - classes.names.keys()) & (
        set(range(num_known)) - known.names.keys()
    )
    rows = {label: by_name[_plain(name)] for label, name in classes.names.items() if _plain(name) in by_name}
    return rows | {label: label for label in unused}


def _class_heads(
    model: nn.Module, state: Mapping[str, Tensor], rows: Mapping[int, int], config: Config
) -> dict[str, Tensor]:
    """The model's class heads with the rows that can be copied."""
    heads = {}
    for name, tensor in model.state_dict().items():
        match = _CLASS_HEAD.fullmatch(name)
        if not match or name not in state:
            continue
        there = state[name]
        of_proposals = config.transformer.two_stage and int(match[1]) == config.transformer.dec_layers
        copied = _proposal_rows(len(tensor), len(there)) if of_proposals else rows
        heads[name] = tensor.clone()
        if copied:
            here, origin = torch.tensor(list(copied.items())).T
            heads[name][here] = there[origin].to(tensor.dtype)
    return heads


def _proposal_rows(num_rows: int, num_known: int) -> dict[int, int]:
    """All rows but that of objects are trained as background, whatever their class: they stay in
    their order.
    """
    return {row: row for row in range(_OBJECT, min(num_rows, num_known))}


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()


def _listed(names: Iterable[str], most: int = 12) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f": {', '.join(names[:most])}{more}" if names else ""
