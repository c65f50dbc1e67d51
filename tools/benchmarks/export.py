"""Times of an exported detector in every runtime that is installed, against PyTorch."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from models.detector import Detector
from models.export.runtime import RUNTIMES, open_exported, runtime_of
from models.export.write import BFLOAT16_OPSET, OPSET, check_output, write
from models.inference import prepare_for_inference
from models.ops.benchmark import machine_name
from models.postprocess import PostProcess
from tools.benchmarks.steps import build, seconds_in_turns
from util.allocator import keep_freed_memory
from util.checkpoint import ONNX, PT2
from util.class_map import COCO_CLASSES
from util.config import Config, with_classes
from util.errors import UserError
from util.nested_tensor import NestedTensor
from util.step.precision import autocast

SIZES, BATCHES = [(800, 1066), (320, 320)], (1, 4)


def measure_export(args: argparse.Namespace, config: Config) -> None:
    """Export the detector of the flags or of --resume, and print a table of times on the CPU."""
    device, amp = torch.device("cpu"), config.run.amp
    opset = BFLOAT16_OPSET if amp == "bf16" else OPSET
    classes = config.classes or COCO_CLASSES
    torch.manual_seed(config.run.seed)
    model = build(with_classes(config, classes), device)[0]
    prepare_for_inference(model, amp)
    detector = Detector(model, config, classes, amp=amp)
    keep_freed_memory()
    print(f"{machine_name(device)}, torch {torch.__version__}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        runs: dict[str, Callable[[Tensor, Tensor], object]] = {"PyTorch": _in_pytorch(detector)}
        for suffix in (ONNX, PT2):
            path = Path(folder, f"model{suffix}")
            try:
                check_output(path, opset, amp)
                write(detector, path, amp=amp, opset=opset)
            except UserError as error:
                print(f"left out: {error}")
                continue
            for name, (kind, _, _) in RUNTIMES.items():
                if kind != suffix:
                    continue
                try:
                    runtime_of(path, name)
                    runs[f"{name} {suffix}"] = open_exported(path, name).run
                except UserError as error:
                    print(f"left out: {error}")
        sizes = [tuple(args.size)] if args.size else SIZES
        for height, width in sizes:
            for batch in BATCHES:
                _measure(runs, args, (batch, 3, height, width))


def _in_pytorch(detector: Detector) -> Callable[[Tensor, Tensor], object]:
    """The detector with the operator that it has in evaluation."""
    postprocess = PostProcess()

    @torch.no_grad()
    def run(images: Tensor, sizes: Tensor) -> object:
        mask = torch.zeros(images.shape[0], *images.shape[2:], dtype=torch.bool)
        with autocast(detector.amp, images.device):
            outputs = detector.model(NestedTensor(images, mask))
        return postprocess(outputs, sizes)

    return run


def _measure(runs: dict[str, Callable], args: argparse.Namespace, shape: tuple[int, int, int, int]) -> None:
    images = torch.randint(256, shape, dtype=torch.uint8)
    sizes = torch.tensor([shape[2:]] * shape[0])
    calls = [lambda run=run: run(images, sizes) for run in runs.values()]
    middles = [1000 * statistics.median(times) for times in seconds_in_turns(calls, args)]
    print(f"\nbatch {shape[0]} of {shape[2]} x {shape[3]}")
    for name, middle in zip(runs, middles, strict=True):
        print(f"{name:20}{middle:10.1f} ms{middle / middles[0]:8.2f} times PyTorch", flush=True)
