"""Times the backends of multi-scale deformable attention side by side.

Run `python benchmark.py op`, or this file.

For the encoder and the decoder at two image sizes and two batches: forward, forward and backward,
and their ratio to plain PyTorch in the same run. "around": the points lie around their query, as in
a fresh model; "scattered": anywhere, the worst case for caches. "from offsets" is the fused
operator, against the same arithmetic in plain PyTorch. Memory is what the step takes at its peak
beyond inputs, output and gradients. On a GPU a column says which part of the floor's speed was
reached: the floor is the time that the caches or the memory need for the bytes that must be moved
(docs/ops.md counts them).

Shape letters: B images, S tokens of all levels, M heads, D channels per head, Q queries, L levels,
P points.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # the project's root

from models.ops import backends
from models.ops.functions import ms_deform_attn, ms_deform_attn_fused

HEADS, CHANNELS, POINTS, DECODER_QUERIES = 8, 32, 4, 300
TURN = 0.02  # seconds
TYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclasses.dataclass(frozen=True)
class Load:
    """A size of the problem, and the form in which it is given."""

    what: str  # encoder or decoder
    image: tuple[int, int]
    batch: int
    scattered: bool = False
    fused: bool = False

    @property
    def name(self) -> str:
        form = "around"
        if self.fused:
            form = "from offsets"
        elif self.scattered:
            form = "scattered"
        return f"{self.what} {self.image[0]} x {self.image[1]}, batch {self.batch}, {form}"

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Strides 8, 16, 32 of the backbone, and 64 by one more convolution."""
        height, width = self.image
        return [(math.ceil(height / stride), math.ceil(width / stride)) for stride in (8, 16, 32, 64)]


def loads(sizes: list[tuple[int, int]], batches: list[int]) -> list[Load]:
    """All combinations; those scattered and from offsets for the first batch alone."""
    combinations = itertools.product(sizes, ("encoder", "decoder"), batches)
    plain = [Load(what, size, batch) for size, what, batch in combinations]
    scattered = [dataclasses.replace(load, scattered=True) for load in plain if load.image == sizes[0]]
    fused = [dataclasses.replace(load, fused=True) for load in plain]
    return plain + scattered[:: len(batches)] + fused[:: len(batches)]


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # the machine and what runs there
    names = [name for name in backends.NAMES if backends.missing(name, device.type) is None]
    machine = machine_name(device)
    print(f"{machine}, torch {torch.__version__}, {options.type}; backends: {', '.join(names)}", flush=True)
    # the floor of a CPU is not known
    rates = Rates.measured(device) if device.type == "cuda" else None
    if rates:
        print(rates)
    floor_column = f"{'of floor':>9}" if rates else ""
    print(f"{'':46}{'forward':>11}{'ratio':>8}{'fwd + bwd':>12}{'ratio':>8}{'memory':>11}{floor_column}")
    for load in loads(options.size or [(800, 1333), (320, 320)], options.batch or [1, 4]):
        _compare(load, names, device, TYPES[options.type], options.num_iters, rates)
    return 0


def _compare(
    load: Load, names: list[str], device, dtype: torch.dtype, iterations: int, rates: Rates | None
) -> None:
    """Print a line for each backend, the reference last."""
    tensors = make_inputs(load, device, dtype)
    grad = torch.ones(load.batch, tensors[1].shape[1], HEADS * CHANNELS, device=device, dtype=dtype)
    functions: list[Callable] = []
    for name in names:
        functions += [_forward(load, tensors, name), _step(load, tensors, grad, name)]

    # forward and step of every backend
    memory = [_extra_memory(step, device) for step in functions[1::2]]
    seconds = _time(functions, iterations, device)

    # a line for each, and ratios to the reference, which is the last
    print(load.name)
    for i, name in enumerate(names):
        forward, step = seconds[2 * i], seconds[2 * i + 1]
        line = f"    {name:42}{forward * 1e3:8.3f} ms{seconds[-2] / forward:7.1f}x"
        line += f"{step * 1e3:9.3f} ms{seconds[-1] / step:7.1f}x{memory[i] / 2**20:7.1f} MiB"
        if rates:
            line += f"{rates.floor(load, tensors) / forward:8.0%}"
        print(line, flush=True)


def make_inputs(load: Load, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """value, locations and weights; in the fused form value, reference points, offsets, logits."""
    generator = torch.Generator().manual_seed(0)
    shapes, levels = load.shapes, len(load.shapes)
    tokens = sum(h * w for h, w in shapes)
    # a query for every token, or queries anywhere
    if load.what == "encoder":
        centres = torch.cat([_centres(h, w) for h, w in shapes])
    else:
        centres = torch.rand(DECODER_QUERIES, 2)

    # as a fresh layer computes them
    size = (load.batch, len(centres), HEADS, levels, POINTS)
    around = centres[None, :, None].expand(load.batch, -1, levels, -1).contiguous()
    offsets = _first_offsets(levels) + 0.3 * torch.randn(*size, 2, generator=generator)
    logits = 0.3 * torch.randn(size, generator=generator)
    value = torch.randn(load.batch, tokens, HEADS, CHANNELS, generator=generator)

    # locations and weights are at least float32
    wide = torch.promote_types(dtype, torch.float32)
    if load.fused:
        given = [value.to(dtype), around.to(wide), offsets.to(dtype), logits.to(dtype)]
    else:
        sizes = torch.tensor([[w, h] for h, w in shapes])[:, None]
        locations = around[:, :, None, :, None] + offsets / sizes
        if load.scattered:
            locations = torch.rand(*size, 2)
        weights = logits.flatten(-2).softmax(-1).view(size)
        given = [value.to(dtype), locations.to(wide), weights.to(wide)]
    return [tensor.to(device).requires_grad_() for tensor in given]


def _centres(height: int, width: int) -> Tensor:
    """[height * width, 2] x, y of the pixels' centres in [0, 1]."""
    y, x = torch.meshgrid(
        (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij"
    )
    return torch.stack([x, y], -1).view(-1, 2)


def _first_offsets(levels: int) -> Tensor:
    """[M, L, P, 2] the offsets in pixels of a fresh layer (MSDeformAttn.reset_parameters)."""
    # directions on the unit square
    angles = torch.arange(HEADS) * (2 * math.pi / HEADS)
    directions = torch.stack([angles.cos(), angles.sin()], -1)
    directions = directions / directions.abs().max(-1, keepdim=True).values
    steps = torch.arange(1, POINTS + 1)[None, None, :, None]
    return (directions[:, None, None] * steps).expand(-1, levels, -1, -1)


def _run(load: Load, tensors: list[Tensor], backend: str) -> Tensor:
    # the two operators differ in what they take
    if load.fused:
        value, reference, offsets, logits = tensors
        return ms_deform_attn_fused(value, load.shapes, reference, offsets, logits, backend)
    value, locations, weights = tensors
    return ms_deform_attn(value, load.shapes, locations, weights, backend)


def _forward(load: Load, tensors: list[Tensor], backend: str) -> Callable[[], object]:
    def forward() -> Tensor:
        with torch.no_grad():
            return _run(load, tensors, backend)

    return forward


def _step(load: Load, tensors: list[Tensor], grad: Tensor, backend: str) -> Callable[[], object]:
    def step() -> tuple[Tensor, ...]:
        out = _run(load, tensors, backend)
        return out, *torch.autograd.grad(out, tensors, grad)

    return step


def _time(functions: list[Callable], turns: int, device: torch.device) -> list[float]:
    """Seconds of a call of each function, in the median of its turns."""
    # a recorded graph has no work of the host in it
    if device.type == "cuda":
        functions = [_recorded(function) for function in functions]
    return [statistics.median(times) for times in in_turns(functions, turns, seconds_of)]


def in_turns(
    functions: Sequence[Callable], turns: int, measure: Callable[[Callable], float]
) -> list[list[float]]:
    """`turns` measurements of each function. They take turns, so that a slow moment strikes all."""
    measured = [[measure(function) for function in functions] for _ in range(turns)]
    return [list(times) for times in zip(*measured, strict=True)]


def machine_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def seconds_of(function: Callable) -> float:
    """Seconds of a call: the median of the calls in TURN seconds, after a warm-up."""
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=TURN).median


def _recorded(function: Callable) -> Callable[[], None]:
    """The replay of a CUDA graph of a call."""
    # a graph needs a warm-up on another stream
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def _extra_memory(step: Callable, device: torch.device) -> int:
    """Bytes at the peak of a step beyond what was there before and what it returns."""
    step()
    peak, results = peak_memory(step, device)
    return max(peak - sum(one.nbytes for one in results), 0)


def peak_memory(step: Callable, device: torch.device) -> tuple[int, Any]:
    """Bytes of tensors at the peak of a call beyond what was there before, and what it returned.

    They are those of PyTorch's allocator: what a library or a kernel allocates for itself on a CPU
    is not counted.
    """
    # garbage that is collected during the call would lower the peak
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, results

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler complains where there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        results = step()
    # every allocation and, with a negative size, every release
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0)), results


@dataclasses.dataclass(frozen=True)
class Rates:
    """Bytes a second that a GPU moves.

    memory and cache (second level) are measured by copies; nearest_cache (first level) is that of
    the design.
    """

    memory: float
    cache: float
    nearest_cache: float

    @staticmethod
    def measured(device: torch.device) -> Rates:
        # kHz; not every version of PyTorch has it
        properties = torch.cuda.get_device_properties(device)
        clock = getattr(properties, "clock_rate", 1_755_000) * 1e3
        return Rates(
            _copy_rate(2**30, device),
            _copy_rate(2**23, device),
            properties.multi_processor_count * 128 * clock,
        )

    def floor(self, load: Load, tensors: list[Tensor]) -> float:
        """The least seconds of a forward.

        It reads every input once from memory and every corner of every sample from the cache.
        """
        queries = tensors[1].shape[1]
        out = load.batch * queries * HEADS * CHANNELS * tensors[0].element_size()
        memory = sum(tensor.nbytes for tensor in tensors) + out
        corners = 4 * len(load.shapes) * POINTS * out
        return max(memory / self.memory, corners / self.nearest_cache)

    def __str__(self) -> str:
        return (
            f"memory {self.memory / 1e12:.2f} TB/s, second-level cache {self.cache / 1e12:.2f} "
            f"TB/s (both measured by copies), first-level caches {self.nearest_cache / 1e12:.1f} "
            f"TB/s (128 bytes a clock and multiprocessor)"
        )


def _copy_rate(size: int, device: torch.device) -> float:
    # in a graph, so that only the device counts
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))

    def copies() -> None:
        for _ in range(20):
            target.copy_(source)

    return 20 * 2 * size / seconds_of(_recorded(copies))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "benchmark.py op", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", help="cpu or cuda (cuda where there is one)")
    add("--type", default="float32", choices=TYPES, help="of the values (float32)")
    text = "turns of each backend; the median counts (5)"
    add("--num_iters", "--num-iters", type=int, default=5, help=text)
    size, text = ("HEIGHT", "WIDTH"), "of images; repeatable"
    add("--size", type=int, nargs=2, action="append", metavar=size, help=text)
    text = "images in a batch; repeatable (1 and 4)"
    add("--batch", type=int, action="append", help=text)
    options = parser.parse_args(arguments)
    options.batch, options.size = options.batch or [], options.size or []
    if min([options.num_iters, *options.batch, *itertools.chain(*options.size)]) < 1:
        parser.error("--num_iters, --batch and --size must be above 0")
    options.size = [tuple(size) for size in options.size]
    return options


if __name__ == "__main__":
    sys.exit(main())
