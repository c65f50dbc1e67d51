"""Times of inference, of a training step and of the items of a data set."""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import timeit
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.profiler import profile

from datasets import build_dataset
from datasets.loader import Batch
from models.ops import backends
from models.ops.benchmark import machine_name, peak_memory
from tools.benchmarks.steps import TrainingStep, inference, prepare, seconds_in_turns
from util.allocator import keep_freed_memory
from util.config import BatchFormerConfig, Config


def measure_items(args: argparse.Namespace, config: Config) -> None:
    """Time the items of both splits in this process, as a worker of the loader makes them."""
    torch.set_num_threads(1)
    keep_freed_memory()
    print(f"{machine_name(torch.device('cpu'))}, torch {torch.__version__}", flush=True)
    for split in ("train", "val"):
        dataset = build_dataset(split, config)
        turns = [i % len(dataset) for i in range(args.warm_iters + args.num_iters)]
        times = [1000 * timeit.timeit(partial(dataset.__getitem__, i), number=1) for i in turns]
        kept = times[args.warm_iters :]
        mean, fastest, slowest = statistics.mean(kept), min(kept), max(kept)
        counted = f"in the mean of {len(kept)} ({fastest:.1f} to {slowest:.1f})"
        print(f"{split}: {mean:.1f} ms an image from file to tensor {counted}", flush=True)


class Measured(NamedTuple):
    """What is timed.

    name: its flags; added: the last of them, which the variant before it does not have; without:
    how that one is called beside `added`.
    """

    name: str
    added: str
    without: str
    config: Config


def _variants(config: Config, training: bool) -> list[Measured]:
    """From the plain detector to what was asked for, with one flag more each."""
    off = {"amp": "off", "checkpoint_encoder": False, "compile": False, "masks": False}
    plain = config.with_flags(off)
    added: list[tuple[str, dict[str, Any]]] = []
    if config.segmentation.masks:
        added.append(("--masks", {"masks": True}))
    if config.run.amp != "off":
        added.append((f"--amp {config.run.amp}", {"amp": config.run.amp}))

    # in evaluation BatchFormerV2 and checkpointing change nothing
    variants = [Measured("", "", "", plain)]
    if training:
        flag = f"--bf {config.batchformer.bf}"
        without_bf = dataclasses.replace(plain, batchformer=BatchFormerConfig())
        variants = [Measured("--bf 0", "", "", without_bf)]
        if config.batchformer.bf:
            variants.append(Measured(flag, flag, "--bf 0", plain))
        if config.transformer.checkpoint_encoder:
            added.append(("--checkpoint_encoder", {"checkpoint_encoder": True}))
        if config.run.compile:
            added.append(("--compile", {"compile": True}))
    # each has all flags of the one before
    for flag, values in added:
        before = variants[-1]
        name = f"{before.name} {flag}".strip()
        variants.append(Measured(name, flag, "without", before.config.with_flags(values)))
    return variants


@dataclasses.dataclass
class Timed:
    """A call and its times, and the call that it is compared with.

    memory: bytes at the peak of a training step.
    """

    name: str
    variant: Measured
    call: Callable[[], None]
    before: Timed | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    memory: int = 0

    @property
    def middle(self) -> float:
        return statistics.median(self.seconds)

    def show(self, images: int) -> None:
        """A line for it, and one for its ratio to the other."""
        middle, fastest, slowest = (
            1000 * value for value in (self.middle, min(self.seconds), max(self.seconds))
        )
        line = (
            f"{self.name}: {images / self.middle:.2f} images/s ({middle:.1f} ms a batch in the median "
            f"of {len(self.seconds)}, {fastest:.1f} to {slowest:.1f})"
        )
        print(line + (f", {self.memory / 2**20:.1f} MiB" if self.memory else ""), flush=True)
        if not self.before:
            return
        longer = self.middle / self.before.middle
        ratio = f"{self.variant.added} takes {longer:.2f} times as long as {self.variant.without}"
        if self.memory:
            ratio += f", and {self.memory / self.before.memory:.2f} times the memory"
        print(ratio)


def measure_speed(args: argparse.Namespace, config: Config) -> None:
    """Time every variant beside the one without its last flag; of a training step the memory too."""
    device, batch, config = prepare(args, config)
    training = args.what == "train"
    timed = _timed_variants(_variants(config, training), device, batch, training)
    last = timed[-1]
    if args.against:
        timed.append(_of_other_library(args.against, timed, device, batch, training))

    # memory comes first: what is kept after a call would count as used by the next
    if training:
        for one in timed:
            one.call()  # the first call has costs of its own
        for one in timed:
            one.memory = peak_memory(one.call, device)[0]
    if device.type == "cpu":
        keep_freed_memory()

    # the reference takes its turns among the others: a slow moment strikes all
    calls = [one.call for one in timed]
    if args.against_reference:
        reference = mock.patch.dict(os.environ, {backends.VARIABLE: "reference"})
        calls.append(reference(last.call))  # in force during each call
    seconds = seconds_in_turns(calls, args)
    for one, of_one in zip(timed, seconds, strict=False):
        one.seconds = of_one
        one.show(len(batch[0]))
    if training:
        print("memory: PyTorch's tensors at the peak of a step, beyond what there was before it")

    # the last variant with the other operator
    if args.against_reference:
        plain = Timed(f"{last.name}, the operator in plain PyTorch", last.variant, calls[-1])
        plain.seconds = seconds[-1]
        plain.show(len(batch[0]))
        print(
            f"{last.name} takes {last.middle / plain.middle:.1%} of the time that it takes with the "
            f"operator in plain PyTorch"
        )
    if args.profile or args.trace:
        _profile(last.call, args, device)


def _timed_variants(
    variants: list[Measured], device: torch.device, batch: Batch, training: bool
) -> list[Timed]:
    # masks cost most behind the network
    to_results = any(variant.config.segmentation.masks for variant in variants)
    timed: list[Timed] = []
    for variant in variants:
        before = timed[-1] if timed else None
        if training:
            name = f"training step, {variant.name}"
            timed.append(Timed(name, variant, TrainingStep(variant.config, device, *batch), before))
        else:
            name = f"inference{' to results' * to_results} {variant.name}".strip()
            call = inference(variant.config, device, batch[0], to_results)
            timed.append(Timed(name, variant, call, before))
    return timed


def _of_other_library(
    library: str, timed: list[Timed], device: torch.device, batch: Batch, training: bool
) -> Timed:
    """Beside the last variant of ours that has only what the library has."""
    from tools.benchmarks import other_library  # needs more packages than the rest

    # in evaluation BatchFormerV2 and checkpointing change nothing
    ours = timed[0]
    for one in timed:
        config = one.variant.config
        more = config.batchformer.bf or config.transformer.checkpoint_encoder or config.run.compile
        if not training or not more:
            ours = one
    version, call = other_library.detector(ours.variant.config, device, *batch, training)
    variant = Measured(ours.variant.name, library, f"ours ({ours.name})", ours.variant.config)
    return Timed(f"{ours.name} with {version}", variant, call, ours)


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
