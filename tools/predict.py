"""Detect objects in pictures and videos: annotated copies of them, and the detections in COCO's
results format.

Written to --output_dir: every picture and video under its own name, in folders as the inputs are;
predictions.json, a list of {image_id, category_id, bbox [x, y, width, height] in pixels, score};
and images.json, which says what the ids mean, in COCO's instances format without annotations. A
picture is taken upright, as viewers show it, and so is a frame of a video; with --annotations
pictures are taken as they are stored, as in training and evaluation.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # run as a script, this folder would be searched instead

from util.config import (
    DataConfig,
    add_score_threshold_flag,
    add_untold_flags,
    add_weights_flag,
    make_parser,
    untold_flags,
)
from util.errors import UserError, run_as_command

if TYPE_CHECKING:  # imported where they are used: --help needs no torch
    from fractions import Fraction

    from PIL import Image
    from tqdm import tqdm

    from models.detector import Detections, Detector, Prepared
    from util.images.files import BadImageError
    from util.images.video import VideoReader

EXAMPLE = (
    "python tools/predict.py --resume exps/run/checkpoint.pth photos street.jpg drive.mp4 "
    "--output_dir predictions"
)
T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the flags say. Raises UserError."""
    args = _parser().parse_args(argv)
    sources = find_sources([Path(path) for path in args.inputs])
    check_output(args.output_dir, args.inputs, sources)

    from models import load_detector

    detector = load_detector(
        args.resume,
        device=args.device,
        amp=args.amp,
        batch_size=args.batch_size,
        weights=args.weights,
        max_image_megapixels=args.max_image_megapixels,
        **untold_flags(args),
    )
    if args.annotations:
        sources = with_annotated_ids(sources, args.annotations, detector)
    with _told_in_a_line(args.output_dir):
        run = predict(detector, sources, args)
    report(run)


def predict(detector: Detector, sources: Sequence[Source], args: argparse.Namespace) -> Prediction:
    """Write everything; gives the account of it."""
    from tqdm import tqdm

    folder = args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    categories = json.dumps(
        [{"id": category.id, "name": category.name} for category in detector.classes.categories]
    )
    head = f'{{"annotations": [], "categories": {categories},\n"images": '
    total = sum(not source.is_video for source in sources)
    with (
        JsonRows(folder / "predictions.json") as results,
        JsonRows(folder / "images.json", head, "}") as images,
        # none where nobody looks at it
        tqdm(total=total, unit="picture", disable=None) as progress,
    ):
        run = Prediction(detector, args, results, images, progress)
        run.run(sources)
    return run


def report(run: Prediction) -> None:
    """Say what was done and what could not be. Raises UserError if that is everything."""
    for error in run.bad:
        print(f"left out: {error.path} {error.reason}", file=sys.stderr)
    if not run.num_shots:
        raise UserError(f"none of the {len(run.bad)} files could be used")
    args = run.args
    left_out = f"; files left out: {len(run.bad)}" if run.bad else ""
    found = f"detections that score {args.score_threshold:g} and more: {run.num_found}"
    if not run.num_found:
        found += f" (the best scores {run.best_score:.2g}; lower --score_threshold to see it)"
    print(f"pictures: {run.num_shots}; {found}{left_out}; written to {args.output_dir}")


@contextlib.contextmanager
def _told_in_a_line(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or folder} can't be written ({error.strerror or error})") from None


# ---- what to predict


@dataclass(frozen=True)
class Source:
    """A file. `name` is its path below what all inputs have in common; `image_id` None: the next
    number.
    """

    path: Path
    name: str
    image_id: int | None = None

    @property
    def is_video(self) -> bool:
        from util.images.video import SUFFIXES

        return self.path.suffix.lower() in SUFFIXES


def find_sources(inputs: Sequence[Path]) -> list[Source]:
    """The files of `inputs`, each once, folders searched for pictures through all their folders, in
    natural order.

    Links to folders are followed; what two of them show is taken once.

    Raises UserError for a path that is not there, and a folder without pictures.
    """
    from datasets.file_names import IMAGE_SUFFIXES, files_below

    found: dict[tuple[str, str], Path] = {}
    for path in inputs:
        if not path.exists():
            raise UserError(f"{path} does not exist; give pictures, videos, or folders of pictures")
        inside = sorted(files_below(path, IMAGE_SUFFIXES), key=_natural) if path.is_dir() else [path]
        if not inside:
            raise UserError(
                f"{path} holds no pictures ({', '.join(IMAGE_SUFFIXES)}); videos are given by name"
            )
        for file in map(os.path.abspath, inside):
            folder, name = os.path.split(file)
            found.setdefault((os.path.realpath(folder), name), Path(file))
    tops = [os.path.abspath(path if path.is_dir() else path.parent) for path in inputs]
    common = os.path.commonpath(tops)
    return [Source(file, file.relative_to(common).as_posix()) for file in found.values()]


def _natural(path: Path) -> list[Any]:
    """2.jpg before 10.jpg."""
    return [
        [int(word) if word.isdigit() else word for word in re.split(r"([0-9]+)", part.casefold())]
        for part in path.parts
    ]


def check_output(output_dir: Path, inputs: Sequence[str], sources: Sequence[Source]) -> None:
    """Raise UserError if the pictures to come would be taken for inputs the next time, or take an
    input's place.
    """
    output = os.path.realpath(output_dir)
    if os.path.exists(output) and not os.path.isdir(output):
        raise UserError(f"--output_dir {output_dir} is a file; name a folder")
    for path in inputs:
        folder = os.path.realpath(path)
        if os.path.isdir(folder) and os.path.commonpath([folder, output]) == folder:
            raise UserError(
                f"--output_dir {output_dir} lies in the input folder {path}; name a folder outside of it"
            )
    copies: dict[str, Source] = {}
    for source in sources:
        if (twin := copies.setdefault(output_name(source), source)) is not source:
            raise UserError(
                f"{twin.path} and {source.path} would have one copy, {output_name(source)}; "
                f"predict them apart"
            )
    originals = {os.path.realpath(source.path) for source in sources}
    for source in sources:
        if os.path.realpath(output_dir / output_name(source)) in originals:
            raise UserError(
                f"--output_dir {output_dir} would replace the input {source.path}; name another folder"
            )


def output_name(source: Source) -> str:
    """What the annotated copy is called: the same, where that is a format to write."""
    kept = (".mp4",) if source.is_video else (".jpg", ".jpeg", ".png")
    return (
        source.name
        if source.path.suffix.lower() in kept
        else source.name + (".mp4" if source.is_video else ".png")
    )


def with_annotated_ids(sources: Sequence[Source], annotations: Path, detector: Detector) -> list[Source]:
    """Names and ids as in a COCO file: an image is the one whose file name there is the longest end
    of the file's path.

    Where none is, it may be spelled otherwise or be a path on another machine (datasets/file_index.py).
    Pictures that it does not list are left out, as those of COCO's test2017 that are not in
    test-dev; how many is printed.

    Raises UserError for a file without any of them, two that are the same, and a category that the
    detector does not know.
    """
    from datasets.coco_format import is_file_name, read_images_and_categories
    from datasets.file_names import portable

    images, categories = read_images_and_categories(annotations)
    detector.classes.check(categories, str(annotations))
    ids = {info["file_name"]: info["id"] for info in images}
    names = _annotated_names([source.path for source in sources], images, annotations)
    taken: dict[str, Path] = {}
    for source in sources:
        if source.is_video:
            raise UserError(f"--annotations are of pictures and {source.path} is a video; give them apart")
        name = names.get(source.path)
        if name is None:
            continue
        if name in taken:
            raise UserError(
                f"{taken[name]} and {source.path} are both {name} of --annotations {annotations}; "
                f"leave out one"
            )
        taken[name] = source.path
    if not taken:
        raise UserError(
            f"--annotations {annotations} lists none of the pictures, not {sources[0].path} for "
            f"one; leave it out"
        )
    if len(taken) < len(sources):
        print(
            f"pictures that --annotations {annotations} does not list, left out: {len(sources) - len(taken)}"
        )
    if len(taken) < len(ids):
        print(f"images of --annotations {annotations} without a picture here: {len(ids) - len(taken)}")
    return [
        Source(path, name if is_file_name(name) else portable(name), ids[name])
        for name, path in taken.items()
    ]


def _annotated_names(
    paths: Sequence[Path], images: Iterable[dict[str, Any]], annotations: Path
) -> dict[Path, str]:
    """The file names that COCO's `images` have for files, as far as they have any; how many differ
    from the file's is printed.
    """
    from datasets.coco_format import is_file_name
    from datasets.file_index import SPELLING, Index, annotated_size

    sizes = {image["file_name"]: annotated_size(image) for image in images}
    names: dict[Path, str] = {}
    for path in paths:
        ends = ("/".join(path.parts[i:]) for i in range(1, len(path.parts)))
        name = next((end for end in ends if end in sizes), None)
        if name is not None:
            names[path] = name
    others = [(path.parts[1:], path) for path in paths if path not in names]
    taken = set(names.values())
    found = (
        Index(others, annotations)
        .find({name: size for name, size in sizes.items() if name not in taken})
        .found
    )
    # by less than the whole name a picture could get the id of one in another folder; of another
    # machine's there is only the end
    chosen = {
        name: file for name, file in found.items() if file.how in ("", SPELLING) or not is_file_name(name)
    }
    for how, count in Counter(file.how or SPELLING for file in chosen.values()).items():
        print(f"{how}: {count}")
    return names | {file.path: name for name, file in chosen.items()}


# ---- prediction


@dataclass(frozen=True)
class Shot:
    """A picture, or a frame of a video: for the eye, for the network, and as images.json has it."""

    picture: Image.Image
    prepared: Prepared
    entry: dict[str, Any]
    source: Source
    seconds: Fraction | None = None


class Prediction:
    """From files to files. Reading, detecting and drawing go on at the same time, with a few
    pictures in memory.

    Args:
        args: the command's flags.
    """

    def __init__(
        self,
        detector: Detector,
        args: argparse.Namespace,
        results: JsonRows,
        images: JsonRows,
        progress: tqdm,
    ) -> None:
        self.detector, self.args, self.results, self.images, self.progress = (
            detector,
            args,
            results,
            images,
            progress,
        )
        self.class_names = list(detector.classes.names.values())
        self.bad: list[BadImageError] = []
        self.num_shots = self.num_found = 0
        self.best_score = 0.0
        self._otherwise = "or add --on_bad_image skip"
        self._next_id = itertools.count(1)

    def run(self, sources: Sequence[Source]) -> None:
        """All files. Raises BadImageError for one that can't be used, or notes it with
        --on_bad_image skip.
        """
        for is_video, group in itertools.groupby(sources, key=lambda source: source.is_video):
            if not is_video:
                self._pictures(list(group))
                continue
            for source in group:
                with self._bad_noted():
                    self._video(source)

    def _pictures(self, sources: Sequence[Source]) -> None:
        with contextlib.closing(self._predicted(self._read_pictures(sources))) as predicted:
            for shot, found in predicted:
                self._note(shot, found)
                if not self.args.no_pictures:
                    path = self._output(shot.source)
                    # at full chroma: coloured letters would blur otherwise
                    self._drawn(shot, found, enlarge=True).save(path, quality=92, subsampling=0)

    def _video(self, source: Source) -> None:
        from util.images.video import VideoReader, VideoWriter

        with VideoReader(source.path, self._otherwise) as video, contextlib.ExitStack() as stack:
            self.progress.total += video.num_frames
            predicted = stack.enter_context(
                contextlib.closing(self._predicted(self._read_video(video, source)))
            )
            writer: VideoWriter | None = None
            for shot, found in predicted:
                self._note(shot, found)
                if self.args.no_pictures:
                    continue
                if writer is None:
                    writer = VideoWriter(
                        self._output(source), shot.picture.size, video.rate, video.pixel_aspect
                    )
                    stack.callback(writer.close)
                writer.add(self._drawn(shot, found, enlarge=False), shot.seconds)

    def _read_pictures(self, sources: Sequence[Source]) -> Iterator[Shot]:
        from util.images.prepare import read_picture

        for source in sources:
            number = next(self._next_id) if source.image_id is None else source.image_id
            with self._bad_noted():
                megapixels, upright = self.args.max_image_megapixels, self.args.annotations is None
                picture = read_picture(source.path, megapixels, self._otherwise, upright=upright)
                yield self._shot(picture, {"id": number, "file_name": source.name}, source)

    def _read_video(self, video: VideoReader, source: Source) -> Iterator[Shot]:
        for index, frame in enumerate(video):
            seconds = round(float(frame.seconds), 6)
            entry = {"id": next(self._next_id), "file_name": source.name, "frame": index, "seconds": seconds}
            yield self._shot(frame.picture, entry, source, frame.seconds)

    def _shot(
        self, picture: Image.Image, entry: dict[str, Any], source: Source, seconds: Fraction | None = None
    ) -> Shot:
        entry = entry | {"width": picture.width, "height": picture.height}
        return Shot(picture, self.detector.prepare(picture), entry, source, seconds)

    def _predicted(self, shots: Iterator[Shot]) -> Iterator[tuple[Shot, Detections]]:
        size = self.detector.batch_size
        return ahead(self._detections(ahead(shots, 2 * size)), size)

    def _detections(self, shots: Iterator[Shot]) -> Iterator[tuple[Shot, Detections]]:
        with contextlib.closing(shots):
            for batch in batches(shots, self.detector.batch_size):
                found = self.detector.detect([shot.prepared for shot in batch])
                yield from zip(batch, map(self._good_enough, found), strict=True)

    def _good_enough(self, found: Detections) -> Detections:
        self.best_score = max([self.best_score, *found.scores[:1].tolist()])
        return found.above(self.args.score_threshold)

    def _note(self, shot: Shot, found: Detections) -> None:
        from datasets.coco_eval import coco_results

        detections = {"boxes": found.boxes, "scores": found.scores, "labels": found.labels}
        for result in coco_results([shot.entry["id"]], [detections], self.detector.classes):
            self.results.add(result)
        self.images.add(shot.entry)
        self.num_shots, self.num_found = self.num_shots + 1, self.num_found + len(found)
        self.progress.update()

    def _drawn(self, shot: Shot, found: Detections, *, enlarge: bool) -> Image.Image:
        from util.draw.boxes import draw_boxes

        boxes, scores = found.boxes.numpy(), found.scores.tolist()
        return draw_boxes(shot.picture, boxes, found.names, scores, classes=self.class_names, enlarge=enlarge)

    def _output(self, source: Source) -> Path:
        path = self.args.output_dir / output_name(source)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @contextlib.contextmanager
    def _bad_noted(self) -> Iterator[None]:
        from util.images.files import BadImageError

        try:
            yield
        except BadImageError as error:
            if self.args.on_bad_image == "stop":
                raise
            self.bad.append(error)


def ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """The items of a generator, up to `depth` of them made in another thread before they are asked
    for.
    """
    end = object()
    pool = ThreadPoolExecutor(1)
    waiting = deque(pool.submit(next, items, end) for _ in range(depth))
    try:
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)  # first, because a generator that runs can't be closed
        items.close()


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter. Where `items` raises, what it gave before comes
    first.
    """
    batch: list[T] = []
    try:
        for item in items:
            batch.append(item)
            if len(batch) == size:
                yield batch
                batch = []
    except Exception:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


# ---- files


class JsonRows:
    """A JSON list written as it grows, an entry a line; closed as a whole list even where an error
    ends it.

    Args:
        head, tail: what stands before and after the list.
    """

    def __init__(self, path: Path, head: str = "", tail: str = "") -> None:
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        self._file.write(f"{head}[")
        self._separator, self._tail = "\n", tail

    def add(self, entry: dict[str, Any]) -> None:
        self._file.write(self._separator + json.dumps(entry))
        self._separator = ",\n"

    def __enter__(self) -> JsonRows:
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:
            self._file.write(f"\n]{self._tail}\n")


# ---- flags


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("tools/predict.py", __doc__, EXAMPLE)
    add, unset = parser.add_argument, argparse.SUPPRESS
    add(
        "inputs",
        nargs="+",
        help="pictures, videos, and folders, which are searched for pictures through all their folders",
    )
    add(
        "--resume",
        required=True,
        default=unset,
        help="the checkpoint, published or ours: a path or an https address",
    )
    add(
        "--output_dir", type=Path, required=True, default=unset, help="folder to write, outside of the inputs"
    )
    add_score_threshold_flag(parser, "leave out detections that score less, in pictures and files")
    add(
        "--annotations",
        type=Path,
        help="a COCO file with the pictures' ids; without it they are numbered from 1 in the "
        "order of the inputs",
    )
    add("--no_pictures", action="store_true", help="write no annotated pictures and videos")
    add(
        "--batch_size",
        type=int,
        default=1,
        help="pictures at once; in a batch the padding changes detections a little",
    )
    add("--device", default="", help="cuda, cpu, cuda:1, mps; default: cuda where there is one, else cpu")
    add("--amp", default="off", choices=("off", "bf16", "fp16"), help="mixed precision")
    add_weights_flag(parser)
    add(
        "--on_bad_image",
        default="stop",
        choices=("stop", "skip"),
        help="stop at a file that can't be used, or leave it out",
    )
    add(
        "--max_image_megapixels",
        type=float,
        default=DataConfig.max_image_megapixels,
        help="refuse larger pictures before they are decoded",
    )
    add_untold_flags(parser)
    return parser


if __name__ == "__main__":
    run_as_command(main)
