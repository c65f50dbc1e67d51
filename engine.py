"""One epoch of training, and evaluation. BatchFormerV2 does not appear here: it is part of the model."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from datasets import DetectionData
from datasets.coco_eval import (
    IOU_TYPES,
    coco_results,
    evaluate_results,
    iou_types_of,
    metrics_table,
    precision_tables,
)
from datasets.loader import DeviceBatches
from datasets.panoptic.quality import quality_table
from models import build_model
from models.criterion import SetCriterion
from models.ops import backends
from models.regions import check_compiler, compile_regions, eager
from models.weights.finetune import fine_tune
from models.weights.start import Start, load_checkpoint
from util.class_map import ClassMap
from util.config import Config, RunConfig
from util.distributed.exchange import apart
from util.distributed.processes import broadcast_from_main, gather_on_main, is_main, world_size
from util.distributed.watchdog import note
from util.errors import UserError
from util.nested_tensor import NestedTensor
from util.optim import build_schedule
from util.step.log import StepLog
from util.step.metrics import published_names
from util.step.not_finite import FiniteWatch, Targets
from util.step.precision import autocast
from util.step.precision_check import move_to_device
from util.step.progress import Progress, Throughput
from util.step.transfer import HostCopy
from util.step.updater import Updater, build_updater

log = logging.getLogger(__name__)

Batches = Iterable[tuple[NestedTensor, Targets]]


def train_one_epoch(
    model: nn.Module,
    criterion: SetCriterion,
    batches: Batches,
    updater: Updater,
    step_log: StepLog,
    amp: str = "off",
) -> dict[str, float]:
    """Train on the batches that are left of an epoch.

    A step blocks on the device once, for the matching. `step_log` reads the losses of a step when those
    of the next one are computed.

    Args:
        model: the detector, wrapped in DistributedDataParallel in a job of several processes.
        updater: averages gradients over groups of `accumulate_steps` batches.
        step_log: the notes of this epoch; says with which step the epoch resumes.
        amp: mixed precision of the forward pass: "off", "bf16" or "fp16".

    Returns:
        means of the epoch over all processes, under the names of log.txt without "train_".

    Raises:
        UserError: a loss or a gradient was not finite, without --on_nan skip or too often. The
            weights are those from before that step.
    """
    # The criterion has modes too: in training it divides by the mean number of boxes per process.
    model.train()
    criterion.train()
    for step, (images, targets) in enumerate(batches, step_log.first_step):
        group_size, last_of_group = updater.group_of(step, step_log.num_steps)
        step_log.before_forward(step, images, targets)

        with _exchange_of_gradients(model, last_of_group):
            # The matching in the criterion blocks on the device.
            with autocast(amp, images.tensors.device):
                outputs = model(images)
            losses = criterion(outputs, targets)
            total = criterion.total(losses)

            # Backward. First check the previous step, before this step changes the weights.
            step_log.before_backward()
            scale = updater.backward(total, group_size)

        # Gradients are averaged over a group of batches.
        norm = updater.step() if last_of_group else None
        step_log.after_step(losses, total, norm, scale, updater.lr)
    return step_log.close(updater.lr)


def _exchange_of_gradients(model: nn.Module, wanted: bool) -> contextlib.AbstractContextManager:
    """Only the last batch of a group exchanges gradients; the others stay in their process."""
    if isinstance(model, DistributedDataParallel) and not wanted:
        return model.no_sync()
    return contextlib.nullcontext()


def check_device(run: RunConfig, device: torch.device) -> None:
    """Compare the attention kernels with the reference, and look for what --compile needs.

    Raises UserError. Called before a run starts.
    """
    if run.compile and not run.eval:
        check_compiler(device)
    try:
        backends.choose(None, device)
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from error


@dataclass(frozen=True)
class Learner:
    """The detector and what trains it. wrapped: the model as the training loop calls it."""

    model: nn.Module
    wrapped: nn.Module
    criterion: SetCriterion
    postprocessors: Mapping[str, Callable]
    updater: Updater
    schedule: LambdaLR

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def build_learner(config: Config, device: torch.device, start: Start, classes: ClassMap) -> Learner:
    """Build the detector on `device`, load the weights of `start`, and build the optimiser.

    Raises UserError if the weights do not fit.
    """
    model, criterion, postprocessors = build_model(config, pretrained=start.weights is None)
    if start.weights is not None and start.resumed:
        load_checkpoint(model, start.weights, start.source)
    elif start.weights is not None:
        for line in fine_tune(model, config, classes, start.weights, start.source).splitlines():
            log.info("%s", line)
    # Move the model first: the optimiser keeps references to its parameters.
    move_to_device(model, device, config.run)

    updater = build_updater(model, config)
    if config.run.compile:
        compile_regions(model)
    wrapped: nn.Module = model
    if world_size() > 1:
        wrapped = data_parallel(model, config, device)
    schedule = build_schedule(updater.optimizer, config)
    return Learner(model, wrapped, criterion, postprocessors, updater, schedule)


def build_watch(config: Config, learner: Learner) -> FiniteWatch:
    """The check of losses and gradients, which can run a step of the learner again."""
    run = config.run
    return FiniteWatch(
        learner.model,
        training_loss(learner.model, learner.criterion, run.amp),
        config.flags(),
        Path(run.output_dir) if run.output_dir else None,
        skip=run.on_nan == "skip",
        max_steps=run.max_nan_steps,
    )


def data_parallel(model: nn.Module, config: Config, device: torch.device) -> DistributedDataParallel:
    """The model wrapped so that its backward averages the gradients over all processes.

    Needs a process group. Buffers are not synchronised here, but once an epoch (equalise_buffers).
    """
    # With both flags some heads get no loss, and DDP must look for unused parameters.
    unused = config.loss.no_aux_loss and config.transformer.with_box_refine
    options: dict[str, Any] = {"find_unused_parameters": unused, "gradient_as_bucket_view": True}
    if device.type == "cuda":
        options["device_ids"] = [device]
    # PyTorch 2.13 renamed the option.
    known = inspect.signature(DistributedDataParallel).parameters
    renamed = "forward_sync_buffers" in known
    options["forward_sync_buffers" if renamed else "broadcast_buffers"] = False
    return DistributedDataParallel(model, **options)


def training_loss(
    model: nn.Module, criterion: SetCriterion, amp: str
) -> Callable[[NestedTensor, Targets], Tensor]:
    """A function that computes the total loss of a batch as a training step does, in this process alone."""

    def loss_of(images: NestedTensor, targets: Targets) -> Tensor:
        with autocast(amp, images.tensors.device), eager(model), apart():
            outputs = model(images)
        # In evaluation mode the criterion does not wait for the other processes.
        was_training = criterion.training
        try:
            losses = criterion.eval()(outputs, targets)
        finally:
            criterion.train(was_training)
        return criterion.total(losses)

    return loss_of


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    stats: metrics and mean losses under the names of log.txt without "test_", on every process.
    results: detections in COCO's results format, in the order of the image ids; main process only.
    tables: precision and recall of boxes as in pycocotools' COCOeval.eval, under "segm" those of masks,
        if there are some, and panoptic quality with panoptic data; main process only.
    """

    stats: dict[str, Any]
    results: list[dict[str, Any]]
    tables: dict[str, Any]

    @property
    def best_by(self) -> tuple[str, float]:
        """The metric that the best checkpoint is chosen by, and its value in [0, 1]; -1 without an object."""
        if quality := self.stats.get("PQ_all"):
            return "PQ", quality["pq"]
        # with --frozen_weights the AP of boxes is that of the first epoch
        if masks := self.stats.get(IOU_TYPES["segm"].key):
            return "mask AP", masks[0]
        return "AP", self.stats[IOU_TYPES["bbox"].key][0]

    def print_metrics(self) -> None:
        """Log the twelve metrics of each IoU type, in two lines."""
        for kind, of in IOU_TYPES.items():
            if of.key not in self.stats:
                continue
            if kind == "segm":
                log.info("masks:")
            for line in metrics_table(self.stats[of.key]).splitlines():
                log.info("%s", line)
        if "PQ_all" in self.stats:
            log.info("panoptic quality, in percent:")
            for line in quality_table(self.stats).splitlines():
                log.info("%s", line)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    criterion: SetCriterion,
    postprocessors: Mapping[str, Callable],
    batches: DeviceBatches,
    dataset: DetectionData,
    run: RunConfig,
    title: str = "evaluate",
) -> Evaluation:
    """COCO's metrics and the mean losses over a data set, the same for any number of processes.

    Args:
        model: not wrapped: processes may have different numbers of batches.
        postprocessors: {"bbox": ...}: outputs and image sizes to detections.
        batches: this process's batches of `dataset`.
        dataset: its classes map labels to category ids, its `coco` is the ground truth.
        run: --amp, --log_every and --coco_eval.

    Raises:
        UserError: no image of the data set could be read.
    """
    # In evaluation mode the criterion divides by the boxes of its own batch, so no process waits.
    model.eval()
    criterion.eval()
    progress, throughput = Progress(title, len(batches), run.log_every), Throughput()
    done: list[BatchResult] = []
    pending: PendingResult | None = None
    for step, (images, targets) in enumerate(batches):
        note("%s, batch %d", title, step)
        with autocast(run.amp, images.tensors.device), eager(model):
            outputs = model(images)
        # The device works on this batch; the host converts the detections of the previous one.
        if pending:
            done.append(pending.collect())
        # Boxes in pixels of the image as it is stored.
        losses = criterion(outputs, targets)
        sizes = torch.stack([target["orig_size"] for target in targets])
        detections = postprocessors["bbox"](outputs, sizes)
        pending = PendingResult(targets, detections, losses, dataset)
        throughput.add(len(images) * world_size())
        progress.step([f"{throughput.rate():.2f} images/s"] if progress.due() else [])
    if pending:
        done.append(pending.collect())
    progress.close()
    return _summarise(done, criterion.weight_dict, dataset, run.coco_eval)


@dataclass(frozen=True)
class BatchResult:
    """What evaluation keeps of a batch: detections in COCO's results format, losses by name, and with
    panoptic data what became of the segments by image id.
    """

    detections: list[dict[str, Any]]
    losses: dict[str, float]
    outcomes: dict[int, np.ndarray]


class PendingResult:
    """Asynchronous copy of detections and losses to the host."""

    def __init__(
        self,
        targets: Targets,
        detections: Sequence[dict[str, Any]],
        losses: dict[str, Tensor],
        dataset: DetectionData,
    ) -> None:
        self._dataset = dataset
        self._image_ids = [int(target["image_id"]) for target in targets]
        self._loss_names = list(losses)
        # The constructor starts the copies; one copy for all losses.
        self._losses = HostCopy(torch.stack([loss.float() for loss in losses.values()]))
        # What coco_results reads; the detector returns more.
        self._detections = {
            name: HostCopy(torch.stack([image[name] for image in detections]))
            for name in ("scores", "labels", "boxes")
        }
        # They stay on the device: `collect` computes masks of one image at a time.
        self._masks = [image["masks"] for image in detections if "masks" in image]

    def collect(self) -> BatchResult:
        """The batch on the host; blocks only if the copy has not finished."""
        losses = dict(zip(self._loss_names, self._losses.get().tolist(), strict=True))
        batch = {name: copy.get() for name, copy in self._detections.items()}
        images: list[dict[str, Any]] = [
            {name: values[i] for name, values in batch.items()} for i in range(len(self._image_ids))
        ]
        for image, masks in zip(images, self._masks, strict=bool(self._masks)):
            image["masks"] = masks
        outcomes = {}
        if panoptic := self._dataset.panoptic:
            for image_id, image in zip(self._image_ids, images, strict=True):
                outcomes[image_id] = panoptic.compare(image_id, image)
                del image["masks"]  # panoptic data have no masks that could overlap
        results = coco_results(self._image_ids, images, self._dataset.classes)
        return BatchResult(results, losses, outcomes)


def _summarise(
    done: list[BatchResult], weights: Mapping[str, float], dataset: DetectionData, evaluator: str
) -> Evaluation:
    """Gather the results of all processes on the main one, in the order of the data set."""
    # Only the main process knows all detections, and computes the metrics.
    shares = gather_on_main(done)
    if not is_main():
        return Evaluation(broadcast_from_main(None), [], {})

    # Batch k went to process k modulo their number.
    rounds = max(len(share) for share in shares)
    in_order = [share[i] for i in range(rounds) for share in shares if i < len(share)]
    if not in_order:
        raise UserError(
            "not one image of the validation set could be read: there is nothing to evaluate; mend the data"
        )
    results = [detection for batch in in_order for detection in batch.detections]
    # Skipped batches break the order of the turns.
    results.sort(key=lambda detection: detection["image_id"])

    # The metrics take minutes for large data: a note for the watchdog.
    note("COCO metrics of %d detections", len(results))
    evaluations = {
        kind: evaluate_results(dataset.coco, results, evaluator, kind) for kind in iou_types_of(results)
    }
    # fsum: the mean must not depend on which process had which batch.
    means = {
        name: math.fsum(batch.losses[name] for batch in in_order) / len(in_order)
        for name in in_order[0].losses
    }
    stats: dict[str, Any] = published_names(means, weights)
    for kind, evaluation in evaluations.items():
        stats[IOU_TYPES[kind].key] = evaluation.stats.tolist()
    # The published tables are those of boxes.
    tables = {kind: precision_tables(evaluation) for kind, evaluation in evaluations.items()}
    tables = tables.pop("bbox") | tables
    if dataset.panoptic:
        outcomes = [batch.outcomes for batch in in_order]
        figures = dataset.panoptic.figures({i: of for batch in outcomes for i, of in batch.items()})
        stats |= figures
        tables |= figures
    return Evaluation(broadcast_from_main(stats), results, tables)
