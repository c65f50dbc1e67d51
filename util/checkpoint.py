"""Checkpoint files, and the weights in them.

A file ends with the SHA-256 of all bytes before it, as the comment that the zip format allows
there; it shows whether the file is damaged. The checksums of the zip format miss some damage
(docs/reliability.md). Reading executes nothing that is pickled in a file: tensors, numbers, strings
and containers are data, an argparse.Namespace holds such data, and everything else is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from util.atomic import written_aside
from util.errors import NotSavedError, UserError
from util.other_layouts import in_our_layout

ONNX, PT2 = ".onnx", ".pt2"  # files of tools/export.py
BATCHFORMER = "transformer.bf."  # its weights
MASK_HEAD = "mask_head."
# what published checkpoints have in the second name of a head, and of BatchFormerV2
_ALIAS = r"^transformer\.decoder\.(?=(class|bbox)_embed\.)|(?<=^transformer\.)encoder\.(?=bf\.)"
_MEANINGLESS = ("total_params", "total_ops")  # left by a profiler
_OPTIONAL = "num_batches_tracked"  # frozen statistics do not have it, and nothing here uses it
# part of a name (a pattern) -> the flags that decide its existence or shape, the likeliest first
_FLAGS = {
    "class_embed": "--num_classes, --dec_layers or --with_box_refine",
    "bbox_embed": "--with_box_refine, --two_stage or --dec_layers",
    "mask_head": "--masks, --hidden_dim or --num_feature_levels",
    "query_embed": "--num_queries, --two_stage or --hidden_dim",
    "reference_points|enc_output|pos_trans": "--two_stage or --hidden_dim",
    BATCHFORMER: "--share_bf, --bt_num_layers, --insert_idx or --bf",
    "level_embed": "--num_feature_levels or --hidden_dim",
    r"encoder.*self_attn\.(sampling|attention)_": "--enc_n_points, --num_feature_levels or --nheads",
    r"decoder.*cross_attn\.(sampling|attention)_": "--dec_n_points, --num_feature_levels or --nheads",
    "linear[12]": "--dim_feedforward or --hidden_dim",
    "coder.layers": "--enc_layers, --dec_layers or --hidden_dim",
    "input_proj": "--num_feature_levels, --backbone or --hidden_dim",
    "backbone.1": "--position_embedding",
    "backbone": "--backbone or --backbone_norm",
}


@dataclass(frozen=True)
class LoadReport:
    """Names of tensors: `missing` in the file, or `unexpected`, only in it. `flag` named `source`."""

    source: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    flag: str = "--resume"

    def require_same_architecture(self, may_lack: tuple[str, ...] = (BATCHFORMER,)) -> None:
        """Raise UserError for missing names, except those that begin with one of `may_lack`, and
        for unexpected ones, except those of BatchFormerV2.
        """
        missing, unexpected = _without(self.missing, may_lack), _without(self.unexpected, (BATCHFORMER,))
        for kind, names in (("has no", missing), ("has the unknown", unexpected)):
            if not names:
                continue
            # a whole layer too many or too few
            layer = re.search(r"transformer\.(enc|dec)oder\.layers\.", names[0])
            flags = f"--{layer[1]}_layers" if layer else _flags_for(names[0])
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"{self.flag} {self.source} is of another architecture: it {kind} {names[0]}{more}; "
                f"probably {flags} differ"
            )

    def batchformer(self) -> list[str]:
        """What became of the weights of BatchFormerV2, if not all of them were loaded."""
        lines = []
        for names, what in (
            (self.missing, "initialised, not in the checkpoint"),
            (self.unexpected, "skipped, which this run does not use"),
        ):
            if count := sum(name.startswith(BATCHFORMER) for name in names):
                lines.append(f"BatchFormerV2: {count} tensors {what}")
        return lines

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.loaded)} tensors loaded"]
        for kind, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if others := _without(names, (BATCHFORMER,)):
                lines.append(f"{kind}: {', '.join(others)}")
        return "; ".join(lines + self.batchformer())


def _without(names: Iterable[str], prefixes: tuple[str, ...]) -> list[str]:
    return [name for name in names if not name.startswith(prefixes)]


def _flags_for(name: str) -> str:
    likely = (flags for pattern, flags in _FLAGS.items() if re.search(pattern, name))
    return next(likely, "the architecture's flags")


def load_weights(model: nn.Module, path_or_url: str) -> LoadReport:
    """Load the weights of a checkpoint, published or ours, into `model`.

    Raises UserError if the file can't be read or holds more than data, or if a tensor has another
    shape; the message names the flag that probably differs.
    """
    return load_state(model, read_checkpoint(path_or_url), str(path_or_url))


def load_state(
    model: nn.Module, checkpoint: Mapping[str, Any], source: str, flag: str = "--resume"
) -> LoadReport:
    """Like `load_weights`, for a checkpoint that has been read. Errors name `flag`."""
    state = weights_of(checkpoint, source, flag)
    own = model.state_dict(keep_vars=True)
    known = {name: tensor for name, tensor in state.items() if name in own}
    refused = f"{flag} {source} does not fit:"

    # names of one tensor in the model must have one value in the file
    first_names: dict[int, str] = {}
    for name, tensor in known.items():
        there, here = list(tensor.shape), list(own[name].shape)
        if there != here:
            raise UserError(
                f"{refused} {name} is {there} there and {here} here; probably {_flags_for(name)} differ"
            )
        twin = first_names.setdefault(id(own[name]), name)
        if twin != name and not torch.equal(known[twin], tensor):
            raise UserError(
                f"{refused} {twin} and {name} differ there and are one tensor here; "
                f"probably {_flags_for(name)} differ"
            )

    # the caller decides what may be missing
    model.load_state_dict(known, strict=False)
    missing = [name for name in own if name not in known and not name.endswith(_OPTIONAL)]
    unexpected = [name for name in state if name not in own and not name.endswith(_OPTIONAL)]
    return LoadReport(source, tuple(known), tuple(missing), tuple(unexpected), flag)


def weights_of(checkpoint: Mapping[str, Any], source: str, flag: str = "--resume") -> dict[str, Tensor]:
    """The weights of a checkpoint, one name for each: published aliases are folded, bookkeeping
    entries are left out.

    Raises UserError if they are not plain tensors.
    """
    refused = f"{flag} {source} is no checkpoint of a detector: its"
    state = checkpoint.get("model", checkpoint) if isinstance(checkpoint, Mapping) else None
    if not isinstance(state, Mapping):
        raise UserError(f"{refused} weights are no dict of tensors")
    weights: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or name.endswith(_MEANINGLESS):
            continue
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        if not plain or tensor.is_quantized or tensor.is_meta:
            raise UserError(f"{refused} entry {name!a} is no plain tensor")
        # a name of its own wins over its alias
        real = re.sub(_ALIAS, "", name)
        if real == name or real not in state:
            weights[real] = tensor
    return weights


def read_checkpoint(path_or_url: str | os.PathLike, flag: str = "--resume") -> dict[str, Any]:
    """The dict in a checkpoint file, on the CPU, with the weights of any program in `model`.

    Nothing in the file is executed. Raises UserError, which names `flag`.
    """
    given = str(path_or_url)
    if given.endswith(".safetensors") or Path(given, "config.json").is_file():
        raise UserError(
            f"{flag} {given} is in Hugging Face's layout; use python tools/convert_checkpoint.py "
            f"{given} <file>.pth, or train from it with --finetune"
        )

    # before torch.load: it reads some damaged files without an error
    path = local_file(given, flag)
    check_intact(path, flag)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in the reader
        name = re.search(r"GLOBAL (\S{1,100})", str(error))
        if name is None or not isinstance(error, pickle.UnpicklingError):
            raise unreadable(flag, path) from None
        what = ascii(name[1]).strip("'")  # whatever characters a hostile file has put there
        raise UserError(
            f"{flag} {path} was refused: it asks to run or build {what}, and a checkpoint may hold "
            "data only; nothing was executed. If you trust it, load it where it was made and save "
            "{'model': its state_dict()}"
        ) from None

    # a list of tensors is plain data too
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model", checkpoint), dict):
        raise UserError(
            f"{flag} {path} is no checkpoint: it must hold a dict of tensors, or one with the entry 'model'"
        )
    return in_our_layout(checkpoint, str(path))


def write_atomically(content: Any, path: Path) -> None:
    """torch.save with a checksum at the end, flushed to the disk; `path` is the old file or the new
    one.

    Raises NotSavedError if the file can't be written. Nothing of the attempt is left.
    """
    try:
        with written_aside(path) as temporary, open(temporary, "w+b") as file:
            torch.save(content, file)
            _seal(file)
            # else a loss of power after the renaming could leave an empty file
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        # torch.save turns a full disk into a RuntimeError that does not say so
        if isinstance(error, RuntimeError) and shutil.disk_usage(path.parent).free < 2**20:
            reason = "no space left on device"
        raise NotSavedError(
            f"{path} could not be written ({reason}); earlier checkpoints are untouched"
        ) from None


_SEAL = b"sha256:"
_SEAL_SIZE = len(_SEAL) + 64
_FOLDER = 0x10  # in an entry's external attributes


def _seal(file: BinaryIO) -> None:
    """Append the checksum of a zip file that torch.save has just written, as its comment."""
    size = file.seek(-2, os.SEEK_END) + 2
    assert file.read() == b"\0\0", "torch.save writes zip files without a comment"
    # the last two bytes are the length of the comment
    file.seek(size - 2)
    file.write(struct.pack("<H", _SEAL_SIZE))
    file.seek(0)
    digest = _digest(file, size)
    file.seek(size)
    file.write(_SEAL + digest)


def check_intact(path: Path, flag: str = "--resume") -> None:
    """Compare a file with its checksum: ours over the whole file, or those of a zip file's records.

    Raises UserError if it is damaged, can't be read, or is neither a zip file (which torch.save
    writes since version 1.6) nor a plain pickle.
    """
    intact = False
    # a damaged zip file can fail anywhere, in decompression too
    with contextlib.suppress(Exception), open(path, "rb") as file:
        intact = _intact(file)
    if not intact:
        raise unreadable(flag, path)


def _intact(file: BinaryIO) -> bool:
    # ours ends with the checksum of all before it
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - _SEAL_SIZE, 0))
    seal = file.read()
    file.seek(0)
    if seal.startswith(_SEAL):
        return _digest(file, size - _SEAL_SIZE) == seal.removeprefix(_SEAL)

    # published files; a pickle from before zip files has no checksum
    start = file.read(2)
    if start != b"PK":
        return start[:1] == pickle.PROTO
    with zipfile.ZipFile(file) as archive:
        # PyTorch does not read a record that is marked as a folder: its tensor would be arbitrary
        for entry in archive.infolist():
            if entry.external_attr & _FOLDER and not entry.is_dir():
                return False
        return archive.testzip() is None


def _digest(file: BinaryIO, size: int) -> bytes:
    """SHA-256 of the next `size` bytes, in hexadecimal digits."""
    digest, left = hashlib.sha256(), size
    while left and (block := file.read(min(left, 2**20))):
        digest.update(block)
        left -= len(block)
    return digest.hexdigest().encode()


def is_address(path_or_url: str) -> bool:
    return path_or_url.startswith(("https://", "http://"))


def local_file(path_or_url: str, flag: str) -> Path:
    """The file that `flag` names. An address is fetched once; PyTorch's cache keeps the file.

    Raises UserError if it does not exist or can't be fetched.
    """
    if not is_address(path_or_url):
        path = Path(path_or_url)
        if path.is_dir():
            raise folder_given(flag, path)
        if not path.is_file():
            raise UserError(
                f"{flag} {path} does not exist; give the path of a checkpoint file or an https address"
            )
        return path

    # a folder for every address: many have a file of the same name
    folder = Path(torch.hub.get_dir(), "checkpoints", hashlib.sha256(path_or_url.encode()).hexdigest()[:16])
    cached = folder / Path(urlparse(path_or_url).path).name
    if cached.exists():
        return cached
    # published files have a part of their digest in the name
    digest = re.search(r"-([0-9a-f]{8,})\.", cached.name)
    expected = digest[1] if digest else None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(path_or_url, str(cached), expected, progress=False)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{flag} {path_or_url} could not be downloaded ({error}); download it and give its path"
        ) from None
    return cached


def folder_given(flag: str, folder: Path) -> UserError:
    """The error for a folder instead of a file. It names the best checkpoint in it, or the newest."""
    checkpoints = sorted(folder.glob("checkpoint*.pth"))  # checkpoint_best.pth comes last
    example = f", such as {checkpoints[-1]}" if checkpoints else ""
    return UserError(f"{flag} {folder} is a folder; name a checkpoint in it{example}")


def is_exported(source: str | os.PathLike) -> bool:
    """Whether a name is that of an exported file, and not of a checkpoint."""
    return Path(source).suffix in (ONNX, PT2)


def unreadable(flag: str, path: Path) -> UserError:
    """The error for a file that is no checkpoint. It names what the file is, if that is known."""
    start = b""
    with contextlib.suppress(OSError), path.open("rb") as file:
        start = file.read(100).lstrip()
    what = "is damaged or no checkpoint (it may be truncated); take an earlier one, or --resume auto"
    # what is often saved under the name of a checkpoint
    if is_exported(path):
        what = "is an exported file, for tools/predict.py and load_detector alone; give the checkpoint"
    elif start.startswith(b"version https://git-lfs"):
        what = "is a pointer of Git LFS; fetch the file itself with git lfs pull"
    elif start.startswith(b"<"):
        what = "is a web page, which a server sends to ask for a login or a confirmation; download it again"
    return UserError(f"{flag} {path} {what}")
