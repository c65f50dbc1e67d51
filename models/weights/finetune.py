"""--finetune and --frozen_weights: start a run from the weights of a trained detector.

Everything but the class heads must fit. The row of each class is copied from the checkpoint's class
of the same name. Classes that the checkpoint does not have are initialised as in a new detector;
so are heads and queries that were removed from the checkpoint, and a mask head that it does not have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from models.weights.architecture import flags_in
from models.weights.load import choose_weights
from util.checkpoint import BATCHFORMER, MASK_HEAD, load_state
from util.class_map import ClassMap, classes_of
from util.config import FLAGS, Config
from util.errors import UserError

FLAG, FROZEN = "--finetune", "--frozen_weights"
_CLASS_HEAD = re.compile(r"class_embed\.(\d+)\.(weight|bias)")
# what may be missing in a checkpoint: how the names of its tensors begin, what it is
_REMOVABLE = {
    "class_embed.": "class heads",
    "bbox_embed.": "box heads",
    "query_embed.": "queries",
    MASK_HEAD: "mask head",
}


def fine_tune(
    model: nn.Module,
    config: Config,
    classes: ClassMap,
    checkpoint: Mapping[str, Any],
    source: str,
    flag: str = FLAG,
    weights: str = "auto",
) -> str:
    """Load the weights of a checkpoint into `model`, whose class heads are for `classes`.

    Args:
        config: the model's, made for this checkpoint (models/weights/architecture.py).
        checkpoint, source: what `read_trained` gives for the file, and the file, which `flag`
            named.
        weights: see `choose_weights`.

    Returns:
        What the model starts with, in lines for the log.

    Raises:
        UserError: the checkpoint is of another detector.
    """
    # which row of the class heads is which
    state, which = choose_weights(checkpoint, source, flag, weights)
    known = classes_of({**checkpoint, "model": state}, f"{flag} {source}")
    rows = matching_rows(known, len(state.get("class_embed.0.weight", ())), classes)
    if config.segmentation.frozen_weights:
        _require_all_rows(rows, known, classes, f"{flag} {source}")

    # a mask head that this run has no use for
    unused = [] if config.segmentation.masks else [name for name in state if name.startswith(MASK_HEAD)]
    state = {name: tensor for name, tensor in state.items() if name not in unused}

    # in two-stage the encoder's head comes after those of the decoder layers
    encoder_head = config.transformer.dec_layers if config.transformer.two_stage else None
    heads = _class_heads(model.state_dict(), state, rows, encoder_head)
    report = load_state(model, {"model": state | heads}, source, flag)
    removed = [part for part in _REMOVABLE if not any(name.startswith(part) for name in state)]
    report.require_same_architecture(may_lack=(BATCHFORMER, *removed))

    # the weights fit any number of heads
    trained = flags_in(checkpoint, ("bf", "bf_heads"), f"{flag} {source}")
    bf_heads = trained.get("bf_heads", FLAGS["bf_heads"].default)
    if config.batchformer.bf and trained.get("bf") and bf_heads != config.batchformer.bf_heads:
        raise UserError(
            f"{flag} {source} has BatchFormerV2 with {bf_heads} heads; give --bf_heads {bf_heads}"
        )

    # what the user could not know from the command
    kind = "averaged weights, " if which == "ema" else ""
    lines = [f"fine-tuning from {source}: {kind}{len(report.loaded)} tensors loaded"]
    new = [what for part, what in _REMOVABLE.items() if any(name.startswith(part) for name in report.missing)]
    if "class heads" not in new:
        lines.append(f"class heads: {_describe_rows(rows, known, classes)}")
    if new:
        lines.append(f"{', '.join(new)}: initialised; the checkpoint has none")
    if unused:
        lines.append("mask head: left out; --masks keeps it")
    return "\n".join([*lines, *report.batchformer()])


def _describe_rows(rows: Mapping[int, int], known: ClassMap | None, classes: ClassMap) -> str:
    total = len(classes.categories)
    if known is None:
        how = "copied as they are" if rows else f"initialised, for {total} classes"
        return f"{how}; the checkpoint does not name its classes"

    copied = [name for label, name in classes.names.items() if label in rows]
    new = [name for label, name in classes.names.items() if label not in rows]
    skipped = [name for label, name in known.names.items() if label not in rows.values()]
    text = f"{len(copied)} of {total} classes copied by name{_listed(copied)}"
    if new:
        text += f"; initialised{_listed(new)}"
    if skipped:
        text += f"; {len(skipped)} of the checkpoint skipped{_listed(skipped)}"
    return text


def _require_all_rows(rows: Mapping[int, int], known: ClassMap | None, classes: ClassMap, named: str) -> None:
    """Raise UserError unless the class heads stay as they are: a new row would never be trained."""
    same = len(rows) == classes.num_classes and all(label == row for label, row in rows.items())
    if not same or (known and known.num_classes != classes.num_classes):
        raise UserError(
            f"{named} was trained on other classes than those of the data, and its class heads stay as they "
            "are; fine-tune it first (--finetune with --masks trains everything)"
        )


def matching_rows(known: ClassMap | None, num_known: int, classes: ClassMap) -> dict[int, int]:
    """Row of a class head -> row of the checkpoint's `num_known` to copy.

    Names are compared without regard to case, spaces, hyphens and underscores. Rows that belong to
    no class in both heads are copied, too. If the checkpoint does not name its classes, heads of
    the same number of rows are copied as they are.
    """
    # without names only the number can fit
    if known is None:
        if num_known != classes.num_classes:
            return {}
        return {label: label for label in range(num_known)}

    # of two classes of one name the first counts
    by_name = {_plain(name): label for label, name in reversed(known.names.items())}
    rows = {label: by_name[_plain(name)] for label, name in classes.names.items() if _plain(name) in by_name}
    # rows of no class, as eleven of COCO's, have learned background
    for label in range(min(num_known, classes.num_classes)):
        if label not in classes.names and label not in known.names:
            rows[label] = label
    return rows


def _class_heads(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], rows: Mapping[int, int], encoder_head: int | None
) -> dict[str, Tensor]:
    """The class heads among the tensors `own`, with the rows that can be copied from `state`."""
    heads = {}
    for name in own.keys() & state.keys():
        match = _CLASS_HEAD.fullmatch(name)
        if not match:
            continue
        there, heads[name] = state[name], own[name].clone()
        if int(match[1]) == encoder_head:
            # Of its rows only the first is trained, as "object"; all others learn background,
            # whatever their class. So they keep their order.
            shared = min(len(there), len(own[name]))
            heads[name][:shared] = there[:shared]
            continue
        for row, origin in rows.items():
            heads[name][row] = there[origin]
    return heads


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()


def _listed(names: list[str], most: int = 12) -> str:
    if not names:
        return ""
    listed = f": {', '.join(names[:most])}"
    if len(names) > most:
        listed += f" and {len(names) - most} more"
    return listed
