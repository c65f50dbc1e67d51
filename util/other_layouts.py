"""Checkpoints of other programs: where in the file the weights of a Deformable DETR are, and what a
file without them holds.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

log = logging.getLogger(__name__)

Place = tuple[str, ...]  # keys that lead to a dict of tensors, then a prefix of the names there

_MARK = "transformer.level_embed"  # every Deformable DETR has this tensor
_AVERAGED = re.compile(r"(^|[._])(ema|swa|shadow|averaged?|teacher)([._]|$)")
_DEEPEST = 3  # dicts in dicts
_STATES = ("state_dict", "model_state_dict")

# part of a tensor's name (a pattern) -> what a file with such names holds
_KINDS = (
    (r"\bbbox_head\.", "it holds a detector of MMDetection, whose tensors have other names and shapes"),
    (
        r"\bbackbone\.conv_encoder\.|\bencoder_attn\.",
        "it holds a model of transformers; give the folder with its config.json",
    ),
    (
        r"\bproposal_generator\.|\broi_heads\.",
        "it holds a two-stage detector such as Detectron2's or torchvision's",
    ),
    (
        r"\btransformer\.encoder\.layers\.0\.self_attn\.in_proj_weight$",
        "it holds a DETR whose attention is not deformable",
    ),
    (
        r"^(module\.)?(conv1|layer1\.0\.conv1)\.weight$",
        "it holds a ResNet; --backbone_weights takes it, and a training with it",
    ),
)


def in_our_layout(content: dict[str, Any], source: str) -> dict[str, Any]:
    """The content of a checkpoint file with the weights of a detector in the entry `model`, and
    averaged weights in `ema`.

    They may have any name, and any prefix of the tensors' names, as wrappers
    (DistributedDataParallel, torch.compile), Lightning, mmcv and others leave them. A file without
    a Deformable DETR keeps its content; its weights are copied to `model`.
    """
    plain: dict[Place, dict[str, Any]] = {}
    averaged: dict[Place, dict[str, Any]] = {}
    for place, state in _detectors(content):
        if _AVERAGED.search(".".join(place)):
            averaged[place] = state
        else:
            plain[place] = state
    found = plain | averaged
    if not found:
        states = [content[key] for key in _STATES if isinstance(content.get(key), Mapping)]
        if states and "model" not in content:
            return {**content, "model": states[0]}
        return content
    if list(plain) in ([("",)], [("model", "")]) and list(averaged) in ([], [("ema", "model", "")]):
        return content

    # without plain weights the averaged ones are the model
    chosen = next(iter(found))
    others = ", ".join(sorted(_describe(place) for place in found if place != chosen))
    also = f"; there are also {others}" if others else ""
    log.info("%s: the weights of %s are taken%s", source, _describe(chosen), also)
    # weights at the top level would stay beside their copy
    ours = dict(content) if len(chosen) > 1 else {}
    ours.pop("ema", None)
    ours["model"] = found[chosen]
    if plain and averaged:
        ours["ema"] = {"model": next(iter(averaged.values()))}
    return ours


def kind_of(names: Iterable[str]) -> str | None:
    """What a file with tensors of these names holds, if it is a known kind."""
    text = "\n".join(names)
    for pattern, kind in _KINDS:
        if re.search(pattern, text, re.MULTILINE):
            return kind
    return None


def _detectors(content: Mapping[Any, Any], keys: Place = ()) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The place of every detector in `content`, and its tensors without the prefix."""
    entries = {name: value for name, value in content.items() if isinstance(name, str)}
    states: dict[str, dict[str, Any]] = {}
    for name in entries:
        if name.endswith(_MARK):
            states[name.removesuffix(_MARK)] = {}
    if not states and len(keys) < _DEEPEST:
        for name, value in entries.items():
            if isinstance(value, Mapping):
                yield from _detectors(value, (*keys, name))

    # a prefix may begin with another one: the longest that fits counts
    longest_first = sorted(states, key=len, reverse=True)
    for name, value in entries.items():
        prefix = next(filter(name.startswith, longest_first), None)
        if prefix is not None:
            states[prefix][name.removeprefix(prefix)] = value
    for prefix, state in states.items():
        yield (*keys, prefix), state


def _describe(place: Place) -> str:
    *keys, prefix = place
    where = ".".join(keys) or "the file"
    return f"{where} under {prefix!r}" if prefix else where
