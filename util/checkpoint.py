"""Files of checkpoints, and the weights in them.

Written aside, flushed and renamed, so that a crash never leaves a broken file. A file ends with the
SHA-256 of all before it, as the comment that the zip format allows there; a damaged file is told by
it. The zip format's own checksums miss some damage (docs/reliability.md). Read without executing
anything that is pickled in them: tensors, numbers, strings and containers are data, an
argparse.Namespace is a bag of such data, and everything else is refused by name.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from util.errors import NotSavedError, UserError
from util.other_layouts import in_our_layout

log = logging.getLogger(__name__)

BATCHFORMER = "transformer.bf."  # its weights
# published checkpoints name these tensors twice
_ALIASES = (
    ("transformer.decoder.class_embed.", "class_embed."),
    ("transformer.decoder.bbox_embed.", "bbox_embed."),
    ("transformer.encoder.bf.", BATCHFORMER),
)
_MEANINGLESS = ("total_params", "total_ops")  # a profiler's leftovers
# a count of batch normalisation, which frozen statistics don't have and which changes nothing where
# it is lacking
_OPTIONAL = "num_batches_tracked"
# part of a name -> the flags that decide its existence or shape, the likeliest first
_FLAGS = (
    ("class_embed", "--num_classes, --dec_layers or --with_box_refine"),
    ("bbox_embed", "--with_box_refine, --two_stage or --dec_layers"),
    ("query_embed", "--num_queries, --two_stage or --hidden_dim"),
    ("reference_points", "--two_stage or --hidden_dim"),
    ("enc_output", "--two_stage"),
    ("pos_trans", "--two_stage"),
    (BATCHFORMER, "--share_bf, --bt_num_layers, --insert_idx or --bf"),
    ("level_embed", "--num_feature_levels or --hidden_dim"),
    ("encoder.layers.{i}.self_attn.sampling_offsets", "--enc_n_points, --num_feature_levels or --nheads"),
    ("encoder.layers.{i}.self_attn.attention_weights", "--enc_n_points, --num_feature_levels or --nheads"),
    ("decoder.layers.{i}.cross_attn.sampling_offsets", "--dec_n_points, --num_feature_levels or --nheads"),
    ("decoder.layers.{i}.cross_attn.attention_weights", "--dec_n_points, --num_feature_levels or --nheads"),
    ("linear1", "--dim_feedforward or --hidden_dim"),
    ("linear2", "--dim_feedforward or --hidden_dim"),
    ("encoder.layers", "--enc_layers or --hidden_dim"),
    ("decoder.layers", "--dec_layers or --hidden_dim"),
    ("input_proj", "--num_feature_levels, --backbone or --hidden_dim"),
    ("running_", "--backbone_norm"),
    ("backbone.1", "--position_embedding"),
    ("backbone", "--backbone or --backbone_norm"),
)


@dataclass(frozen=True)
class LoadReport:
    """Names of tensors: loaded; missing in the file; unexpected, in the file only. flag: which
    named the file.
    """

    source: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    flag: str = "--resume"

    def require_same_architecture(self, may_lack: tuple[str, ...] = (BATCHFORMER,)) -> None:
        """Raise UserError for missing names, other than those that begin as `may_lack` says, and
        for unexpected ones, other than BatchFormerV2's.
        """
        for kind, names, fine in (
            ("lacks", self.missing, may_lack),
            ("has the unknown", self.unexpected, (BATCHFORMER,)),
        ):
            names = [name for name in names if not name.startswith(fine)]
            if names:
                raise UserError(
                    f"{self.flag} {self.source} is of another architecture: it {kind} "
                    f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}; probably "
                    f"{_flags_for_layer(names[0])} differ"
                )

    def batchformer(self) -> list[str]:
        """What became of BatchFormerV2's weights, where not all of them were loaded."""
        new, unused = (
            sum(name.startswith(BATCHFORMER) for name in names) for names in (self.missing, self.unexpected)
        )
        lines = [f"BatchFormerV2: {new} tensors made anew, which the checkpoint lacks"] if new else []
        return lines + (
            [f"BatchFormerV2: {unused} tensors skipped, which this run does not use"] if unused else []
        )

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.loaded)} tensors loaded"]
        for kind, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            names = [name for name in names if not name.startswith(BATCHFORMER)]
            lines += [f"{kind}: {', '.join(names)}"] if names else []
        return "; ".join(lines + self.batchformer())


def load_weights(model: nn.Module, path_or_url: str) -> LoadReport:
    """Load the weights of a checkpoint, published or ours, into `model`.

    Raises:
        UserError: the file can't be read or holds more than data; a tensor has another shape, or
        the file has different values for names that are one tensor in the model (the message names
        the flag that probably differs).
    """
    return load_state(model, read_checkpoint(path_or_url), str(path_or_url))


def load_state(
    model: nn.Module, checkpoint: Mapping[str, Any], source: str, flag: str = "--resume"
) -> LoadReport:
    """As `load_weights`, from a checkpoint that has been read; errors name `flag`."""
    state = weights_of(checkpoint, source, flag)
    own = model.state_dict(keep_vars=True)
    known = {name: tensor for name, tensor in state.items() if name in own}
    for name, tensor in known.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"{flag} {source} does not fit: {name} is {list(tensor.shape)} there and "
                f"{list(own[name].shape)} here; probably {_flags_for(name)} differ"
            )
    _check_tied(own, known, source, flag)
    model.load_state_dict(known, strict=False)
    return LoadReport(
        source,
        loaded=tuple(known),
        missing=tuple(name for name in own if name not in known and not name.endswith(_OPTIONAL)),
        unexpected=tuple(name for name in state if name not in own and not name.endswith(_OPTIONAL)),
        flag=flag,
    )


def weights_of(checkpoint: Mapping[str, Any], source: str, flag: str = "--resume") -> dict[str, Tensor]:
    """A checkpoint's weights under one name each: published aliases folded, bookkeeping entries
    left out.

    Raises UserError if they are something else than plain tensors.
    """
    state = checkpoint.get("model", checkpoint) if isinstance(checkpoint, Mapping) else None
    if not isinstance(state, Mapping):
        raise UserError(f"{flag} {source} is no checkpoint of a detector: its weights are no dict of tensors")
    named: dict[str, Tensor] = {}
    aliased: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or name.endswith(_MEANINGLESS):
            continue
        if (
            not isinstance(tensor, Tensor)
            or tensor.layout != torch.strided
            or tensor.is_quantized
            or tensor.is_meta
        ):
            raise UserError(
                f"{flag} {source} is no checkpoint of a detector: its entry {name!a} is no plain tensor"
            )
        for alias, real in _ALIASES:
            if name.startswith(alias):
                aliased[real + name.removeprefix(alias)] = tensor
                break
        else:
            named[name] = tensor
    return aliased | named


def read_checkpoint(path_or_url: str | os.PathLike, flag: str = "--resume") -> dict[str, Any]:
    """The dict in a checkpoint file, on the CPU, nothing executed; weights that other programs keep
    elsewhere are in `model`.

    Raises UserError, naming `flag`.
    """
    given = str(path_or_url)
    if given.endswith(".safetensors") or not is_address(given) and (Path(given) / "config.json").is_file():
        convert = f"python tools/convert_checkpoint.py {given} <file>.pth"
        raise UserError(
            f"{flag} {given} is in Hugging Face's layout; use {convert}, or train from it with --finetune"
        )
    path = local_file(given, flag)
    check_intact(path, flag)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S{1,100})", str(error))
        if name:
            told = ascii(name[1]).strip("'")  # whatever characters a hostile file has put there
            raise UserError(
                f"{flag} {path} was refused: it asks to run or build {told}, and a checkpoint may "
                f"hold data only; "
                "nothing was executed. If you trust it, load it where it was made and save "
                "{'model': its state_dict()}"
            ) from None
        raise unreadable(flag, path) from None
    except Exception as error:  # a damaged file can fail anywhere in the reader
        log.debug("reading %s", path, exc_info=error)
        raise unreadable(flag, path) from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model", checkpoint), dict):
        raise UserError(
            f"{flag} {path} is no checkpoint: it must hold a dict of tensors, or one with the entry 'model'"
        )
    return in_our_layout(checkpoint, str(path))


def write_atomically(content: Any, path: Path) -> None:
    """torch.save under a temporary name, sealed with its checksum, flushed to the disk, then
    renamed: `path` is the old file or the new one.

    Raises:
        NotSavedError: the file system would not have it; nothing of the attempt is left.
    """
    temporary = temporary_name(path)
    try:
        with open(temporary, "w+b") as file:
            torch.save(content, file)
            _seal(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save wraps a full disk in a RuntimeError
        _remove(temporary)
        reason = (
            error.strerror
            if isinstance(error, OSError)
            else _full_disk(path.parent) or str(error).splitlines()[0]
        )
        raise NotSavedError(
            f"{path} could not be written ({reason}); earlier checkpoints are untouched"
        ) from None
    except BaseException:
        _remove(temporary)
        raise


def temporary_name(path: Path) -> Path:
    """Where `write_atomically` prepares `path`; left behind by a process that was killed meanwhile."""
    return path.with_name(f".{path.name}.tmp")


def flush_folder(folder: Path) -> None:
    """Make renamed entries of a folder outlive a loss of power, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _full_disk(folder: Path) -> str:
    """What torch.save's own error does not say."""
    usage = os.statvfs(folder)
    return "no space left on device" if usage.f_bavail * usage.f_frsize < 2**20 else ""


# the last record of a zip file; its last two bytes are the length of the comment that follows
_END_OF_ZIP, _END_SIZE = b"PK\x05\x06", 22
_SEAL = b"sha256:"
_SEAL_SIZE = len(_SEAL) + 64
_FOLDER = 0x10  # in an entry's external attributes


def _seal(file: BinaryIO) -> None:
    """Append the checksum of a zip file that torch.save has just written, as its comment."""
    file.seek(-_END_SIZE, os.SEEK_END)
    end = file.read(_END_SIZE)
    assert end.startswith(_END_OF_ZIP), "torch.save writes zip files"
    assert end.endswith(b"\0\0"), "without a comment"
    file.seek(-2, os.SEEK_END)
    file.write(struct.pack("<H", _SEAL_SIZE))
    size = file.tell()
    file.seek(0)
    digest = _digest(file, size)
    file.seek(0, os.SEEK_END)
    file.write(_SEAL + digest)


def check_intact(path: Path, flag: str = "--resume") -> None:
    """Compare a file with its checksum: our own over all of it, or a zip file's over each record.

    Raises:
        UserError: it is damaged, can't be read, or is no zip file (which torch.save writes since
        version 1.6) nor a plain pickle.
    """
    try:
        with open(path, "rb") as file:
            intact = _intact(file)
    except Exception as error:  # a damaged zip file can fail anywhere, in decompression too
        log.debug("checking %s", path, exc_info=error)
        intact = False
    if not intact:
        raise unreadable(flag, path)


def _intact(file: BinaryIO) -> bool:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - _SEAL_SIZE, 0))
    seal = file.read()
    file.seek(0)
    if seal.startswith(_SEAL):
        return _digest(file, size - _SEAL_SIZE) == seal.removeprefix(_SEAL)
    start = file.read(2)
    if start != b"PK":
        return start[:1] == pickle.PROTO  # a pickle from before zip files has no checksum
    with zipfile.ZipFile(file) as archive:
        return archive.testzip() is None and not any(map(_is_marked_as_folder, archive.infolist()))


def _is_marked_as_folder(entry: zipfile.ZipInfo) -> bool:
    """Whether a record is marked as a folder: PyTorch does not read it, and the tensor is
    arbitrary.
    """
    return bool(entry.external_attr & _FOLDER) and not entry.is_dir()


def _digest(file: BinaryIO, size: int) -> bytes:
    """SHA-256 of the next `size` bytes, in hexadecimal digits."""
    digest, left = hashlib.sha256(), size
    while left and (block := file.read(min(left, 2**20))):
        digest.update(block)
        left -= len(block)
    return digest.hexdigest().encode()


def _check_tied(own: Mapping[str, Tensor], known: Mapping[str, Tensor], source: str, flag: str) -> None:
    first: dict[int, str] = {}
    for name in known:
        twin = first.setdefault(id(own[name]), name)
        if twin != name and not torch.equal(known[twin], known[name]):
            raise UserError(
                f"{flag} {source} does not fit: {twin} and {name} differ there and are one tensor "
                f"here; probably {_flags_for(name)} differ"
            )


def _flags_for_layer(name: str) -> str:
    """The flags that decide whether a tensor is there at all."""
    layer = re.search(r"transformer\.(enc|dec)oder\.layers\.", name)
    return f"--{layer[1]}_layers" if layer else _flags_for(name)


def _flags_for(name: str) -> str:
    generic = re.sub(r"layers\.\d+", "layers.{i}", name)
    return next(
        (flags for part, flags in _FLAGS if part in generic or part in name), "the architecture's flags"
    )


def is_address(path_or_url: str) -> bool:
    return path_or_url.startswith(("https://", "http://"))


def local_file(path_or_url: str, flag: str) -> Path:
    """The file that `flag` names; an address is fetched once, and found again in PyTorch's cache.

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
    name = Path(urlparse(path_or_url).path).name
    # a folder for every address: many have a file of the same name
    folder = Path(torch.hub.get_dir()) / "checkpoints" / hashlib.sha256(path_or_url.encode()).hexdigest()[:16]
    cached = folder / name
    if not cached.exists():
        folder.mkdir(parents=True, exist_ok=True)
        digest = re.search(r"-([0-9a-f]{8,})\.", name)
        try:
            torch.hub.download_url_to_file(
                path_or_url, str(cached), digest[1] if digest else None, progress=False
            )
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{flag} {path_or_url} could not be downloaded ({error}); download it and give its path"
            ) from None
    return cached


def folder_given(flag: str, folder: Path) -> UserError:
    """The error for a folder where a file is asked for; it names the best checkpoint, or the
    newest, if it is a run's.
    """
    checkpoints = sorted(folder.glob("checkpoint*.pth"))  # checkpoint_best.pth comes last
    example = f", such as {checkpoints[-1]}" if checkpoints else ""
    return UserError(f"{flag} {folder} is a folder; name a checkpoint in it{example}")


# how files begin that are often taken for the checkpoint whose name they have
_OTHER_FILES = (
    (b"version https://git-lfs", "is a pointer of Git LFS; fetch the file itself with git lfs pull"),
    (
        b"<",
        "is a web page, as a server sends instead of a file that asks for a login or a "
        "confirmation; download it anew",
    ),
)


def unreadable(flag: str, path: Path) -> UserError:
    start = b""
    with contextlib.suppress(OSError), path.open("rb") as file:
        start = file.read(100).lstrip()
    other = next((what for mark, what in _OTHER_FILES if start.startswith(mark)), None)
    what = other or "is damaged or no checkpoint (it may be truncated); take an earlier one, or --resume auto"
    return UserError(f"{flag} {path} {what}")
