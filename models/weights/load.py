"""A trained detector in a file of any layout, and which of its weights to take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.weights.hugging_face import is_hugging_face, read_hugging_face
from util.checkpoint import read_checkpoint, weights_of
from util.errors import UserError


def read_trained(source: str, flag: str) -> dict[str, Any]:
    """A checkpoint of any layout in ours: published or our own, or Hugging Face's.

    Raises UserError, which names `flag`.
    """
    return read_hugging_face(source, flag) if is_hugging_face(source) else read_checkpoint(source, flag)


def choose_weights(
    checkpoint: Mapping[str, Any], source: str, flag: str, which: str = "auto"
) -> tuple[dict[str, Tensor], str]:
    """Weights under our names, and which they are.

    Args:
        which: "model"; "ema", the averaged ones; or "auto": the averaged ones, unless their last
            evaluation was worse.

    Raises UserError if the checkpoint has not got them.
    """
    averaged = checkpoint.get("ema")
    if which == "auto":
        which = "model" if averaged is None or _averaged_are_worse(checkpoint) else "ema"
    if which == "ema" and averaged is None:
        raise UserError(f"{flag} {source} has no averaged weights; a run keeps them with --ema_decay")
    return weights_of(averaged if which == "ema" else checkpoint, source, flag), which


def _averaged_are_worse(checkpoint: Mapping[str, Any]) -> bool:
    """By the last line of the log that has both figures."""
    try:
        lines = [json.loads(line) for line in checkpoint["history"]["lines"]]
        names = ("test_coco_eval_bbox", "test_ema_coco_eval_bbox")
        last = next(line for line in reversed(lines) if all(name in line for name in names))
        return bool(last[names[1]][0] < last[names[0]][0])
    except (LookupError, TypeError, ValueError, StopIteration):
        return False
