"""Second stage of the check: image files and their pixels."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from datasets.coco_format import Problem
from datasets.file_index import shown_size
from datasets.preflight.annotations import CheckedSplit
from datasets.respell import respell
from util.errors import UserError
from util.images.files import BadImageError, decode, read_header, read_image_file, rgb_extrema

# levels of 256 by which the pixels of a picture differ: below, almost nothing is visible in it
_FLAT = 16
_FEW_FILES = 64  # are read faster than processes start


class _Seen(NamedTuple):
    """What a file is.

    kind, message: of its problem. identity: equal for files of the same content (read as a whole)
    or of the same place (else). Of files read as a whole, levels: of 256, by which the pixels
    differ; bits: as `util.images.files.as_rgb` tells.
    """

    kind: str = ""
    message: str = ""
    identity: Any = None
    levels: int = 256
    bits: int | None = None


def check_files(splits: Sequence[CheckedSplit], *, whole: bool, megapixels: float, workers: int) -> None:
    """Open every image, in `workers` processes, and add the problems to the splits.

    whole: decode them as training does, look at their pixels and compare their contents. Otherwise
    read only their headers, and compare their places on the disk.
    """
    # list the files
    owners: list[tuple[CheckedSplit, dict[str, Any]]] = []
    for split in splits:
        if split.folder.is_dir():
            for how, count in respell(split.images, split.folder).items():
                split.add(Problem("other_name", f"{split.annotations}: {how}: {count}"))
            owners += [(split, image) for image in split.images]
        else:
            message = f"{split.folder} does not exist; it must be the folder of the {split.name} images"
            split.add(Problem("missing_folder", message), split.folder)

    # look at them
    paths = [split.folder / image["file_name"] for split, image in owners]
    sizes = [(image["width"], image["height"]) for _, image in owners]
    remedies = [f"take image {image['id']} out of {split.annotations}" for split, image in owners]
    look = partial(_look, whole=whole, megapixels=megapixels)
    all_seen = _in_processes(look, workers, paths, sizes, remedies)

    # add what was seen to the splits
    first: dict[Any, tuple[CheckedSplit, dict[str, Any]]] = {}
    depths: Counter[int] = Counter()
    for (split, image), path, seen in zip(owners, paths, all_seen, strict=True):
        if seen.kind:
            split.add(Problem(seen.kind, seen.message, "images", image), path)
        if seen.identity:
            _check_repetition(split, image, path, *first.setdefault(seen.identity, (split, image)))
        if seen.levels < _FLAT:
            how = f"as the detector sees it, its pixels differ by {seen.levels} of 255"
            message = f"{path} is nearly of one level: {how}"
            split.add(Problem("flat_picture", message, "images", image), path)
        if seen.bits:
            depths[seen.bits] += 1
    if len(depths) > 1:
        found = ", ".join(f"{count} of {bits} bits" for bits, count in sorted(depths.items()))
        message = (
            f"pictures are scaled by the depth that holds their largest number: {found}; convert "
            "those of one camera alike"
        )
        splits[0].add(Problem("mixed_depths", message), splits[0].folder)


def check_paths(splits: Sequence[CheckedSplit]) -> None:
    """Find images that are in several splits, by their names alone."""
    # within a split it is a duplicate_file, which the annotations tell
    first: dict[Path, tuple[CheckedSplit, dict[str, Any]]] = {}
    for split in splits:
        folder = split.folder.resolve()
        for image in split.images:
            path = folder / os.path.normpath(image["file_name"])
            _check_repetition(split, image, path, *first.setdefault(path, (split, image)))


def _check_repetition(
    split: CheckedSplit, image: dict[str, Any], path: Path, owner: CheckedSplit, other: dict[str, Any]
) -> None:
    """Report `image`, whose file is the same as that of the image `other` of `owner`."""
    same = f"{path} (image {image['id']}) is the same picture as"
    if owner is not split:
        place = f"{owner.folder / other['file_name']} of {owner.name}"
        problem = Problem("overlap", f"{same} {place}; take it out of one of the two", "images", image)
        split.add(problem, path)
    elif os.path.normpath(other["file_name"]) != os.path.normpath(image["file_name"]):
        message = f"{same} {other['file_name']} (image {other['id']})"
        split.add(Problem("same_picture", message, "images", image), path)


def _in_processes(look: Callable[..., _Seen], workers: int, *arguments: list[Any]) -> Iterator[_Seen]:
    """`look` for the arguments of each file, in their order, with a progress bar on a terminal."""
    count = len(arguments[0])
    bar = partial(tqdm, total=count, desc="images", unit="image", disable=None)
    if workers == 1 or count <= _FEW_FILES:
        yield from bar(map(look, *arguments))
        return
    # Spawned and not forked: the parent has threads, and memory that they would copy. Ctrl-C is left
    # to the parent, which ends its workers without a traceback from each.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        yield from bar(pool.map(look, *arguments, chunksize=min(32, count // workers)))
    except BrokenProcessPool:
        raise UserError(
            "a process that reads images died, of too little memory perhaps; try fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _look(path: Path, size: tuple[int, int], otherwise: str, *, whole: bool, megapixels: float) -> _Seen:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of metadata that nobody uses
        return _look_at(path, size, otherwise, whole, megapixels)


def _look_at(path: Path, size: tuple[int, int], otherwise: str, whole: bool, megapixels: float) -> _Seen:
    """What the file of an image is that has a `size` (width, height) in the annotations."""
    if not path.exists():
        return _Seen("missing_image", f"{path} is missing; add the file, or {otherwise}")
    try:
        # the whole file: a copy has the same content
        if whole:
            content = read_image_file(path, megapixels, otherwise)
            digest = hashlib.blake2b(content, digest_size=16).digest()
            picture = decode(content, path, megapixels, otherwise)
            levels = max(high - low for low, high in rgb_extrema(picture))
            found = picture.size
            seen = _Seen(identity=digest, levels=levels, bits=picture.info.get("bits"))
        # the header alone: a link has the same place
        else:
            status = path.stat()
            found = read_header(path, megapixels, otherwise).size
            seen = _Seen(identity=(status.st_dev, status.st_ino))
    except BadImageError as error:
        return _Seen("broken_image", str(error))
    if found == size:
        return seen

    # why the size is another one
    message = f"{path} is {found[0]} x {found[1]}, and {size[0]:g} x {size[1]:g} in the annotations"
    remedy = "; mend the size there, and the boxes if the image was scaled"
    if shown_size(read_header(path, megapixels, otherwise)) == size:
        turned = "it was annotated as its EXIF orientation turns it, which training does not"
        remedy = f": {turned}; store it turned"
    return seen._replace(kind="wrong_size", message=message + remedy)
