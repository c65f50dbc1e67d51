"""Train or evaluate: flags -> Config -> data, model -> epochs.

    python main.py --help
"""

from __future__ import annotations

import datetime
import json
import logging
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from datasets import build_dataset
from datasets.coco_eval import figures_table
from datasets.loader import Prefetcher, build_loader
from datasets.samplers import EvalBatches, TrainBatches
from engine import Evaluation, evaluate, train_one_epoch
from models import build_model
from models.ops import backends
from util.checkpoint import load_state, random_state, read_checkpoint, restore_training, save_training, write_atomically
from util.config import Config, check_trainable, parse_config
from util.distributed import equalise_buffers, gather_on_main, is_main, process_group, rank, world_size
from util.errors import UserError, run_as_command
from util.optim import build_optimizer, build_schedule

log = logging.getLogger("main")


def main(config: Config) -> None:
    """Do what the flags say, on all processes that the environment says there are."""
    with process_group(config.run.device) as device:
        start_logging()
        announce(config, device)
        seed_everything(config.run.seed + rank())
        check_operator(device)
        (evaluate_only if config.run.eval else train)(config, device)


def check_operator(device: torch.device) -> None:
    """The attention kernels' own comparison with the reference, before anything is read: nobody trains on broken ones."""
    try:
        backends.choose(None, device)
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from error


def evaluate_only(config: Config, device: torch.device) -> None:
    output_dir = prepare_output(config)
    dataset = build_dataset("val", config)
    model, criterion, postprocessors = build_model(config)
    load_checkpoint(model, config)
    model.to(device)
    batches = eval_loader(dataset, config, device)
    evaluation = evaluate(model, criterion, postprocessors, batches, dataset.coco, config.run.log_every)
    report(evaluation, output_dir, config)
    if output_dir and is_main():
        write_atomically(evaluation.tables, output_dir / "eval.pth")


def train(config: Config, device: torch.device) -> None:
    check_trainable(config)
    dataset, val_dataset = build_dataset("train", config), build_dataset("val", config)
    order = TrainBatches(len(dataset), config.optim.batch_size, rank(), world_size(), config.run.seed)
    batches = build_loader(dataset, order, config.data.num_workers, device)
    val_batches = eval_loader(val_dataset, config, device)

    model, criterion, postprocessors = build_model(config)
    checkpoint = load_checkpoint(model, config)
    model.to(device)
    num_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info("%d trainable parameters, %d + %d images", num_parameters, len(dataset), len(val_dataset))
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, config)
    wrapped = share_gradients(model, config, device)
    start = restore_training(checkpoint, optimizer, schedule, config, rank())
    if start >= config.optim.epochs:
        raise UserError(f"--resume {config.run.resume} has trained {start} epochs already; raise --epochs {config.optim.epochs}")

    output_dir = prepare_output(config)
    started = time.perf_counter()
    for epoch in range(start, config.optim.epochs):
        order.epoch = dataset.epoch = epoch
        stats = train_one_epoch(
            wrapped, criterion, batches, optimizer, device, epoch,
            clip_max_norm=config.optim.clip_max_norm, accumulate_steps=config.optim.accumulate_steps,
            log_every=config.run.log_every, dump_dir=output_dir,
        )  # fmt: skip
        schedule.step()
        equalise_buffers(model)
        save_epoch(output_dir, model, optimizer, schedule, epoch, config, device)
        line = {f"train_{name}": value for name, value in stats.items()}
        if (epoch + 1) % config.run.eval_every == 0 or epoch + 1 == config.optim.epochs:
            evaluation = evaluate(model, criterion, postprocessors, val_batches, val_dataset.coco, config.run.log_every)
            report(evaluation, output_dir, config)
            save_tables(output_dir, evaluation, epoch)
            line |= {f"test_{name}": value for name, value in evaluation.stats.items()}
        append_log(output_dir, line | {"epoch": epoch, "n_parameters": num_parameters})
    log.info("training time %s", datetime.timedelta(seconds=round(time.perf_counter() - started)))


def start_logging() -> None:
    """The main process tells everything, the others their warnings, each with its number."""
    form = "%(message)s" if world_size() == 1 else f"[{rank()}] %(message)s"
    logging.basicConfig(stream=sys.stdout, level=logging.INFO if is_main() else logging.WARNING, format=form, force=True)


def announce(config: Config, device: torch.device) -> None:
    log.info("flags: %s", json.dumps(config.flags()))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    log.info("device: %s (%s), %d process(es), torch %s", device, name, world_size(), torch.__version__)
    if config.batchformer.bf and config.optim.batch_size == 1:
        log.warning("BatchFormerV2 relates the images of a process's batch: --batch_size 1 gives it nothing to relate")


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries may draw from it


def eval_loader(dataset, config: Config, device: torch.device) -> Prefetcher:
    batches = EvalBatches(len(dataset), config.optim.batch_size, rank(), world_size())
    return build_loader(dataset, batches, config.data.num_workers, device)


def load_checkpoint(model: nn.Module, config: Config) -> dict | None:
    """Load the weights of --resume and say what fitted; gives the checkpoint. Raises UserError for another architecture."""
    if not config.run.resume:
        return None
    checkpoint = read_checkpoint(config.run.resume)
    result = load_state(model, checkpoint, config.run.resume)
    log.info("%s", result)
    result.require_same_architecture()
    return checkpoint


def share_gradients(model: nn.Module, config: Config, device: torch.device) -> nn.Module:
    """The model whose gradients are averaged over processes; the model itself if there is one."""
    if world_size() == 1:
        return model
    # only then heads are there that no loss reaches
    unused = config.loss.no_aux_loss and config.transformer.with_box_refine
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=False,  # equalised once an epoch
        find_unused_parameters=unused,
        gradient_as_bucket_view=True,
    )


def prepare_output(config: Config) -> Path | None:
    """The output folder, if any. An earlier run in it that is not being resumed is moved into a folder beside it, never lost."""
    if not config.run.output_dir:
        return None
    folder = Path(config.run.output_dir)
    if is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            keeps = config.run.resume or config.run.eval
            if not keeps:
                _move_earlier_run(folder)
            (folder / ".write_test").touch()
            (folder / ".write_test").unlink()
        except OSError as error:
            raise UserError(f"--output_dir {folder} can't be written to ({error.strerror}); choose another") from None
    return folder


def _move_earlier_run(folder: Path) -> None:
    files = [*folder.glob("checkpoint*.pth"), *folder.glob("log.txt"), *folder.glob("eval"), *folder.glob("eval.pth")]
    if not files:
        return
    number = next(i for i in range(1, 10**6) if not (folder / f"earlier-{i}").exists())
    earlier = folder / f"earlier-{number}"
    earlier.mkdir()
    for file in files:
        file.rename(earlier / file.name)
    log.warning("%s held an earlier run; it is now in %s (to go on with it, use --resume)", folder, earlier)


def save_epoch(output_dir: Path | None, model: nn.Module, optimizer, schedule, epoch: int, config: Config, device) -> None:
    """checkpoint.pth after every epoch; checkpoint<epoch>.pth too before a drop of the rates and every 5 epochs."""
    if not output_dir:
        return
    states = gather_on_main(random_state(device))
    if not is_main():
        return
    drops = config.optim.lr_drop_epochs
    before_drop = epoch + 1 in drops if drops else (epoch + 1) % config.optim.lr_drop == 0
    paths = [output_dir / "checkpoint.pth"]
    if before_drop or (epoch + 1) % 5 == 0:
        paths.append(output_dir / f"checkpoint{epoch:04}.pth")
    save_training(paths, model, optimizer, schedule, epoch, config, states)


def save_tables(output_dir: Path | None, evaluation: Evaluation, epoch: int) -> None:
    """Precision and recall in eval/latest.pth, and every 50 epochs in eval/<epoch>.pth."""
    if not output_dir or not is_main():
        return
    (output_dir / "eval").mkdir(exist_ok=True)
    for name in ["latest.pth", *([f"{epoch:03}.pth"] if epoch % 50 == 0 else [])]:
        write_atomically(evaluation.tables, output_dir / "eval" / name)


def report(evaluation: Evaluation, output_dir: Path | None, config: Config) -> None:
    """Show the twelve figures, and save the detections if asked to."""
    log.info("%s", figures_table(evaluation.stats["coco_eval_bbox"]))
    if config.run.save_predictions and output_dir and is_main():
        path = output_dir / "predictions.json"
        path.write_text(json.dumps(evaluation.results))
        log.info("%d detections in %s", len(evaluation.results), path)


def append_log(output_dir: Path | None, line: dict) -> None:
    if output_dir and is_main():
        with open(output_dir / "log.txt", "a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    run_as_command(lambda: main(parse_config()))
