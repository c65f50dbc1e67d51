"""Which detector a checkpoint holds: from the flags in it, and from the shapes of its weights where it has none.

Weights tell how many classes, queries, layers, levels and sampling points there are, all widths, the backbone and its norm, and
whether boxes are refined, or in two stages. Flags alone tell dilation, nheads, position_embedding_scale, eval_size, max_size, and
num_queries in two stages. What the weights tell goes before the flags in the file, and what the caller says before both.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from util.checkpoint import weights_of
from util.config import BackboneConfig, BatchFormerConfig, Config, DataConfig, TransformerConfig, config_from_flags
from util.errors import UserError

log = logging.getLogger(__name__)

# blocks of the four stages; width of the 3x3 convolutions of the first stage and their inputs -> network of torchvision
_BASIC = {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet34"}
_BOTTLENECK = {
    (3, 4, 6, 3, 64, 64): "resnet50",
    (3, 4, 23, 3, 64, 64): "resnet101",
    (3, 8, 36, 3, 64, 64): "resnet152",
    (3, 4, 6, 3, 128, 4): "resnext50_32x4d",
    (3, 4, 23, 3, 256, 8): "resnext101_32x8d",
    (3, 4, 23, 3, 256, 4): "resnext101_64x4d",
    (3, 4, 6, 3, 128, 128): "wide_resnet50_2",
    (3, 4, 23, 3, 128, 128): "wide_resnet101_2",
}
# the flags that decide what a detector computes from its weights
_ARCHITECTURE = (
    "backbone", "backbone_norm", "dilation", "position_embedding", "position_embedding_scale", "num_feature_levels", "enc_layers",
    "dec_layers", "dim_feedforward", "hidden_dim", "nheads", "num_queries", "dec_n_points", "enc_n_points", "with_box_refine",
    "two_stage",
)  # fmt: skip
_BODY = "backbone.0.body."
_SIZES = ("eval_size", "max_size")


def config_of(
    checkpoint: Mapping[str, Any], source: str, flag: str = "--resume", *, batchformer: bool = False, **overrides: Any
) -> Config:
    """The Config of the detector in a checkpoint, published or ours, for prediction: it starts without other weights.

    Args:
        checkpoint: as `read_checkpoint` gives it.
        source, flag: the file and the flag that named it, for messages.
        batchformer: with BatchFormerV2 as it was trained, off in evaluation.
        overrides: flags of main.py that go before what the checkpoint says: those of the backbone and the transformer, eval_size
            and max_size.

    Raises:
        UserError: it holds no Deformable DETR, or none with BatchFormerV2; an override is no such flag or can't be.
    """
    known = {f.name for group in (BackboneConfig, TransformerConfig) for f in fields(group)} | {*_SIZES}
    if unknown := sorted(overrides.keys() - known):
        raise UserError(f"{unknown[0]} is no flag of a detector's architecture; there are {', '.join(sorted(known))}")
    if batchformer:
        overrides |= _batchformer_in(checkpoint, source, flag)
    said = _flags_in(checkpoint, known)
    chosen = {**known_flags(checkpoint, source, flag, **overrides), **overrides, "backbone_weights": "none"}
    if not said:
        taken = {"nheads": TransformerConfig.nheads, "dilation": BackboneConfig.dilation, "eval_size": DataConfig.eval_size}
        told = ", ".join(f"{name} {value}" for name, value in {**taken, **overrides}.items())
        log.warning("%s does not say how it was trained; taken for granted: %s", source, told)
    chosen["train_sizes"] = [chosen.get("eval_size", DataConfig.eval_size)]  # max_size must not be below its default
    try:
        return config_from_flags(chosen)
    except UserError as error:
        raise UserError(f"{flag} {source} can't be used: {error}") from None


def _batchformer_in(checkpoint: Mapping[str, Any], source: str, flag: str) -> dict[str, Any]:
    flags = _flags_in(checkpoint, {f.name for f in fields(BatchFormerConfig)})
    if not flags.get("bf"):
        raise UserError(f"{flag} {source} was trained without BatchFormerV2 (--bf), or does not say how it was trained")
    return {**flags, "eval_bf": False}


def known_flags(checkpoint: Mapping[str, Any], source: str, flag: str = "--resume", **overrides: Any) -> dict[str, Any]:
    """Flags of the architecture that the weights of a checkpoint tell, or else its flags; `overrides` help to read the weights.

    Raises UserError if it holds no Deformable DETR.
    """
    state = weights_of(checkpoint, source, flag)
    said = _flags_in(checkpoint, {*_ARCHITECTURE, *_SIZES})
    try:
        return {**said, **_seen_in(state, {**said, **overrides})}
    except KeyError as error:
        raise UserError(f"{flag} {source} holds no Deformable DETR under the published names: it lacks {error}") from None
    except (IndexError, TypeError) as error:
        raise UserError(f"{flag} {source} holds no Deformable DETR: {error}") from None


def require_same_architecture(checkpoint: Mapping[str, Any], flags: Mapping[str, Any], source: str, flag: str) -> None:
    """Raise UserError, with the flags to give, unless a checkpoint is of the detector that a run's `flags` make.

    What neither its weights nor its own flags tell is not compared.
    """
    said = _flags_in(checkpoint, {"nheads"})
    there = known_flags(checkpoint, source, flag, **{"nheads": flags["nheads"], **said})
    differ = {name: there[name] for name in _ARCHITECTURE if name in there and not _alike(name, there, flags)}
    give = [f"--{name}" if value is True else f"--{name} {value}" for name, value in differ.items() if value is not False]
    if differ.get("backbone_norm") == "gn" and flags["backbone_weights"] == "imagenet":
        give.append("--backbone_weights none")
    leave_out = [f"--{name}" for name, value in differ.items() if value is False]
    remedy = [f"give {' '.join(give)}"] * bool(give) + [f"leave out {' '.join(leave_out)}"] * bool(leave_out)
    if remedy:
        raise UserError(f"{flag} {source} is of another detector: {' and '.join(remedy)}")


def _alike(name: str, there: Mapping[str, Any], flags: Mapping[str, Any]) -> bool:
    if name == "num_queries" and there["two_stage"]:
        return True  # proposals have no weights
    if name == "with_box_refine" and there["dec_layers"] == 1:
        return True  # there is no next layer
    if name == "backbone_norm" and "gn" not in (there[name], flags[name]):
        return True  # statistics may be frozen or go on
    return bool(there[name] == flags[name])


def _flags_in(checkpoint: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """The flags of the architecture among the checkpoint's `args`: a dict, or a published file's Namespace."""
    args = checkpoint.get("args", {})
    flags = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(flags, Mapping):
        return {}
    if flags.get("eval_bf"):  # else BatchFormerV2 has no say in evaluation, and needs no module
        known = known | {f.name for f in fields(BatchFormerConfig)}
    return {name: flags[name] for name in known if flags.get(name) is not None}


def _seen_in(state: Mapping[str, Tensor], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags that the weights tell. Raises KeyError for a tensor that every Deformable DETR has."""
    two_stage = "transformer.enc_output.weight" in state
    num_levels = state["transformer.level_embed"].shape[0]
    seen = {
        "num_classes": state["class_embed.0.weight"].shape[0],
        "hidden_dim": state["transformer.level_embed"].shape[1],
        "dim_feedforward": state["transformer.encoder.layers.0.linear1.weight"].shape[0],
        "enc_layers": _count(state, r"transformer\.encoder\.layers\.(\d+)\."),
        "dec_layers": _count(state, r"transformer\.decoder\.layers\.(\d+)\."),
        "num_feature_levels": num_levels,
        "two_stage": two_stage,
        "with_box_refine": two_stage or _heads_differ(state),
        "position_embedding": "learned" if "backbone.1.row_embed.weight" in state else "sine",
        "backbone_norm": _norm(state),
    }
    if not two_stage:
        seen["num_queries"] = state["query_embed.weight"].shape[0]
    heads = flags.get("nheads", TransformerConfig.nheads)
    for flag, module in (("enc_n_points", "encoder.layers.0.self_attn"), ("dec_n_points", "decoder.layers.0.cross_attn")):
        # one weight for every head, level and point
        weights = state[f"transformer.{module}.attention_weights.bias"].shape[0]
        seen[flag] = max(weights // max(heads * num_levels, 1), 1)
    if backbone := _backbone(state):
        seen["backbone"] = backbone
    return seen


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest number in the names that begin with `pattern`; 0 if there is none."""
    return max((int(match[1]) + 1 for name in state if (match := re.match(pattern, name))), default=0)


def _heads_differ(state: Mapping[str, Tensor]) -> bool:
    """Without refinement the heads of all layers are one module, saved under several names."""
    return any(
        not torch.equal(state[first], tensor)
        for name, tensor in state.items()
        if (first := re.sub(r"^(class_embed|bbox_embed)\.\d+", r"\1.0", name)) != name
    )


def _norm(state: Mapping[str, Tensor]) -> str:
    if f"{_BODY}bn1.running_mean" not in state:
        return "gn"
    return "bn" if f"{_BODY}bn1.num_batches_tracked" in state else "frozen_bn"


def _backbone(state: Mapping[str, Tensor]) -> str | None:
    """The ResNet of these weights; None if it is none that we know."""
    blocks = tuple(_count(state, rf"{re.escape(_BODY)}layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    if f"{_BODY}layer1.0.conv3.weight" not in state:
        return _BASIC.get(blocks)
    width, inputs = state[f"{_BODY}layer1.0.conv2.weight"].shape[:2]
    return _BOTTLENECK.get((*blocks, width, inputs))
