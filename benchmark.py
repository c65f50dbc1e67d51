"""Images a second of the detector, with main's flags, and the speed of the attention operator, on
any device.

    python benchmark.py --num_iters 300 --warm_iters 5 --batch_size 1  # an image of the data set
    python benchmark.py --num_iters 20 --size 800 1333  # noise of a size, no data set
    python benchmark.py train --num_iters 10 --size 320 320 --bf 1 --insert_idx 0  # against --bf 0
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import timer  # waits for the GPU before it looks at the clock

from datasets import build_dataset
from datasets.loader import collate
from models import build_model
from models.ops import backends
from models.ops import benchmark as op_benchmark
from models.weights.architecture import Purpose, adopt
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
    device = choose_device(config.run.device)
    torch.manual_seed(config.run.seed)
    images, targets, config = _batch(args, config, device)
    height, width = images.tensors.shape[-2:]
    print(
        f"{_device_name(device)}, torch {torch.__version__}; batch {len(images)} of {height} x {width}",
        flush=True,
    )
    measure = {"inference": _inference, "train": _train}[args.what]
    measure(args, config, device, images, targets)
    return None


@dataclass(frozen=True)
class Variant:
    """What is timed; `name` are its flags, `added` the last of them, which the variant before it
    lacks.
    """

    name: str
    added: str
    config: Config


def _variants(config: Config, training: bool) -> list[Variant]:
    """From the plain detector to what was asked for, a flag more each, to be compared with the one
    before.
    """
    plain_run = dataclasses.replace(config.run, amp="off")
    plain_transformer = dataclasses.replace(config.transformer, checkpoint_encoder=False)
    plain = dataclasses.replace(config, run=plain_run, transformer=plain_transformer)
    variants = [Variant("", "", plain)]
    if training:
        variants = [Variant("--bf 0", "", dataclasses.replace(plain, batchformer=BatchFormerConfig()))]
    if training and config.batchformer.bf:
        flag = f"--bf {config.batchformer.bf}"
        variants.append(Variant(flag, flag, plain))
    more = [(f"--amp {config.run.amp}", "run", config.run.amp != "off")]
    more.append(("--checkpoint_encoder", "transformer", training and config.transformer.checkpoint_encoder))
    for flag, group, given in more:
        if given:
            before = variants[-1]
            changed = dataclasses.replace(before.config, **{group: getattr(config, group)})
            variants.append(Variant(f"{before.name} {flag}".strip(), flag, changed))
    return variants


def _inference(
    args: argparse.Namespace, config: Config, device: torch.device, images: NestedTensor, targets: list
) -> None:
    variants = _variants(config, training=False)
    calls = [_inference_call(variant.config, device, images) for variant in variants]
    against = [_with_reference_operator(calls[-1])] if args.against_reference else []
    seconds = _time([*calls, *against], args)
    names = [f"inference {variant.name}".strip() for variant in variants]
    for i, name in enumerate(names):
        _report(name, len(images), seconds[i])
        if i:
            print(
                f"{variants[i].added} takes {_ratio(seconds[i], seconds[i - 1]):.2f} times as long as without"
            )
    _report_against_reference(names[-1], len(images), seconds[len(calls) - 1], seconds[len(calls) :])
    _profile(calls[-1], args, device)


def _inference_call(config: Config, device: torch.device, images: NestedTensor) -> Callable[[], None]:
    model, _ = _build(config, device)
    model.eval()

    def infer() -> None:
        with torch.no_grad(), autocast(config.run.amp, device):
            model(images)

    return infer


def _train(
    args: argparse.Namespace, config: Config, device: torch.device, images: NestedTensor, targets: list
) -> None:
    """Forward, losses, backward, clipping and optimiser; time and memory of every flag side by side
    with the same without.
    """
    variants = _variants(config, training=True)
    steps = [_training_step(variant.config, device, images, targets) for variant in variants]
    against = [_with_reference_operator(steps[-1])] if args.against_reference else []
    seconds = _time([*steps, *against], args)
    memory = [op_benchmark.peak_memory(step, device)[0] for step in steps]
    names = [f"training step, {variant.name}" for variant in variants]
    for i, name in enumerate(names):
        _report(name, len(images), seconds[i], memory[i])
        if i:
            without = "--bf 0" if variants[i].added.startswith("--bf") else "without"
            print(
                f"{variants[i].added} takes {_ratio(seconds[i], seconds[i - 1]):.2f} times as long "
                f"as {without}, and {memory[i] / memory[i - 1]:.2f} times the memory"
            )
    counted = (
        "what is allocated on the GPU"
        if device.type == "cuda"
        else "resident memory of the process (nan: not told here)"
    )
    print(f"memory: {counted} at the peak of a step, beyond what there was before it")
    _report_against_reference(names[-1], len(images), seconds[len(steps) - 1], seconds[len(steps) :])
    _profile(steps[-1], args, device)


def _training_step(
    config: Config, device: torch.device, images: NestedTensor, targets: list
) -> Callable[[], None]:
    model, criterion = _build(config, device)
    model.train()
    updater = build_updater(model, config)

    def step() -> None:
        with autocast(config.run.amp, device):
            outputs = model(images)
        updater.backward(criterion.total(criterion(outputs, targets)), 1)
        # lets go of the gradients: none is there before a step whose memory is counted
        updater.step()

    return step


def _ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(seconds) / statistics.median(others)


def _with_reference_operator(function: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        before = os.environ.get(backends.VARIABLE)
        os.environ[backends.VARIABLE] = "reference"
        try:
            function()
        finally:
            del os.environ[backends.VARIABLE]
            if before is not None:
                os.environ[backends.VARIABLE] = before

    return run


def _report_against_reference(what: str, batch: int, seconds: list[float], others: list[list[float]]) -> None:
    for reference in others:
        _report(f"{what}, the operator in plain PyTorch", batch, reference)
        print(
            f"{what} takes {_ratio(seconds, reference):.1%} of the time that it takes with the "
            f"operator in plain PyTorch"
        )


def _profile(function: Callable[[], None], args: argparse.Namespace, device: torch.device) -> None:
    if not (args.profile or args.trace):
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    for _ in range(2):  # the first call also pays for the start of the profiler
        with profile(activities=activities) as recorded:
            function()
    if args.profile:
        order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        print(recorded.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=50))
    if args.trace:
        recorded.export_chrome_trace(args.trace)


def _time(functions: Sequence[Callable], args: argparse.Namespace) -> list[list[float]]:
    """Seconds of every call, the functions taking turns so that a slow moment of the machine
    strikes all.
    """
    measured = []
    for _ in range(args.warm_iters + args.num_iters):
        measured.append([timeit.timeit(function, timer=timer, number=1) for function in functions])
    return [list(times) for times in zip(*measured[args.warm_iters :], strict=True)]


def _report(what: str, batch: int, seconds: list[float], memory: float | None = None) -> None:
    middle = statistics.median(seconds)
    line = (
        f"{what}: {batch / middle:.2f} images/s ({middle * 1000:.1f} ms a batch in the median of "
        f"{len(seconds)}, {min(seconds) * 1000:.1f} to {max(seconds) * 1000:.1f})"
    )
    print(line if memory is None else f"{line}, {memory / 2**20:.1f} MiB", flush=True)


def _build(config: Config, device: torch.device) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The detector on the device, and its losses."""
    model, criterion, _ = build_model(config)
    if config.run.resume:
        load_weights(model, config.run.resume)
    check_precision(model.to(device), config.run.amp)
    return model, criterion


def _batch(
    args: argparse.Namespace, config: Config, device: torch.device
) -> tuple[NestedTensor, list, Config]:
    """Images and targets, the first of the validation set or noise of --size, and the Config with
    their classes.
    """
    count = config.optim.batch_size
    if args.size:
        number = config.data.num_classes
        classes = config.classes or (COCO_CLASSES if number == AUTO else ClassMap(int(number), ()))
        items = [_noise(*args.size, classes.num_classes) for _ in range(count)]
    else:
        dataset = _dataset(config)
        classes = dataset.classes
        items = [dataset[i % len(dataset)] for i in range(count)]
    images, targets = collate(items)
    targets = [{name: value.to(device) for name, value in target.items()} for target in targets]
    return images.to(device), targets, with_classes(config, classes)


def _dataset(config: Config):
    try:
        return build_dataset("val", config)
    except UserError as error:
        raise UserError(f"{error}; or give --size <height> <width> to do without a data set") from None


def _noise(height: int, width: int, num_classes: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    boxes = torch.cat([torch.rand(OBJECTS, 2) * 0.5 + 0.25, torch.rand(OBJECTS, 2) * 0.4 + 0.05], 1)
    return torch.randn(3, height, width), {"boxes": boxes, "labels": torch.randint(num_classes, (OBJECTS,))}


def _parse() -> tuple[argparse.Namespace, Config]:
    parser = make_parser("benchmark.py", __doc__)
    parser.usage = "python benchmark.py [inference|train|op] [flags]"
    own = parser.add_argument_group("benchmark")
    own.add_argument(
        "what", nargs="?", default="inference", choices=("inference", "train", "op"), help="what to time"
    )
    for name, default, text in (
        ("num", 300, "timed iterations"),
        ("warm", 5, "iterations before that are not counted"),
    ):
        own.add_argument(f"--{name}_iters", f"--{name}-iters", type=int, default=default, help=text)
    own.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="noise of this size instead of the data set",
    )
    own.add_argument(
        "--against_reference",
        action="store_true",
        help="the same with the attention operator in plain PyTorch too",
    )
    own.add_argument("--profile", action="store_true", help="what the time of one iteration goes to")
    own.add_argument(
        "--trace", metavar="FILE", help="write a timeline of one iteration, as .json or .json.gz"
    )
    args, config = parse_with_config(parser, None, batch_size=1)
    if args.num_iters < 1 or args.warm_iters < 0 or (args.size and min(args.size) < 1):
        raise UserError("--num_iters and --size must be above 0, --warm_iters not negative")
    # the time does not depend on the weights: don't download any
    needs_none = config.backbone.backbone_weights == "imagenet"
    config = config.with_flags({"backbone_weights": "none"} if needs_none else {})
    return args, _with_detector_of(config.run.resume, config)


def _with_detector_of(resume: str, config: Config) -> Config:
    """The Config with the architecture and the classes of the checkpoint, if one is named."""
    if not resume:
        return dataclasses.replace(config, settled=True)
    checkpoint = read_checkpoint(resume)
    config = adopt(config, checkpoint, resume, purpose=Purpose.RESUME)
    classes = classes_of(checkpoint, resume) or unnamed_classes(weights_of(checkpoint, resume))
    return with_classes(config, classes) if config.data.num_classes == AUTO else config


def _device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    run_as_command(main)
