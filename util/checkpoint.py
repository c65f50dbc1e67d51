"""Checkpoints: the only code that reads and writes them.

Written aside, flushed and renamed, so that a crash never leaves a broken file. Read without executing anything that is
pickled in them: tensors, numbers, strings and containers are data, an argparse.Namespace is a bag of such data, and
everything else is refused by name.
"""

from __future__ import annotations

import argparse
import logging
import os
import pickle
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from util.config import Config
from util.errors import UserError
from util.optim import go_to_epoch

log = logging.getLogger(__name__)

# published checkpoints name these tensors twice
_ALIASES = (
    ("transformer.decoder.class_embed.", "class_embed."),
    ("transformer.decoder.bbox_embed.", "bbox_embed."),
    ("transformer.encoder.bf.", "transformer.bf."),
)
_MEANINGLESS = ("total_params", "total_ops")  # a profiler's leftovers
# a count of batch normalisation, which frozen statistics don't have and which changes nothing where it is lacking
_OPTIONAL = "num_batches_tracked"
# flags that change nothing of what is learned
_MAY_DIFFER = (
    "resume", "output_dir", "eval", "device", "num_workers", "log_every", "start_epoch", "save_predictions", "coco_path",
    "cache_mode", "eval_every", "backbone_weights", "epochs",
)  # fmt: skip
# part of a name -> the flags that decide its existence or shape, the likeliest first
_FLAGS = (
    ("class_embed", "--num_classes, --dec_layers or --with_box_refine"),
    ("bbox_embed", "--with_box_refine, --two_stage or --dec_layers"),
    ("query_embed", "--num_queries, --two_stage or --hidden_dim"),
    ("reference_points", "--two_stage or --hidden_dim"),
    ("enc_output", "--two_stage"),
    ("pos_trans", "--two_stage"),
    ("transformer.bf.", "--share_bf, --bt_num_layers, --insert_idx or --bf"),
    ("level_embed", "--num_feature_levels"),
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
)  # fmt: skip


@dataclass(frozen=True)
class LoadReport:
    """Names of tensors: loaded; missing in the file; unexpected, in the file only."""

    source: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def require_same_architecture(self) -> None:
        """Raise UserError if anything but BatchFormerV2's weights is missing or unexpected."""
        for kind, names in (("lacks", self.missing), ("has the unknown", self.unexpected)):
            names = [name for name in names if not name.startswith("transformer.bf.")]
            if names:
                raise UserError(
                    f"--resume {self.source} is of another architecture: it {kind} {names[0]}"
                    f"{f' and {len(names) - 1} more' if names[1:] else ''}; probably {_flags_for(names[0])} differ"
                )

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.loaded)} tensors loaded"]
        lines += [f"missing: {', '.join(self.missing)}"] if self.missing else []
        lines += [f"unexpected: {', '.join(self.unexpected)}"] if self.unexpected else []
        return "; ".join(lines)


def load_weights(model: nn.Module, path_or_url: str) -> LoadReport:
    """Load the weights of a checkpoint, published or ours, into `model`.

    Raises:
        UserError: the file can't be read or holds more than data; a tensor has another shape, or the file has different
            values for names that are one tensor in the model (the message names the flag that probably differs).
    """
    return load_state(model, read_checkpoint(path_or_url), str(path_or_url))


def load_state(model: nn.Module, checkpoint: Mapping[str, Any], source: str) -> LoadReport:
    """As `load_weights`, from a checkpoint that has been read."""
    state = _canonical(checkpoint.get("model", checkpoint), source)
    own = model.state_dict(keep_vars=True)
    known = {name: tensor for name, tensor in state.items() if name in own}
    for name, tensor in known.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"--resume {source} does not fit: {name} is {list(tensor.shape)} there and {list(own[name].shape)} here; "
                f"probably {_flags_for(name)} differ"
            )
    _check_tied(own, known, source)
    model.load_state_dict(known, strict=False)
    return LoadReport(
        source,
        loaded=tuple(known),
        missing=tuple(name for name in own if name not in known and not name.endswith(_OPTIONAL)),
        unexpected=tuple(name for name in state if name not in own and not name.endswith(_OPTIONAL)),
    )


def read_checkpoint(path_or_url: str | os.PathLike, flag: str = "--resume") -> dict[str, Any]:
    """The dict in a checkpoint file, on the CPU, nothing executed. Raises UserError, naming `flag`."""
    path = _local_file(str(path_or_url), flag)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        if name:
            raise UserError(
                f"{flag} {path} was refused: it asks to run or build {name[1]}, and a checkpoint may hold data only; "
                "nothing was executed"
            ) from None
        raise _unreadable(flag, path) from None
    except Exception as error:  # a damaged file can fail anywhere in the reader
        log.debug("reading %s", path, exc_info=error)
        raise _unreadable(flag, path) from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model", checkpoint), dict):
        raise UserError(f"{flag} {path} is no checkpoint: it must hold a dict of tensors, or one with the entry 'model'")
    return checkpoint


def write_atomically(content: Any, path: Path) -> None:
    """torch.save under a temporary name, flushed to the disk, then renamed: `path` is the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save wraps a full disk in a RuntimeError
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written ({error}); earlier checkpoints are untouched") from None


def save_training(
    paths: Sequence[Path], model: nn.Module, optimizer: torch.optim.Optimizer, schedule: LambdaLR, epoch: int, config: Config,
    random_states: Sequence[dict],
) -> None:  # fmt: skip
    """Write all that training needs to go on after `epoch`; `random_states` holds those of every process by rank."""
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "epoch": epoch,
        "args": config.flags(),
        "random_states": list(random_states),
    }
    for path in paths:
        write_atomically(content, path)


def restore_training(
    checkpoint: Mapping[str, Any] | None, optimizer: torch.optim.Optimizer, schedule: LambdaLR, config: Config, rank: int
) -> int:
    """Put back optimiser, schedule and this process's random state; gives the epoch to go on with.

    Without a checkpoint, or with a published one, of which only the weights are taken (elsewhere), that is --start_epoch.
    This run's flags hold: where they differ from the checkpoint's, a warning says so.
    """
    if checkpoint is None or not is_own(checkpoint):
        if checkpoint is not None:
            log.warning("resume: not a checkpoint of this program; its weights are loaded, the optimiser starts afresh")
        go_to_epoch(schedule, config.run.start_epoch)
        return config.run.start_epoch
    _warn_about_changes(checkpoint["args"], config.flags())
    weight_decay, base_lrs = optimizer.defaults["weight_decay"], list(schedule.base_lrs)
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
    except ValueError as error:
        raise UserError(
            f"--resume {config.run.resume}: its optimiser belongs to other parameters ({error}); resume with the flags "
            "that it was trained with (--bf, --sgd, --lr_backbone and the like)"
        ) from None
    schedule.load_state_dict(checkpoint["lr_scheduler"])
    schedule.base_lrs = base_lrs
    go_to_epoch(schedule, schedule.last_epoch)
    for group in optimizer.param_groups:
        group["weight_decay"] = weight_decay
    _restore_random_state(checkpoint["random_states"], rank)
    return checkpoint["epoch"] + 1


def is_own(checkpoint: Mapping[str, Any]) -> bool:
    """Whether this program wrote it for resuming."""
    return "random_states" in checkpoint and isinstance(checkpoint.get("args"), dict)


def random_state(device: torch.device) -> dict[str, Any]:
    """The random generators of this process, as plain data."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - other people's code may draw from it
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore_random_state(states: Sequence[dict], rank: int) -> None:
    if rank >= len(states):
        log.warning("resume: the checkpoint has no random state for process %d (of %d); it starts anew", rank, len(states))
        return
    state = states[rank]
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _warn_about_changes(saved: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    for name, value in flags.items():
        if name in saved and saved[name] != value and name not in _MAY_DIFFER:
            log.warning("resume: --%s was %s in the checkpoint and is %s in this run, which holds", name, saved[name], value)


def _canonical(state: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The tensors under one name each: published aliases folded, bookkeeping entries left out."""
    canonical: dict[str, Tensor] = {}
    aliased: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or name.endswith(_MEANINGLESS):
            continue
        if not isinstance(tensor, Tensor):
            raise UserError(f"--resume {source} is no checkpoint of a detector: its entry {name!r} is no tensor")
        name = name.removeprefix("module.")
        for alias, real in _ALIASES:
            if name.startswith(alias):
                aliased[real + name.removeprefix(alias)] = tensor
                break
        else:
            canonical[name] = tensor
    return aliased | canonical


def _check_tied(own: Mapping[str, Tensor], known: Mapping[str, Tensor], source: str) -> None:
    first: dict[int, str] = {}
    for name in known:
        twin = first.setdefault(id(own[name]), name)
        if twin != name and not torch.equal(known[twin], known[name]):
            raise UserError(
                f"--resume {source} does not fit: {twin} and {name} differ there and are one tensor here; "
                f"probably {_flags_for(name)} differ"
            )


def _flags_for(name: str) -> str:
    generic = re.sub(r"layers\.\d+", "layers.{i}", name)
    return next((flags for part, flags in _FLAGS if part in generic or part in name), "the architecture's flags")


def _local_file(path_or_url: str, flag: str) -> Path:
    if not path_or_url.startswith(("https://", "http://")):
        path = Path(path_or_url)
        if not path.is_file():
            raise UserError(f"{flag} {path} does not exist; give the path of a checkpoint file or an https address")
        return path
    name = Path(urlparse(path_or_url).path).name
    cached = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        digest = re.search(r"-([0-9a-f]{8,})\.", name)
        try:
            torch.hub.download_url_to_file(path_or_url, str(cached), digest[1] if digest else None, progress=False)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{flag} {path_or_url} could not be downloaded ({error}); download it and give its path") from None
    return cached


def _unreadable(flag: str, path: Path) -> UserError:
    return UserError(f"{flag} {path} is damaged or no checkpoint (it may be truncated); take an earlier one")
