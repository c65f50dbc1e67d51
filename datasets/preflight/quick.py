"""What every training checks by itself, in seconds."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

from datasets.preflight.annotations import CheckedSplit, object_warnings
from datasets.preflight.boxes import BOX_TOLERANCE
from datasets.respell import absent_names
from util.config import TransformerConfig
from util.errors import UserError

log = logging.getLogger(__name__)

# what training does about boxes that the full check reports as problems
_COUNTED = {
    "degenerate_box": "boxes without width or height (training leaves them out)",
    "box_outside": "boxes outside of their image (training leaves them out)",
    "box_reaches_out": f"boxes that reach more than {BOX_TOLERANCE:g} pixels out of their "
    "image (training cuts them)",
}


def quick_check(
    train: Any, val: Any, skip_missing: bool = False, num_queries: int = TransformerConfig.num_queries
) -> UserError | None:
    """Check two CocoDetection data sets before a run; log one warning with everything found.

    Returns the error to end with if image files are missing, for the caller to raise in all
    processes. With `skip_missing` that is only a part of the warning.
    """
    # each split: files, then boxes and objects
    notes, paths = [], []
    for name, dataset in (("train", train), ("val", val)):
        content = dataset.coco.dataset
        lists = content["images"], content["categories"], content["annotations"]
        split = CheckedSplit(name, dataset.images, dataset.annotations, *lists)
        names = [image["file_name"] for image in split.images]
        missing = absent_names(split.folder, names)
        if missing:
            first = split.folder / next(name for name in names if name in missing)
            message = f"missing image files of {split.annotations}: {len(missing)}, first {first}"
            if not skip_missing:
                return UserError(f"{message}; add them, take them out, or add --on_bad_image skip")
            notes.append(message)
        notes += _doubts(split, num_queries)
        # only the folder is resolved: resolving each file would ask the file system for every image
        folder = split.folder.resolve()
        paths.append({os.path.normpath(f"{folder}/{name}") for name in names})

    # images in both, and the warning
    shared = len(set.intersection(*paths))
    if shared:
        notes.append(f"images in both train and val: {shared}")
    if notes:
        log.warning("data: %s; python tools/check_data.py with these flags lists them", "; ".join(notes))
    return None


def _doubts(split: CheckedSplit, num_queries: int) -> Iterator[str]:
    for kind, flagged in split.flagged_boxes(BOX_TOLERANCE).items():
        if flagged.any():
            yield f"{_COUNTED[kind]} in {split.name}: {flagged.sum()}"
    for _, message in object_warnings(split, num_queries):
        yield f"{split.name}: {message}"
