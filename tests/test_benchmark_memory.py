"""What benchmark.py says of mixed precision, of activation checkpointing, and of memory."""

from __future__ import annotations

import re
import sys

import torch

import benchmark
from models.ops.benchmark import peak_memory
from tests.helpers import BATCHFORMER, SMALL_MODEL, run
from util.config import parse_config

CPU = torch.device("cpu")


def bench(*flags):
    result = run(
        sys.executable,
        "benchmark.py",
        *SMALL_MODEL,
        "--num_iters",
        "1",
        "--warm_iters",
        "1",
        "--batch_size",
        "2",
        "--device",
        "cpu",
        *flags,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_flag_is_timed_beside_the_same_without_it():
    """The encoder is made the most of the network, so that forgetting it shows."""
    large = ("--enc_layers", "4", "--dim_feedforward", "512", "--size", "256", "256")
    lines = bench("train", *BATCHFORMER, "--amp", "bf16", "--checkpoint_encoder", *large).splitlines()
    timed = [line.split(":")[0] for line in lines if "images/s" in line]
    names = ("--bf 0", "--bf 1", "--bf 1 --amp bf16", "--bf 1 --amp bf16 --checkpoint_encoder")
    assert timed == [f"training step, {name}" for name in names]
    compared = [
        re.match(r"(--\S+.*) takes [\d.]+ times as long as (.*), and ([\d.]+) times the memory", line)
        for line in lines
    ]
    found = {match[1]: (match[2], float(match[3])) for match in compared if match}
    assert {flag: without for flag, (without, _) in found.items()} == {
        "--bf 1": "--bf 0",
        "--amp bf16": "without",
        "--checkpoint_encoder": "without",
    }
    assert lines[-1].startswith("memory: PyTorch's tensors at the peak")
    assert found["--checkpoint_encoder"][1] < 0.9


def test_inference_in_low_precision_is_timed_beside_float32():
    lines = bench("--amp", "bf16", "--checkpoint_encoder", "--size", "64", "80").splitlines()
    assert [line.split(":")[0] for line in lines if "images/s" in line] == [
        "inference",
        "inference --amp bf16",
    ]
    assert re.fullmatch(r"--amp bf16 takes [\d.]+ times as long as without", lines[-1])


def test_peak_memory_is_what_a_call_takes_for_a_moment():
    kept = []

    def step():
        for _ in range(2):  # one after the other, not together
            torch.ones(8 << 20)
        kept.append(torch.ones(4 << 20))
        return kept

    peak, results = peak_memory(step, CPU)
    assert results is kept
    assert peak == 32 << 20


def test_the_scaler_of_float16_leaves_out_what_overflows():
    """The first scales of GradScaler are too large for some gradients: the weights must stay
    numbers.
    """
    config = parse_config([*SMALL_MODEL, "--amp", "fp16", "--lr", "0.001"])
    torch.manual_seed(0)
    images, targets = benchmark.collate([benchmark._noise(64, 80, 4) for _ in range(2)])
    built = []
    build = benchmark._build
    try:
        benchmark._build = lambda *args: built.append(build(*args)) or built[-1]
        step = benchmark._training_step(config, CPU, images, targets)
    finally:
        benchmark._build = build
    before = [p.clone() for p in built[0][0].parameters()]
    for _ in range(3):
        step()
    after = list(built[0][0].parameters())
    assert all(p.isfinite().all() for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
