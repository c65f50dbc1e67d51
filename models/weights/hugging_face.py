"""The detector in the layout of Hugging Face: a folder with config.json and model.safetensors, as
transformers' DeformableDetrForObjectDetection reads and writes it. transformers itself is not
needed here. Its older pytorch_model.bin, weights in several files with an index, and a
DeformableDetrModel, which has no heads, can be read, too.

What transformers has no place for lies where it does not look: the category ids in an entry of
config.json, the weights of BatchFormerV2 with their flags in batchformer.safetensors.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from models.weights.hugging_face_files import (
    CONFIG,
    WEIGHTS,
    files_of,
    read_json,
    read_safetensors,
    read_weights,
)
from models.weights.hugging_face_names import Converted, from_hugging_face, to_hugging_face
from util.atomic import temporary_name
from util.backbones import BACKBONES
from util.class_map import ClassMap
from util.config import BackboneConfig, BatchFormerConfig, Config
from util.errors import NotSavedError, UserError
from util.other_layouts import in_our_layout

PROCESSOR = "preprocessor_config.json"
BATCHFORMER = "batchformer.safetensors"
_NO_CLASS = "N/A"  # in the hub's COCO models: the name of a label that no category has
# transformers' names of the classes of a model that has no names
_UNNAMED = re.compile(r"LABEL_\d+")
_CATEGORY_IDS = "category_ids"

# flag -> the fields of config.json that must equal it
_FIELDS = {
    "hidden_dim": ("d_model",),
    "enc_layers": ("encoder_layers",),
    "dec_layers": ("decoder_layers",),
    "nheads": ("encoder_attention_heads", "decoder_attention_heads"),
    "dim_feedforward": ("encoder_ffn_dim", "decoder_ffn_dim"),
    "enc_n_points": ("encoder_n_points",),
    "dec_n_points": ("decoder_n_points",),
    "num_feature_levels": ("num_feature_levels",),
    "with_box_refine": ("with_box_refine",),
    "two_stage": ("two_stage",),
    "dilation": ("dilation",),
    "position_embedding": ("position_embedding_type",),
    "dropout": ("dropout",),
}
_BATCHFORMER_FLAGS = tuple(BatchFormerConfig.__dataclass_fields__)


def read_hugging_face(source: str, flag: str) -> dict[str, Any]:
    """A checkpoint in our layout: `model`, `args` and, if the classes have names, `classes`.

    Args:
        source: a folder, the safetensors file in it, that file's https address, or the address of a
            model's page.
        flag: to be named in errors.

    A safetensors file without config.json beside it is another program's, with our names of
    tensors.

    Raises:
        UserError: it can't be read, or is no Deformable DETR that this program can build.
    """
    config_file, weights_file = files_of(source, flag)
    weights = read_weights(weights_file, flag)
    if not config_file.is_file():
        return in_our_layout(weights, str(weights_file))

    # the detector that config.json describes
    where = f"{flag} {config_file}"
    config = read_json(config_file, flag)
    flags = read_flags(config, where) | _sizes_in(config_file.with_name(PROCESSOR), flag)
    state = from_hugging_face(
        weights, flags["with_box_refine"], flags["dec_layers"], f"{flag} {weights_file}"
    )
    # the number of classes is that of the weights
    bias = state.get("class_embed.0.bias")
    if bias is not None:
        flags["num_classes"] = len(bias)

    # what transformers has no place for
    beside = weights_file.with_name(BATCHFORMER)
    if beside.is_file():
        modules, module_flags = _read_batchformer(beside, flag)
        state, flags = state | modules, flags | module_flags
    # a detector of transformers may be none that can be built here
    try:
        checkpoint = {"model": state, "args": Config().with_flags(flags).flags()}
    except UserError as error:
        raise UserError(f"{where} can't be used: {error}") from None
    if bias is not None and (classes := _classes_in(config, len(bias), where)):
        checkpoint["classes"] = classes.to_plain()
    return checkpoint


def write_hugging_face(
    state: Mapping[str, Tensor], config: Config, classes: ClassMap | None, folder: Path
) -> Converted:
    """Write the weights of the detector that `config` describes as a folder that transformers
    loads.

    Raises:
        UserError: transformers has no such model; `folder` exists.
        NotSavedError: it can't be written; nothing of the attempt is left.
    """
    refuse_unknown_to_transformers(config)
    if folder.exists():
        raise UserError(f"{folder} exists already; remove it or give another name")
    converted = to_hugging_face(state, config.transformer.with_box_refine, config.transformer.two_stage)
    num_classes = len(converted.weights["class_embed.0.bias"])

    # written under another name, so that the folder is whole or not there
    temporary = temporary_name(folder)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(converted.weights, temporary / WEIGHTS, metadata={"format": "pt"})
        if converted.batchformer:
            flags = config.flags()
            metadata = {name: json.dumps(flags[name]) for name in _BATCHFORMER_FLAGS}
            save_file(converted.batchformer, temporary / BATCHFORMER, metadata=metadata)
        _write_json(temporary / CONFIG, json_of(config, classes, num_classes))
        _write_json(temporary / PROCESSOR, _processor_of(config))
        temporary.replace(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise NotSavedError(f"{folder} could not be written ({reason})") from None
    return converted


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


# ---- config.json


def refuse_unknown_to_transformers(config: Config) -> None:
    """Raise UserError for a detector that transformers can't compute."""
    if unknown := unknown_to_transformers(config):
        raise UserError(
            f"transformers has no Deformable DETR with {unknown}: this checkpoint can't be converted"
        )


def unknown_to_transformers(config: Config) -> str:
    """The flag with which transformers can't compute the detector; "" if it can."""
    scale = config.backbone.position_embedding_scale
    if config.backbone.backbone_norm == "gn":
        return "--backbone_norm gn (its backbones are normalised by frozen statistics)"
    if scale != BackboneConfig.position_embedding_scale:
        return f"--position_embedding_scale {scale}"
    if config.batchformer.eval_bf:
        return "--eval_bf (nothing that relates the images of a batch)"
    return ""


def json_of(config: Config, classes: ClassMap | None, num_classes: int) -> dict[str, Any]:
    """The contents of config.json."""
    # sizes of the detector
    flags = config.flags()
    content = {
        "architectures": ["DeformableDetrForObjectDetection"],
        "model_type": "deformable_detr",
        "use_timm_backbone": True,
        "use_pretrained_backbone": False,
        "backbone": BACKBONES[config.backbone.backbone].hugging_face,
        "backbone_config": None,
        "num_queries": config.transformer.num_queries,
        "two_stage_num_proposals": config.transformer.num_queries,
    }
    for flag, names_there in _FIELDS.items():
        content |= dict.fromkeys(names_there, flags[flag])

    # classes
    names = {label: f"LABEL_{label}" for label in range(num_classes)}
    if classes:
        names = dict.fromkeys(range(num_classes), _NO_CLASS) | classes.names
        content[_CATEGORY_IDS] = {str(category.label): category.id for category in classes.categories}
    content["id2label"] = {str(label): name for label, name in names.items()}
    content["label2id"] = {name: label for label, name in names.items()}
    return content


def read_flags(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Our flags for the detector that a config.json describes.

    Raises UserError if this program can't build it.
    """
    if config.get("model_type") != "deformable_detr":
        raise UserError(f"{source} is of no Deformable DETR: its model_type is {config.get('model_type')!r}")
    # fields that are not there have transformers' defaults, which are ours
    flags = {**Config().flags(), "backbone": _backbone_in(config, source)}
    for flag, names in _FIELDS.items():
        values = [config[name] for name in names if config.get(name) is not None]
        if any(value != values[0] for value in values):
            raise UserError(
                f"{source} can't be used: its {' and '.join(names)} differ, and here both are --{flag}"
            )
        if values:
            flags[flag] = values[0]
    # proposals take the place of learned queries
    queries = config.get("two_stage_num_proposals" if flags["two_stage"] else "num_queries")
    if queries is not None:
        flags["num_queries"] = queries
    return flags


def _backbone_in(config: Mapping[str, Any], source: str) -> str:
    """The name of the backbone here."""
    # a table of its own in newer files, a name in older ones
    own = config.get("backbone_config") or {"backbone": config.get("backbone") or "resnet50"}
    name = str(own.get("backbone")).split(".")[0]  # what follows names a set of pretrained weights
    ours = {entry.hugging_face: entry.name for entry in BACKBONES.values()}
    if name not in ours:
        raise UserError(
            f"{source} can't be used: its backbone is {own.get('backbone')!r}; here it can be "
            f"{', '.join(ours)}"
        )
    return ours[name]


def _classes_in(config: Mapping[str, Any], num_classes: int, source: str) -> ClassMap | None:
    """The classes that have names. Files of other programs have no category ids; then labels are
    ids.
    """
    # names that stand for "no name" are no classes
    try:
        ids = config.get(_CATEGORY_IDS) or {}
        names = {int(label): name for label, name in (config.get("id2label") or {}).items()}
        categories = [
            (label, ids.get(str(label), label), name)
            for label, name in sorted(names.items())
            if name != _NO_CLASS and not _UNNAMED.fullmatch(name)
        ]
        if not categories:
            return None
        return ClassMap.from_plain({"num_classes": num_classes, "categories": categories})
    except (AttributeError, TypeError, ValueError):
        raise UserError(
            f"{source} is damaged: its id2label or {_CATEGORY_IDS} can't be those of {num_classes} logits"
        ) from None


# ---- the other files


def _processor_of(config: Config) -> dict[str, Any]:
    """The contents of preprocessor_config.json: the image sizes of our evaluation. The rest is
    transformers' default, and ours.
    """
    size = {"shortest_edge": config.data.eval_size, "longest_edge": config.data.max_size}
    return {"image_processor_type": "DeformableDetrImageProcessor", "size": size}


def _sizes_in(processor: Path, flag: str) -> dict[str, Any]:
    """The image sizes in preprocessor_config.json, if there are any other than the published ones."""
    if not processor.is_file():
        return {}
    content = read_json(processor, flag)
    size = content.get("size")
    if not isinstance(size, dict):  # as older versions wrote it
        size = {"shortest_edge": size, "longest_edge": content.get("max_size")}
    eval_size, max_size = size.get("shortest_edge"), size.get("longest_edge")
    if not isinstance(eval_size, int) or not isinstance(max_size, int):
        return {}
    published = Config().data
    if (eval_size, max_size) == (published.eval_size, published.max_size):
        return {}
    # the published sizes of training might exceed max_size
    return {"eval_size": eval_size, "max_size": max_size, "train_sizes": [eval_size]}


def _read_batchformer(path: Path, flag: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The modules of BatchFormerV2 and its flags."""
    modules, metadata = read_safetensors(path, flag)
    # the flags are JSON in the metadata
    try:
        return modules, {name: json.loads(metadata[name]) for name in _BATCHFORMER_FLAGS}
    except (KeyError, ValueError):
        raise UserError(
            f"{flag} {path} is damaged: flags of BatchFormerV2 are missing; remove it to go on without"
        ) from None
