"""Detect objects in pictures and videos: annotated copies of them, and the detections in COCO's
results format.

Written to --output_dir: every picture and video under its own name, in folders as the inputs are;
predictions.json, a list of {image_id, category_id, bbox [x, y, width, height] in pixels, score};
and images.json, which says what the ids mean, in COCO's instances format without annotations.
A detector of panoptic data writes panoptic.json and the maps in panoptic/ too, in COCO's results format;
its pictures show the segments, and predictions.json has the things alone.
Pictures and frames of videos are turned upright, as viewers show them. With --annotations, pictures
are taken as they are stored, as in training and evaluation.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image
from tqdm import tqdm

# a script sees only its own folder, not the project
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.allocator import keep_freed_memory
from util.config import (
    DataConfig,
    add_detector_flags,
    add_score_threshold_flag,
    add_weights_flag,
    detector_flags,
    make_parser,
)
from util.errors import UserError, run_as_command

if TYPE_CHECKING:  # imported where they are used, so that --help needs no torch
    from datasets.input_files import InputFile
    from datasets.panoptic.format import Panoptic
    from models.detector import Detections, Detector, Prepared
    from util.images.files import BadImageError
    from util.images.video import VideoReader

EXAMPLE = (
    "python tools/predict.py --resume exps/run/checkpoint.pth photos street.jpg drive.mp4 "
    "--output_dir predictions"
)
REMEDY = "or add --on_bad_image skip"
T = TypeVar("T")


def parser() -> argparse.ArgumentParser:
    made = make_parser("tools/predict.py", __doc__, EXAMPLE)
    add = made.add_argument
    text = "pictures, videos, and folders, which are searched for pictures with all their subfolders"
    add("inputs", nargs="+", help=text)
    text = "the checkpoint, published or ours: a path or an https address"
    add("--resume", "--checkpoint", required=True, help=text)
    text = "folder to write, outside of the inputs"
    add("--output_dir", type=Path, required=True, help=text)
    add_score_threshold_flag(made, "leave out detections that score less, in pictures and files")
    text = "a COCO file with the pictures' ids; default: numbered from 1 in the order of the inputs"
    add("--annotations", type=Path, help=text)
    add("--no_pictures", action="store_true", help="write no annotated pictures and videos")
    text = "pictures at once; in a batch the padding changes detections a little"
    add("--batch_size", type=int, default=1, help=text)
    add("--device", default="", help="cuda, cpu, cuda:1, mps; default: cuda where there is one, else cpu")
    add("--amp", default="off", choices=("off", "bf16", "fp16"), help="mixed precision")
    add_weights_flag(made)
    text = "stop at a file that can't be used, or leave it out"
    add("--on_bad_image", default="stop", choices=("stop", "skip"), help=text)
    text = "refuse larger pictures before they are decoded"
    largest = DataConfig.max_image_megapixels
    add("--max_image_megapixels", type=float, default=largest, help=text)
    # what a published checkpoint does not say of its detector
    add_detector_flags(made)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the flags say. Raises UserError."""
    # what can be checked before the checkpoint is loaded is checked first
    args = parser().parse_args(argv)
    from datasets.input_files import check_output, find_files, with_annotated_ids

    files = find_files([Path(path) for path in args.inputs])
    check_output(args.output_dir, args.inputs, files)

    from models import load_detector

    # a published checkpoint may need some flags of main.py
    detector = load_detector(
        args.resume,
        device=args.device,
        amp=args.amp,
        batch_size=args.batch_size,
        weights=args.weights,
        max_image_megapixels=args.max_image_megapixels,
        **detector_flags(args),
    )
    if detector.device.type == "cpu":
        keep_freed_memory()
    if args.annotations:
        files = with_annotated_ids(files, args.annotations, detector.classes)
    # the frames of a video are added when it is opened
    pictures = sum(not file.is_video for file in files)
    # the ids of predictions.json mean the images and categories of images.json
    categories = json.dumps([{"id": one.id, "name": one.name} for one in detector.classes.categories])
    head = f'{{"annotations": [], "categories": {categories},\n"images": '
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        maps: contextlib.AbstractContextManager = contextlib.nullcontext()
        stuff = detector.classes.stuff
        if stuff is not None and detector.config.segmentation.masks:
            maps = open_maps(args.output_dir, detector)
        # disable=None: no bar if the output is not a terminal
        with (
            JsonRows(args.output_dir / "predictions.json") as results,
            JsonRows(args.output_dir / "images.json", head, "}") as images,
            maps as panoptic,
            tqdm(total=pictures, unit="picture", disable=None) as progress,
        ):
            prediction = Prediction(detector, args, progress, results, images, panoptic)
            prediction.run(files)
    except OSError as error:
        path = error.filename or args.output_dir
        raise UserError(f"{path} can't be written ({error.strerror or error})") from None
    prediction.report()


@dataclass(frozen=True)
class Shot:
    """A picture or a frame of a video: as it is drawn on, as the network takes it, its entry in
    images.json, and its time in seconds.
    """

    picture: Image.Image
    prepared: Prepared
    entry: dict[str, Any]
    file: InputFile
    seconds: Fraction


@dataclass
class Prediction:
    """Detects, draws and writes. Reading, detecting and drawing run at the same time, with a few
    pictures in memory.

    args: the command's flags. results, images, maps: predictions.json, images.json, and panoptic.json or
    None. bad: files that could not be used. best_score: of all detections, also those below the threshold.
    """

    detector: Detector
    args: argparse.Namespace
    progress: tqdm
    results: JsonRows
    images: JsonRows
    maps: JsonRows | None
    bad: list[BadImageError] = field(default_factory=list)
    best_score: float = 0.0
    _next_id: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def run(self, files: Sequence[InputFile]) -> None:
        """Predict all files. Raises BadImageError for one that can't be used, or keeps it in `bad`
        with --on_bad_image skip.
        """
        # Pictures that follow each other share batches; a video is predicted by itself.
        for is_video, group in itertools.groupby(files, key=lambda file: file.is_video):
            if not is_video:
                self._predict(self._read_pictures(list(group)), self._save_picture)
                continue
            for file in group:
                with self._skipping_bad():
                    self._predict_video(file)

    def report(self) -> None:
        """Print what was done and which files were left out. Raises UserError if those are all."""
        # the files that were left out, one a line, then the counts
        for error in self.bad:
            print(f"left out: {error.path} {error.reason}", file=sys.stderr)
        if not self.images.count:
            raise UserError(f"none of the {len(self.bad)} files could be used")
        line = f"pictures: {self.images.count}; "
        line += f"detections that score {self.args.score_threshold:g} and more: {self.results.count}"
        if not self.results.count and not self.maps:
            line += f" (the best scores {self.best_score:.2g}; lower --score_threshold to see it)"
        if self.bad:
            line += f"; files left out: {len(self.bad)}"
        print(f"{line}; written to {self.args.output_dir}")

    def _predict(
        self, shots: Generator[Shot], write: Callable[[Shot, Detections, Panoptic | None], None]
    ) -> None:
        from datasets.coco_eval import coco_results

        # one thread reads ahead, one detects, and this one draws and writes
        size = self.detector.batch_size
        predicted = ahead(self._detect(ahead(shots, 2 * size)), size)
        with contextlib.closing(predicted):
            for shot, every in predicted:
                found = every.above(self.args.score_threshold)
                # noted first, so that a picture that can't be written is in the JSON files
                detections: dict[str, Any] = {
                    "boxes": found.boxes,
                    "scores": found.scores,
                    "labels": found.labels,
                }
                if found.embedded_masks is not None:
                    detections["masks"] = found.embedded_masks
                for result in coco_results([shot.entry["id"]], [detections], self.detector.classes):
                    self.results.add(result)
                self.images.add(shot.entry)
                panoptic = self._write_map(shot, every) if self.maps else None
                self.progress.update()
                if not self.args.no_pictures:
                    write(shot, found, panoptic)

    def _write_map(self, shot: Shot, found: Detections) -> Panoptic:
        """Write the panoptic map of all detections, as evaluation makes it."""
        from datasets.panoptic.format import write_image
        from datasets.panoptic.merge import panoptic_of

        data, classes = self.detector.config.data, self.detector.classes
        limits = {"score_threshold": data.panoptic_score, "overlap_threshold": data.panoptic_overlap}
        panoptic = panoptic_of(found.scores, found.labels, found.embedded_masks, classes, **limits)
        assert self.maps is not None
        self.maps.add(write_image(self.args.output_dir / "panoptic", shot.entry["id"], panoptic))
        return panoptic

    def _predict_video(self, file: InputFile) -> None:
        from util.images.video import VideoReader, VideoWriter

        with VideoReader(file.path, REMEDY) as video, contextlib.ExitStack() as stack:
            writer: VideoWriter | None = None

            def write(shot: Shot, found: Detections, panoptic: Panoptic | None) -> None:
                nonlocal writer
                # the size is known from the first frame only
                if writer is None:
                    size = shot.picture.size
                    writer = VideoWriter(self._output(file), size, video.rate, video.pixel_aspect)
                    stack.callback(writer.close)
                writer.add(self._draw(shot, found, panoptic, enlarge=False), shot.seconds)

            self.progress.total += video.num_frames
            self._predict(self._read_video(video, file), write)

    def _save_picture(self, shot: Shot, found: Detections, panoptic: Panoptic | None) -> None:
        picture = self._draw(shot, found, panoptic, enlarge=True)
        # with subsampled chroma coloured letters would blur
        picture.save(self._output(shot.file), quality=92, subsampling=0)

    def _read_pictures(self, files: Sequence[InputFile]) -> Generator[Shot]:
        from util.images.files import read_picture

        upright = self.args.annotations is None
        for file in files:
            # an id is used up even if the file is left out
            number = file.image_id
            if number is None:
                number = next(self._next_id)
            with self._skipping_bad():
                picture = read_picture(file.path, self.args.max_image_megapixels, REMEDY, upright=upright)
                yield self._shot(picture, file, {"id": number}, Fraction(0))

    def _read_video(self, video: VideoReader, file: InputFile) -> Generator[Shot]:
        for index, frame in enumerate(video):
            seconds = round(float(frame.seconds), 6)
            entry = {"id": next(self._next_id), "frame": index, "seconds": seconds}
            yield self._shot(frame.picture, file, entry, frame.seconds)

    def _shot(self, picture: Image.Image, file: InputFile, entry: dict[str, Any], seconds: Fraction) -> Shot:
        entry |= {"file_name": file.name, "width": picture.width, "height": picture.height}
        return Shot(picture, self.detector.prepare(picture), entry, file, seconds)

    def _detect(self, shots: Generator[Shot]) -> Generator[tuple[Shot, Detections]]:
        with contextlib.closing(shots):
            for batch in batches(shots, self.detector.batch_size):
                every = self.detector.detect([shot.prepared for shot in batch])
                for shot, found in zip(batch, every, strict=True):
                    # the first detection of an image has the highest score
                    self.best_score = max([self.best_score, *found.scores[:1].tolist()])
                    yield shot, found

    def _draw(
        self, shot: Shot, found: Detections, panoptic: Panoptic | None, *, enlarge: bool
    ) -> Image.Image:
        from util.draw.boxes import draw_boxes, draw_panoptic

        classes = list(self.detector.classes.names.values())
        if panoptic:
            names = {category.id: category.name for category in self.detector.classes.categories}
            labels = {segment["id"]: names.get(segment["category_id"], "") for segment in panoptic.segments}
            return draw_panoptic(shot.picture, panoptic.ids, labels, classes=classes, enlarge=enlarge)
        scores = found.scores.tolist()
        masks = None if found.masks is None else found.masks.numpy()
        boxes = found.boxes.numpy()
        return draw_boxes(
            shot.picture, boxes, found.names, scores, classes=classes, masks=masks, enlarge=enlarge
        )

    def _output(self, file: InputFile) -> Path:
        path = self.args.output_dir / file.output_name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @contextlib.contextmanager
    def _skipping_bad(self) -> Iterator[None]:
        from util.images.files import BadImageError

        try:
            yield
        except BadImageError as error:
            if self.args.on_bad_image == "stop":
                raise
            self.bad.append(error)


def open_maps(folder: Path, detector: Detector) -> JsonRows:
    """panoptic.json; its maps go to the folder of the same name."""
    classes = detector.classes
    categories = [
        {"id": one.id, "name": one.name, "isthing": int(one.label not in (classes.stuff or ()))}
        for one in classes.categories
    ]
    (folder / "panoptic").mkdir(exist_ok=True)
    head = f'{{"categories": {json.dumps(categories)},\n"annotations": '
    return JsonRows(folder / "panoptic.json", head, "}")


class JsonRows:
    """A JSON list that is written as it grows, one entry a line. An error leaves a complete list.

    head, tail: what stands before and after the list. count: number of entries.
    """

    def __init__(self, path: Path, head: str = "", tail: str = "") -> None:
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        self._file.write(f"{head}[")
        self._tail, self.count = tail, 0

    def add(self, entry: dict[str, Any]) -> None:
        separator = ",\n" if self.count else "\n"
        self._file.write(separator + json.dumps(entry))
        self.count += 1

    def __enter__(self) -> JsonRows:
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:
            self._file.write(f"\n]{self._tail}\n")


def ahead(items: Generator[T], depth: int) -> Generator[T]:
    """The items of a generator; another thread makes up to `depth` of them in advance."""
    pool = ThreadPoolExecutor(1)
    waiting = deque(pool.submit(next, items, None) for _ in range(depth))
    try:
        while (item := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, items, None))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)  # first, because a generator that runs can't be closed
        items.close()


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter. If `items` raises, what it gave before comes first."""
    batch: list[T] = []
    try:
        for item in items:
            batch.append(item)
            if len(batch) == size:
                yield batch
                batch = []
    except Exception:
        # what was read before an error is still predicted
        if batch:
            yield batch
        raise
    if batch:
        yield batch


if __name__ == "__main__":
    run_as_command(main)
