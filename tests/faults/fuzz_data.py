"""Thousands of damaged annotation files, images and checkpoints: each loads, or is refused in one
line.

    python tests/faults/fuzz_data.py --annotations 10000 --images 2000 --checkpoints 2000 --unsealed 2000
    python tests/faults/fuzz_data.py --annotations 10000 --only 1234        # that case again

A case is made from the seed, its kind and its number alone. To load means: the data set is built,
every item goes through the training transform and into a batch, and the annotations serve to
evaluate detections; or a model takes the checkpoint's weights. A case misbehaves if anything but a
UserError of one line comes out, if it takes too long or gigabytes, or does what fuzz_watch.py
forbids. Its files are then kept, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import random
import re
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(
    0, str(Path(__file__).resolve().parents[2])
)  # run as a script, this folder would be searched instead

import numpy as np
import torch
from PIL import Image
from torch import nn

from datasets.bad_images import BadImages
from datasets.coco import CocoDetection
from datasets.coco_eval import evaluate_results
from datasets.loader import collate
from datasets.transforms import train_transform
from tests.faults import fuzz_mutate
from tests.faults.compare import differing
from tests.faults.fuzz_watch import Misbehaviour, Watch
from util.checkpoint import load_state, read_checkpoint, write_atomically
from util.class_map import ClassMap
from util.config import DataConfig, parse_config
from util.data_identity import DataIdentity
from util.errors import UserError
from util.optim import build_schedule
from util.run.history import History
from util.run.state import TrainingPosition, TrainingState
from util.step.metrics import EpochSums
from util.step.not_finite import FiniteWatch
from util.step.random_state import RandomGenerators
from util.step.updater import Updater, build_updater

SECONDS_PER_CASE = 20
MEGAPIXELS = 2.0
_NUM_CLASSES = 4


@dataclass
class Outcome:
    """What became of the cases of a kind."""

    loaded: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    misbehaved: list[str] = field(default_factory=list)

    def report(self, kind: str, seed: int) -> str:
        refused = sum(self.refused.values())
        total = self.loaded + refused + len(self.misbehaved)
        lines = [
            f"{kind}: {total} cases, seed {seed}: {self.loaded} loaded, {refused} refused with one "
            f"line, {len(self.misbehaved)} misbehaved"
        ]
        lines += [f"  {count:6}  {message}" for message, count in self.refused.most_common()]
        return "\n".join(lines)


def fuzz(
    kind: str, numbers: range, seed: int, work: Path, *, keep: Path | None = None, hard: bool = False
) -> Outcome:
    """Run the cases `numbers` of a kind of CASES.

    Args:
        work: an empty folder for the files of the case at hand.
        keep: where the files of misbehaving cases are copied.
        hard: end this process when a case hangs in a C function.
    """
    case = CASES[kind](work)
    watch = Watch(work, SECONDS_PER_CASE, hard)
    case.prepare(None)
    case.run()  # imports what is imported late, before opening files is watched
    outcome = Outcome()
    for number in numbers:
        case.prepare(random.Random(f"{seed}/{kind}/{number}"))
        failure = _run_case(case.run, watch, outcome)
        if failure:
            outcome.misbehaved.append(f"MISBEHAVED: {kind} case {number}, seed {seed}: {failure}")
            if keep:
                shutil.copytree(work, keep / f"{kind}-{seed}-{number}", dirs_exist_ok=True)
                print(outcome.misbehaved[-1], flush=True)
    return outcome


def _run_case(run: Callable[[], None], watch: Watch, outcome: Outcome) -> str | None:
    """Count a case; gives what it did wrong, if anything."""
    try:
        with watch.case(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow and PyTorch warn of odd files
            run()
    except UserError as error:
        text = str(error)
        if len(text.splitlines()) != 1 or len(text) > 2000 or not text.isprintable():
            return f"not one short line: {text!r}"
        outcome.refused[_kind_of(text)] += 1
    except (Exception, Misbehaviour):
        return traceback.format_exc()
    else:
        outcome.loaded += 1
    return None


def _kind_of(message: str) -> str:
    """A message without what is particular to the case."""
    message = re.sub(r"( has \w+) .*; it must be", r"\1 ...; it must be", message)
    message = re.sub(r"/\S+?(?=:? )", "<file>", message)
    message = re.sub(r"\(.*\)|\b(lacks|key|GLOBAL|entry|build) '?[^ ;]*", "...", message)
    return re.sub(r"-?\b\d[\w.+-]*", "#", message).split("; take")[0][:120]


# ---- kinds of cases


class AnnotationCase:
    """A damaged instances file beside good images."""

    def __init__(self, work: Path) -> None:
        self._images, self._file = work / "images", work / "instances.json"
        self._images.mkdir()
        noise = np.random.default_rng(0)
        for i, size in enumerate(((24, 32, 3), (32, 24, 3), (20, 20, 3))):
            Image.fromarray(noise.integers(0, 255, size, dtype=np.uint8)).save(self._images / f"{i}.png")

    def prepare(self, rng: random.Random | None) -> None:
        """Write the file; undamaged without `rng`."""
        content = json.dumps(_INSTANCES).encode()
        if rng and rng.random() < 0.8:
            content = fuzz_mutate.json_text(rng, fuzz_mutate.mutate_json(rng, _INSTANCES))
        elif rng:
            content = fuzz_mutate.mutate_bytes(rng, content, [content])
        self._file.write_bytes(content)

    def run(self) -> None:
        dataset = _dataset(self._images, self._file)
        _check_batch(dataset)
        truth = dataset.coco
        detections = [
            {
                "image_id": image_id,
                "category_id": category_id,
                "bbox": [1.0, 2.0, 10.0, 12.0],
                "score": 0.5 / (k + 1),
            }
            for k, image_id in enumerate(dataset.image_ids)
            for category_id in (*truth.cats, 77)
        ]
        detections += [{**a, "score": 0.9} for a in truth.anns.values()]
        for some in (detections, []):
            stats = evaluate_results(truth, some).stats
            assert len(stats) == 12
            assert all(-1 <= value <= 1 for value in stats), stats


class ImageCase:
    """A damaged image file beside good annotations."""

    def __init__(self, work: Path) -> None:
        self._images, self._annotations = work / "images", work / "instances.json"
        self._images.mkdir()
        one = {"images": _INSTANCES["images"][:1], "annotations": _INSTANCES["annotations"][:2]}
        self._annotations.write_text(json.dumps(_INSTANCES | one))
        self._files = fuzz_mutate.image_files()

    def prepare(self, rng: random.Random | None) -> None:
        content = fuzz_mutate.mutate_image(rng, self._files) if rng else self._files[0]
        (self._images / "0.png").write_bytes(content)

    def run(self) -> None:
        _check_batch(_dataset(self._images, self._annotations))


class CheckpointCase:
    """A damaged checkpoint, from which a run goes on.

    Where its bytes were damaged and it loads all the same, all that is read must be as it was
    written.
    """

    write: Callable[[Any, Path], None] = staticmethod(write_atomically)

    def __init__(self, work: Path) -> None:
        self._file = work / "checkpoint.pth"
        model = _small_model()
        state, updater = _training(model)
        self._bytes = self._after_a_step(model, state, updater)
        self._content = read_checkpoint(self._file)
        self._next = self._after_a_step(model, state, updater)
        legacy = io.BytesIO()
        torch.save(self._content, legacy, _use_new_zipfile_serialization=False)
        self._others = [self._bytes, legacy.getvalue(), json.dumps(_INSTANCES).encode()]
        self._same_content = False

    def _after_a_step(self, model: nn.Module, state: TrainingState, updater: Updater) -> bytes:
        updater.backward(sum(p.exp().sum() for p in model.parameters()), 1)
        updater.step()
        self.write(state.gather(), self._file)
        return self._file.read_bytes()

    def prepare(self, rng: random.Random | None) -> None:
        kind = rng.choice(("bytes", "zip file", "state", "state")) if rng else "whole"
        self._same_content = kind != "state"
        if kind == "whole":
            self._file.write_bytes(self._bytes)
        elif kind == "bytes":
            self._file.write_bytes(fuzz_mutate.mutate_bytes(rng, self._bytes, self._others))
        elif kind == "zip file":
            self._file.write_bytes(fuzz_mutate.mutate_zip(rng, self._bytes, self._next))
        else:
            self._file.unlink(missing_ok=True)
            self.write(fuzz_mutate.mutate_state(rng, self._content), self._file)

    def run(self) -> None:
        model = _small_model()
        checkpoint = read_checkpoint(self._file)
        changed = list(differing("", self._content, checkpoint)) if self._same_content else []
        assert not changed, f"{changed[0]} was damaged, and nobody noticed"
        load_state(model, checkpoint, str(self._file))
        state, _ = _training(model)
        state.restore(checkpoint, str(self._file))
        for name, tensor in model.state_dict().items():
            kept = self._content["model"][name]
            assert (tensor.shape, tensor.dtype) == (kept.shape, kept.dtype), name


class UnsealedCase(CheckpointCase):
    """The same without the SHA-256 at the end, as other programs write checkpoints."""

    write = staticmethod(torch.save)


CASES: dict[str, Callable[[Path], Any]] = {
    "annotations": AnnotationCase,
    "images": ImageCase,
    "checkpoints": CheckpointCase,
    "unsealed": UnsealedCase,
}

_INSTANCES = {
    "info": {"description": "three images", "year": 2026},
    "licenses": [{"id": 1, "url": "x"}],
    "images": [
        {"id": 10, "file_name": "0.png", "width": 32, "height": 24, "license": 1},
        {"id": 11, "file_name": "1.png", "width": 24, "height": 32},
        {"id": 12, "file_name": "2.png", "width": 20, "height": 20},
    ],
    "annotations": [
        {
            "id": 1,
            "image_id": 10,
            "category_id": 1,
            "bbox": [2, 3, 10, 12],
            "area": 90.5,
            "iscrowd": 0,
            "segmentation": [[2, 3, 12, 3, 12, 15]],
        },
        {
            "id": 2,
            "image_id": 10,
            "category_id": 3,
            "bbox": [0.5, 1.5, 30.0, 20.0],
            "area": 600,
            "iscrowd": 0,
        },
        {"id": 3, "image_id": 11, "category_id": 3, "bbox": [20, 20, 30, 30]},
        {
            "id": 4,
            "image_id": 11,
            "category_id": 1,
            "bbox": [1, 1, 20, 20],
            "area": 400,
            "iscrowd": 1,
            "segmentation": {"counts": [4, 5, 6], "size": [32, 24]},
        },
    ],
    "categories": [{"id": 1, "name": "one", "supercategory": "a"}, {"id": 3, "name": "three"}],
}


def _dataset(images: Path, annotations: Path) -> CocoDetection:
    data = DataConfig(train_sizes=[32, 40], max_size=60, crop_resize_sizes=[32], crop_sizes=[16, 24])
    transform = train_transform(data)
    return CocoDetection(
        images, annotations, transform, num_classes=_NUM_CLASSES, seed=1, max_megapixels=MEGAPIXELS
    )


def _check_batch(dataset: CocoDetection) -> None:
    """Every item, in one batch: what the model and the losses rely on."""
    images, targets = collate([dataset[i] for i in range(len(dataset))])
    assert torch.isfinite(images.tensors).all()
    for target in targets:
        boxes, labels = target["boxes"], target["labels"]
        assert boxes.shape == (len(labels), 4)
        assert ((boxes >= -1e-6) & (boxes <= 1 + 1e-6)).all(), boxes  # not a number is neither
        assert ((labels >= 0) & (labels < _NUM_CLASSES)).all()
        assert torch.isfinite(target["area"]).all()
        assert target["image_id"].dtype == labels.dtype == torch.int64


def _small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "backbone": nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)),
            "linear1": nn.Linear(3, 8),
            "linear2": nn.Linear(8, 4),
        }
    )


def _training(model: nn.Module) -> tuple[TrainingState, Updater]:
    """All parts of a run's state."""
    config = parse_config(["--ema_decay", "0.9", "--amp", "fp16"])
    updater = build_updater(model, config)
    shared = {"history": History(None)}
    watch = FiniteWatch(model, lambda images, targets: images.tensors.sum(), {}, None)
    random_state = RandomGenerators(torch.device("cpu"))
    own = {
        "random": random_state,
        "means": EpochSums(),
        "not_finite": watch,
        "bad_images": BadImages("skip", 9),
    }
    schedule = build_schedule(updater.optimizer, config)
    classes = ClassMap.of([{"id": 1, "name": "one"}], _NUM_CLASSES, "")
    data = dict.fromkeys(("train", "val"), DataIdentity.of([{"id": 1, "file_name": "1.jpg"}], []))
    return TrainingState(
        config, classes, data, model, updater, schedule, TrainingPosition(), shared, own
    ), updater


def main() -> int:
    logging.disable()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for kind in CASES:
        what = "checkpoints without a SHA-256" if kind == "unsealed" else kind
        parser.add_argument(f"--{kind}", type=int, default=0, metavar="CASES", help=f"damaged {what} to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", type=int, help="run the case of this number alone, of every kind that is given"
    )
    parser.add_argument(
        "--keep", type=Path, default=Path("fuzz_failures"), help="folder for the files of misbehaving cases"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    failed = False
    for kind in CASES:
        count = getattr(args, kind)
        numbers = range(count) if args.only is None else range(args.only, args.only + bool(count))
        if not numbers:
            continue
        work = Path(tempfile.mkdtemp(prefix=f"fuzz-{kind}-"))
        print(f"{kind}: the case at hand is in {work}", flush=True)
        outcome = fuzz(kind, numbers, args.seed, work, keep=args.keep, hard=True)
        shutil.rmtree(work)  # not after a crash: then it holds the case
        print(outcome.report(kind, args.seed), flush=True)
        failed = failed or bool(outcome.misbehaved)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
