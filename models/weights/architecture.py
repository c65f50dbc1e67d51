"""Which detector a checkpoint holds: from the flags in it, and from the shapes of its weights.

The weights show the numbers of classes, queries, layers, levels and sampling points, all widths, the
backbone and its norm, whether boxes are refined, or in two stages, and whether there are masks. They
count more than the flags in the file. Only flags show the rest (`Flag.in_tools`). A flag of the caller
that contradicts either is refused; image sizes are the caller's choice.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Collection, Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from util.backbones import recognise
from util.checkpoint import MASK_HEAD, weights_of
from util.config import FLAGS, Config, RunConfig, as_typed, flags_of
from util.errors import UserError
from util.other_layouts import kind_of

log = logging.getLogger(__name__)

_BODY = "backbone.0.body."
# often removed from a checkpoint that others are to start from
HEADS = ("class_embed.", "bbox_embed.")

MODULES = frozenset(name for name, flag in FLAGS.items() if flag.group == "batchformer")
_ARCHITECTURE = tuple(name for name in flags_of("architecture") if name not in MODULES)
_SIZES = ("eval_size", "max_size")
# flags of BatchFormerV2 that decide which weights there are, with one stream or two
_MODULE_WEIGHTS = ("share_bf", "bt_num_layers", "insert_idx")


class Purpose(Enum):
    """What a checkpoint is loaded for. The value: flags that it decides if the caller does not."""

    EVALUATE = frozenset(flags_of("architecture", "model", "evaluation"))
    # backbone_weights: whether they were random decides which parameters are trained
    RESUME = frozenset((*flags_of("architecture"), "backbone_weights"))
    FINE_TUNE = frozenset((*_ARCHITECTURE, "backbone_weights"))
    # the data set decides its kind and its classes, and no other file has weights
    BUILD = frozenset(
        name
        for name, flag in FLAGS.items()
        if flag.group != "run"
        and not flag.refused
        and name not in ("dataset_file", "num_classes", "frozen_weights")
    )


def config_of(
    checkpoint: Mapping[str, Any],
    source: str,
    flag: str = "--resume",
    *,
    batchformer: bool = False,
    **overrides: Any,
) -> Config:
    """The Config to predict with the detector in a checkpoint, published or ours.

    Args:
        checkpoint: as `read_checkpoint` gives it.
        source, flag: the file and the flag that named it, for messages.
        batchformer: with BatchFormerV2 as it was trained, off in evaluation.
        overrides: flags of main.py: those of the backbone and the transformer, for what the
            checkpoint does not say, and those of evaluation, such as eval_size.

    Raises:
        UserError: it holds no Deformable DETR, or none with BatchFormerV2; an override is no such
        flag or has a value that is not possible.
    """
    known = {name for name, item in FLAGS.items() if item.group in ("backbone", "transformer")}
    known.update(flags_of("evaluation"))
    for name in sorted(overrides.keys() - known):
        raise UserError(
            f"{name} is no flag of a detector's architecture; there are {', '.join(sorted(known))}"
        )
    config = adopt(as_given(overrides, resume=source, eval=True), checkpoint, source, flag)
    if not batchformer:
        return config

    # as it was trained, but detections do not depend on the other images of a batch
    modules = flags_in(checkpoint, MODULES, f"{flag} {source}")
    if not modules.get("bf"):
        raise UserError(
            f"{flag} {source} was trained without BatchFormerV2 (--bf), or does not say how it was trained"
        )
    if modules.get("bf_control", "none") != "none":
        raise UserError(
            f"{flag} {source} was trained with --bf_control {modules['bf_control']}: nothing in it relates "
            "images"
        )
    return config.with_flags({**modules, "eval_bf": False})


def as_given(flags: Mapping[str, Any], **run: Any) -> Config:
    """A Config whose other flags are left to a checkpoint."""
    return Config(run=RunConfig(**run)).with_flags(flags, given=frozenset(flags), settled=False)


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
        config: the run's, whose `given` flags are kept.
        source, flag: the file and the flag that named it, for messages.
        without_heads: the weights of the heads may have been removed.

    Raises:
        UserError: the file holds no complete Deformable DETR; a flag that was given contradicts it
        (the message lists the flags to give); the flags do not fit together.
    """
    named = f"{flag} {source}"
    given = {name: value for name, value in config.flags().items() if config.is_given(name)}
    state = weights_of(checkpoint, source, flag)
    saved = flags_in(checkpoint, purpose.value, named)
    # the weights count more than the flags in the file
    there = saved | _flags_shown_by(state, {**given, **saved}, named)
    if purpose is Purpose.FINE_TUNE:
        del there["masks"]  # a mask head may be new, or left out
    if not without_heads:
        _require_heads(state, named)

    # BatchFormerV2 acts in evaluation only with --eval_bf
    evaluate = purpose is Purpose.EVALUATE
    if evaluate and given.get("eval_bf") and not {**there, **given}.get("bf"):
        raise UserError(f"{named} was trained without BatchFormerV2; leave --eval_bf out")
    acts = evaluate and {**there, **given}.get("eval_bf") and given.get("bf") != 0
    is_own_run = purpose is Purpose.RESUME and "processes" in checkpoint
    _require_same(there, given, named, modules=bool(acts or is_own_run))

    # then the flags of the command line count
    decided = purpose.value
    if not there.get("bf"):
        decided -= MODULES
    taken = {name: value for name, value in there.items() if name in decided and name not in given}
    if evaluate:
        taken |= _fitting_size(given, there, source)
    changes = dict(taken)
    if evaluate and not acts:
        changes |= {name: FLAGS[name].default for name in MODULES}
    try:
        settled = config.with_flags(changes, settled=True)
    except UserError as error:
        raise UserError(f"{named} can't be used: {error}") from None

    # what the user could not know from the command
    before, changed = config.flags(), {}
    for name, value in settled.flags().items():
        # the others change no result
        logged = FLAGS[name].of in ("architecture", "evaluation")
        if logged and name in taken and value != before[name]:
            changed[name] = value
    if changed:
        log.info("taken from %s: %s", source, as_typed(changed))
    if not saved:
        _warn_of_guesses(settled, source)
    return settled


def flags_in(checkpoint: Mapping[str, Any], names: Collection[str], named: str) -> dict[str, Any]:
    """These flags among the checkpoint's `args`: a dict, or a published file's Namespace."""
    args = checkpoint.get("args", {})
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    if not isinstance(args, Mapping):
        return {}
    flags = {name: args[name] for name in sorted(names) if args.get(name) is not None}
    defaults = Config().flags()
    for name, value in flags.items():
        if isinstance(value, tuple):
            flags[name] = value = list(value)
        kind = type(defaults[name])
        # 1 may stand for 1.0 and for a switch that is on
        if not isinstance(value, kind) and not (kind in (float, bool) and isinstance(value, int)):
            found = f"{type(value).__name__} {str(value)[:60]!a}"
            raise UserError(f"{named} is damaged: its --{name} can't be {found}")
    return flags


def _require_heads(state: Mapping[str, Tensor], named: str) -> None:
    removed = [f"{head}*" for head in HEADS if not any(name.startswith(head) for name in state)]
    if removed:
        raise UserError(
            f"{named} has no {' and no '.join(removed)}: somebody removed these weights, and it can "
            "only be the start of a training; use --finetune"
        )


def _require_same(there: Mapping[str, Any], given: Mapping[str, Any], named: str, *, modules: bool) -> None:
    """Raise UserError, with the flags to give, if those that were given contradict the detector in
    a checkpoint.

    Only what its weights or its own flags show is compared. modules: BatchFormerV2's too.
    """
    here = {**there, **given}
    # what neither weights nor saved flags show can't contradict
    names = [name for name in _ARCHITECTURE if name in there and not _alike(name, there, here)]
    differ = {name: there.get(name) for name in names}
    theirs, ours = _modules_in(there), _modules_in(here)
    if modules and theirs != ours:
        differ["bf"] = there.get("bf", 0)
        differ |= {name: theirs.get(name, FLAGS[name].default) for name in theirs | ours if theirs}
    # a switch that is off can't be given
    remedies = []
    if give := as_typed(differ):
        remedies.append(f"give {give}")
    if leave_out := " ".join(f"--{name}" for name, value in differ.items() if value is False):
        remedies.append(f"leave out {leave_out}")
    if remedies:
        raise UserError(f"{named} is of another detector: {' and '.join(remedies)}")


def _alike(name: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    if name == "num_queries" and there["two_stage"]:
        return True  # proposals have no weights
    if name == "with_box_refine" and there["dec_layers"] == 1:
        return True  # there is no next layer
    if name == "backbone_norm" and "gn" not in (there[name], here[name]):
        return True  # statistics may be frozen or go on
    return bool(there[name] == here[name])


def _modules_in(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that decide which weights of BatchFormerV2 there are; none without it."""
    if not flags.get("bf"):
        return {}
    seen = {name: flags.get(name) for name in _MODULE_WEIGHTS}
    # files of older versions do not say these, and at their defaults nobody needs to
    for name in ("bf_heads", "bf_control"):
        value = flags.get(name, FLAGS[name].default)
        if value != FLAGS[name].default:
            seen[name] = value
    return seen


def _fitting_size(given: Mapping[str, Any], there: Mapping[str, Any], source: str) -> dict[str, Any]:
    """If only one of --eval_size and --max_size was given, and the other one of the checkpoint does
    not fit it: one that does.
    """
    trained = {name: there.get(name, FLAGS[name].default) for name in _SIZES}
    sizes = {name: given.get(name, trained[name]) for name in _SIZES}
    shorter, longest = sizes["eval_size"], sizes["max_size"]
    if shorter <= longest or given.keys() >= sizes.keys():
        return {}
    if "eval_size" not in given:
        return {"eval_size": longest}  # no side may be longer, so this changes nothing
    # the same proportion as in training
    raised = max(shorter, round(longest * shorter / trained["eval_size"]))
    log.warning(
        "--eval_size %d is above --max_size %d of %s; used: --max_size %d", shorter, longest, source, raised
    )
    return {"max_size": raised}


def _warn_of_guesses(config: Config, source: str) -> None:
    guessed = f"nheads {config.transformer.nheads}, dilation {config.backbone.dilation}"
    if config.run.eval:
        guessed += f", eval_size {config.data.eval_size}"
    log.warning("%s does not say how it was trained; assumed: %s", source, guessed)


def _flags_shown_by(state: Mapping[str, Tensor], flags: Mapping[str, Any], named: str) -> dict[str, Any]:
    """The flags that the weights show. `flags` have the number of heads, if it is known.

    Raises UserError if this is no Deformable DETR.
    """
    try:
        return _seen_in(state, flags)
    except KeyError as error:
        what = kind_of(state) or f"it has no {error}"
        raise UserError(f"{named} holds no Deformable DETR under the published names: {what}") from None
    except (IndexError, TypeError) as error:
        raise UserError(f"{named} holds no Deformable DETR: {error}") from None


def _seen_in(state: Mapping[str, Tensor], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Raises KeyError for a tensor that every Deformable DETR has."""
    # shapes, as models/build.py makes them
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
        "masks": any(name.startswith(MASK_HEAD) for name in state),
    }
    # heads may have been removed
    if two_stage or any(name.startswith(HEADS) for name in state):
        seen["with_box_refine"] = two_stage or _heads_differ(state)
    if "query_embed.weight" in state:
        seen["num_queries"] = state["query_embed.weight"].shape[0]
    # one weight for every head, level and point; weights do not show the number of heads
    heads = flags.get("nheads", FLAGS["nheads"].default)
    for flag, attention in (
        ("enc_n_points", "encoder.layers.0.self"),
        ("dec_n_points", "decoder.layers.0.cross"),
    ):
        weights = state[f"transformer.{attention}_attn.attention_weights.bias"].shape[0]
        seen[flag] = max(weights // max(heads * num_levels, 1), 1)
    shapes = {
        name.removeprefix(_BODY): tensor.shape for name, tensor in state.items() if name.startswith(_BODY)
    }
    if backbone := recognise(shapes):
        seen["backbone"] = backbone
    return seen


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest number in the names that begin with `pattern`; 0 if there is none."""
    matches = filter(None, (re.match(pattern, name) for name in state))
    return 1 + max((int(match[1]) for match in matches), default=-1)


def _heads_differ(state: Mapping[str, Tensor]) -> bool:
    """Without refinement the heads of all layers are one module, saved under several names."""
    for name, tensor in state.items():
        first = re.sub(r"^(class_embed|bbox_embed)\.\d+", r"\1.0", name)
        if first != name and not torch.equal(state[first], tensor):
            return True
    return False


def _norm(state: Mapping[str, Tensor]) -> str:
    if f"{_BODY}bn1.running_mean" not in state:
        return "gn"
    return "bn" if f"{_BODY}bn1.num_batches_tracked" in state else "frozen_bn"
