"""Names of the detector's tensors: ours, which are the published ones, and those of Hugging Face's
DeformableDetr.

The names of the models on the hub are written, because every version of transformers reads them.
These and the names that version 5 has in memory are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from util.checkpoint import MASK_HEAD
from util.errors import UserError

# places in the pairs below
_OURS, _HUB = 0, 1
# beginnings of names; those of the heads are the same
_BEGINNINGS = (
    ("backbone.0.body.", "model.backbone.conv_encoder.model."),
    ("backbone.1.row_embed.", "model.position_embedding.row_embeddings."),
    ("backbone.1.col_embed.", "model.position_embedding.column_embeddings."),
    ("query_embed.", "model.query_position_embeddings."),
    ("input_proj.", "model.input_proj."),
    ("transformer.", "model."),
)
# parts of a layer
_LAYER_PART = re.compile(r"((?:transformer|model)\.(encoder|decoder)\.layers\.\d+\.)(\w+)(\..+)")
_FEED_FORWARD = (("linear1", "fc1"), ("linear2", "fc2"))
_PARTS = {
    "encoder": (*_FEED_FORWARD, ("norm1", "self_attn_layer_norm"), ("norm2", "final_layer_norm")),
    "decoder": (
        *_FEED_FORWARD,
        ("cross_attn", "encoder_attn"),
        ("norm1", "encoder_attn_layer_norm"),
        ("norm2", "self_attn_layer_norm"),
        ("norm3", "final_layer_norm"),
    ),
}
# version 5, the hub
_NEWER = (
    (".backbone.model.", ".backbone.conv_encoder.model."),
    (".o_proj.", ".out_proj."),
    (".mlp.fc", ".fc"),
)
# tensors that have a second name: of position embeddings in version 4, of boxes with refinement, of
# classes in two-stage
_POSITIONS = ("model.position_embedding.", "model.backbone.position_embedding.")
_REFINED = ("bbox_embed.", "model.decoder.bbox_embed.")
_TWO_STAGE = ("class_embed.", "model.decoder.class_embed.")
# nn.MultiheadAttention's one tensor, and transformers' three
_FUSED = re.compile(r"(transformer\.decoder\.layers\.\d+\.self_attn\.)in_proj_(weight|bias)")
_SINGLE = re.compile(r"(transformer\.decoder\.layers\.\d+\.self_attn\.)([qkv])_proj\.(weight|bias)")
_MODULES = "transformer.bf."
_COUNT = "num_batches_tracked"


class Converted(NamedTuple):
    """weights: under Hugging Face's names. batchformer: those that it has no place for, under ours.
    left_out: our names of tensors that transformers does not have.
    """

    weights: dict[str, Tensor]
    batchformer: dict[str, Tensor]
    left_out: tuple[str, ...]


def to_hugging_face(state: Mapping[str, Tensor], with_box_refine: bool, two_stage: bool) -> Converted:
    """Our tensors under Hugging Face's names, each in memory of its own (safetensors has no shared
    tensors).
    """
    # each tensor once
    weights: dict[str, Tensor] = {}
    batchformer: dict[str, Tensor] = {}
    left_out = []
    for name, tensor in state.items():
        match = _FUSED.fullmatch(name)
        if name.endswith(_COUNT):
            left_out.append(name)  # frozen statistics, all that transformers has, count nothing
        elif name.startswith(MASK_HEAD):
            left_out.append(name)  # it has boxes only
        elif name.startswith(_MODULES):
            batchformer[name] = _unshared(tensor)
        elif match:
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                weights[_renamed(f"{match[1]}{letter}_proj.{match[2]}", _HUB)] = _unshared(third)
        else:
            weights[_renamed(name, _HUB)] = _unshared(tensor)

    # second names
    doubles = [_POSITIONS]
    if with_box_refine:
        doubles.append(_REFINED)
    if two_stage:
        doubles.append(_TWO_STAGE)
    for first, second in doubles:
        for name in list(weights):
            if name.startswith(first):
                weights[second + name.removeprefix(first)] = _unshared(weights[name])
    return Converted(weights, batchformer, tuple(left_out))


def from_hugging_face(
    weights: Mapping[str, Tensor], with_box_refine: bool, dec_layers: int, source: str
) -> dict[str, Tensor]:
    """The reverse of `to_hugging_face`. Heads that all layers share are given for each, though the
    file may have them once.

    Raises UserError if a part of an attention layer is missing.
    """
    state: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for hub_name, tensor in _single_names(weights).items():
        name = _renamed(hub_name, _OURS)
        match = _SINGLE.fullmatch(name)
        if match:
            thirds.setdefault(f"{match[1]}in_proj_{match[3]}", {})[match[2]] = tensor
        elif not name.endswith(_COUNT):
            state[name] = tensor

    # one tensor of the three parts of an attention layer
    for name, parts in thirds.items():
        if len(parts) < 3:
            raise UserError(
                f"{source} is damaged: of {name}'s three parts it has only {', '.join(sorted(parts))}"
            )
        state[name] = torch.cat([parts[letter] for letter in "qkv"])
    if with_box_refine:
        return state

    # one head for all layers
    shared = {}
    for name, tensor in state.items():
        if name.startswith(("class_embed.0.", "bbox_embed.0.")):
            for layer in range(dec_layers):
                shared[name.replace("_embed.0.", f"_embed.{layer}.", 1)] = tensor
    return shared | state


def _single_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The hub's names, one for each tensor."""
    first_names: dict[str, Tensor] = {}
    second_names: dict[str, Tensor] = {}
    is_bare = not any(name.startswith("model.") for name in weights)  # DeformableDetrModel's
    for name, tensor in weights.items():
        if is_bare:
            name = f"model.{name}"
        for newer, hub in _NEWER:
            name = name.replace(newer, hub)
        first_names[name] = tensor
        for first, second in (_POSITIONS, _REFINED, _TWO_STAGE):
            if name.startswith(second):
                second_names[first + name.removeprefix(second)] = first_names.pop(name)
    return second_names | first_names


def _unshared(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _renamed(name: str, target: int) -> str:
    """The name in the layout `target`, _OURS or _HUB, of a tensor in the other one."""
    source = 1 - target
    if match := _LAYER_PART.fullmatch(name):
        layer, coder, part, rest = match.groups()
        parts = {pair[source]: pair[target] for pair in _PARTS[coder]}
        name = layer + parts.get(part, part) + rest
    for pair in _BEGINNINGS:
        if name.startswith(pair[source]):
            return pair[target] + name.removeprefix(pair[source])
    return name
