"""Checkpoints as other programs write them: where in the file the weights of a Deformable DETR are,
and what a file holds that has none.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

log = logging.getLogger(__name__)

_MARK = "transformer.level_embed"  # every Deformable DETR has this tensor
_AVERAGED = re.compile(r"(^|[._])(ema|swa|shadow|averaged?|teacher)([._]|$)")
_DEEPEST = 3  # dicts in dicts
_STATES = ("state_dict", "model_state_dict")

# part of a tensor's name -> what has such
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
    """The content of a checkpoint file with a detector's weights in the entry `model`, averaged
    ones in `ema`.

    They are looked for under any name and any prefix of their names, as wrappers
    (DistributedDataParallel, torch.compile), Lightning, mmcv and others leave them. What has no
    Deformable DETR stays as it is, but for its weights' place.
    """
    found = dict(_detectors(content))
    averaged = [place for place in found if _AVERAGED.search(".".join(place))]
    plain = [place for place in found if place not in averaged]
    if not found:
        state = next((content[key] for key in _STATES if isinstance(content.get(key), Mapping)), None)
        return content if state is None or "model" in content else {**content, "model": state}
    if plain in ([("",)], [("model", "")]) and averaged in ([], [("ema", "model", "")]):
        return content
    chosen = (plain or averaged)[0]
    log.info("%s: the weights of %s are taken%s", source, _said(chosen), _also(found.keys() - {chosen}))
    rest = {} if len(chosen) == 1 else {key: value for key, value in content.items() if key != "ema"}
    ours = {**rest, "model": found[chosen]}
    return {**ours, "ema": {"model": found[averaged[0]]}} if plain and averaged else ours


def kind_of(names: Iterable[str]) -> str | None:
    """What a file holds whose tensors have these names, if we know it."""
    names = list(names)
    return next((kind for pattern, kind in _KINDS if any(re.search(pattern, name) for name in names)), None)


def _detectors(
    content: Mapping[Any, Any], keys: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """(keys that lead to a dict of tensors, and the prefix of the names there; the tensors without
    it) of every detector.
    """
    names = [name for name in content if isinstance(name, str)]
    prefixes = [name.removesuffix(_MARK) for name in names if name.endswith(_MARK)]
    states: dict[str, dict[str, Any]] = {prefix: {} for prefix in prefixes}
    for name in names if prefixes else ():
        owner = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default=None)
        if owner is not None:
            states[owner][name.removeprefix(owner)] = content[name]
    yield from (((*keys, prefix), state) for prefix, state in states.items())
    for name in names if not prefixes and len(keys) < _DEEPEST else ():
        if isinstance(content[name], Mapping):
            yield from _detectors(content[name], (*keys, name))


def _said(place: tuple[str, ...]) -> str:
    *keys, prefix = place
    where = ".".join(keys) or "the file"
    return f"{where} under {prefix!r}" if prefix else where


def _also(others: Iterable[tuple[str, ...]]) -> str:
    told = ", ".join(sorted(map(_said, others)))
    return f"; there are also {told}" if told else ""
