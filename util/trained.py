"""A trained detector in a file of any layout: its weights, and the flags that decide what it computes from them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from util.checkpoint import canonical, read_checkpoint
from util.config import Config, config_from_flags
from util.errors import UserError
from util.hugging_face import is_hugging_face, read_hugging_face

ARCHITECTURE = (
    "backbone", "backbone_norm", "dilation", "position_embedding", "position_embedding_scale", "num_feature_levels", "enc_layers",
    "dec_layers", "dim_feedforward", "hidden_dim", "nheads", "num_queries", "dec_n_points", "enc_n_points", "with_box_refine",
    "two_stage",
)  # fmt: skip
_BATCHFORMER = ("bf", "share_bf", "bt_num_layers", "insert_idx", "eval_bf")
_SIZES = ("eval_size", "max_size")


def read_trained(source: str, flag: str) -> dict[str, Any]:
    """A checkpoint of any layout in ours: published or our own, or Hugging Face's.

    Raises UserError, which names `flag`.
    """
    return read_hugging_face(source, flag) if is_hugging_face(source) else read_checkpoint(source, flag)


def choose_weights(checkpoint: Mapping[str, Any], source: str, flag: str, which: str = "best") -> tuple[dict[str, Tensor], str]:
    """Weights under our names, and which they are.

    Args:
        which: "model"; "ema", the averaged ones; or "best": the averaged ones, unless their last evaluation was worse.

    Raises UserError if the checkpoint has not got them.
    """
    if which == "best":
        which = "ema" if "ema" in checkpoint and not _averaged_are_worse(checkpoint) else "model"
    if which == "ema" and "ema" not in checkpoint:
        raise UserError(f"{flag} {source} has no averaged weights; a run keeps them with --ema_decay")
    return canonical(checkpoint["ema"] if which == "ema" else checkpoint, source, flag), which


def num_logits(state: Mapping[str, Tensor], source: str) -> int:
    """Rows of the class heads. Raises UserError for weights without such."""
    if "class_embed.0.bias" not in state:
        raise UserError(f"{source} is no Deformable DETR: it has no tensor class_embed.0.bias")
    return len(state["class_embed.0.bias"])


def _averaged_are_worse(checkpoint: Mapping[str, Any]) -> bool:
    """By the last line of the log that has both figures."""
    try:
        lines = [json.loads(line) for line in checkpoint["history"]["lines"]]
        names = ("test_coco_eval_bbox", "test_ema_coco_eval_bbox")
        last = next(line for line in reversed(lines) if all(name in line for name in names))
        return bool(last[names[1]][0] < last[names[0]][0])
    except (LookupError, TypeError, ValueError, StopIteration):
        return False


def saved_flags(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The flags in a checkpoint, published (a Namespace) or ours; empty if it has none."""
    args = checkpoint.get("args")
    flags = vars(args) if isinstance(args, argparse.Namespace) else args
    return dict(flags) if isinstance(flags, Mapping) else {}


def config_of(flags: Mapping[str, Any], num_classes: int, source: str) -> Config:
    """The Config of a detector by the flags of its checkpoint, those of its training aside.

    Raises UserError, which names `source`, for flags that no detector here can have.
    """
    names = (*ARCHITECTURE, *_SIZES, *(_BATCHFORMER if flags.get("bf") else ()))
    known = {name: flags[name] for name in names if flags.get(name) is not None}
    try:
        return config_from_flags({**known, "backbone_weights": "none", "num_classes": num_classes})
    except UserError as error:
        raise UserError(f"{source} can't be used: {error}") from None


def require_same_architecture(saved: Mapping[str, Any], flags: Mapping[str, Any], source: str) -> None:
    """Raise UserError, with the flags to give, unless the flags of a checkpoint and of this run make the same detector.

    Args:
        saved: the checkpoint's, as `saved_flags` gives them; those that it lacks are not compared.
        flags: this run's.
        source: flag and name of the checkpoint.
    """
    differ = {name: saved[name] for name in ARCHITECTURE if name in saved and not _alike(name, saved, flags)}
    give = [f"--{name}" if value is True else f"--{name} {value}" for name, value in differ.items() if value is not False]
    if differ.get("backbone_norm") == "gn" and flags["backbone_weights"] == "imagenet":
        give.append("--backbone_weights none")
    leave_out = [f"--{name}" for name, value in differ.items() if value is False]
    remedy = [f"give {' '.join(give)}"] * bool(give) + [f"leave out {' '.join(leave_out)}"] * bool(leave_out)
    if remedy:
        raise UserError(f"{source} is of another detector: {' and '.join(remedy)}")


def _alike(name: str, saved: Mapping[str, Any], flags: Mapping[str, Any]) -> bool:
    if name == "num_queries" and saved.get("two_stage"):
        return True  # proposals have no weights
    if name == "backbone_norm" and "gn" not in (saved[name], flags[name]):
        return True  # statistics may be frozen or go on
    return bool(saved[name] == flags[name])
