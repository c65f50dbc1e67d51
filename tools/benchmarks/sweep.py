"""What inference and a training step cost against image size, queries, batch size and processes.

Each axis varies alone; the others stay as the flags say. Images are noise.
"""

from __future__ import annotations

import argparse
import statistics
import timeit
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from typing import NamedTuple

import torch
from torch import multiprocessing

from models.ops.benchmark import machine_name, peak_memory
from tools.benchmarks.steps import TrainingStep, inference, make_batch, seconds_in_turns
from util.allocator import keep_freed_memory
from util.config import Config
from util.distributed.processes import choose_device
from util.draw.plots import Chart, check_format, plot_charts
from util.errors import UserError

# values of an axis, as multiples of the flags'
SIZES, QUERIES, BATCHES = (0.5, 0.75, 1, 1.25), (1 / 3, 1, 2, 3), (1, 2, 4)
START_LIMIT = 600  # seconds


class Point(NamedTuple):
    """A value of an axis, with the flags and the image size that it means."""

    label: str
    value: float
    config: Config
    size: tuple[int, int]


def measure_sweep(args: argparse.Namespace, config: Config) -> None:
    """Print a table for each axis and, with --out, draw them."""
    if not args.size:
        raise UserError("benchmark.py sweep needs --size <height> <width>, around which it varies the size")
    if args.out:
        check_format(args.out)
    device = choose_device(config.run.device)
    # times do not depend on the weights, and those of a checkpoint fit one number of queries
    config = config.with_flags({"resume": ""})
    if device.type == "cpu":
        keep_freed_memory()
    print(f"{machine_name(device)}, torch {torch.__version__}", flush=True)

    charts = []
    for axis, points in _axes(config, tuple(args.size)).items():
        print(f"\n{axis:24}{'inference':>12}{'training step':>15}{'its memory':>13}")
        costs = []
        for point in points:
            costs.append(_cost(point, args, device))
            print("{:24}{:9.1f} ms{:12.1f} ms{:9.1f} MiB".format(point.label, *costs[-1]), flush=True)
        x = [point.value for point in points]
        calls, step, memory = zip(*costs, strict=True)
        charts.append(
            Chart("Time of a batch (ms)", axis, {"inference": (x, calls), "training step": (x, step)})
        )
        charts.append(Chart("Memory of a training step (MiB)", axis, {"": (x, memory)}))
    if device.type == "cpu" and torch.get_num_threads() > 1:
        charts.append(_measure_processes(args, config))
    else:
        print("\nprocesses: not varied, there are no threads of a CPU to divide")
    if args.out:
        plot_charts(charts, args.out)
        print(f"\n{args.out}")


def _axes(config: Config, size: tuple[int, int]) -> dict[str, list[Point]]:
    # small numbers may round to the same
    def multiples(flag: str, given: int, factors: Sequence[float]) -> list[Point]:
        values = sorted({max(1, round(given * by)) for by in factors})
        return [Point(str(value), value, config.with_flags({flag: value}), size) for value in values]

    sizes = [(max(1, round(size[0] * by)), max(1, round(size[1] * by))) for by in SIZES]
    return {
        "image size (megapixels)": [
            Point(f"{h} x {w}", round(h * w / 1e6, 3), config, (h, w)) for h, w in sizes
        ],
        "queries": multiples("num_queries", config.transformer.num_queries, QUERIES),
        "batch size": multiples("batch_size", config.optim.batch_size, BATCHES),
    }


def _cost(point: Point, args: argparse.Namespace, device: torch.device) -> tuple[float, float, float]:
    """Milliseconds of inference and of a training step, and MiB at the peak of the step."""
    infer, step = _calls(point.config, point.size, device)
    step()  # the first has costs of its own
    memory, _ = peak_memory(step, device)
    middles = [1000 * statistics.median(times) for times in seconds_in_turns([infer, step], args)]
    return middles[0], middles[1], memory / 2**20


def _calls(config: Config, size: tuple[int, int], device: torch.device) -> list[Callable[[], None]]:
    torch.manual_seed(config.run.seed)
    (images, targets), config = make_batch(size, config, device)
    return [inference(config, device, images), TrainingStep(config, device, images, targets)]


def _measure_processes(args: argparse.Namespace, config: Config) -> Chart:
    """Images a second of several processes at once, which share the threads of this one."""
    threads = torch.get_num_threads()
    print(f"\n{'processes x threads':24}{'inference':>18}{'training':>18}")
    counts = [2**power for power in range(threads.bit_length())]
    sums = []
    for count in counts:
        sums.append(rates_of(count, threads // count, args, config))
        print(
            "{:24}{:9.2f} images/s{:9.2f} images/s".format(f"{count} x {threads // count}", *sums[-1]),
            flush=True,
        )
    calls, step = zip(*sums, strict=True)
    lines = {"inference": (counts, calls), "training": (counts, step)}
    return Chart("Images a second of all", "processes", lines)


def rates_of(processes: int, threads: int, args: argparse.Namespace, config: Config) -> list[float]:
    """Images a second of all processes: of inference, and of training steps without an exchange."""
    context = multiprocessing.get_context("spawn")
    # a barrier can be handed over only to a process that starts
    shared = context.Barrier(processes, timeout=START_LIMIT), threads
    with ProcessPoolExecutor(processes, context, _begin, shared) as pool:
        rates = list(pool.map(_rates_of_one, [args] * processes, [config] * processes))
    return [sum(of_call) for of_call in zip(*rates, strict=True)]


_barrier: Barrier


def _begin(barrier: Barrier, threads: int) -> None:
    global _barrier
    _barrier = barrier
    torch.set_num_threads(threads)
    keep_freed_memory()


def _rates_of_one(args: argparse.Namespace, config: Config) -> list[float]:
    rates = []
    for call in _calls(config, tuple(args.size), torch.device("cpu")):
        for _ in range(max(1, args.warm_iters)):
            call()
        # each process has one such task, because none goes on before all have begun
        _barrier.wait()
        seconds = timeit.timeit(call, number=args.num_iters)
        rates.append(args.num_iters * config.optim.batch_size / seconds)
    return rates
