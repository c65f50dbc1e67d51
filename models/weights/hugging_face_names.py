"""Names of the detector's tensors: ours, which are the published ones, and those of Hugging Face's
DeformableDetr.

The names of the models on the hub are written, because every version of transformers reads them.
These and the names that version 5 has in memory are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from util.errors import UserError

# ours, Hugging Face's; {n}: a number, {rest}: anything. The first that fits is used
_NAMES = (
    ("backbone.0.body.{rest}", "model.backbone.conv_encoder.model.{rest}"),
    ("backbone.1.row_embed.{rest}", "model.position_embedding.row_embeddings.{rest}"),
    ("backbone.1.col_embed.{rest}", "model.position_embedding.column_embeddings.{rest}"),
    ("query_embed.{rest}", "model.query_position_embeddings.{rest}"),
    ("input_proj.{rest}", "model.input_proj.{rest}"),
    ("transformer.encoder.layers.{n}.norm1.{rest}", "model.encoder.layers.{n}.self_attn_layer_norm.{rest}"),
    ("transformer.encoder.layers.{n}.norm2.{rest}", "model.encoder.layers.{n}.final_layer_norm.{rest}"),
    ("transformer.decoder.layers.{n}.cross_attn.{rest}", "model.decoder.layers.{n}.encoder_attn.{rest}"),
    (
        "transformer.decoder.layers.{n}.norm1.{rest}",
        "model.decoder.layers.{n}.encoder_attn_layer_norm.{rest}",
    ),
    ("transformer.decoder.layers.{n}.norm2.{rest}", "model.decoder.layers.{n}.self_attn_layer_norm.{rest}"),
    ("transformer.decoder.layers.{n}.norm3.{rest}", "model.decoder.layers.{n}.final_layer_norm.{rest}"),
    ("transformer.{coder}.layers.{n}.linear1.{rest}", "model.{coder}.layers.{n}.fc1.{rest}"),
    ("transformer.{coder}.layers.{n}.linear2.{rest}", "model.{coder}.layers.{n}.fc2.{rest}"),
    ("transformer.{rest}", "model.{rest}"),
    ("{rest}", "{rest}"),  # the heads
)
_PARTS = {"n": r"\d+", "coder": "encoder|decoder", "rest": ".+"}
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
    left_out: our names of tensors that transformers does not need.
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
        elif name.startswith(_MODULES):
            batchformer[name] = _unshared(tensor)
        elif match:
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                weights[_to_hub(f"{match[1]}{letter}_proj.{match[2]}")] = _unshared(third)
        else:
            weights[_to_hub(name)] = _unshared(tensor)

    # second names
    doubles = [_POSITIONS]
    if with_box_refine:
        doubles.append(_REFINED)
    if two_stage:
        doubles.append(_TWO_STAGE)
    for first, second in doubles:
        for name in [name for name in weights if name.startswith(first)]:
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
        name = _from_hub(hub_name)
        match = _SINGLE.fullmatch(name)
        if match:
            thirds.setdefault(f"{match[1]}in_proj_{match[3]}", {})[match[2]] = tensor
        elif not name.endswith(_COUNT):
            state[name] = tensor

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
        seconds = [pair for pair in (_POSITIONS, _REFINED, _TWO_STAGE) if name.startswith(pair[1])]
        if seconds:
            first, second = seconds[0]
            second_names[first + name.removeprefix(second)] = tensor
        else:
            first_names[name] = tensor
    return second_names | first_names


def _unshared(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _renaming(pairs: Iterable[tuple[str, str]]) -> Callable[[str], str]:
    """A function that renames by the first of the patterns that fits."""
    rules = []
    for source, target in pairs:
        pattern = re.escape(source)
        for part, matches in _PARTS.items():
            pattern = pattern.replace(re.escape(f"{{{part}}}"), f"(?P<{part}>{matches})")
        rules.append((re.compile(pattern), target))

    def rename(name: str) -> str:
        matches = ((rule.fullmatch(name), target) for rule, target in rules)
        return next(target.format(**match.groupdict()) for match, target in matches if match)

    return rename


_to_hub = _renaming(_NAMES)
_from_hub = _renaming((theirs, ours) for ours, theirs in _NAMES)
