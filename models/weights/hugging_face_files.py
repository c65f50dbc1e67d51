"""The files of Hugging Face's layout: which ones there are, and what is in them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from safetensors import SafetensorError, safe_open
from torch import Tensor

from util.checkpoint import folder_given, is_address, local_file, read_checkpoint
from util.errors import UserError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_OLD_WEIGHTS = "pytorch_model.bin"
_INDEX = ".index.json"  # of weights in several files
_ALL_WEIGHTS = (WEIGHTS, WEIGHTS + _INDEX, _OLD_WEIGHTS, _OLD_WEIGHTS + _INDEX)
# one of several files of weights
_SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")
_PAGE = re.compile(r"https://huggingface\.co/[^/]+/[^/]+/?")


def is_hugging_face(source: str) -> bool:
    """Whether a path or address names this layout: a folder, a file of weights as they lie in one,
    or a model's page.
    """
    if is_address(source):
        return bool(_PAGE.fullmatch(source)) or urlparse(source).path.endswith(".safetensors")
    path = Path(source)
    if path.is_dir() or path.suffix == ".safetensors":
        return True
    # a .bin or .json alone may be of any program
    return _is_of_folder(path.name) and path.with_name(CONFIG).is_file()


def _is_of_folder(name: str) -> bool:
    """Whether a file of this name is one of a folder in this layout."""
    return name in (CONFIG, *_ALL_WEIGHTS) or bool(_SHARD.fullmatch(name))


def files_of(source: str, flag: str) -> tuple[Path, Path]:
    """Paths of config.json, which may be missing, and of the weights or their index; downloaded if
    `source` is an address.
    """
    # on the hub
    if is_address(source):
        address = source.replace("/blob/", "/resolve/")
        if _PAGE.fullmatch(source):
            address = f"{source.rstrip('/')}/resolve/main/{WEIGHTS}"
        folder_address = address.rpartition("/")[0]
        return local_file(f"{folder_address}/{CONFIG}", flag), local_file(address, flag)

    # a file of another name is taken as it is
    path = Path(source)
    if path.is_file() and not _is_of_folder(path.name):
        return path.with_name(CONFIG), path

    # else the folder decides
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


def read_json(path: Path, flag: str) -> dict[str, Any]:
    """Raises UserError unless the file holds a JSON object."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{flag} {path} can't be read: it must hold a JSON object")
    return content


def read_weights(path: Path, flag: str) -> dict[str, Tensor]:
    """The tensors of a file, or of all files that an index names. Raises UserError."""
    if path.name.endswith(_INDEX):
        return _read_shards(path, flag)
    # a pickle, of which nothing is executed
    if path.suffix == ".bin":
        return read_checkpoint(path, flag)
    return read_safetensors(path, flag)[0]


def _read_shards(index: Path, flag: str) -> dict[str, Tensor]:
    # the files, which must lie beside the index
    places = read_json(index, flag).get("weight_map")
    if (
        not isinstance(places, dict)
        or not places
        or not all(_SHARD.fullmatch(str(name)) for name in places.values())
    ):
        raise UserError(f"{flag} {index} is damaged: its weight_map must map tensors to files beside it")
    names = sorted(set(places.values()))
    for name in names:
        if not (index.parent / name).is_file():
            raise UserError(
                f"{flag} {index} names {name}, which is not there: download all {len(names)} files "
                f"of the weights"
            )

    # their tensors
    weights: dict[str, Tensor] = {}
    for name in names:
        weights |= read_weights(index.parent / name, flag)
    for tensor in sorted(places.keys() - weights.keys()):
        raise UserError(
            f"{flag} {places[tensor]} is damaged: it does not have the tensor {tensor}, which {index} "
            f"says it has"
        )
    return weights


def read_safetensors(path: Path, flag: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata. Raises UserError."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{flag} {path} is damaged or no safetensors file ({error})") from None
