"""Train or evaluate: flags -> Config -> data, model -> epochs.

python main.py --help
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import inspect
import json
import logging
import random
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from datasets import build_dataset
from datasets.bad_images import BadImages
from datasets.coco import CocoDetection
from datasets.coco_eval import figures_table
from datasets.loader import DeviceBatches, build_loader
from datasets.preflight.quick import quick_check
from datasets.samplers import EvalBatches, TrainBatches
from datasets.workers import end_workers
from engine import EpochMeans, Evaluation, evaluate, train_one_epoch, training_loss
from models import build_model
from models.ops import backends
from models.weights.architecture import Purpose, adopt
from models.weights.finetune import FLAG as FINETUNE
from models.weights.finetune import fine_tune
from models.weights.load import read_trained
from util.checkpoint import BATCHFORMER, load_state, read_checkpoint, weights_of, write_atomically
from util.class_map import AUTO, ClassMap, classes_of, unnamed_classes
from util.config import Config, check_trainable, parse_config, with_classes
from util.distributed.processes import (
    broadcast_from_main,
    equalise_buffers,
    is_main,
    process_group,
    rank,
    sum_over_processes,
    world_size,
)
from util.distributed.watchdog import note
from util.errors import NotSavedError, UserError, run_as_command
from util.optim import GROUPS, build_schedule, build_updater
from util.run.checkpoints import BEST, CheckpointFolder, scheduled_name
from util.run.folder import announce_new, begun, set_aside
from util.run.history import History
from util.run.hold import FolderHold
from util.run.record import device_name, environment, write_record
from util.run.start import Source, find_checkpoint, goes_on, loading, output_folder
from util.run.state import Position, TrainingState, position_of
from util.run.stop import StopRequest, StopVote
from util.run.tensorboard import Board, check_tensorboard, detection_pictures
from util.step.deterministic import explaining_refusals, make_deterministic
from util.step.not_finite import FiniteWatch
from util.step.precision_check import check_precision
from util.step.random_state import RandomGenerators

log = logging.getLogger("main")


def main(config: Config) -> None:
    """Do what the flags say, on all processes that the environment says there are.

    Raises:
        UserError: a mistake of the user's.
        Preempted: a signal asked to leave (util/run/stop.py), and all is saved.
    """
    if config.run.deterministic:
        make_deterministic()
    processes = process_group(config.run.device, config.run.dist_timeout)
    try:
        request = StopRequest(what_is_kept(config, "nothing was trained since the start"))
        with request.installed() as stop, processes as device, explaining_refusals():
            start_logging()
            log.info(
                "device: %s (%s), %d process(es), torch %s",
                device,
                device_name(device),
                world_size(),
                torch.__version__,
            )
            seed_everything(config.run.seed + rank())
            check_operator(device)
            check_tensorboard(config.run.tensorboard)
            if config.run.eval:
                evaluate_only(config, device)
                return
            with output_folder(config) as hold:
                training = Training(config, device, stop, hold)
                with contextlib.closing(training.board):
                    training.run()
    finally:
        end_workers()


def evaluate_only(config: Config, device: torch.device) -> None:
    run = Path(config.run.output_dir) if config.run.output_dir and is_main() else None
    source = find_checkpoint(config, run, going_on=config.run.resume == "auto")
    assert source, "--eval needs --resume"
    checkpoint = read_trained(source.path, "--resume")
    config = adopt(config, checkpoint, source.path)
    announce(config)
    dataset = evaluation_data(config, checkpoint, source)
    config = settle_classes(config, dataset.classes, checkpoint, source)
    with output_folder(config) as hold:
        evaluate_checkpoint(config, device, checkpoint, source, dataset, hold)


def evaluate_checkpoint(
    config: Config,
    device: torch.device,
    checkpoint: Mapping[str, Any],
    source: Source,
    dataset: CocoDetection,
    hold: FolderHold | None,
) -> None:
    """Evaluate the weights of a checkpoint, and the averaged ones if it has such."""
    if hold:
        write_record(
            hold.folder, run_facts(config, val=dataset), environment(device), {"checkpoint": str(source)}
        )
    model, criterion, postprocessors = build_model(config)
    load_checkpoint(model, checkpoint, source, may_lack=())
    check_precision(model.to(device), config.run.amp)
    batches = eval_loader(
        dataset, config, device, BadImages(config.data.on_bad_image, config.data.max_bad_images)
    )
    for suffix in ["", *(["_ema"] if "ema" in checkpoint else [])]:
        if suffix:
            load_checkpoint(model, checkpoint["ema"], source, "averaged weights: ", may_lack=())
        evaluation = evaluate(
            model,
            criterion,
            postprocessors,
            batches,
            dataset.coco,
            dataset.classes,
            config.run.log_every,
            amp=config.run.amp,
            evaluator=config.run.coco_eval,
        )
        log.info("%s", figures_table(evaluation.stats["coco_eval_bbox"]))
        if hold:
            hold.check()
            save_predictions(hold.folder / f"predictions{suffix}.json", evaluation, config)
            write_atomically(evaluation.tables, hold.folder / f"eval{suffix}.pth")
    if hold:
        log.info("the evaluation is in %s", hold.folder)


class Training:
    """A training run, from the data to the last epoch. All that must survive an interruption is in
    `state`.
    """

    def __init__(
        self, config: Config, device: torch.device, stop: StopRequest, hold: FolderHold | None
    ) -> None:
        self.hold, self.folder = hold, hold.folder if hold else None
        self.goes_on = goes_on(config, self.folder)
        if self.folder and not self.goes_on:
            announce_new(self.folder)
        source = find_checkpoint(config, self.folder, self.goes_on)
        checkpoint = read_checkpoint(source.path) if source else None
        start = (
            read_trained(config.run.finetune, FINETUNE) if config.run.finetune and not source else checkpoint
        )
        config = starting_config(config, start, source)
        check_trainable(config)
        announce(config)

        self.dataset = build_dataset("train", config)
        self.classes = self.dataset.classes
        self.val_dataset = build_dataset("val", config, self.classes)
        check_data(self.dataset, self.val_dataset, config)
        config = settle_classes(config, self.classes, checkpoint, source)
        self.config, self.device, self.stop = config, device, stop
        self.votes = StopVote(stop)
        self.order = TrainBatches(
            len(self.dataset), config.optim.batch_size, rank(), world_size(), config.run.seed
        )
        self.bad_images = BadImages(config.data.on_bad_image, config.data.max_bad_images)
        self.batches = build_loader(
            self.dataset,
            self.order,
            config.data.num_workers,
            device,
            self.bad_images,
            timeout=loader_timeout(config),
        )
        self.val_batches = eval_loader(self.val_dataset, config, device, self.bad_images)

        self.checkpoints = CheckpointFolder(self.folder, config.run.keep) if self.folder else None
        self.model, self.criterion, self.postprocessors = build_model(loading(config, source))
        if source:
            load_checkpoint(self.model, checkpoint, source)
        elif start:
            log.info("%s", fine_tune(self.model, config, self.classes, start, config.run.finetune))
        check_precision(self.model.to(device), config.run.amp)
        self.num_parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.updater = build_updater(self.model, config)
        self.schedule = build_schedule(self.updater.optimizer, config)
        self.wrapped = share_gradients(self.model, config, device)

        self.position, self.means = Position(), EpochMeans()
        self.history = History(self.folder / "log.txt" if self.folder else None)
        self.watch = FiniteWatch(
            self.model,
            training_loss(self.model, self.criterion, config.run.amp),
            config.flags(),
            Path(config.run.output_dir) if config.run.output_dir else None,
            skip=config.run.on_nan == "skip",
            max_steps=config.run.max_nan_steps,
        )
        data = {"train": self.dataset.identity(), "val": self.val_dataset.identity()}
        self.state = TrainingState(
            config,
            self.classes,
            data,
            self.model,
            self.updater,
            self.schedule,
            self.position,
            shared={"history": self.history},
            own={
                "random": RandomGenerators(device),
                "means": self.means,
                "not_finite": self.watch,
                "bad_images": self.bad_images,
            },
        )
        self.exact = self.state.restore(checkpoint, str(source))
        epoch_anew = self._meet_changed_data()
        self._prepare_folder(source, checkpoint)
        finished = self.position.epoch - (self.history.unfinished is not None)
        wanted = self.folder and config.run.tensorboard
        self.board = Board(self.folder / "tensorboard" if wanted else None, self._images_trained(), finished)
        if self.folder:
            start = {
                "epoch": self.position.epoch,
                "images": self.position.images,
                "checkpoint": str(source or ""),
            }
            write_record(
                self.folder,
                run_facts(config, train=self.dataset, val=self.val_dataset),
                environment(device),
                start,
            )
        if epoch_anew:
            self._save(must=True)
            # not before: who is killed here must still find them
            if self.checkpoints and self.folder:
                set_aside(self.folder, self.checkpoints.newer_than(self.position))

    def run(self) -> None:
        log.info(
            "%d trainable parameters, %d + %d images",
            self.num_parameters,
            len(self.dataset),
            len(self.val_dataset),
        )
        epochs, started = self.config.optim.epochs, time.perf_counter()
        first = self.position.epoch - (self.history.unfinished is not None)
        if first >= epochs:
            self._nothing_left()
            return
        for epoch in range(first, epochs):
            # else it was interrupted between training and evaluation
            if self.history.unfinished is None:
                self._train(epoch)
            self._evaluate(epoch)
        self._save(must=True)
        log.info("training time %s", datetime.timedelta(seconds=round(time.perf_counter() - started)))

    def _train(self, epoch: int) -> None:
        self.order.epoch = self.dataset.epoch = epoch
        self.order.first_image = self.position.images
        with self.stop.deferred():
            stats = train_one_epoch(
                self.wrapped,
                self.criterion,
                self.batches,
                self.updater,
                self.device,
                epoch,
                watch=self.watch,
                means=self.means,
                amp=self.config.run.amp,
                log_every=self.config.run.log_every,
                first_step=self.position.images // self.order.images_per_step if self.exact else 0,
                after_step=self._after_step,
                after_window=self._after_window,
            )
            self.schedule.step()
            equalise_buffers(self.model)
            self.means.reset()
            self.position.epoch, self.position.images, self.exact = epoch + 1, 0, True
            self.history.unfinished = {
                f"train_{name}": value for name, value in (stats | self._skipped()).items()
            }
            self._save(self._scheduled(epoch))
            self.stop.saved = what_is_kept(self.config, f"epoch {epoch} is saved, its evaluation is next")
            if self.votes.agreed_now():
                self.stop.leave(self.stop.saved)

    def _after_step(self, steps: int) -> None:
        """Note what has been trained; save if it is time to, and leave if any process was asked to."""
        self.position.images += self.order.images_per_step
        leave = self.votes.agreed()
        every = self.config.run.save_every
        due = (
            every and steps % every == 0 and self.position.images < self.order.images
        )  # else the epoch's end saves
        if leave or due:
            self.watch.check()
            self._save(must=leave)
        if leave:
            done = (
                f"saved in epoch {self.position.epoch}, after {self.position.images} of "
                f"{self.order.images} images"
            )
            self.stop.leave(what_is_kept(self.config, done))

    def _images_trained(self) -> int:
        return self.position.epoch * self.order.images + self.position.images

    def _after_window(self, means: Mapping[str, float]) -> None:
        rates = {
            f"lr/{name}": group["lr"]
            for name, group in zip(GROUPS, self.updater.optimizer.param_groups, strict=True)
        }
        shown = {f"steps/{name}": value for name, value in means.items() if not name.endswith("_unscaled")}
        self.board.step(shown | rates, self._images_trained() + self.order.images_per_step)

    def _evaluate(self, epoch: int) -> None:
        entries: dict[str, Any] = {}
        if (epoch + 1) % self.config.run.eval_every == 0 or epoch + 1 == self.config.optim.epochs:
            entries |= self._evaluate_weights(self.model, epoch, "")
            if self.updater.averaged:
                self.updater.averaged.take_buffers()
                entries |= self._evaluate_weights(self.updater.averaged.model, epoch, "ema_")
        line = self.history.finish_epoch(entries | {"epoch": epoch, "n_parameters": self.num_parameters})
        self.board.epoch(line)

    def _evaluate_weights(self, model: nn.Module, epoch: int, prefix: str) -> dict[str, Any]:
        evaluation = evaluate(
            model,
            self.criterion,
            self.postprocessors,
            self.val_batches,
            self.val_dataset.coco,
            self.classes,
            self.config.run.log_every,
            amp=self.config.run.amp,
            title="evaluate the averaged weights" if prefix else "evaluate",
            evaluator=self.config.run.coco_eval,
        )
        figures = evaluation.stats["coco_eval_bbox"]
        log.info("%s", figures_table(figures))
        is_best = self.history.is_best(figures[0], epoch, prefix.strip("_") or "model")
        if not prefix:
            self.board.pictures(lambda: evaluation_pictures(self.val_dataset, evaluation), epoch)
        if self.hold and self.checkpoints:
            self.hold.check()
            if is_best:
                self.checkpoints.name_newest(BEST)
            try:
                save_tables(self.hold.folder / "eval", evaluation, epoch, prefix)
                suffix = "_ema" if prefix else ""
                save_predictions(self.hold.folder / f"predictions{suffix}.json", evaluation, self.config)
            except (OSError, NotSavedError) as error:
                log.warning("%s; training goes on", error)
        return {f"test_{prefix}{name}": value for name, value in evaluation.stats.items()}

    def _skipped(self) -> dict[str, int]:
        """How many steps and image files have been left out so far, for runs that are to go on
        then.
        """
        steps = {"skipped_steps": self.watch.skipped} if self.config.run.on_nan == "skip" else {}
        if self.config.data.on_bad_image == "stop":
            return steps
        # a file counts once for every process that has met it
        return steps | {"bad_images": int(sum_over_processes(torch.tensor(self.bad_images.count)))}

    def _save(self, also: list[str] | None = None, must: bool = False) -> None:
        """Write a checkpoint, on the main process; all must call, and go on when it is written."""
        if not self.config.run.output_dir:
            return
        note("saving after %d images of epoch %d", self.position.images, self.position.epoch)
        content = self.state.gather()
        if self.hold and self.checkpoints and content:
            self.hold.check()
            self.checkpoints.save(content, self.position, also or [], must=must)
        broadcast_from_main(None)

    def _scheduled(self, epoch: int) -> list[str]:
        """checkpoint<epoch>.pth before a drop of the rates and every 5 epochs, as published."""
        optim = self.config.optim
        drops = optim.lr_drop_epochs
        before_drop = epoch + 1 in drops if drops else (epoch + 1) % optim.lr_drop == 0
        return [scheduled_name(epoch)] if before_drop or (epoch + 1) % 5 == 0 else []

    def _prepare_folder(self, source: Source | None, checkpoint: Mapping[str, Any] | None) -> None:
        """Nothing of an earlier run may be taken for this one's: what lies there and is not gone on
        with is set aside.
        """
        if not self.folder or not self.checkpoints:
            return
        self.checkpoints.sweep()
        if source is None:
            if not self.goes_on:
                set_aside(self.folder)
        elif not source.by_itself:
            newer = self.checkpoints.newer_than(position_of(checkpoint or {}))
            if newer or self.history.lines_beyond():
                set_aside(self.folder, [*newer, self.folder / "log.txt"])
        self.history.write()
        begun(self.folder)

    def _meet_changed_data(self) -> bool:
        """What follows if the data are not the checkpoint's; gives whether an interrupted epoch
        begins anew.

        Nobody knows which of the images as they are now it has seen: so that none is left out, it
        takes all.
        """
        if self.state.other_validation:
            log.warning("resume: results before and after can't be compared; %s is chosen anew", BEST)
            self.history.best = None
        if not self.state.other_images or self.position.images == 0:
            return False
        epoch, done = self.position.epoch, self.position.images
        log.warning(
            "resume: epoch %d begins anew with the images as they are now, after %d of the earlier ones",
            epoch,
            done,
        )
        self.position.images, self.exact = 0, True
        self.means.reset()
        self.updater.optimizer.zero_grad()  # of an unfinished accumulation
        return True

    def _nothing_left(self) -> None:
        epochs = self.config.optim.epochs
        if self.goes_on:
            log.info("all %d epochs have been trained and evaluated: nothing is left to do", epochs)
            return
        trained = self.position.epoch
        raise UserError(
            f"--resume {self.config.run.resume} has trained {trained} epochs already; raise --epochs {epochs}"
        )


def starting_config(config: Config, start: Mapping[str, Any] | None, source: Source | None) -> Config:
    """The Config with the detector of the checkpoint that a training starts with: that of --resume,
    else that of --finetune.
    """
    if start is None:
        return dataclasses.replace(config, settled=True)
    if source:
        return adopt(config, start, source.path, purpose=Purpose.RESUME)
    return adopt(config, start, config.run.finetune, FINETUNE, Purpose.FINE_TUNE, without_heads=True)


def evaluation_data(config: Config, checkpoint: Mapping[str, Any], source: Source):
    """The validation set, labelled as the checkpoint's class heads are."""
    classes = classes_of(checkpoint, str(source)) if config.data.num_classes == AUTO else None
    dataset = build_dataset("val", config, classes)
    logits = unnamed_classes(weights_of(checkpoint, str(source))).num_classes
    if classes or config.data.num_classes != AUTO or dataset.classes.num_classes == logits:
        return dataset
    log.warning(
        "%s does not name its classes; category ids are taken for the numbers of its %d logits",
        source,
        logits,
    )
    return build_dataset("val", config.with_flags({"num_classes": logits}))


def settle_classes(
    config: Config, classes: ClassMap, checkpoint: Mapping[str, Any] | None, source: Source | None
) -> Config:
    """The Config with the number of logits that the data has. Raises UserError if the checkpoint
    was trained on other classes.
    """
    trained = classes_of(checkpoint, str(source)) if checkpoint and "classes" in checkpoint else None
    if trained:
        classes.require_same(trained, str(source))
    log.info("%d classes: %s", len(classes.categories), shortened(", ".join(classes.names.values())))
    return with_classes(config, classes)


def load_checkpoint(
    model: nn.Module,
    checkpoint: Mapping[str, Any],
    source: Source,
    which: str = "",
    may_lack: tuple[str, ...] = (BATCHFORMER,),
) -> None:
    """Load weights and say what fitted. Raises UserError for another architecture; `may_lack`:
    beginnings of names.
    """
    result = load_state(model, checkpoint, str(source))
    log.info("%s%s", which, result)
    result.require_same_architecture(may_lack)


def shortened(text: str, longest: int = 200) -> str:
    return text if len(text) <= longest else f"{text[:longest]} ..."


def start_logging() -> None:
    """The main process tells everything, the others their warnings, each with its number."""
    form = "%(message)s" if world_size() == 1 else f"[{rank()}] %(message)s"
    logging.basicConfig(
        stream=sys.stdout, level=logging.INFO if is_main() else logging.WARNING, format=form, force=True
    )
    logging.raiseExceptions = False  # a log that can't be written, on a full disk say, ends no run


def announce(config: Config) -> None:
    log.info("flags: %s", json.dumps(config.flags()))
    if names := config.without_effect():
        off = "evaluation does without it unless --eval_bf is given" if config.run.eval else "--bf 0"
        log.info(
            "without effect: %s; BatchFormerV2 is off (%s)", ", ".join(f"--{name}" for name in names), off
        )
    if not (config.run.output_dir or config.run.eval):
        log.warning("warning: %s, neither weights nor log.txt", NOTHING_KEPT)
    if config.batchformer.bf and config.optim.batch_size == 1:
        log.warning(
            "BatchFormerV2 relates the images of a process's batch: --batch_size 1 gives it nothing to relate"
        )


NOTHING_KEPT = "nothing is saved without --output_dir"


def what_is_kept(config: Config, saved: str) -> str:
    """For the line with which a run leaves: what is on the disk, and how to go on."""
    if config.run.eval:
        return "the evaluation is not finished"
    return f"{saved}; go on with --resume auto" if config.run.output_dir else NOTHING_KEPT


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries may draw from it


def check_operator(device: torch.device) -> None:
    """The attention kernels' own comparison with the reference, before anything is read: nobody
    trains on broken ones.
    """
    try:
        backends.choose(None, device)
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from error


def loader_timeout(config: Config) -> int:
    """Seconds to wait for a batch. In a job the others' exchange fails first, and they name the
    process that waits.
    """
    return config.run.dist_timeout * (1 if world_size() == 1 else 2)


def eval_loader(dataset, config: Config, device: torch.device, bad_images: BadImages) -> DeviceBatches:
    batches = EvalBatches(len(dataset), config.optim.batch_size, rank(), world_size())
    return build_loader(
        dataset,
        batches,
        config.data.num_workers,
        device,
        bad_images,
        replace=False,
        timeout=loader_timeout(config),
    )


def check_data(train, val, config: Config) -> None:
    """The quick part of tools/check_data.py, on the main process. Raises UserError, on all, for
    what would end the run later.
    """
    skip_missing, num_queries = config.data.on_bad_image == "skip", config.transformer.num_queries
    error = broadcast_from_main(quick_check(train, val, skip_missing, num_queries) if is_main() else None)
    if error:
        raise error


def share_gradients(model: nn.Module, config: Config, device: torch.device) -> nn.Module:
    """The model whose gradients are averaged over processes; the model itself if there is one."""
    return model if world_size() == 1 else data_parallel(model, config, device)


def data_parallel(model: nn.Module, config: Config, device: torch.device) -> DistributedDataParallel:
    """The model with an exchange of gradients in its backward; needs a process group."""
    # only then heads are there that no loss reaches
    unused = config.loss.no_aux_loss and config.transformer.with_box_refine
    known = inspect.signature(DistributedDataParallel).parameters
    sync_buffers = (
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    )  # its name before 2.13
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        **{sync_buffers: False},  # equalised once an epoch
        find_unused_parameters=unused,
        gradient_as_bucket_view=True,
    )


def run_facts(config: Config, **datasets) -> dict[str, Any]:
    """What run.json says of a run on data sets, "train" and "val", beside its machine."""
    data = {
        name: {
            "images": str(part.images.resolve()),
            "annotations": str(part.annotations.resolve()),
            "num_images": len(part),
        }
        for name, part in datasets.items()
    }
    return {"flags": config.flags(), "classes": datasets["val"].classes.to_plain(), "data": data}


def evaluation_pictures(dataset, evaluation: Evaluation) -> dict[str, Any]:
    """Pictures by name, for TensorBoard."""
    files = {image_id: dataset.file_of(image_id) for image_id in dataset.image_ids}
    names = {category.id: category.name for category in dataset.classes.categories}
    return detection_pictures(files, dataset.coco.imgToAnns, evaluation.results, names)


def save_tables(folder: Path, evaluation: Evaluation, epoch: int, prefix: str) -> None:
    """Detections in eval/latest.json; precision and recall in eval/latest.pth, and every 50 epochs
    in eval/<epoch>.pth.
    """
    folder.mkdir(exist_ok=True)
    write_results(folder / f"{prefix}latest.json", evaluation)
    for name in ["latest.pth", *([f"{epoch:03}.pth"] if epoch % 50 == 0 else [])]:
        write_atomically(evaluation.tables, folder / f"{prefix}{name}")


def save_predictions(path: Path, evaluation: Evaluation, config: Config) -> None:
    """The detections in COCO's results format, if asked for."""
    if config.run.save_predictions:
        write_results(path, evaluation)
        log.info("%d detections in %s", len(evaluation.results), path)


def write_results(path: Path, evaluation: Evaluation) -> None:
    try:
        path.write_text(json.dumps(evaluation.results))
    except OSError as error:
        raise NotSavedError(f"{path} could not be written ({error.strerror})") from None


if __name__ == "__main__":
    run_as_command(lambda: main(parse_config()))
