"""A training step of one process of a job, with --bf_across_processes. What it gives is saved."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist

from engine import data_parallel
from models import build_model
from tests.golden import recipe
from tests.helpers import BATCHFORMER, SMALL_MODEL
from util.config import parse_config
from util.distributed.processes import process_group, rank, world_size
from util.nested_tensor import NestedTensor

NUM_IMAGES = 6
SIZES = ((64, 80), (48, 96), (72, 64), (64, 64), (80, 72), (40, 56))  # (height, width)


def images_and_targets() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    images, targets = [], []
    for i, size in enumerate(SIZES):
        images.append(torch.rand(3, *size, generator=generator))
        boxes = torch.rand(i + 1, 4, generator=generator) * 0.3 + 0.2
        targets.append({"boxes": boxes, "labels": torch.arange(i + 1) % 4})
    return images, targets


def count_bytes_to_others() -> list[int]:
    """A list that gets the bytes of each exchange of tokens which go to another process."""
    sent, original = [], dist.all_to_all_single

    def counted(received: torch.Tensor, rows: torch.Tensor, _: list[int], splits: list[int]) -> None:
        sent.append((len(rows) - splits[rank()]) * rows[0].nbytes)
        original(received, rows, _, splits)

    dist.all_to_all_single = counted
    return sent


def main(output: str, *flags: str) -> None:
    config = parse_config([*SMALL_MODEL, *BATCHFORMER, "--dropout", "0", "--bf_dropout", "0", *flags])
    with process_group("cpu") as device:
        model, criterion, _ = build_model(config)
        recipe.fill(model)
        wrapped: Any = model
        if world_size() > 1:
            wrapped = data_parallel(model, config, device)

        sent = count_bytes_to_others()
        # the images of this process
        images, targets = images_and_targets()
        count = NUM_IMAGES // world_size()
        own = slice(rank() * count, (rank() + 1) * count)
        outputs = wrapped(NestedTensor.from_images(images[own]))
        criterion.total(criterion(outputs, targets[own])).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        logits, boxes = outputs["pred_logits"].detach(), outputs["pred_boxes"].detach()
        step = {"logits": logits, "boxes": boxes, "gradients": gradients, "sent": sum(sent)}
        torch.save(step, f"{output}{rank()}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
