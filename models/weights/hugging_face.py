"""The detector in the layout of Hugging Face: a folder with config.json and model.safetensors, as
transformers' DeformableDetrForObjectDetection reads and writes it. transformers itself is not
needed here. Read are also its older pytorch_model.bin, weights in several files with an index, and
a DeformableDetrModel, which has no heads.

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
from urllib.parse import urlparse

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.weights.hugging_face_names import Converted, from_hugging_face, to_hugging_face
from util.backbones import BACKBONES
from util.checkpoint import folder_given, is_address, local_file, read_checkpoint, temporary_name
from util.class_map import AUTO, ClassMap
from util.config import BackboneConfig, BatchFormerConfig, Config
from util.errors import NotSavedError, UserError
from util.other_layouts import in_our_layout

CONFIG, WEIGHTS, PROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"
BATCHFORMER = "batchformer.safetensors"
_OLD_WEIGHTS = "pytorch_model.bin"
_INDEX = ".index.json"  # of weights in several files
_ALL_WEIGHTS = (WEIGHTS, WEIGHTS + _INDEX, _OLD_WEIGHTS, _OLD_WEIGHTS + _INDEX)
_SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")
_PAGE = re.compile(r"https://huggingface\.co/[^/]+/[^/]+/?")
_NO_CLASS = "N/A"  # what the hub's COCO models call the labels that no category has
# what transformers calls the classes of a model that has no names
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


def is_hugging_face(source: str) -> bool:
    """Whether a path or address names this layout: a folder, a file of weights as they lie in one,
    or a model's page.
    """
    if is_address(source):
        return bool(_PAGE.fullmatch(source)) or urlparse(source).path.endswith(".safetensors")
    path = Path(source)
    in_folder = path.name in _ALL_WEIGHTS or _SHARD.fullmatch(path.name) or path.name == CONFIG
    return (
        path.suffix == ".safetensors" or path.is_dir() or bool(in_folder and path.with_name(CONFIG).is_file())
    )


def read_hugging_face(source: str, flag: str) -> dict[str, Any]:
    """A checkpoint in our layout: `model`, `args` and, if the classes have names, `classes`.

    Args:
        source: a folder, the safetensors file in it, that file's https address, or the address of a
            model's page.
        flag: to be named in errors.

    Without config.json beside it a safetensors file is another program's, with our names of
    tensors.

    Raises:
        UserError: it can't be read, or is no Deformable DETR that this program can build.
    """
    config_file, weights_file = _files_of(source, flag)
    weights = _read_weights(weights_file, flag)
    if not config_file.is_file():
        return in_our_layout(weights, str(weights_file))
    config = _read_json(config_file, flag)
    flags = flags_of(config, f"{flag} {config_file}") | _sizes_in(config_file.with_name(PROCESSOR), flag)
    state = from_hugging_face(
        weights, flags["with_box_refine"], flags["dec_layers"], f"{flag} {weights_file}"
    )
    if "class_embed.0.bias" in state:
        flags["num_classes"] = len(state["class_embed.0.bias"])
    if (beside := weights_file.with_name(BATCHFORMER)).is_file():
        modules, module_flags = _read_batchformer(beside, flag)
        state, flags = state | modules, flags | module_flags
    checkpoint = {"model": state, "args": _checked(flags, f"{flag} {config_file}")}
    labels = flags["num_classes"]
    classes = _classes_in(config, labels, f"{flag} {config_file}") if labels != AUTO else None
    return checkpoint | ({"classes": classes.to_plain()} if classes else {})


def write_hugging_face(
    state: Mapping[str, Tensor], config: Config, classes: ClassMap | None, folder: Path
) -> Converted:
    """Write the weights of the detector that `config` describes as a folder that transformers
    loads.

    Raises:
        UserError: transformers has no such model; `folder` exists.
        NotSavedError: it can't be written; nothing of the attempt is left.
    """
    refuse_what_transformers_lacks(config)
    if folder.exists():
        raise UserError(f"{folder} exists already; remove it or give another name")
    converted = to_hugging_face(state, config.transformer.with_box_refine, config.transformer.two_stage)
    num_classes = len(converted.weights["class_embed.0.bias"])
    temporary = temporary_name(folder)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(converted.weights, temporary / WEIGHTS, metadata={"format": "pt"})
        if converted.batchformer:
            save_file(converted.batchformer, temporary / BATCHFORMER, metadata=_batchformer_flags(config))
        (temporary / CONFIG).write_text(json.dumps(json_of(config, classes, num_classes), indent=2) + "\n")
        (temporary / PROCESSOR).write_text(json.dumps(_processor_of(config), indent=2) + "\n")
        temporary.replace(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise NotSavedError(
            f"{folder} could not be written ({getattr(error, 'strerror', None) or error})"
        ) from None
    return converted


# ---- config.json


def refuse_what_transformers_lacks(config: Config) -> None:
    """Raise UserError for a detector that transformers can't compute."""
    backbone = config.backbone
    lacking = {
        "--backbone_norm gn (its backbones are normalised by frozen statistics)": backbone.backbone_norm
        == "gn",
        f"--position_embedding_scale {backbone.position_embedding_scale}": (
            backbone.position_embedding_scale != BackboneConfig.position_embedding_scale
        ),
        "--eval_bf (nothing that relates the images of a batch)": config.batchformer.eval_bf,
    }
    for what, lacks in lacking.items():
        if lacks:
            raise UserError(
                f"transformers has no Deformable DETR with {what}: this checkpoint can't be converted"
            )


def json_of(config: Config, classes: ClassMap | None, num_classes: int) -> dict[str, Any]:
    """The contents of config.json."""
    if classes:
        names = dict.fromkeys(range(num_classes), _NO_CLASS) | classes.names
        ids = {_CATEGORY_IDS: {str(category.label): category.id for category in classes.categories}}
    else:
        names, ids = {label: f"LABEL_{label}" for label in range(num_classes)}, {}
    flags = config.flags()
    return {
        "architectures": ["DeformableDetrForObjectDetection"],
        "model_type": "deformable_detr",
        "use_timm_backbone": True,
        "use_pretrained_backbone": False,
        "backbone": BACKBONES[config.backbone.backbone].hugging_face,
        "backbone_config": None,
        **{field: flags[flag] for flag, fields in _FIELDS.items() for field in fields},
        "num_queries": config.transformer.num_queries,
        "two_stage_num_proposals": config.transformer.num_queries,
        "id2label": {str(label): name for label, name in names.items()},
        "label2id": {name: label for label, name in names.items()},
        **ids,
    }


def flags_of(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Our flags for the detector that a config.json describes.

    Raises UserError if this program can't build it.
    """
    if config.get("model_type") != "deformable_detr":
        raise UserError(f"{source} is of no Deformable DETR: its model_type is {config.get('model_type')!r}")
    flags = {
        **Config().flags(),
        "backbone": _backbone_in(config, source),
    }  # what is not said has transformers' default, and ours
    for flag, fields in _FIELDS.items():
        values = [config[field] for field in fields if config.get(field) is not None]
        if any(value != values[0] for value in values):
            raise UserError(
                f"{source} can't be used: its {' and '.join(fields)} differ, and here both are --{flag}"
            )
        if values:
            flags[flag] = values[0]
    queries = config.get("two_stage_num_proposals" if flags["two_stage"] else "num_queries")
    return flags | ({} if queries is None else {"num_queries": queries})


def _checked(flags: Mapping[str, Any], source: str) -> dict[str, Any]:
    try:
        return Config().with_flags(flags).flags()
    except UserError as error:
        raise UserError(f"{source} can't be used: {error}") from None


def _backbone_in(config: Mapping[str, Any], source: str) -> str:
    """The name of the backbone here."""
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
    """The classes that have names; without category ids, as in files of others, labels are ids."""
    try:
        ids = config.get(_CATEGORY_IDS) or {}
        names = {int(label): name for label, name in (config.get("id2label") or {}).items()}
        categories = [
            (label, ids.get(str(label), label), name)
            for label, name in sorted(names.items())
            if name != _NO_CLASS and not _UNNAMED.fullmatch(name)
        ]
        return (
            ClassMap.from_plain({"num_classes": num_classes, "categories": categories})
            if categories
            else None
        )
    except (AttributeError, TypeError, ValueError):
        raise UserError(
            f"{source} is damaged: its id2label or {_CATEGORY_IDS} can't be those of {num_classes} logits"
        ) from None


def _processor_of(config: Config) -> dict[str, Any]:
    """The contents of preprocessor_config.json: the sizes of our evaluation. The rest is
    transformers' default, and ours.
    """
    size = {"shortest_edge": config.data.eval_size, "longest_edge": config.data.max_size}
    return {"image_processor_type": "DeformableDetrImageProcessor", "size": size}


def _sizes_in(processor: Path, flag: str) -> dict[str, Any]:
    """The image sizes in preprocessor_config.json, if it is there and says others than the
    published ones.
    """
    if not processor.is_file():
        return {}
    content = _read_json(processor, flag)
    size = content.get("size")
    if not isinstance(size, dict):  # as older versions wrote it
        size = {"shortest_edge": size, "longest_edge": content.get("max_size")}
    sizes = {"eval_size": size.get("shortest_edge"), "max_size": size.get("longest_edge")}
    if (
        not all(isinstance(value, int) for value in sizes.values())
        or sizes.items() <= Config().flags().items()
    ):
        return {}
    # or max_size might not fit the published ones
    return {**sizes, "train_sizes": [sizes["eval_size"]]}


# ---- files


def _files_of(source: str, flag: str) -> tuple[Path, Path]:
    """Paths of config.json, which may be lacking, and of the weights or their index; fetched if
    they are elsewhere.
    """
    if is_address(source):
        is_page = _PAGE.fullmatch(source)
        weights_at = (
            source.rstrip("/") + f"/resolve/main/{WEIGHTS}"
            if is_page
            else source.replace("/blob/", "/resolve/")
        )
        return local_file(weights_at.rpartition("/")[0] + f"/{CONFIG}", flag), local_file(weights_at, flag)
    path = Path(source)
    if path.is_file() and path.name not in (CONFIG, *_ALL_WEIGHTS) and not _SHARD.fullmatch(path.name):
        return path.with_name(CONFIG), path
    folder = path if path.is_dir() else path.parent
    weights = next((folder / name for name in _ALL_WEIGHTS if (folder / name).is_file()), None)
    if weights is None and any(folder.glob("*.pth")):
        raise folder_given(flag, folder)
    if weights is None or not path.exists():
        raise UserError(
            f"{flag} {source} has no {WEIGHTS} in it; give a folder with {CONFIG} and {WEIGHTS}, "
            f"or a .pth file"
        )
    return folder / CONFIG, weights


def _read_json(path: Path, flag: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{flag} {path} can't be read: it must hold a JSON object")
    return content


def _read_weights(path: Path, flag: str) -> dict[str, Tensor]:
    if path.name.endswith(_INDEX):
        return _read_shards(path, flag)
    return read_checkpoint(path, flag) if path.suffix == ".bin" else _read_safetensors(path, flag)[0]


def _read_shards(index: Path, flag: str) -> dict[str, Tensor]:
    """The tensors of all files that an index names, which lie beside it."""
    places = _read_json(index, flag).get("weight_map")
    names = (
        sorted(set(places.values()))
        if isinstance(places, dict) and all(map(_is_shard, places.values()))
        else []
    )
    if not names:
        raise UserError(f"{flag} {index} is damaged: its weight_map must map tensors to files beside it")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise UserError(
            f"{flag} {index} names {missing[0]}, which is not there: fetch all {len(names)} files "
            f"of the weights"
        )
    weights: dict[str, Tensor] = {}
    for name in names:
        weights |= _read_weights(index.parent / name, flag)
    if lacking := sorted(places.keys() - weights.keys()):
        raise UserError(
            f"{flag} {places[lacking[0]]} is damaged: it lacks the tensor {lacking[0]}, which "
            f"{index} says it has"
        )
    return weights


def _is_shard(name: Any) -> bool:
    return isinstance(name, str) and bool(_SHARD.fullmatch(name))


def _read_safetensors(path: Path, flag: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{flag} {path} is damaged or no safetensors file ({error})") from None


def _read_batchformer(path: Path, flag: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The modules of BatchFormerV2 and its flags."""
    modules, metadata = _read_safetensors(path, flag)
    try:
        return modules, {name: json.loads(metadata[name]) for name in _BATCHFORMER_FLAGS}
    except (KeyError, ValueError):
        raise UserError(
            f"{flag} {path} is damaged: it lacks flags of BatchFormerV2; remove it to go on without"
        ) from None


def _batchformer_flags(config: Config) -> dict[str, str]:
    flags = config.flags()
    return {name: json.dumps(flags[name]) for name in _BATCHFORMER_FLAGS}
