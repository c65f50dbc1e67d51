"""What a run prints, beside the progress of its loops: settings at the start, a line after each epoch."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from util.config import Config, as_typed
from util.distributed.processes import is_main, rank, world_size
from util.draw.curves import FIGURE_KEYS, percent
from util.run.checkpoints import BEST
from util.run.record import device_name
from util.step.progress import duration

log = logging.getLogger(__name__)

NOTHING_KEPT = "nothing is saved without --output_dir"


def start_logging(device: torch.device) -> None:
    """Print everything of the main process, and the warnings of the others with their rank."""
    form, level = "%(message)s", logging.INFO
    if world_size() > 1:
        form = f"[{rank()}] {form}"
    # what the others would say is the same
    if not is_main():
        level = logging.WARNING
    logging.basicConfig(stream=sys.stdout, level=level, format=form, force=True)
    # a line that can't be written, on a full disk for example, ends no run
    logging.raiseExceptions = False
    name = device_name(device)
    log.info("device: %s (%s), %d process(es), torch %s", device, name, world_size(), torch.__version__)


def announce(config: Config) -> None:
    """Print the flags that differ from their defaults, and warn about those that can't work."""
    flags = as_typed(config.non_default_flags())
    log.info("flags that differ from their defaults: %s", flags or "none")
    if names := config.without_effect():
        off = "--bf 0"
        if config.run.eval:
            off = "evaluation does without it unless --eval_bf is given"
        log.info(
            "without effect: %s; BatchFormerV2 is off (%s)", ", ".join(f"--{name}" for name in names), off
        )
    # hours later it would be too late to notice
    if not (config.run.output_dir or config.run.eval):
        log.warning("warning: %s, neither weights nor log.txt", NOTHING_KEPT)
    related = config.optim.batch_size
    if config.batchformer.bf_across_processes:
        related *= world_size()
    if config.batchformer.bf and related == 1:
        log.warning(
            "warning: BatchFormerV2 relates the images of a process's batch: "
            "--batch_size 1 gives it nothing to relate"
        )


def what_is_kept(config: Config, saved: str) -> str:
    """The part of the last line that says what is on the disk, and how to resume."""
    if config.run.eval:
        return "the evaluation is not finished"
    if not config.run.output_dir:
        return NOTHING_KEPT
    return f"{saved}; start again with --resume auto"


def epoch_title(epoch: int, epochs: int) -> str:
    """The name of an epoch: its number as in log.txt, from 0, and its place among all."""
    return f"epoch {epoch} ({epoch + 1}/{epochs})"


class EpochSummary:
    """Prints a line after each epoch and the result after the last. The main process alone prints.

    Args:
        epochs: number of epochs of the run (--epochs).
        folder: --output_dir, or "".
    """

    def __init__(self, epochs: int, folder: str) -> None:
        self._epochs, self._folder = epochs, folder
        self.start(whole_epoch=True)

    def start(self, whole_epoch: bool) -> None:
        """Start the clocks. whole_epoch: the first epoch is trained and evaluated from its beginning."""
        self._whole_epoch = whole_epoch
        self._run_start = self._epoch_start = time.perf_counter()

    def epoch(self, line: Mapping[str, Any], best: Mapping[str, Any] | None, saved: str) -> None:
        """Print the result of an epoch.

        Args:
            line: the epoch's entries of log.txt.
            best: of the best evaluation so far: its metric first, then epoch and weights.
            saved: the checkpoint that was written after the training of this epoch, or "".
        """
        # both the training and the evaluation of the epoch
        now = time.perf_counter()
        seconds, self._epoch_start = now - self._epoch_start, now

        # an epoch without an evaluation has no results of one
        epoch = line["epoch"]
        fields = [f"{epoch_title(epoch, self._epochs)} done in {duration(seconds)}"]
        if "train_loss" in line:
            fields.append(f"loss {line['train_loss']:.4f}")
        if "test_loss" in line:
            fields.append(f"validation loss {line['test_loss']:.4f}")
            for prefix, key in FIGURE_KEYS.items():
                if f"test_{key}" in line:
                    fields.append(f"{prefix}AP {percent(line[f'test_{key}'][0])}")
        if "test_PQ_all" in line:
            fields.append(f"PQ {percent(line['test_PQ_all']['pq'])}")
        if best:
            fields.append(f"best {_metric(best)} (epoch {best['epoch']})")
        left = self._epochs - epoch - 1
        # a part of an epoch says nothing about a whole one
        if left > 0 and self._whole_epoch:
            fields.append(f"about {duration(seconds * left)} left")
        self._whole_epoch = True
        if saved:
            fields.append(f"saved {saved}")
        log.info("%s", "  ".join(fields))

    def finish(self, best: Mapping[str, Any] | None) -> None:
        """Print the result of the run, and the commands that follow."""
        log.info("training time %s", duration(time.perf_counter() - self._run_start))
        if not (best and self._folder):
            return
        # the averaged ones were evaluated too
        weights = ", averaged weights" if best["weights"] == "ema" else ""
        path = Path(self._folder) / BEST
        log.info("best %s (epoch %d%s): %s", _metric(best), best["epoch"], weights, path)
        log.info("next: python tools/report.py %s", self._folder)
        log.info("      python tools/predict.py --resume %s <images> --output_dir predictions", path)


def _metric(best: Mapping[str, Any]) -> str:
    metric, value = next(iter(best.items()))
    return f"{metric} {percent(value)}"
