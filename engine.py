"""One epoch of training, and evaluation. Knows nothing of BatchFormerV2: the outputs carry what the
criterion must know.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pycocotools.coco import COCO
from torch import Tensor, nn

from datasets.coco_eval import coco_results, evaluate_results, precision_tables
from datasets.loader import DeviceBatches
from models.criterion import SetCriterion
from util.class_map import ClassMap
from util.distributed.processes import broadcast_from_main, gather_on_main, is_main, world_size
from util.distributed.watchdog import note
from util.errors import UserError
from util.nested_tensor import NestedTensor
from util.optim import Updater
from util.step.metrics import MeanOnDevice, Progress, memory_in_use
from util.step.not_finite import FiniteWatch, Step, Targets
from util.step.precision import autocast
from util.step.random_state import torch_state
from util.step.transfer import HostCopy


@dataclass
class EpochMeans:
    """The sums of an epoch so far."""

    losses: MeanOnDevice = field(default_factory=MeanOnDevice)
    norms: MeanOnDevice = field(default_factory=MeanOnDevice)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses.state_dict(), "norms": self.norms.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses.load_state_dict(state["losses"])
        self.norms.load_state_dict(state["norms"])

    def load_merged(self, states: Sequence[Mapping[str, Any]]) -> None:
        self.losses.load_merged([state["losses"] for state in states])
        self.norms.load_merged([state["norms"] for state in states])

    def reset(self) -> None:
        self.losses, self.norms = MeanOnDevice(), MeanOnDevice()


def train_one_epoch(
    model: nn.Module,
    criterion: SetCriterion,
    batches: DeviceBatches,
    updater: Updater,
    device: torch.device,
    epoch: int,
    *,
    watch: FiniteWatch,
    means: EpochMeans,
    amp: str = "off",
    first_step: int = 0,
    log_every: int = 10,
    after_step: Callable[[int], None] = lambda step: None,
    after_window: Callable[[Mapping[str, float]], None] = lambda means: None,
) -> dict[str, float]:
    """Train on the batches that are left of an epoch.

    A step waits for the device once, for the matching. Losses are summed on the device and read
    every `log_every` steps; whether they were finite is read one step late, when the answer has
    arrived with the matching of the next step.

    Args:
        model: wrapped, if gradients are exchanged.
        updater: averages gradients over groups of `accumulate_steps` batches. Each batch goes
            through BatchFormerV2 by itself, so this does not give it more images to relate.
        watch: looks for losses and gradients that are not finite.
        means: the sums, with what an interrupted epoch has already.
        amp: mixed precision of the forward pass.
        first_step: how many steps of the epoch have been made.
        after_step: called with the steps made so far; may save, or end the run by an exception.
        after_window: called every `log_every` steps, and after the last, with their means in this
            process (published names).

    Returns:
        the epoch's means over all processes, under the published names (without "train_").

    Raises:
        UserError: from `watch`; the weights are those from before that step.
    """
    model.train()
    criterion.train()
    num_steps = first_step + len(batches)
    progress = Progress(f"epoch {epoch}", num_steps, log_every, first_step)
    clock = Throughput()
    random_before = torch_state(device)
    for step, (images, targets) in enumerate(batches, first_step):
        group_start = step - step % updater.accumulate_steps
        group_size = min(updater.accumulate_steps, num_steps - group_start)
        last_of_group = step == group_start + group_size - 1
        with contextlib.nullcontext() if last_of_group else _without_exchange(model):
            note("epoch %d, step %d: forward", epoch, step)
            with autocast(amp, device):
                outputs = model(images)
            losses = criterion(outputs, targets)
            watch.check()
            total = criterion.total(losses)
            note("epoch %d, step %d: backward and exchange of gradients", epoch, step)
            scale = updater.backward(total, group_size)
        norm = None
        if last_of_group:
            norm = updater.step()
            means.norms.update({"grad_norm": norm})
        means.losses.update(losses)
        watch.expect(Step(epoch, step, images, targets, random_before), losses, total, norm, scale)
        clock.add(len(images) * world_size())
        line = None
        if (
            progress.due()
        ):  # the one place of a training step, besides the matching, that waits for the device
            window = published_names(means.losses.window() | means.norms.window(), criterion.weight_dict)
            window["images_per_second"] = clock.rate()
            after_window(window)
            line = _line(window, updater.lr, device)
        progress.step(line)
        after_step(step + 1)
        random_before = torch_state(device)
        note("epoch %d, step %d: waiting for the batch", epoch, step + 1)
    watch.check()
    progress.close()
    totals = means.losses.totals() | means.norms.totals()
    return {"lr": updater.lr} | published_names(totals, criterion.weight_dict)


def training_loss(
    model: nn.Module, criterion: SetCriterion, amp: str
) -> Callable[[NestedTensor, Targets], Tensor]:
    """The total loss of a batch as a training step computes it, without an exchange between
    processes.
    """

    def loss_of(images: NestedTensor, targets: Targets) -> Tensor:
        with autocast(amp, images.tensors.device):
            outputs = model(images)
        was_training = criterion.training
        try:
            losses = criterion.eval()(
                outputs, targets
            )  # in evaluation it does not wait for the other processes
        finally:
            criterion.train(was_training)
        return criterion.total(losses)

    return loss_of


@dataclass(frozen=True)
class Evaluation:
    """stats: published names (without "test_") to numbers, on every process. On the main process
    also the detections in COCO's results format and the precision tables of pycocotools.
    """

    stats: dict[str, Any]
    results: list[dict[str, Any]]
    tables: dict[str, Any]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    criterion: SetCriterion,
    postprocessors: Mapping[str, Callable],
    batches: DeviceBatches,
    ground_truth: COCO,
    classes: ClassMap,
    log_every: int = 10,
    *,
    amp: str = "off",
    title: str = "evaluate",
    evaluator: str = "faster",
) -> Evaluation:
    """COCO's figures and the losses over a data set; the same however many processes share the
    work.

    `classes` gives detections the category ids of `ground_truth`. `evaluator` is that of
    evaluate_results. `model` must not be wrapped: processes may have different numbers of batches.
    While the device works on a batch, the host puts the detections of the batch before into COCO's
    format.
    """
    model.eval()
    criterion.eval()
    progress = Progress(title, len(batches), log_every)
    done: list[BatchResult] = []
    pending: PendingResult | None = None
    clock = Throughput()
    for step, (images, targets) in enumerate(batches):
        note("%s, batch %d", title, step)
        with autocast(amp, images.tensors.device):
            outputs = model(images)
        done += [pending.collect()] if pending else []
        losses = criterion(outputs, targets)
        sizes = torch.stack([target["orig_size"] for target in targets])
        pending = PendingResult(targets, postprocessors["bbox"](outputs, sizes), losses, classes)
        clock.add(len(images) * world_size())
        progress.step(f"{clock.rate():.2f} images/s" if progress.due() else None)
    done += [pending.collect()] if pending else []
    progress.close()
    return _summarise(done, criterion, ground_truth, evaluator)


@dataclass(frozen=True)
class BatchResult:
    """Detections in COCO's results format, and the losses by name."""

    detections: list[dict[str, Any]]
    losses: dict[str, float]


class PendingResult:
    """Detections and losses of a batch on their way to the host."""

    def __init__(
        self,
        targets: Targets,
        detections: Sequence[dict[str, Tensor]],
        losses: dict[str, Tensor],
        classes: ClassMap,
    ) -> None:
        self._classes = classes
        self._image_ids = [target["image_id"].item() for target in targets]
        self._names = list(losses)
        self._losses = HostCopy(torch.stack([loss.float() for loss in losses.values()]))
        self._detections = HostCopy(torch.stack([_packed(detection) for detection in detections]))

    def collect(self) -> BatchResult:
        detections = [
            {"boxes": rows[:, :4], "scores": rows[:, 4], "labels": rows[:, 5].long()}
            for rows in self._detections.get()
        ]
        losses = dict(zip(self._names, self._losses.get().tolist(), strict=True))
        return BatchResult(coco_results(self._image_ids, detections, self._classes), losses)


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
    """Means of unweighted losses as log.txt has them: `loss`, weighted terms, and every term with
    `_unscaled`.
    """
    scaled = {name: means[name] * weight for name, weight in weights.items() if name in means}
    named = {name: means[name] for name in ("class_error", "grad_norm") if name in means}
    unscaled = {f"{name}_unscaled": value for name, value in means.items() if name != "grad_norm"}
    return named | {"loss": sum(scaled.values())} | scaled | unscaled


def _line(window: Mapping[str, float], lr: float, device: torch.device) -> str:
    norm = f"{window['grad_norm']:.3g}" if "grad_norm" in window else "-"
    speed = f"{window['images_per_second']:.2f} images/s"
    return f"loss {window['loss']:.4f}  lr {lr:.1e}  grad norm {norm}  {speed}  mem {memory_in_use(device)}"


def _without_exchange(model: nn.Module) -> Any:
    """Gradients of all but the last batch of a group stay with their process."""
    return model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext()


def _packed(detection: dict[str, Tensor]) -> Tensor:
    """[n, 6]: box, score, label; labels are far below the 2^24 up to which float32 is exact."""
    boxes = detection["boxes"].float()
    return torch.cat(
        [boxes, detection["scores"][:, None].float(), detection["labels"][:, None].to(boxes.dtype)], 1
    )


def _summarise(
    done: list[BatchResult], criterion: SetCriterion, ground_truth: COCO, evaluator: str
) -> Evaluation:
    """Everything to the main process, in the order of the data set whatever the number of
    processes.
    """
    shares = gather_on_main(done)
    if not is_main():
        return Evaluation(broadcast_from_main(None), [], {})
    # batch k went to process k modulo their number
    rounds = max(map(len, shares))
    in_order = [share[i] for i in range(rounds) for share in shares if i < len(share)]
    if not in_order:
        raise UserError(
            "not one image of the validation set could be read: there is nothing to evaluate; mend the data"
        )
    results = [detection for batch in in_order for detection in batch.detections]
    results.sort(
        key=lambda detection: detection["image_id"]
    )  # where batches were passed over, the turns have shifted
    note("COCO's figures of %d detections", len(results))
    evaluation = evaluate_results(ground_truth, results, evaluator)
    means = {
        name: math.fsum(batch.losses[name] for batch in in_order) / len(in_order)
        for name in in_order[0].losses
    }
    stats = published_names(means, criterion.weight_dict) | {"coco_eval_bbox": evaluation.stats.tolist()}
    return Evaluation(broadcast_from_main(stats), results, precision_tables(evaluation))
