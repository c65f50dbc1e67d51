"""One epoch of training, and evaluation. Knows nothing of BatchFormerV2: the outputs carry what the criterion must know."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pycocotools.coco import COCO
from torch import Tensor, nn

from datasets.coco_eval import coco_results, evaluate_boxes, precision_tables
from datasets.loader import Prefetcher
from models.criterion import SetCriterion
from util.checkpoint import write_atomically
from util.diagnose import first_nonfinite_module
from util.distributed import broadcast_from_main, gather_on_main, is_main, rank, world_size
from util.errors import UserError
from util.metrics import MeanOnDevice, Progress, memory_in_use
from util.nested_tensor import NestedTensor
from util.optim import clip_gradients, step_if_finite
from util.transfer import HostCopy

Targets = Sequence[dict[str, Tensor]]


def train_one_epoch(
    model: nn.Module, criterion: SetCriterion, batches: Prefetcher, optimizer: torch.optim.Optimizer, device: torch.device,
    epoch: int, *, clip_max_norm: float, accumulate_steps: int, log_every: int, dump_dir: Path | None,
) -> dict[str, float]:  # fmt: skip
    """Train on every batch once.

    A step waits for the device once, for the matching. Losses are summed on the device and read every `log_every` steps; whether
    they were finite is read one step late, when the answer has arrived with the matching of the next step.

    Args:
        accumulate_steps: batches per optimiser step; their gradients are averaged. Each batch goes through BatchFormerV2 by
            itself, so this does not give it more images to relate.
        dump_dir: where the batch is saved that gave a loss or gradient that is not finite; None saves nothing.

    Returns:
        the epoch's means over all processes, under the published names (without "train_").

    Raises:
        UserError: a loss or gradient was not finite; the weights are those from before that step.
    """
    model.train()
    criterion.train()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    losses_seen, norms_seen = MeanOnDevice(), MeanOnDevice()
    watch = FiniteWatch(model, criterion, epoch, dump_dir)
    progress = Progress(f"epoch {epoch}", len(batches), log_every)
    clock = Throughput()
    optimizer.zero_grad()
    for step, (images, targets) in enumerate(batches):
        group_start = step - step % accumulate_steps
        group_size = min(accumulate_steps, len(batches) - group_start)
        last_of_group = step == group_start + group_size - 1
        with contextlib.nullcontext() if last_of_group else _without_exchange(model):
            losses = criterion(model(images), targets)
            watch.check()
            total = criterion.total(losses)
            (total / group_size).backward()
        norm = None
        if last_of_group:
            norm = clip_gradients(parameters, clip_max_norm)
            step_if_finite(optimizer, torch.isfinite(norm))
            optimizer.zero_grad()
            norms_seen.update({"grad_norm": norm})
        losses_seen.update(losses)
        watch.expect(step, images, targets, losses, total, norm)
        clock.add(len(images) * world_size())
        progress.step(_line(losses_seen, norms_seen, criterion, optimizer, clock, device) if progress.due() else None)
    watch.check()
    progress.close()
    means = losses_seen.totals() | norms_seen.totals()
    return {"lr": optimizer.param_groups[0]["lr"]} | published_names(means, criterion.weight_dict)


@dataclass(frozen=True)
class Evaluation:
    """stats: published names (without "test_") to numbers, on every process. On the main process also the detections in
    COCO's results format and the precision tables of pycocotools."""

    stats: dict[str, Any]
    results: list[dict[str, Any]]
    tables: dict[str, Any]


@torch.no_grad()
def evaluate(
    model: nn.Module, criterion: SetCriterion, postprocessors: Mapping[str, Callable], batches: Prefetcher, ground_truth: COCO,
    log_every: int = 10,
) -> Evaluation:  # fmt: skip
    """COCO's figures and the losses over a data set; the same however many processes share the work.

    `model` must not be wrapped: processes may have different numbers of batches. While the device works on a batch, the host
    puts the detections of the batch before into COCO's format.
    """
    model.eval()
    criterion.eval()
    progress = Progress("evaluate", len(batches), log_every)
    done: list[BatchResult] = []
    pending: PendingResult | None = None
    clock = Throughput()
    for images, targets in batches:
        outputs = model(images)
        done += [pending.collect()] if pending else []
        losses = criterion(outputs, targets)
        sizes = torch.stack([target["orig_size"] for target in targets])
        pending = PendingResult(targets, postprocessors["bbox"](outputs, sizes), losses)
        clock.add(len(images) * world_size())
        progress.step(f"{clock.rate():.2f} images/s" if progress.due() else None)
    done += [pending.collect()] if pending else []
    progress.close()
    return _summarise(done, criterion, ground_truth)


@dataclass(frozen=True)
class BatchResult:
    """Detections in COCO's results format, and the losses by name."""

    detections: list[dict[str, Any]]
    losses: dict[str, float]


class PendingResult:
    """Detections and losses of a batch on their way to the host."""

    def __init__(self, targets: Targets, detections: Sequence[dict[str, Tensor]], losses: dict[str, Tensor]) -> None:
        self._image_ids = [target["image_id"].item() for target in targets]
        self._names = list(losses)
        self._losses = HostCopy(torch.stack([loss.float() for loss in losses.values()]))
        self._detections = HostCopy(torch.stack([_packed(detection) for detection in detections]))

    def collect(self) -> BatchResult:
        detections = [
            {"boxes": rows[:, :4], "scores": rows[:, 4], "labels": rows[:, 5].long()} for rows in self._detections.get()
        ]
        losses = dict(zip(self._names, self._losses.get().tolist(), strict=True))
        return BatchResult(coco_results(self._image_ids, detections), losses)


class FiniteWatch:
    """Stops a run whose loss or gradient is not finite, without waiting for the device: one step late.

    The optimiser has left such a step out, so the weights that went wrong are still there to look at.
    """

    def __init__(self, model: nn.Module, criterion: SetCriterion, epoch: int, dump_dir: Path | None) -> None:
        self._model, self._criterion, self._epoch, self._dump_dir = model, criterion, epoch, dump_dir
        self._expected: dict[str, Any] | None = None

    def expect(
        self, step: int, images: NestedTensor, targets: Targets, losses: dict[str, Tensor], total: Tensor, norm: Tensor | None
    ) -> None:
        """Start fetching this step's verdict, and keep what a diagnosis needs."""
        numbers = torch.stack([total.detach(), total.detach() if norm is None else norm, *(x.detach() for x in losses.values())])
        self._expected = {
            "step": step, "images": images, "targets": targets, "names": list(losses), "numbers": HostCopy(numbers.float()),
            "has_norm": norm is not None,
        }  # fmt: skip

    def check(self) -> None:
        """Raise UserError if the step before was not finite."""
        if self._expected is None:
            return
        total, norm, *terms = self._expected["numbers"].get().tolist()
        if math.isfinite(total) and math.isfinite(norm):
            return
        terms = dict(zip(self._expected["names"], terms, strict=True))
        self._stop(total, norm if self._expected["has_norm"] else None, terms)

    def _stop(self, total: float, norm: float | None, terms: dict[str, float]) -> None:
        seen = self._expected
        assert seen is not None
        model = getattr(self._model, "module", self._model)  # unwrapped: the other processes do not take part
        module = first_nonfinite_module(
            model, lambda: self._criterion.total(self._criterion.eval()(model(seen["images"]), seen["targets"]))
        )
        ids = [target["image_id"].item() for target in seen["targets"]]
        what = f"loss {total}" if norm is None else f"loss {total}, gradient norm {norm}"
        wrong = [name for name, value in terms.items() if not math.isfinite(value)]
        where = self._dump(
            {
                "epoch": self._epoch, "step": seen["step"], "image_ids": ids, "loss": total, "grad_norm": norm,
                "losses": terms, "module": module, "images": seen["images"].tensors, "mask": seen["images"].mask,
                "targets": list(seen["targets"]), "model": model.state_dict(),
            }
        )  # fmt: skip
        raise UserError(
            f"epoch {self._epoch}, step {seen['step']}, process {rank()}: {what} is not finite; images {ids}; "
            f"terms {', '.join(wrong) or 'all finite'}; first wrong: {module}; {where}. Look at these images and their boxes, "
            "or lower --lr or --clip_max_norm, and go on from the last checkpoint with --resume"
        )

    def _dump(self, content: dict[str, Any]) -> str:
        if self._dump_dir is None:
            return "nothing saved without --output_dir"
        path = self._dump_dir / f"nonfinite_process{rank()}.pth"
        write_atomically(content, path)
        return f"saved to {path}"


class Throughput:
    """Images a second since it was last asked."""

    def __init__(self) -> None:
        self._start, self._images = time.perf_counter(), 0

    def add(self, images: int) -> None:
        self._images += images

    def rate(self) -> float:
        now = time.perf_counter()
        value = self._images / max(now - self._start, 1e-9)
        self._start, self._images = now, 0
        return value


def published_names(means: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """Means of unweighted losses as log.txt has them: `loss`, weighted terms, and every term with `_unscaled`."""
    scaled = {name: means[name] * weight for name, weight in weights.items() if name in means}
    named = {name: means[name] for name in ("class_error", "grad_norm") if name in means}
    unscaled = {f"{name}_unscaled": value for name, value in means.items() if name != "grad_norm"}
    return named | {"loss": sum(scaled.values())} | scaled | unscaled


def _line(
    losses: MeanOnDevice, norms: MeanOnDevice, criterion: SetCriterion, optimizer: torch.optim.Optimizer, clock: Throughput,
    device: torch.device,
) -> str:  # fmt: skip
    """The one place of a training step, besides the matching, that waits for the device: every `log_every` steps."""
    stats = published_names(losses.window() | norms.window(), criterion.weight_dict)
    norm = f"{stats['grad_norm']:.3g}" if "grad_norm" in stats else "-"
    rate = optimizer.param_groups[0]["lr"]
    return (
        f"loss {stats['loss']:.4f}  lr {rate:.1e}  grad norm {norm}  {clock.rate():.2f} images/s  mem {memory_in_use(device)}"
    )


def _without_exchange(model: nn.Module) -> Any:
    """Gradients of all but the last batch of a group stay with their process."""
    return model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext()


def _packed(detection: dict[str, Tensor]) -> Tensor:
    """[n, 6]: box, score, label; labels are far below the 2^24 up to which float32 is exact."""
    boxes = detection["boxes"].float()
    return torch.cat([boxes, detection["scores"][:, None].float(), detection["labels"][:, None].to(boxes.dtype)], 1)


def _summarise(done: list[BatchResult], criterion: SetCriterion, ground_truth: COCO) -> Evaluation:
    """Everything to the main process, in the order of the data set whatever the number of processes."""
    shares = gather_on_main(done)
    if not is_main():
        return Evaluation(broadcast_from_main(None), [], {})
    # batch k went to process k modulo their number
    rounds = max(map(len, shares))
    in_order = [share[i] for i in range(rounds) for share in shares if i < len(share)]
    results = [detection for batch in in_order for detection in batch.detections]
    evaluation = evaluate_boxes(ground_truth, results)
    means = {name: math.fsum(batch.losses[name] for batch in in_order) / len(in_order) for name in in_order[0].losses}
    stats = published_names(means, criterion.weight_dict) | {"coco_eval_bbox": evaluation.stats.tolist()}
    return Evaluation(broadcast_from_main(stats), results, precision_tables(evaluation))
