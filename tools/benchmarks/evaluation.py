"""What an evaluation's time goes to, from the files to the metrics, as in main.py --eval."""

from __future__ import annotations

import argparse
import copy
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.benchmark import timer  # synchronises with the GPU before it reads the clock

from datasets import DetectionData, build_dataset
from datasets.coco_format import restrict
from datasets.loader import Batch, DeviceBatches
from datasets.splits import evaluation_loader
from engine import evaluate
from models.ops.benchmark import machine_name
from tools.benchmarks.parts import Parts
from tools.benchmarks.steps import build
from util.allocator import keep_freed_memory
from util.config import Config, with_classes
from util.distributed.processes import choose_device
from util.errors import UserError
from util.nested_tensor import NestedTensor

# all that is in no other part: the results in COCO's format, and their metrics
REST = "results and COCO metrics"
PARTS = ("loader", "transfer", "forward", "losses", "postprocess", REST)


class Clock(Parts):
    """Seconds of every part. The device has finished a part when the next one begins."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        self._last = 0.0

    def changing(self) -> None:
        now = timer()
        if self._names:
            self.seconds[self.current] += now - self._last
        self._last = now


@dataclass
class TimedBatches(DeviceBatches):
    """Batches whose loading and copying are parts of the clock's. images: how many came."""

    clock: Clock
    images: int = 0

    def __iter__(self) -> Iterator[Batch]:
        batches = super().__iter__()
        while True:
            with self.clock.part("loader"):
                batch = next(batches, None)
            if batch is None:
                return
            self.images += len(batch[0])
            yield batch

    def on_device(self, images: NestedTensor, targets: list[dict[str, Tensor]]) -> Batch:
        with self.clock.part("transfer"):
            return super().on_device(images, targets)


def first_batches(
    dataset: DetectionData, config: Config, device: torch.device, count: int
) -> tuple[DeviceBatches, DetectionData]:
    """The first batches, and the data set with the ground truth of their images alone."""
    num_images = min(count * config.optim.batch_size, len(dataset))
    few = copy.copy(dataset)
    few.coco = COCO()
    few.coco.dataset = restrict(dataset.coco.dataset, set(dataset.image_ids[:num_images]))
    return evaluation_loader(few, config, device, num_images=num_images), few


def measure_evaluation(args: argparse.Namespace, config: Config) -> None:
    """Evaluate batches of the validation set, as a whole and by part, and print the times."""
    if args.size:
        raise UserError("benchmark.py evaluation reads the validation set: leave out --size")
    device = choose_device(config.run.device)
    torch.manual_seed(config.run.seed)
    if device.type == "cpu":
        keep_freed_memory()
    machine = f"{machine_name(device)}, torch {torch.__version__}"
    print(f"{machine}; batches of {config.optim.batch_size}", flush=True)
    dataset = build_dataset("val", config)
    config = with_classes(config, dataset.classes)
    model, criterion, postprocessors = build(config, device)

    def seconds_of(batches: DeviceBatches, data: DetectionData) -> float:
        start = timer()
        evaluate(model, criterion, postprocessors, batches, data, config.run)
        return timer() - start

    # the first calls have costs of their own
    if args.warm_iters:
        seconds_of(*first_batches(dataset, config, device, args.warm_iters))
    batches, few = first_batches(dataset, config, device, args.num_iters)
    whole = seconds_of(batches, few)

    # once more by part: between parts the device must have finished
    clock = Clock()
    timed = TimedBatches(**vars(batches), clock=clock)
    clock.follow(model, "forward")
    clock.follow(criterion, "losses")
    clock.follow(postprocessors["bbox"], "postprocess")
    with clock.part(REST):
        total = seconds_of(timed, few)

    print(f"{timed.images} images\n{'part':28}{'ms an image':>12}{'images/s':>10}{'share':>7}")
    for name in PARTS:
        print(_row(name, clock.seconds[name], timed.images), f"{clock.seconds[name] / total:6.0%}")
    print(_row("sum of the parts", total, timed.images))
    print(_row("without a clock in between", whole, timed.images))
    print(f"loader: the wait for --num_workers {config.data.num_workers}, which work beside the other parts")


def _row(name: str, seconds: float, images: int) -> str:
    return f"{name:28}{1000 * seconds / images:12.2f}{images / seconds:10.2f}"
