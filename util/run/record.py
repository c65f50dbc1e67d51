"""run.json in the output folder: flags, classes, data and machine of a run, for tools/report.py and
for people.
"""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from util.atomic import replace_text
from util.config import Config
from util.distributed.processes import world_size
from util.errors import UserError

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
NAME = "run.json"
KEPT_STARTS = 100  # beside the first: a run may be preempted every hour for months


def record_start(
    folder: Path | None, config: Config, device: torch.device, start: Mapping[str, Any], **splits: Any
) -> None:
    """Write the record of a run that starts now; without a folder, nothing.

    Args:
        start: where it resumes: epoch, images, checkpoint.
        splits: data sets by "train" and "val".
    """
    if folder is None:
        return
    data = {}
    for name, split in splits.items():
        data[name] = {
            "images": str(split.images.resolve()),
            "annotations": str(split.annotations.resolve()),
            "num_images": len(split),
        }
    content = {"flags": config.flags(), "classes": splits["val"].classes.to_plain(), "data": data}
    write_record(folder, content, environment(device), start)


def write_record(
    folder: Path, content: Mapping[str, Any], machine: Mapping[str, Any], start: Mapping[str, Any]
) -> None:
    """Replace the record, and keep its list of starts. A failure is a warning.

    Args:
        folder: the folder of the run.
        content: plain data about the run as it is now: flags, classes, data.
        machine: of this start: versions, device, processes.
        start: where this start resumes: epoch, images, checkpoint.
    """
    # a person may have edited it; it never stops a run
    starts, flags_before = [], {}
    try:
        before = read_record(folder)
        starts, flags_before = list(before.get("starts", [])), dict(before.get("flags", {}))
    except (TypeError, ValueError) as error:
        log.warning("%s; %s is written again", error, NAME)

    # the earlier values of flags that have changed since
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    this = {"at": now, **start, **machine}
    flags = content.get("flags", {})
    changed = {name: old for name, old in flags_before.items() if flags.get(name, old) != old}
    if changed:
        this["changed_flags"] = changed

    # the first start is the beginning of the run: it stays
    starts.append(this)
    starts = starts[:1] + starts[1:][-KEPT_STARTS:]
    record = {**content, "environment": dict(machine), "starts": starts}
    try:
        replace_text(folder / NAME, json.dumps(record, indent=1) + "\n")
    except OSError as error:
        log.warning("%s could not be written (%s); training continues", folder / NAME, error.strerror)


def environment(device: torch.device) -> dict[str, Any]:
    """What this process runs on: versions, device, processes, host, and the commit of the project
    if git knows it.
    """
    facts = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processes": world_size(),
        "host": platform.node(),
        "device": str(device),
        "device_name": device_name(device),
    }
    # a copy of the project without git has no commit
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        facts["commit"] = output.stdout.strip()
    return facts


def device_name(device: torch.device) -> str:
    """The name of a GPU, or the number of threads that a CPU uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return "1 thread" if threads == 1 else f"{threads} threads"


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a run; {} if there is none. Raises UserError if it can't be read."""
    path = folder / NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:  # a run of an earlier version
        return {}
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not JSON"
        raise UserError(f"{path} can't be read ({reason}); move it away") from None
    if not isinstance(record, dict):
        raise UserError(f"{path} is no record of a run: it must be a JSON object; move it away")
    return record
