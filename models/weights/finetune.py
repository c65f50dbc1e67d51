"""--finetune: start a run from the weights of a trained detector.

Everything but the class heads must fit. The row of each class is copied from the checkpoint's class
of the same name. Classes that the checkpoint does not have are initialised as in a new detector;
so are heads and queries that were removed from the checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from models.weights.load import choose_weights
from util.checkpoint import BATCHFORMER, LoadReport, load_state
from util.class_map import ClassMap, classes_of
from util.config import Config

FLAG = "--finetune"
_CLASS_HEAD = re.compile(r"class_embed\.(\d+)\.(weight|bias)")
# what may be missing in a checkpoint: how the names of its tensors begin, what it is
_REMOVABLE = {"class_embed.": "class heads", "bbox_embed.": "box heads", "query_embed.": "queries"}


@dataclass(frozen=True)
class FineTuned:
    """What a run starts with, for the log.

    report: the tensors. weights: "model" or "ema", the averaged ones. classes: the run's. known:
    the checkpoint's classes, None if it does not say. rows: row of the class heads -> the
    checkpoint's row that was copied.
    """

    report: LoadReport
    weights: str
    classes: ClassMap
    known: ClassMap | None
    rows: Mapping[int, int]

    def __str__(self) -> str:
        # the weights
        kind = "averaged weights, " if self.weights == "ema" else ""
        count = len(self.report.loaded)
        lines = [f"fine-tuning from {self.report.source}: {kind}{count} tensors loaded"]

        # the class heads, and what else the checkpoint does not have
        missing = [what for part, what in _REMOVABLE.items() if _has(self.report.missing, part)]
        if "class heads" not in missing:
            lines.append(f"class heads: {self._classes()}")
        if missing:
            lines.append(f"{', '.join(missing)}: initialised; the checkpoint has none")
        return "\n".join([*lines, *self.report.batchformer()])

    def _classes(self) -> str:
        total = len(self.classes.categories)
        if self.known is None:
            how = "copied as they are" if self.rows else f"initialised, for {total} classes"
            return f"{how}; the checkpoint does not name its classes"

        copied, new = [], []
        for label, name in self.classes.names.items():
            if label in self.rows:
                copied.append(name)
            else:
                new.append(name)
        skipped = [name for label, name in self.known.names.items() if label not in self.rows.values()]
        said = f"{len(copied)} of {total} classes copied by name{_listed(copied)}"
        if new:
            said += f"; initialised{_listed(new)}"
        if skipped:
            said += f"; {len(skipped)} of the checkpoint skipped{_listed(skipped)}"
        return said


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
    # which row of the class heads is which
    state, which = choose_weights(checkpoint, source, flag, weights)
    known = classes_of({**checkpoint, "model": state}, f"{flag} {source}")
    rows = matching_rows(known, len(state.get("class_embed.0.weight", ())), classes)

    # in two-stage the encoder's head comes after those of the decoder layers
    encoder_head = config.transformer.dec_layers if config.transformer.two_stage else None
    heads = _class_heads(model.state_dict(), state, rows, encoder_head)
    report = load_state(model, {"model": state | heads}, source, flag)
    removed = tuple(part for part in _REMOVABLE if not _has(state, part))
    report.require_same_architecture(may_lack=(BATCHFORMER, *removed))
    return FineTuned(report, which, classes, known, rows)


def matching_rows(known: ClassMap | None, num_known: int, classes: ClassMap) -> dict[int, int]:
    """Row of a class head -> row of the checkpoint's `num_known` to copy.

    Names are compared without regard to case, spaces, hyphens and underscores. Rows that belong to
    no class in both heads are copied, too. If the checkpoint does not name its classes, heads of
    the same number of rows are copied as they are.
    """
    if known is None:
        if num_known != classes.num_classes:
            return {}
        return {label: label for label in range(num_known)}

    by_name = {_plain(name): label for label, name in reversed(known.names.items())}
    rows = {label: by_name[_plain(name)] for label, name in classes.names.items() if _plain(name) in by_name}
    for label in range(min(num_known, classes.num_classes)):
        if label not in classes.names and label not in known.names:
            rows[label] = label
    return rows


def _class_heads(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], rows: Mapping[int, int], encoder_head: int | None
) -> dict[str, Tensor]:
    """The class heads among the tensors `own`, with the rows that can be copied from `state`."""
    heads = {}
    for name, tensor in own.items():
        match = _CLASS_HEAD.fullmatch(name)
        if not match or name not in state:
            continue
        there = state[name]
        copied = rows
        if int(match[1]) == encoder_head:
            # Of its rows only the first is trained, as "object"; all others learn background,
            # whatever their class. So they keep their order.
            copied = {row: row for row in range(min(len(tensor), len(there)))}
        heads[name] = tensor.clone()
        for row, origin in copied.items():
            heads[name][row] = there[origin]
    return heads


def _has(names: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()


def _listed(names: list[str], most: int = 12) -> str:
    if not names:
        return ""
    listed = f": {', '.join(names[:most])}"
    if len(names) > most:
        listed += f" and {len(names) - most} more"
    return listed
