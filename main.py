"""Train or evaluate: flags -> Config -> data, model -> epochs.

python main.py --help
"""

from __future__ import annotations

from util.config import Config, check_trainable, parse_config, with_classes
from util.errors import UserError, run_as_command

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and mistakes in flags answer at once.
    CONFIG = run_as_command(parse_config)

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from datasets.splits import TrainingData, evaluation_loader, open_evaluation_data, open_training_data
from datasets.workers import end_workers
from engine import (
    Learner,
    build_learner,
    build_watch,
    check_device,
    evaluate,
    train_one_epoch,
)
from models import build_model
from models.weights import adopt, find_start, load_checkpoint, read_trained
from util.distributed import (
    broadcast_from_main,
    equalise_buffers,
    note,
    process_group,
    rank,
    sum_over_processes,
)
from util.run import (
    BEST,
    EpochSummary,
    History,
    RunFolder,
    StopRequest,
    StopVote,
    TrainingPosition,
    TrainingState,
    announce,
    epoch_title,
    record_start,
    save_evaluation,
    scheduled_names,
    start_logging,
    what_is_kept,
    write_evaluation,
)
from util.run.tensorboard import Board, check_tensorboard, detection_pictures
from util.step.deterministic import explaining_refusals, make_deterministic
from util.step.log import StepLog
from util.step.metrics import EpochSums
from util.step.precision_check import move_to_device
from util.step.random_state import RandomGenerators, seed_everything

log = logging.getLogger("main")


def main(config: Config) -> None:
    """Do what the flags say, in every process of the job.

    Raises:
        UserError: a mistake of the user.
        Preempted: a signal asked the run to exit (util/run/stop.py), and everything is saved.
    """
    # Before anything computes on a GPU: cuBLAS reads its environment once.
    if config.run.deterministic:
        make_deterministic()
    request = StopRequest(what_is_kept(config, "nothing was trained since the start"))
    processes = process_group(config.run.device, config.run.dist_timeout)
    try:
        with request.installed() as stop, processes as device, explaining_refusals():
            # What would stop the run later stops it now, before data is read.
            start_logging(device)
            seed_everything(config.run.seed + rank())
            check_device(config.run, device)
            check_tensorboard(config.run.tensorboard)

            if config.run.eval:
                # Evaluation also takes Hugging Face's layout.
                with RunFolder.open(config, lambda source: read_trained(source, "--resume")) as folder:
                    evaluate_checkpoint(config, device, folder)
            else:
                with RunFolder.open(config) as folder:
                    training = prepare_training(config, device, stop, folder)
                    with contextlib.closing(training.board):
                        training.run()
    finally:
        # An error inside a loop would leave workers to a process that lives on.
        end_workers()


def evaluate_checkpoint(config: Config, device: torch.device, folder: RunFolder) -> None:
    """Evaluate the weights of a checkpoint, and its averaged weights if it has them (--eval)."""
    checkpoint, source = folder.checkpoint, folder.source
    assert checkpoint is not None, "--eval needs --resume"
    # The checkpoint decides the architecture, and the classes of the data.
    config = adopt(config, checkpoint, source)
    announce(config)
    dataset = open_evaluation_data(config, checkpoint, source)
    config = with_classes(config, dataset.classes)
    batches = evaluation_loader(dataset, config, device)
    record_start(folder.path, config, device, {"checkpoint": source}, val=dataset)

    model, criterion, postprocessors = build_model(config, pretrained=False)
    move_to_device(model, device, config.run)
    weights = {"": checkpoint}
    if "ema" in checkpoint:
        # Written to eval_ema.pth and predictions_ema.json.
        weights["_ema"] = checkpoint["ema"]
    for suffix, state in weights.items():
        # In evaluation no weight may be missing.
        load_checkpoint(model, state, source, "averaged weights: " if suffix else "", may_lack=())
        evaluation = evaluate(model, criterion, postprocessors, batches, dataset, config.run)
        evaluation.print_metrics()
        if folder.path:
            # Another run may have taken the folder over while this process was suspended.
            folder.check()
            tables, results = evaluation.tables, evaluation.results
            write_evaluation(folder.path, tables, results, suffix, config.run.save_predictions)
    if folder.path:
        log.info("the evaluation is in %s", folder.path / "eval.pth")


def prepare_training(config: Config, device: torch.device, stop: StopRequest, folder: RunFolder) -> Training:
    """Four stages: folder (where it starts), data, learner, state. The result holds no checkpoint."""
    # Folder: the checkpoint that the run resumes, or the weights that it starts from.
    start = find_start(config, folder.checkpoint, folder.source)
    check_trainable(start.config)
    announce(start.config)

    # Data: both splits and the classes.
    data = open_training_data(start.config, device, folder.checkpoint, folder.source)
    config = with_classes(start.config, data.classes)

    # Learner: the detector with its weights, its losses and its optimiser.
    learner = build_learner(config, device, start, data.classes)

    # State: everything that an interrupted run restores.
    training = Training(config, device, stop, folder, data, learner)
    training.restore()
    return training


class Training:
    """The epochs of a run; `state` is what survives an interruption. Call restore(), then run()."""

    def __init__(
        self,
        config: Config,
        device: torch.device,
        stop: StopRequest,
        folder: RunFolder,
        data: TrainingData,
        learner: Learner,
    ) -> None:
        self.config, self.device, self.folder, self.data, self.learner = config, device, folder, data, learner
        self.stop, self.votes = stop, StopVote(stop)
        # What an interrupted run restores, besides the learner.
        self.position, self.sums = TrainingPosition(), EpochSums()
        self.history = History(folder.path / "log.txt" if folder.path else None)
        self.summary = EpochSummary(config.optim.epochs, config.run.output_dir)
        self.watch = build_watch(config, learner)
        self.state = TrainingState(
            config,
            data.classes,
            {"train": data.train.identity(), "val": data.val.identity()},
            learner.model,
            learner.updater,
            learner.schedule,
            self.position,
            shared={"history": self.history},
            own={
                "random": RandomGenerators(device),
                "means": self.sums,
                "not_finite": self.watch,
                "bad_images": data.bad_images,
            },
        )
        # True if the rest of an interrupted epoch has the same batches as without the interruption.
        self.exact = True
        self.board = Board(None)
        # The checkpoint of the epoch, once its training is saved.
        self.saved = ""

    def restore(self) -> None:
        """Restore the checkpoint's state, and make the folder this run's own."""
        folder = self.folder
        # The order matters: a kill before `begin` must leave the earlier run as it was.
        self.exact = self.state.restore(folder.checkpoint, folder.source)
        if self._is_finished() and not folder.resumes:
            raise UserError(
                f"--resume {folder.source} has trained {self.position.epoch} epochs already; "
                f"raise --epochs {self.config.optim.epochs}"
            )
        epoch_restarts = self._handle_changed_data()
        folder.begin(self.history)

        # TensorBoard continues after the images that the checkpoint knows.
        if self.config.run.tensorboard and folder.path:
            self.board = Board(folder.path / "tensorboard", self._images_trained(), self._first_epoch())
        # A start that trains nothing leaves the record as it is.
        if not self._is_finished():
            start = asdict(self.position) | {"checkpoint": folder.source}
            train, val = self.data.train, self.data.val
            record_start(folder.path, self.config, self.device, start, train=train, val=val)

        if epoch_restarts:
            self._save(must=True)
            # After the save: a kill before it must leave a checkpoint to resume from.
            folder.set_aside_after(self.position)

    def run(self) -> None:
        """Train and evaluate the epochs that are left."""
        train, val = len(self.data.train), len(self.data.val)
        log.info("%d trainable parameters, %d + %d images", self.learner.num_parameters, train, val)
        epochs = self.config.optim.epochs
        if self._is_finished():
            trained = "%d epochs have been trained and evaluated, --epochs is %d: nothing is left to do"
            log.info(trained, self.position.epoch, epochs)
            return
        self.summary.start(whole_epoch=self.position.images == 0 and self.history.unfinished is None)
        for epoch in range(self._first_epoch(), epochs):
            if self.history.unfinished is None:
                self._train(epoch)
            else:
                # The run was interrupted in the evaluation.
                log.info("epoch %d is trained already; it is evaluated now", epoch)
            self._evaluate(epoch)
        # Save again, now with the results of the last evaluation.
        self._save(must=True)
        self.summary.finish(self.history.best)

    def _first_epoch(self) -> int:
        """The epoch to continue with: an epoch that is trained and not evaluated is not finished."""
        if self.history.unfinished is not None:
            return self.position.epoch - 1
        return self.position.epoch

    def _is_finished(self) -> bool:
        return self._first_epoch() >= self.config.optim.epochs

    def _train(self, epoch: int) -> None:
        data, learner, run = self.data, self.learner, self.config.run
        # Order and augmentation depend on the epoch.
        data.order.epoch = data.train.epoch = epoch
        data.order.first_image = self.position.images
        first_step = self.position.images // data.order.images_per_step if self.exact else 0
        steps = StepLog(
            epoch,
            first_step + len(data.batches),
            self.sums,
            self.watch,
            learner.criterion.weight_dict,
            first_step=first_step,
            title=epoch_title(epoch, self.config.optim.epochs),
            log_every=run.log_every,
            on_step=self._after_step,
            on_window=self._after_window,
        )

        # Within this block a signal is only noted. `_after_step`, or the end of the block, acts on it.
        with self.stop.deferred():
            stats = train_one_epoch(
                learner.wrapped, learner.criterion, data.batches, learner.updater, steps, run.amp
            )
            learner.schedule.step()
            # Each process has its own statistics of batch norm until now.
            equalise_buffers(learner.model)

            # Save before the evaluation, so that a kill repeats the evaluation only.
            self.sums.reset()
            self.position.epoch, self.position.images, self.exact = epoch + 1, 0, True
            entries = stats | self._skipped()
            self.history.unfinished = {f"train_{name}": value for name, value in entries.items()}
            optim = self.config.optim
            self.saved = self._save(scheduled_names(epoch, optim.lr_drop, optim.lr_drop_epochs))
            self.stop.saved = what_is_kept(self.config, f"epoch {epoch} is saved, its evaluation is next")
            # All processes must leave together, or the others would wait for this one.
            if self.votes.agreed_now():
                self.stop.leave(self.stop.saved)

    def _after_step(self, steps: int) -> None:
        """Save if it is time to; save and exit if any process was asked to."""
        order = self.data.order
        self.position.images += order.images_per_step
        # The vote of the previous step: waiting for this one would block every step.
        leave = self.votes.agreed()
        every = self.config.run.save_every
        # The last step of an epoch is saved with the end of the epoch.
        due = every and steps % every == 0 and self.position.images < order.images
        if leave or due:
            # A checkpoint must not hold a step whose loss is unknown.
            self.watch.check()
            self._save(must=leave)
        if leave:
            done = f"after {self.position.images} of {order.images} images"
            self.stop.leave(what_is_kept(self.config, f"saved in epoch {self.position.epoch}, {done}"))

    def _after_window(self, means: Mapping[str, float]) -> None:
        images = self._images_trained() + self.data.order.images_per_step
        self.board.window(means, self.learner.updater.rates(), images)

    def _images_trained(self) -> int:
        return self.position.epoch * self.data.order.images + self.position.images

    def _evaluate(self, epoch: int) -> None:
        results: dict[str, Any] = {}
        last = epoch + 1 == self.config.optim.epochs
        if last or (epoch + 1) % self.config.run.eval_every == 0:
            results = self._evaluate_weights(self.learner.model, epoch, "")
            averaged = self.learner.updater.averaged
            if averaged:
                # Buffers are not averaged: copy the model's.
                averaged.take_buffers()
                results |= self._evaluate_weights(averaged.model, epoch, "ema_")
        results |= {"epoch": epoch, "n_parameters": self.learner.num_parameters}
        line = self.history.finish_epoch(results)
        self.board.epoch(line)
        self.summary.epoch(line, self.history.best, self.saved)

    def _evaluate_weights(self, model: nn.Module, epoch: int, prefix: str) -> dict[str, Any]:
        """Evaluate `model`, the averaged one with the prefix "ema_", and return its entries of log.txt."""
        data, run = self.data, self.config.run
        criterion, postprocessors = self.learner.criterion, self.learner.postprocessors
        title = "evaluate the averaged weights" if prefix else "evaluate"
        evaluation = evaluate(model, criterion, postprocessors, data.val_batches, data.val, run, title)
        evaluation.print_metrics()
        is_best = self.history.is_best(*evaluation.best_by, epoch, prefix.strip("_") or "model")
        if not prefix:
            self.board.pictures(lambda: detection_pictures(data.val, evaluation.results), epoch)
        if self.folder.path:
            # The checkpoint of this epoch is written already; the best one is another name of it.
            self.folder.check()
            if is_best:
                self.folder.checkpoints.name_newest(BEST)
            tables, results = evaluation.tables, evaluation.results
            save_evaluation(self.folder.path, tables, results, epoch, prefix, run.save_predictions)
        return {f"test_{prefix}{name}": value for name, value in evaluation.stats.items()}

    def _skipped(self) -> dict[str, int]:
        """Numbers of skipped steps and image files so far, for runs that skip them."""
        skipped = {}
        if self.config.run.on_nan == "skip":
            skipped["skipped_steps"] = self.watch.skipped
        if self.config.data.on_bad_image == "skip":
            # A file counts once for every process that met it.
            count = torch.tensor(self.data.bad_images.count)
            skipped["bad_images"] = int(sum_over_processes(count))
        return skipped

    def _save(self, also: list[str] | None = None, must: bool = False) -> str:
        """Write a checkpoint on the main process, and give its path there. Every process must call."""
        if not self.config.run.output_dir:
            return ""
        note("saving after %d images of epoch %d", self.position.images, self.position.epoch)
        # Random states and sums are of each process, so all of them take part.
        content = self.state.gather()
        saved = self.folder.save(content, self.position, also or [], must=must) if content else ""
        # All processes wait until the file is written.
        broadcast_from_main(None)
        return saved

    def _handle_changed_data(self) -> bool:
        """Adapt to data that are not the checkpoint's; whether an interrupted epoch starts again.

        Nobody knows which of the present images the interrupted epoch has seen, so it takes all.
        """
        if self.state.other_validation:
            log.warning("resume: results before and after can't be compared; %s is chosen again", BEST)
            self.history.best = None
        if not self.state.other_images or self.position.images == 0:
            return False
        log.warning(
            "resume: epoch %d starts again with the present images, after %d of the earlier ones",
            self.position.epoch,
            self.position.images,
        )
        self.position.images, self.exact = 0, True
        self.sums.reset()
        # Gradients of an unfinished accumulation.
        self.learner.updater.optimizer.zero_grad()
        return True


if __name__ == "__main__":
    run_as_command(lambda: main(CONFIG))
