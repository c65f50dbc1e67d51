"""Second stage of the check: image files and their pixels."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from datasets.coco_format import Problem
from datasets.file_index import shown_size
from datasets.preflight.annotations import CheckedSplit
from datasets.respell import respell
from util.errors import UserError
from util.images.files import BadImageError, decode, read_header, read_image_file

# levels of 256 by which the pixels of a picture differ: below, almost nothing is visible in it
_FLAT = 16
_FEW_FILES = 64  # are read faster than processes start


class _Task(NamedTuple):
    """A file to look at. size: (width, height) of the annotations. otherwise: ends the remedy."""

    path: Path
    size: tuple[int, int]
    megapixels: float
    whole: bool
    otherwise: str


class _Seen(NamedTuple):
    """What a file is.

    kind, message: of its problem. identity: equal for files of the same content (read as a whole)
    or of the same place (else). Of files read as a whole, levels: of 256, by which the pixels
    differ; bits: as `util.images.files.as_rgb` tells.
    """

    kind: str = ""
    message: str = ""
    identity: tuple[Any, ...] | None = None
    levels: int | None = None
    bits: int | None = None


def check_files(splits: Sequence[CheckedSplit], *, whole: bool, megapixels: float, workers: int) -> None:
    """Open every image, in `workers` processes, and add the problems to the splits.

    whole: decode them as training does, look at their pixels and compare their contents. Otherwise
    read only their headers, and compare their places on the disk.
    """
    # list the files, and look at them
    owners: list[tuple[CheckedSplit, dict[str, Any]]] = []
    for split in splits:
        if split.folder.is_dir():
            for how, count in respell(split.images, split.folder).items():
                split.warn("other_name", f"{split.annotations}: {how}: {count}")
            owners += [(split, image) for image in split.images]
        else:
            message = f"{split.folder} does not exist; it must be the folder of the {split.name} images"
            split.add(Problem("missing_folder", message), split.folder)
    tasks = [_task(split, image, megapixels, whole) for split, image in owners]

    # add what was seen to the splits
    first: dict[Any, tuple[CheckedSplit, dict[str, Any]]] = {}
    depths: Counter[int] = Counter()
    for (split, image), task, seen in zip(owners, tasks, _look_at_all(tasks, workers), strict=True):
        if seen.kind:
            split.add(Problem(seen.kind, seen.message, "images", image), task.path)
        if seen.identity is not None:
            _check_repetition(split, image, task.path, *first.setdefault(seen.identity, (split, image)))
        if seen.levels is not None and seen.levels < _FLAT:
            message = (
                f"{task.path} is nearly of one level: as the detector sees it, its pixels differ by "
                f"{seen.levels} of 255"
            )
            split.warn("flat_picture", message, "images", image, file=task.path)
        if seen.bits is not None:
            depths[seen.bits] += 1
    _check_depths(splits[0], depths)


def check_paths(splits: Sequence[CheckedSplit]) -> None:
    """Find images that are in several splits, by their names alone."""
    # within a split it is a duplicate_file, which the annotations tell
    first: dict[Path, tuple[CheckedSplit, dict[str, Any]]] = {}
    for split in splits:
        folder = split.folder.resolve()
        for image in split.images:
            path = folder / os.path.normpath(image["file_name"])
            owner, other = first.setdefault(path, (split, image))
            if owner is not split:
                _check_repetition(split, image, path, owner, other)


def _check_depths(split: CheckedSplit, depths: Mapping[int, int]) -> None:
    if len(depths) > 1:
        found = ", ".join(f"{depths[bits]} of {bits} bits" for bits in sorted(depths))
        message = (
            f"pictures are scaled by the depth that holds their largest number: {found}; convert "
            "those of one camera alike"
        )
        split.warn("mixed_depths", message, file=split.folder)


def _task(split: CheckedSplit, image: dict[str, Any], megapixels: float, whole: bool) -> _Task:
    size = image["width"], image["height"]
    otherwise = f"take image {image['id']} out of {split.annotations}"
    return _Task(split.folder / image["file_name"], size, megapixels, whole, otherwise)


def _check_repetition(
    split: CheckedSplit, image: dict[str, Any], path: Path, owner: CheckedSplit, other: dict[str, Any]
) -> None:
    """Report `image`, whose file is the same as that of the image `other` of `owner`."""
    same = f"{path} (image {image['id']}) is the same picture as"
    if owner is not split:
        place = f"{owner.folder / other['file_name']} of {owner.name}"
        message = f"{same} {place}; take it out of one of the two"
        split.add(Problem("overlap", message, "images", image), path)
    elif os.path.normpath(other["file_name"]) != os.path.normpath(image["file_name"]):
        message = f"{same} {other['file_name']} (image {other['id']})"
        split.warn("same_picture", message, "images", image, file=path)


# ---- looking at files, in several processes


def _look_at_all(tasks: Sequence[_Task], workers: int) -> Iterable[_Seen]:
    """_look(task) for each, in their order, with a progress bar on a terminal."""

    def bar(results: Iterable[_Seen]) -> Iterable[_Seen]:
        return tqdm(results, total=len(tasks), desc="images", unit="image", disable=None)

    if workers == 1 or len(tasks) <= _FEW_FILES:
        yield from bar(map(_look, tasks))
        return
    # Spawned and not forked: the parent has threads, and memory that they would copy. Ctrl-C is left
    # to the parent, which ends its workers without a traceback from each.
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        yield from bar(pool.map(_look, tasks, chunksize=min(32, len(tasks) // workers)))
    except BrokenProcessPool:
        raise UserError(
            "a process that reads images died, of too little memory perhaps; try fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _look(task: _Task) -> _Seen:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of metadata that nobody uses
        return _look_at(task)


def _look_at(task: _Task) -> _Seen:
    path, megapixels, otherwise = task.path, task.megapixels, task.otherwise
    if not path.exists():
        return _Seen("missing_image", f"{path} is missing; add the file, or {otherwise}")
    try:
        # the whole file: a copy has the same content
        if task.whole:
            content = read_image_file(path, megapixels, otherwise)
            digest = hashlib.blake2b(content, digest_size=16).digest()
            picture = decode(content, path, megapixels, otherwise)
            size, bits = picture.size, picture.info.get("bits")
            seen = _Seen(identity=(digest,), levels=_levels(picture), bits=bits)
        # the header alone: a link has the same place
        else:
            status = path.stat()
            seen = _Seen(identity=(status.st_dev, status.st_ino))
            size = read_header(path, megapixels, otherwise).size
    except BadImageError as error:
        return _Seen("broken_image", str(error))
    if size == task.size:
        return seen
    return seen._replace(kind="wrong_size", message=_wrong_size(task, size))


def _levels(picture: Any) -> int:
    return max(high - low for low, high in picture.getextrema())


def _wrong_size(task: _Task, size: tuple[int, int]) -> str:
    found = f"{task.path} is {size[0]} x {size[1]}"
    message = f"{found}, and {task.size[0]:g} x {task.size[1]:g} in the annotations"
    if shown_size(read_header(task.path, task.megapixels, task.otherwise)) == task.size:
        return (
            f"{message}: it was annotated as its EXIF orientation turns it, which training does not; "
            "store it turned"
        )
    return f"{message}; mend the size there, and the boxes if the image was scaled"
