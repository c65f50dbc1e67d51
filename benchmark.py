"""Speed of the detector, with main's flags, of its data, and of the attention operator, on any device.

    python benchmark.py --num_iters 300 --warm_iters 5 --batch_size 1  # an image of the data set
    python benchmark.py --num_iters 20 --size 800 1333  # noise of a size, no data set
    python benchmark.py train --num_iters 10 --size 320 320 --bf 1 --insert_idx 0  # against --bf 0
    python benchmark.py loader --num_iters 50  # training and evaluation images, from file to tensor
    python benchmark.py op  # the operator's backends, see op --help

--amp bf16 and, of a training step, --bf and --checkpoint_encoder are timed beside the same without
them, and the memory of a training step is given at its peak. --against_reference times the same
with the attention operator in plain PyTorch too; --profile adds what the time goes to; --trace
writes it as a timeline, for ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import timeit
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import profile
from torch.utils.benchmark import timer  # synchronises with the GPU before it reads the clock

from datasets import build_dataset
from datasets.loader import collate
from models.build import build_model
from models.criterion import SetCriterion
from models.deformable_detr import DeformableDETR
from models.ops import backends
from models.ops import benchmark as op_benchmark
from models.weights.architecture import Purpose, adopt
from util.allocator import keep_freed_memory
from util.checkpoint import load_weights, read_checkpoint, weights_of
from util.class_map import AUTO, COCO_CLASSES, ClassMap, classes_of, unnamed_classes
from util.config import BatchFormerConfig, Config, make_parser, parse_with_config, with_classes
from util.distributed.processes import choose_device
from util.errors import UserError, run_as_command
from util.nested_tensor import NestedTensor
from util.step.precision import autocast
from util.step.precision_check import check_precision
from util.step.updater import build_updater

OBJECTS = 7  # an image of COCO has 7.3 on average


def main() -> int | None:
    if sys.argv[1:2] == ["op"]:
        return op_benchmark.main(sys.argv[2:])
    args, config = _parse()
    if args.what == "loader":
        _measure_items(args, config)
        return None
    device = choose_device(config.run.device)
    torch.manual_seed(config.run.seed)
    images, targets, config = _batch(args, config, device)
    height, width = images.tensors.shape[-2:]
    machine = op_benchmark.machine_name(device)
    print(f"{machine}, torch {torch.__version__}; batch {len(images)} of {height} x {width}", flush=True)
    _measure(args, config, device, images, targets)
    return None


def _measure_items(args: argparse.Namespace, config: Config) -> None:
    """Time the items of both splits in this process, as a worker of the loader makes them."""
    torch.set_num_threads(1)
    keep_freed_memory()
    print(f"{op_benchmark.machine_name(torch.device('cpu'))}, torch {torch.__version__}", flush=True)
    for split in ("train", "val"):
        dataset = build_dataset(split, config)
        turns = [i % len(dataset) for i in range(args.warm_iters + args.num_iters)]
        times = [1000 * timeit.timeit(partial(dataset.__getitem__, i), number=1) for i in turns]
        kept = times[args.warm_iters :]
        mean, fastest, slowest = statistics.mean(kept), min(kept), max(kept)
        counted = f"in the mean of {len(kept)} ({fastest:.1f} to {slowest:.1f})"
        print(f"{split}: {mean:.1f} ms an image from file to tensor {counted}", flush=True)


class Variant(NamedTuple):
    """What is timed.

    name: its flags; added: the last of them, which the variant before it does not have; without:
    how that one is called beside `added`.
    """

    name: str
    added: str
    without: str
    config: Config


def _variants(config: Config, training: bool) -> list[Variant]:
    """From the plain detector to what was asked for, with one flag more each."""
    plain = config.with_flags({"amp": "off", "checkpoint_encoder": False})
    added: list[tuple[str, dict[str, Any]]] = []
    if config.run.amp != "off":
        added.append((f"--amp {config.run.amp}", {"amp": config.run.amp}))

    # in evaluation BatchFormerV2 and checkpointing change nothing
    variants = [Variant("", "", "", plain)]
    if training:
        flag = f"--bf {config.batchformer.bf}"
        without_bf = dataclasses.replace(plain, batchformer=BatchFormerConfig())
        variants = [Variant("--bf 0", "", "", without_bf)]
        if config.batchformer.bf:
            variants.append(Variant(flag, flag, "--bf 0", plain))
        if config.transformer.checkpoint_encoder:
            added.append(("--checkpoint_encoder", {"checkpoint_encoder": True}))
    # each has all flags of the one before
    for flag, values in added:
        before = variants[-1]
        name = f"{before.name} {flag}".strip()
        variants.append(Variant(name, flag, "without", before.config.with_flags(values)))
    return variants


def _measure(
    args: argparse.Namespace,
    config: Config,
    device: torch.device,
    images: NestedTensor,
    targets: list[dict[str, Tensor]],
) -> None:
    """Time every variant beside the one without its last flag; of a training step the memory too."""
    training = args.what == "train"
    variants = _variants(config, training)
    if training:
        names = [f"training step, {variant.name}" for variant in variants]
        calls = [_training_step(variant.config, device, images, targets) for variant in variants]
    else:
        names = [f"inference {variant.name}".strip() for variant in variants]
        calls = [_inference(variant.config, device, images) for variant in variants]

    # memory comes first: what is kept after a call would count as used by the next
    memory = []
    if training:
        for step in calls:
            step()  # the first call has costs of its own
        memory = [op_benchmark.peak_memory(step, device)[0] for step in calls]
    if device.type == "cpu":
        keep_freed_memory()

    # the reference takes its turns among the others: a slow moment strikes all
    timed = list(calls)
    if args.against_reference:
        reference = mock.patch.dict(os.environ, {backends.VARIABLE: "reference"})
        timed.append(reference(calls[-1]))  # in force during each call
        names.append(f"{names[-1]}, the operator in plain PyTorch")
    count = args.warm_iters + args.num_iters
    turns = op_benchmark.in_turns(timed, count, lambda call: timeit.timeit(call, timer=timer, number=1))
    seconds = [times[args.warm_iters :] for times in turns]
    middles = [statistics.median(times) for times in seconds]
    speeds = [
        f"{name}: {len(images) / middle:.2f} images/s ({middle * 1000:.1f} ms a batch in the median of "
        f"{len(times)}, {min(times) * 1000:.1f} to {max(times) * 1000:.1f})"
        for name, middle, times in zip(names, middles, seconds, strict=True)
    ]

    # a line for each, and its ratio to the one before
    for i, variant in enumerate(variants):
        if training:
            speeds[i] += f", {memory[i] / 2**20:.1f} MiB"
        print(speeds[i], flush=True)
        if i == 0:
            continue
        longer = middles[i] / middles[i - 1]
        ratio = f"{variant.added} takes {longer:.2f} times as long as {variant.without}"
        if training:
            ratio += f", and {memory[i] / memory[i - 1]:.2f} times the memory"
        print(ratio)
    if training:
        print("memory: PyTorch's tensors at the peak of a step, beyond what there was before it")

    # the last variant with the other operator
    if args.against_reference:
        print(speeds[-1], flush=True)
        print(
            f"{names[-2]} takes {middles[-2] / middles[-1]:.1%} of the time that it takes with the "
            f"operator in plain PyTorch"
        )
    if args.profile or args.trace:
        _profile(calls[-1], args, device)


def _inference(config: Config, device: torch.device, images: NestedTensor) -> Callable[[], None]:
    model, _ = _build(config, device)
    model.eval()

    def infer() -> None:
        with torch.no_grad(), autocast(config.run.amp, device):
            model(images)

    return infer


def _training_step(
    config: Config, device: torch.device, images: NestedTensor, targets: list[dict[str, Tensor]]
) -> Callable[[], None]:
    """Forward, losses, backward, clipping and optimiser."""
    # gradients and optimiser as in main.py
    model, criterion = _build(config, device)
    model.train()
    updater = build_updater(model, config)

    def step() -> None:
        with autocast(config.run.amp, device):
            outputs = model(images)
        updater.backward(criterion.total(criterion(outputs, targets)), 1)
        # frees the gradients, so that none counts as memory before the next step
        updater.step()

    return step


def _profile(function: Callable[[], None], args: argparse.Namespace, device: torch.device) -> None:
    for _ in range(2):  # the first call also pays for the start of the profiler
        with profile() as recorded:
            function()
    if args.profile:
        order = "self_cpu_time_total"
        if device.type == "cuda":
            order = "self_cuda_time_total"
        print(recorded.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=50))
    if args.trace:
        recorded.export_chrome_trace(args.trace)


def _build(config: Config, device: torch.device) -> tuple[DeformableDETR, SetCriterion]:
    """The detector on the device, and its losses."""
    model, criterion, _ = build_model(config)
    if config.run.resume:
        load_weights(model, config.run.resume)
    check_precision(model.to(device), config.run.amp)
    return model, criterion


def _batch(
    args: argparse.Namespace, config: Config, device: torch.device
) -> tuple[NestedTensor, list[dict[str, Tensor]], Config]:
    """Images and targets, of the validation set or noise, and the Config with their classes."""
    count, classes = config.optim.batch_size, config.classes
    # the content of noise costs as much time as that of pictures
    if args.size:
        if classes is None:
            classes = COCO_CLASSES
            if config.data.num_classes != AUTO:
                classes = ClassMap(int(config.data.num_classes), ())
        height, width = args.size
        items = [_noise(height, width, classes.num_classes) for _ in range(count)]
    else:
        try:
            dataset = build_dataset("val", config)
        except UserError as error:
            raise UserError(f"{error}; or give --size <height> <width> to do without a data set") from None
        classes = dataset.classes
        items = [dataset[i % len(dataset)] for i in range(count)]
    images, targets = collate(items)
    targets = [{name: value.to(device) for name, value in target.items()} for target in targets]
    return images.to(device), targets, with_classes(config, classes)


def _noise(height: int, width: int, num_classes: int) -> tuple[Tensor, dict[str, Tensor]]:
    # cxcywh, all within the image
    boxes = torch.cat([torch.rand(OBJECTS, 2) * 0.5 + 0.25, torch.rand(OBJECTS, 2) * 0.4 + 0.05], 1)
    pixels = torch.randint(256, (3, height, width), dtype=torch.uint8)
    return pixels, {"boxes": boxes, "labels": torch.randint(num_classes, (OBJECTS,))}


def _parse() -> tuple[argparse.Namespace, Config]:
    parser = make_parser("benchmark.py", __doc__)
    parser.usage = "python benchmark.py [inference|train|loader|op] [flags]"
    own = parser.add_argument_group("benchmark")
    # spelled as the published program's
    add = own.add_argument
    add(
        "what",
        nargs="?",
        default="inference",
        choices=("inference", "train", "loader", "op"),
        help="what to time",
    )
    add("--num_iters", "--num-iters", type=int, default=300, help="timed iterations")
    text = "iterations before that are not counted"
    add("--warm_iters", "--warm-iters", type=int, default=5, help=text)
    text = "noise of this size instead of the data set"
    add("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help=text)
    text = "the same with the attention operator in plain PyTorch too"
    add("--against_reference", action="store_true", help=text)
    add("--profile", action="store_true", help="what the time of one iteration goes to")
    add("--trace", metavar="FILE", help="write a timeline of one iteration, as .json or .json.gz")
    args, config = parse_with_config(parser, None, batch_size=1)
    if args.num_iters < 1 or args.warm_iters < 0 or (args.size and min(args.size) < 1):
        raise UserError("--num_iters and --size must be above 0, --warm_iters not negative")
    # the time does not depend on the weights: no download
    if config.backbone.backbone_weights == "imagenet":
        config = config.with_flags({"backbone_weights": "none"})
    resume = config.run.resume
    if not resume:
        return args, dataclasses.replace(config, settled=True)

    # the flags and classes of the checkpoint fill what the caller did not give
    checkpoint = read_checkpoint(resume)
    config = adopt(config, checkpoint, resume, purpose=Purpose.RESUME)
    if config.data.num_classes == AUTO:
        classes = classes_of(checkpoint, resume) or unnamed_classes(weights_of(checkpoint, resume))
        config = with_classes(config, classes)
    return args, config


if __name__ == "__main__":
    run_as_command(main)
