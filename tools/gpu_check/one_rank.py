"""DistributedDataParallel over NCCL in a group of one process: python -m tools.gpu_check.one_rank
[--device cpu].

main.py does without DDP for one process, and NCCL takes no two processes on one GPU, so on a
machine with one GPU nothing else meets it. Every exchange that training makes is made once.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from engine import data_parallel, train_one_epoch, training_loss
from models import build_model
from util.config import Config, parse_config
from util.distributed.processes import process_group
from util.nested_tensor import NestedTensor
from util.step.deterministic import make_deterministic
from util.step.log import StepLog
from util.step.metrics import EpochSums
from util.step.not_finite import FiniteWatch
from util.step.updater import build_updater

FLAGS = (
    "--backbone",
    "resnet18",
    "--backbone_weights",
    "none",
    "--backbone_norm",
    "gn",
    "--hidden_dim",
    "64",
    "--nheads",
    "4",
    "--enc_layers",
    "1",
    "--dec_layers",
    "2",
    "--num_queries",
    "20",
    "--num_classes",
    "5",
    "--accumulate_steps",
    "2",
    "--bf",
    "1",
    "--share_bf",
    "0",
    "--insert_idx",
    "0",
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args()
    make_deterministic()
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": _free_port(),
    }
    with process_group(args.device, timeout=60) as device:
        print(f"one process, {dist.get_backend_config()}")
        results = [check_training(device), check_exchanges(device)]
    print("the group has ended")
    return 0 if all(results) else 1


def check_training(device: torch.device) -> bool:
    """Two updates of two batches each, so with and without no_sync, end with the bits that they
    have without DDP.
    """
    config = parse_config(FLAGS)
    plain = trained(config, device, lambda model: model)
    exchanged = trained(config, device, lambda model: data_parallel(model, config, device))
    return say(
        all(map(torch.equal, plain, exchanged)),
        "four steps with DDP give the weights of four steps without it",
    )


def trained(
    config: Config, device: torch.device, wrap: Callable[[nn.Module], nn.Module]
) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model, criterion, _ = build_model(config)
    model.to(device)
    batches = [noise(device) for _ in range(4)]
    watch = FiniteWatch(model, training_loss(model, criterion, "off"), {}, None)
    log = StepLog(0, len(batches), EpochSums(), watch, criterion.weight_dict)
    train_one_epoch(wrap(model), criterion, batches, build_updater(model, config), log)
    return [parameter.detach().cpu() for parameter in model.parameters()]


def noise(device: torch.device) -> tuple[NestedTensor, list[dict[str, torch.Tensor]]]:
    """A batch of two images with three objects each."""
    images = NestedTensor.from_images(list(torch.randn(2, 3, 64, 96)))
    boxes, labels = torch.rand(2, 3, 4) * 0.4 + 0.1, torch.randint(5, (2, 3))
    targets = [{"boxes": b.to(device), "labels": n.to(device)} for b, n in zip(boxes, labels, strict=True)]
    return images.to(device), targets


def check_exchanges(device: torch.device) -> bool:
    """What util/distributed/processes.py sends: sums and buffers on the device, objects on the host."""
    number, buffer = torch.full((), 3.0, device=device), torch.arange(4.0, device=device)
    dist.all_reduce(number)
    dist.broadcast(buffer, 0)
    gathered: list[object] = [None]
    dist.gather_object({"a": 1}, gathered)
    box: list[object] = ["text"]
    dist.broadcast_object_list(box)
    seen = (number.item(), buffer.tolist(), gathered, box)
    return say(seen == (3.0, [0.0, 1.0, 2.0, 3.0], [{"a": 1}], ["text"]), "numbers, buffers and objects")


def _free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def say(passed: bool, what: str) -> bool:
    print(f"{bool(passed)}  {what}", flush=True)
    return bool(passed)


if __name__ == "__main__":
    sys.exit(main())
