"""Which detector a checkpoint holds: from the flags in it, and from the shapes of its weights where
it has none.

Weights tell how many classes, queries, layers, levels and sampling points there are, all widths,
the backbone and its norm, and whether boxes are refined, or in two stages. Flags alone tell
dilation, nheads, position_embedding_scale, eval_size, max_size, and num_queries in two stages. What
the weights tell goes before the flags in the file. A flag of the caller's that contradicts either
is refused; image sizes are the caller's to choose.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import fields
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from util.backbones import recognise
from util.checkpoint import weights_of
from util.config import (
    BackboneConfig,
    BatchFormerConfig,
    Config,
    DataConfig,
    LossConfig,
    OptimConfig,
    RunConfig,
    TransformerConfig,
)
from util.errors import UserError
from util.other_layouts import kind_of

log = logging.getLogger(__name__)

# the flags that decide what a detector computes from its weights
_ARCHITECTURE = (
    "backbone",
    "backbone_norm",
    "dilation",
    "position_embedding",
    "position_embedding_scale",
    "num_feature_levels",
    "enc_layers",
    "dec_layers",
    "dim_feedforward",
    "hidden_dim",
    "nheads",
    "num_queries",
    "dec_n_points",
    "enc_n_points",
    "with_box_refine",
    "two_stage",
)
_BODY = "backbone.0.body."
HEADS = (
    "class_embed.",
    "bbox_embed.",
)  # what is often removed from a checkpoint that others are to start from


def _names(*groups: type, without: Collection[str] = ()) -> frozenset[str]:
    return frozenset(f.name for group in groups for f in fields(group)) - frozenset(without)


_SIZES = frozenset({"eval_size", "max_size"})
_MODULES = _names(BatchFormerConfig)
_UNAVAILABLE = (
    "mask_loss_coef",
    "dice_loss_coef",
    "dataset_file",
    "coco_panoptic_path",
    "remove_difficult",
    "num_classes",
)
_LOSSES = _names(LossConfig, without=_UNAVAILABLE)


class Purpose(Enum):
    """What a checkpoint is taken for, and the flags that it decides where the caller does not."""

    EVALUATE = _names(BackboneConfig, TransformerConfig) | _LOSSES | _SIZES | _MODULES
    # these decide which parameters train
    RESUME = frozenset(_ARCHITECTURE) | _MODULES | {"backbone_weights"}
    FINE_TUNE = frozenset(_ARCHITECTURE) | {"backbone_weights"}
    BUILD = (
        _names(OptimConfig, BackboneConfig, TransformerConfig, DataConfig, without=_UNAVAILABLE)
        | _LOSSES
        | _MODULES
    )


def config_of(
    checkpoint: Mapping[str, Any],
    source: str,
    flag: str = "--resume",
    *,
    batchformer: bool = False,
    **overrides: Any,
) -> Config:
    """The Config of the detector in a checkpoint, published or ours, for prediction: that of its
    evaluation.

    Args:
        checkpoint: as `read_checkpoint` gives it.
        source, flag: the file and the flag that named it, for messages.
        batchformer: with BatchFormerV2 as it was trained, off in evaluation.
        overrides: flags of main.py: those of the backbone and the transformer, for what the
            checkpoint does not say, and eval_size and max_size.

    Raises:
        UserError: it holds no Deformable DETR, or none with BatchFormerV2; an override is no such
        flag or can't be.
    """
    known = _names(BackboneConfig, TransformerConfig) | _SIZES
    if unknown := sorted(overrides.keys() - known):
        raise UserError(
            f"{unknown[0]} is no flag of a detector's architecture; there are {', '.join(sorted(known))}"
        )
    config = adopt(as_given(overrides, resume=source, eval=True), checkpoint, source, flag)
    return config.with_flags(_batchformer_in(checkpoint, source, flag)) if batchformer else config


def as_given(flags: Mapping[str, Any], **run: Any) -> Config:
    """A Config whose other flags are left to a checkpoint."""
    return Config(run=RunConfig(**run)).with_flags(flags, given=frozenset(flags), settled=False)


def _batchformer_in(checkpoint: Mapping[str, Any], source: str, flag: str) -> dict[str, Any]:
    flags = _flags_in(checkpoint, _MODULES)
    if not flags.get("bf"):
        raise UserError(
            f"{flag} {source} was trained without BatchFormerV2 (--bf), or does not say how it was trained"
        )
    return {**flags, "eval_bf": False}


def adopt(
    config: Config,
    checkpoint: Mapping[str, Any],
    source: str,
    flag: str = "--resume",
    purpose: Purpose = Purpose.EVALUATE,
    *,
    without_heads: bool = False,
) -> Config:
    """The Config of a run that starts with a checkpoint's weights: flags that were not given are
    the checkpoint's, as far as `purpose` says. A line of the log lists them.

    Args:
        config: the run's, whose `given` flags hold.
        source, flag: the file and the flag that named it, for messages.
        without_heads: the weights of the heads may have been removed.

    Raises:
        UserError: the file holds no Deformable DETR, or only a part of one; a flag that was given
        contradicts it (the message has those to give); together they can't be.
    """
    given = {name: value for name, value in config.flags().items() if config.is_given(name)}
    there = known_flags(checkpoint, source, flag, given)
    if not without_heads:
        _require_heads(weights_of(checkpoint, source, flag), source, flag)
    modules_off = purpose is Purpose.EVALUATE and (
        given.get("bf") == 0 or not {**there, **given}.get("eval_bf")
    )
    decided = purpose.value - (_MODULES if modules_off or not there.get("bf") else frozenset())
    _require_sound({name: there[name] for name in sorted(decided & there.keys())}, f"{flag} {source}")
    is_own_run = purpose is Purpose.RESUME and "processes" in checkpoint
    _require_same(
        there,
        given,
        f"{flag} {source}",
        modules=is_own_run or purpose is Purpose.EVALUATE and not modules_off,
    )
    taken = {name: value for name, value in there.items() if name in decided and name not in given}
    if purpose is Purpose.EVALUATE:
        taken |= _other_size(given, there, source)
    off = {f.name: f.default for f in fields(BatchFormerConfig)} if modules_off else {}
    try:
        settled = config.with_flags({**taken, **off}, settled=True)
    except UserError as error:
        raise UserError(f"{flag} {source} can't be used: {error}") from None
    _tell(config, settled, taken, source)
    if not _flags_in(checkpoint, purpose.value):
        _warn_of_guesses(settled, source)
    return settled


def _other_size(given: Mapping[str, Any], there: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Where --eval_size or --max_size was given alone, the other one, if it must be another than
    the checkpoint's to fit.
    """
    flags = {"eval_size": DataConfig.eval_size, "max_size": DataConfig.max_size, **there, **given}
    shorter, longest = flags["eval_size"], flags["max_size"]
    if shorter <= longest or {"eval_size", "max_size"} <= given.keys():
        return {}
    if "eval_size" not in given:
        return {"eval_size": longest}  # no side may be longer, so this changes nothing
    raised = max(shorter, round(longest * shorter / there.get("eval_size", DataConfig.eval_size)))
    log.warning(
        "--eval_size %d is above --max_size %d of %s; taken: --max_size %d", shorter, longest, source, raised
    )
    return {"max_size": raised}


def _tell(config: Config, settled: Config, taken: Mapping[str, Any], source: str) -> None:
    before, told = config.flags(), {*_ARCHITECTURE, *_SIZES, *_MODULES} & taken.keys()
    changed = {
        name: value for name, value in settled.flags().items() if name in told and value != before[name]
    }
    if changed:
        log.info("taken from %s: %s", source, _given_as(changed))


def _warn_of_guesses(config: Config, source: str) -> None:
    names = ("nheads", "dilation", *(("eval_size",) if config.run.eval else ()))
    guessed = ", ".join(f"{name} {config.flags()[name]}" for name in names)
    log.warning("%s does not say how it was trained; taken for granted: %s", source, guessed)


def known_flags(
    checkpoint: Mapping[str, Any], source: str, flag: str, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Flags that the weights of a checkpoint tell, and its own in all else; `given` helps to read
    the weights.

    Raises UserError if it holds no Deformable DETR.
    """
    state = weights_of(checkpoint, source, flag)
    said = _flags_in(checkpoint, frozenset().union(*(purpose.value for purpose in Purpose)))
    try:
        return {**said, **_seen_in(state, {**given, **said})}
    except KeyError as error:
        what = kind_of(state) or f"it lacks {error}"
        raise UserError(
            f"{flag} {source} holds no Deformable DETR under the published names: {what}"
        ) from None
    except (IndexError, TypeError) as error:
        raise UserError(f"{flag} {source} holds no Deformable DETR: {error}") from None


def _require_sound(flags: Mapping[str, Any], named: str) -> None:
    """Raise UserError for a flag of a checkpoint whose value is of another type than the flag's."""
    for name, default in Config().flags().items():
        kinds = next(
            (kinds for kinds in ((bool, int), (int, float), (list, tuple)) if type(default) in kinds),
            (type(default),),
        )
        if name in flags and type(flags[name]) not in kinds:
            raise UserError(
                f"{named} is damaged: its --{name} can't be {type(flags[name]).__name__} "
                f"{str(flags[name])[:60]!a}"
            )


def _require_heads(state: Mapping[str, Tensor], source: str, flag: str) -> None:
    lacking = [f"{part}*" for part in HEADS if not any(name.startswith(part) for name in state)]
    if lacking:
        raise UserError(
            f"{flag} {source} has no {' and no '.join(lacking)}: somebody removed these weights, "
            f"and it can only be the start of "
            "a training; use --finetune"
        )


def _require_same(there: Mapping[str, Any], given: Mapping[str, Any], named: str, *, modules: bool) -> None:
    """Raise UserError, with the flags to give, if those that were given contradict the detector in
    a checkpoint.

    What neither its weights nor its own flags tell is not compared. modules: those of BatchFormerV2
    count.
    """
    here = {**there, **given}
    names = [name for name in _ARCHITECTURE if name in there and not _alike(name, there, here)]
    if modules and not _same_modules(there, here):
        names += ["bf", "share_bf", "bt_num_layers", "insert_idx"] if there.get("bf") else ["bf"]
    differ = {name: there.get(name, 0) for name in names}
    give, leave_out = (
        _given_as(differ),
        " ".join(f"--{name}" for name, value in differ.items() if value is False),
    )
    remedy = [f"give {give}"] * bool(give) + [f"leave out {leave_out}"] * bool(leave_out)
    if remedy:
        raise UserError(f"{named} is of another detector: {' and '.join(remedy)}")


def _given_as(flags: Mapping[str, Any]) -> str:
    """Flags as on a command line; one that is off can't be given."""
    texts = []
    for name, value in flags.items():
        values = value if isinstance(value, list | tuple) else [] if value is True else [value]
        texts += [" ".join([f"--{name}", *map(str, values)])] if value is not False else []
    return " ".join(texts)


def _alike(name: str, there: Mapping[str, Any], flags: Mapping[str, Any]) -> bool:
    if name == "num_queries" and there["two_stage"]:
        return True  # proposals have no weights
    if name == "with_box_refine" and there["dec_layers"] == 1:
        return True  # there is no next layer
    if name == "backbone_norm" and "gn" not in (there[name], flags[name]):
        return True  # statistics may be frozen or go on
    return bool(there[name] == flags[name])


def _same_modules(there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Whether BatchFormerV2's modules have the same weights, be there one stream or two."""
    if not here.get("bf") or not there.get("bf"):
        return bool(here.get("bf")) == bool(there.get("bf"))
    return all(here.get(name) == there.get(name) for name in ("share_bf", "bt_num_layers", "insert_idx"))


def _flags_in(checkpoint: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """The known flags among the checkpoint's `args`: a dict, or a published file's Namespace."""
    args = checkpoint.get("args", {})
    flags = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(flags, Mapping):
        return {}
    return {name: flags[name] for name in known if flags.get(name) is not None}


def _seen_in(state: Mapping[str, Tensor], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags that the weights tell. Raises KeyError for a tensor that every Deformable DETR has."""
    two_stage = "transformer.enc_output.weight" in state
    num_levels = state["transformer.level_embed"].shape[0]
    seen = {
        "hidden_dim": state["transformer.level_embed"].shape[1],
        "dim_feedforward": state["transformer.encoder.layers.0.linear1.weight"].shape[0],
        "enc_layers": _count(state, r"transformer\.encoder\.layers\.(\d+)\."),
        "dec_layers": _count(state, r"transformer\.decoder\.layers\.(\d+)\."),
        "num_feature_levels": num_levels,
        "two_stage": two_stage,
        "position_embedding": "learned" if "backbone.1.row_embed.weight" in state else "sine",
        "backbone_norm": _norm(state),
    }
    if two_stage or any(name.startswith(HEADS) for name in state):
        seen["with_box_refine"] = two_stage or _heads_differ(state)
    if "query_embed.weight" in state:
        seen["num_queries"] = state["query_embed.weight"].shape[0]
    heads = flags.get("nheads", TransformerConfig.nheads)
    for flag, module in (
        ("enc_n_points", "encoder.layers.0.self_attn"),
        ("dec_n_points", "decoder.layers.0.cross_attn"),
    ):
        # one weight for every head, level and point
        weights = state[f"transformer.{module}.attention_weights.bias"].shape[0]
        seen[flag] = max(weights // max(heads * num_levels, 1), 1)
    shapes = {
        name.removeprefix(_BODY): tensor.shape for name, tensor in state.items() if name.startswith(_BODY)
    }
    if backbone := recognise(shapes):
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
