"""Names of the detector's tensors: ours, which are the published ones, and those of Hugging Face's
DeformableDetr.

Written are the names of the models on the hub, which every version of transformers reads; read are
those and the names that version 5 has in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from util.errors import UserError

# ours, Hugging Face's; {n}: a number, {rest}: anything. The first that fits counts
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
_REFINED = (("bbox_embed.", "model.decoder.bbox_embed."),)
_TWO_STAGE = (("class_embed.", "model.decoder.class_embed."),)
# version 5, version 4
_POSITIONS = (("model.position_embedding.", "model.backbone.position_embedding."),)
# nn.MultiheadAttention's one tensor, and transformers' three
_FUSED = re.compile(r"(transformer\.decoder\.layers\.\d+\.self_attn\.)in_proj_(weight|bias)")
_SINGLE = re.compile(r"(transformer\.decoder\.layers\.\d+\.self_attn\.)([qkv])_proj\.(weight|bias)")
_MODULES = "transformer.bf."
_COUNT = "num_batches_tracked"


class Converted(NamedTuple):
    """weights: under Hugging Face's names; batchformer: those that it has no place for, under ours;
    left_out: names of ours with which nothing is lost.
    """

    weights: dict[str, Tensor]
    batchformer: dict[str, Tensor]
    left_out: tuple[str, ...]


def to_hugging_face(state: Mapping[str, Tensor], with_box_refine: bool, two_stage: bool) -> Converted:
    """Our tensors under Hugging Face's names, each in memory of its own (safetensors has no shared
    tensors).
    """
    weights: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(_MODULES) or name.endswith(_COUNT):
            continue
        if match := _FUSED.fullmatch(name):
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                weights[_to_hub(f"{match[1]}{letter}_proj.{match[2]}")] = part
        else:
            weights[_to_hub(name)] = tensor
    twice = (*_POSITIONS, *(_REFINED if with_box_refine else ()), *(_TWO_STAGE if two_stage else ()))
    for first, second in twice:
        weights |= {
            second + name.removeprefix(first): x for name, x in weights.items() if name.startswith(first)
        }
    return Converted(
        _unshared(weights),
        _unshared({name: tensor for name, tensor in state.items() if name.startswith(_MODULES)}),
        # frozen statistics, all that transformers has, count nothing
        tuple(name for name in state if name.endswith(_COUNT)),
    )


def from_hugging_face(
    weights: Mapping[str, Tensor], with_box_refine: bool, dec_layers: int, source: str
) -> dict[str, Tensor]:
    """The reverse of `to_hugging_face`; heads that all layers share are given for each, though the
    file may have them once.

    Raises UserError if a part of an attention layer is missing.
    """
    state: dict[str, Tensor] = {}
    fused: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _single_names(weights).items():
        name = _from_hub(name)
        if match := _SINGLE.fullmatch(name):
            fused.setdefault(f"{match[1]}in_proj_{match[3]}", {})[match[2]] = tensor
        elif not name.endswith(_COUNT):
            state[name] = tensor
    for name, parts in fused.items():
        if len(parts) < 3:
            raise UserError(
                f"{source} is damaged: of {name}'s three parts it has only {', '.join(sorted(parts))}"
            )
        state[name] = torch.cat([parts[letter] for letter in "qkv"])
    return state if with_box_refine else _shared_heads(state, dec_layers) | state


def _single_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The hub's names, one for each tensor."""
    named: dict[str, Tensor] = {}
    again: dict[str, Tensor] = {}
    # what DeformableDetrModel saves
    without_heads = not any(name.startswith("model.") for name in weights)
    for name, tensor in weights.items():
        name = f"model.{name}" if without_heads else name
        for newer, hub in _NEWER:
            name = name.replace(newer, hub)
        for first, second in (*_POSITIONS, *_REFINED, *_TWO_STAGE):
            if name.startswith(second):
                again[first + name.removeprefix(second)] = tensor
                break
        else:
            named[name] = tensor
    return again | named


def _shared_heads(state: Mapping[str, Tensor], dec_layers: int) -> dict[str, Tensor]:
    return {
        name.replace("_embed.0.", f"_embed.{layer}.", 1): tensor
        for name, tensor in state.items()
        if name.startswith(("class_embed.0.", "bbox_embed.0."))
        for layer in range(dec_layers)
    }


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }


def _renaming(pairs: tuple[tuple[str, str], ...]) -> Callable[[str], str]:
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
_from_hub = _renaming(tuple((theirs, ours) for ours, theirs in _NAMES))
