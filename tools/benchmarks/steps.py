"""What is measured: a call of inference and a training step, and what goes into them."""

from __future__ import annotations

import argparse
import timeit
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import timer  # synchronises with the GPU before it reads the clock

from datasets import build_dataset
from datasets.loader import Batch, collate
from models.build import build_model
from models.criterion import SetCriterion
from models.deformable_detr import DeformableDETR
from models.inference import prepare_for_inference
from models.ops.benchmark import in_turns, machine_name
from models.postprocess import PostProcess
from models.regions import check_compiler, compile_regions
from util.checkpoint import load_weights
from util.class_map import AUTO, COCO_CLASSES, ClassMap
from util.config import Config, with_classes
from util.distributed.processes import choose_device
from util.errors import UserError
from util.nested_tensor import NestedTensor
from util.step.precision import autocast
from util.step.precision_check import move_to_device
from util.step.updater import build_updater

OBJECTS = 7  # an image of COCO has 7.3 on average


class TrainingStep:
    """Forward, losses, backward, clipping and optimiser, as in main.py: by a call, or one by one."""

    def __init__(
        self, config: Config, device: torch.device, images: NestedTensor, targets: list[dict[str, Tensor]]
    ) -> None:
        self.config, self.images, self.targets = config, images, targets
        self.model, self.criterion, _ = build(config, device)
        self.model.train()
        if config.run.compile:
            check_compiler(device)
            compile_regions(self.model)
        self._updater = build_updater(self.model, config)

    def __call__(self) -> None:
        # as in a training, the outputs live until the end
        outputs = self.forward()
        self.backward(self.loss(outputs))
        self.update()

    def forward(self) -> dict[str, Any]:
        with autocast(self.config.run.amp, self.images.tensors.device):
            return self.model(self.images)

    def loss(self, outputs: dict[str, Any]) -> Tensor:
        return self.criterion.total(self.criterion(outputs, self.targets))

    def backward(self, total: Tensor) -> None:
        self._updater.backward(total, 1)

    def update(self) -> None:
        # frees the gradients, so that none counts as memory before the next step
        self._updater.step()


def inference(
    config: Config, device: torch.device, images: NestedTensor, to_results: bool = False
) -> Callable[[], None]:
    """The network alone, or all up to detections in COCO's results format, with boxes and masks of the
    batch's size.
    """
    model, _, postprocessors = build(config, device)
    prepare_for_inference(model, config.run.amp)
    sizes = torch.tensor([images.tensors.shape[-2:]] * len(images), device=device)

    if to_results:
        from datasets.coco_eval import coco_results  # needs more packages than the rest

    def infer() -> None:
        with torch.no_grad(), autocast(config.run.amp, device):
            outputs = model(images)
        if to_results:
            detections = postprocessors["bbox"](outputs, sizes)
            on_host = [{name: values.cpu() for name, values in image.items()} for image in detections]
            coco_results(range(len(on_host)), on_host, config.classes or COCO_CLASSES)

    return infer


def build(
    config: Config, device: torch.device
) -> tuple[DeformableDETR, SetCriterion, dict[str, PostProcess]]:
    """The detector on the device, its losses and {"bbox": postprocessor}."""
    model, criterion, postprocessors = build_model(config)
    if config.run.resume:
        load_weights(model, config.run.resume)
    move_to_device(model, device, config.run)
    return model, criterion, postprocessors


def seconds_in_turns(calls: Sequence[Callable], args: argparse.Namespace) -> list[list[float]]:
    """Seconds of --num_iters calls of each function, after --warm_iters that do not count."""
    turns = args.warm_iters + args.num_iters
    times = in_turns(calls, turns, lambda call: timeit.timeit(call, timer=timer, number=1))
    return [of_one[args.warm_iters :] for of_one in times]


def prepare(args: argparse.Namespace, config: Config) -> tuple[torch.device, Batch, Config]:
    """The device, a batch on it and the Config with its classes. Prints the machine and the batch."""
    device = choose_device(config.run.device)
    torch.manual_seed(config.run.seed)
    (images, targets), config = make_batch(args.size, config, device)
    height, width = images.tensors.shape[-2:]
    machine = f"{machine_name(device)}, torch {torch.__version__}"
    print(f"{machine}; batch {len(images)} of {height} x {width}", flush=True)
    return device, (images, targets), config


def make_batch(size: Sequence[int] | None, config: Config, device: torch.device) -> tuple[Batch, Config]:
    """Images and targets, noise of a size or of the validation set, and the Config with their classes."""
    count, classes = config.optim.batch_size, config.classes
    # the content of noise costs as much time as that of pictures
    if size:
        if classes is None:
            classes = COCO_CLASSES
            if config.data.num_classes != AUTO:
                classes = ClassMap(int(config.data.num_classes), ())
        height, width = size
        masks = config.segmentation.masks
        items = [noise(height, width, classes.num_classes, masks) for _ in range(count)]
    else:
        try:
            dataset = build_dataset("val", config)
        except UserError as error:
            raise UserError(f"{error}; or give --size <height> <width> to do without a data set") from None
        classes = dataset.classes
        items = [dataset[i % len(dataset)] for i in range(count)]
    images, targets = collate(items)
    targets = [{name: value.to(device) for name, value in target.items()} for target in targets]
    return (images.to(device), targets), with_classes(config, classes)


def noise(height: int, width: int, num_classes: int, masks: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """An item of a data set."""
    # cxcywh, all within the image
    boxes = torch.cat([torch.rand(OBJECTS, 2) * 0.5 + 0.25, torch.rand(OBJECTS, 2) * 0.4 + 0.05], 1)
    pixels = torch.randint(256, (3, height, width), dtype=torch.uint8)
    target = {"boxes": boxes, "labels": torch.randint(num_classes, (OBJECTS,))}
    if masks:
        target["masks"] = torch.rand(OBJECTS, height, width) < 0.5
    return pixels, target
