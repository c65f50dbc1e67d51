"""run.json in a run's output folder: its flags, classes, data and machine, for tools/report.py and
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
from util.distributed.processes import world_size
from util.errors import UserError

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
NAME = "run.json"
KEPT_STARTS = 100  # a run that is preempted every hour for months still has a small record


def write_record(
    folder: Path, content: Mapping[str, Any], environment: Mapping[str, Any], start: Mapping[str, Any]
) -> None:
    """Replace the record, and keep what it says of the run's earlier starts. What goes wrong is a
    warning, never an end.

    Args:
        folder: the run's.
        content: what holds of the run as it is now, as plain data: flags, classes, data.
        environment: of this start: versions, device, processes.
        start: where this start went on: epoch, images, resume.
    """
    before = _record_before(folder)
    starts, changed = _starts(before), _changes(before, content.get("flags", {}))
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    starts = [*starts, {"at": now, **start, **environment, **({"changed_flags": changed} if changed else {})}]
    record = {
        **content,
        "environment": dict(environment),
        "starts": [*starts[:1], *starts[1:][-KEPT_STARTS:]],
    }
    try:
        replace_text(folder / NAME, json.dumps(record, indent=1) + "\n")
    except OSError as error:
        log.warning("%s could not be written (%s); training goes on", folder / NAME, error.strerror)


def environment(device: torch.device) -> dict[str, Any]:
    """What this process runs on: versions, device, processes, host, and the project's commit where
    git knows it.
    """
    facts = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processes": world_size(),
        "host": platform.node(),
        "device": str(device),
        "device_name": device_name(device),
    }
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "rev-parse", "HEAD"]
        told = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        facts["commit"] = told
    return facts


def device_name(device: torch.device) -> str:
    """A GPU's name, or how many threads of a CPU are used."""
    threads = torch.get_num_threads()
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{threads} thread{'s' if threads > 1 else ''}"
    )


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a run; {} if there is none. Raises UserError if it can't be read."""
    path = folder / NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} can't be read ({getattr(error, 'strerror', None) or 'not JSON'}); move it away"
        ) from None
    if not isinstance(record, dict):
        raise UserError(f"{path} is no record of a run: it must be a JSON object; move it away")
    return record


def _record_before(folder: Path) -> dict[str, Any]:
    try:
        return read_record(folder)
    except UserError as error:
        log.warning("%s; it is written anew", error)
        return {}


def _starts(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    starts = record.get("starts", [])
    return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []


def _changes(record: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that were others at the start before, with their values then."""
    before = record.get("flags", {})
    if not isinstance(before, dict):
        return {}
    return {name: before[name] for name, value in flags.items() if name in before and before[name] != value}
