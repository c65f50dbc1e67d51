"""DistributedDataParallel over NCCL in a group of one process.

    python -m tests.gpu_check.one_rank [--device cpu]

main.py uses no DDP for one process, and NCCL takes no two processes on one GPU, so on a machine
with one GPU nothing else tests it. Every exchange of training is made once.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from engine import data_parallel, train_one_epoch, training_loss
from models import build_model
from tests.gpu_check.prepare import device_parser
from util.config import Config, parse_config
from util.distributed.processes import process_group
from util.nested_tensor import NestedTensor
from util.step.deterministic import make_deterministic
from util.step.log import StepLog
from util.step.metrics import EpochSums
from util.step.not_finite import FiniteWatch
from util.step.updater import build_updater

FLAGS = (
    "--backbone resnet18 --backbone_weights none --backbone_norm gn --hidden_dim 64 --nheads 4"
    " --enc_layers 1 --dec_layers 2 --num_queries 20 --num_classes 5 --accumulate_steps 2"
    " --bf 1 --share_bf 0 --insert_idx 0"
)


def main() -> int:
    device_name = device_parser(__doc__).parse_args().device
    make_deterministic()
    # what a launcher sets
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}

    # the group is closed before the last line, so a hang at the end shows too
    with process_group(device_name, timeout=60) as device:
        print(f"one process, {dist.get_backend_config()}")
        results = {
            "four steps with DDP give the weights of four steps without it": training_agrees(device),
            "numbers, buffers and objects": exchanges_agree(device),
        }
        for name, passed in results.items():
            print(f"{passed}  {name}", flush=True)
    print("the group has ended")
    return 0 if all(results.values()) else 1


def training_agrees(device: torch.device) -> bool:
    """Two updates of two batches each: the first batch of an update runs under no_sync."""
    config = parse_config(FLAGS.split())
    # the same seed gives both the same weights and batches
    plain = trained(config, device, lambda model: model)
    exchanged = trained(config, device, lambda model: data_parallel(model, config, device))
    return all(map(torch.equal, plain, exchanged))


def trained(
    config: Config, device: torch.device, wrap: Callable[[nn.Module], nn.Module]
) -> list[torch.Tensor]:
    """The weights after four steps on random batches."""
    torch.manual_seed(0)
    model, criterion, _ = build_model(config)
    model.to(device)
    batches = [noise(device) for _ in range(4)]

    # one log window, no checkpoints: only the steps matter
    watch = FiniteWatch(model, training_loss(model, criterion, "off"), {}, None)
    log = StepLog(0, len(batches), EpochSums(), watch, criterion.weight_dict)
    train_one_epoch(wrap(model), criterion, batches, build_updater(model, config), log)
    return [parameter.detach().cpu() for parameter in model.parameters()]


def noise(device: torch.device) -> tuple[NestedTensor, list[dict[str, torch.Tensor]]]:
    """A batch of two images with three objects each."""
    images = NestedTensor.from_images(list(torch.randn(2, 3, 64, 96)))
    targets = []
    for _ in range(2):
        boxes, labels = torch.rand(3, 4) * 0.4 + 0.1, torch.randint(5, (3,))
        targets.append({"boxes": boxes.to(device), "labels": labels.to(device)})
    return images.to(device), targets


def exchanges_agree(device: torch.device) -> bool:
    """What util/distributed/processes.py sends: sums and buffers on the device, objects on the host."""
    number, buffer = torch.full((), 3.0, device=device), torch.arange(4.0, device=device)
    # in a group of one every exchange gives back what was sent
    dist.all_reduce(number)
    dist.broadcast(buffer, 0)
    gathered: list[object] = [None]
    dist.gather_object({"a": 1}, gathered)
    box: list[object] = ["text"]
    dist.broadcast_object_list(box)
    received = (number.item(), buffer.tolist(), gathered, box)
    return received == (3.0, [0.0, 1.0, 2.0, 3.0], [{"a": 1}], ["text"])


def _free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
