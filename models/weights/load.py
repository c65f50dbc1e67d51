"""Read a trained detector from a file of any layout, and choose which of its weights to use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from util.checkpoint import read_checkpoint, weights_of
from util.errors import UserError


def read_trained(source: str, flag: str) -> dict[str, Any]:
    """A checkpoint of any layout in ours: published or our own, or Hugging Face's.

    Raises UserError, which names `flag`.
    """
    # these need safetensors, which a machine that only measures may lack
    from models.weights.hugging_face import read_hugging_face
    from models.weights.hugging_face_files import is_hugging_face

    if is_hugging_face(source):
        return read_hugging_face(source, flag)
    return read_checkpoint(source, flag)


def choose_weights(
    checkpoint: Mapping[str, Any], source: str, flag: str, which: str = "auto"
) -> tuple[dict[str, Tensor], str]:
    """Weights under our names, and which they are: "model" or "ema".

    Args:
        which: "model"; "ema", the averaged ones; or "auto": the averaged ones if there are any,
            unless their last evaluation was worse.

    Raises UserError if the checkpoint does not have them.
    """
    # averaged weights are the better ones as a rule
    averaged = checkpoint.get("ema")
    if which == "model" or (which == "auto" and (averaged is None or _averaged_are_worse(checkpoint))):
        return weights_of(checkpoint, source, flag), "model"
    if averaged is None:
        raise UserError(f"{flag} {source} has no averaged weights; a run keeps them with --ema_decay")
    return weights_of(averaged, source, flag), "ema"


def _averaged_are_worse(checkpoint: Mapping[str, Any]) -> bool:
    """By AP in the last line of the log that has both."""
    plain, averaged = "test_coco_eval_bbox", "test_ema_coco_eval_bbox"
    # an epoch without an evaluation has neither
    try:
        for line in reversed(checkpoint["history"]["lines"]):
            metrics = json.loads(line)
            if plain in metrics and averaged in metrics:
                return bool(metrics[averaged][0] < metrics[plain][0])
    except (LookupError, TypeError, ValueError):
        pass  # a checkpoint of another program
    return False
