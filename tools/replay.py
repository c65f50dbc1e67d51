"""Repeat a step whose loss or gradient was not finite, and name the first module that went wrong.

A run saves such a step as nonfinite_<epoch>_<step>_process<n>.pth in its --output_dir: batch,
weights, random state and flags.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

# a script sees only its own folder, not the project
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine import training_loss
from models import build_model
from util.checkpoint import load_state, read_checkpoint
from util.config import Config, make_parser
from util.distributed.processes import choose_device
from util.errors import UserError, run_as_command
from util.nested_tensor import NestedTensor
from util.step.not_finite import Rerun, run_again
from util.step.precision_check import move_to_device
from util.step.random_state import set_torch_state

EXAMPLE = "python tools/replay.py exps/run/nonfinite_0003_000120_process0.pth"


def parser() -> argparse.ArgumentParser:
    made = make_parser("tools/replay.py", __doc__, EXAMPLE)
    made.add_argument("dump", help="the file that the run saved")
    text = "cuda, cpu, ...; default: cuda where there is one. The same bits as in the run only on the "
    text += "device of the run"
    made.add_argument("--device", default="", help=text)
    return made


def main(argv: Sequence[str]) -> int:
    """Exit status 0 if the step went wrong again, 1 if it was finite this time."""
    args = parser().parse_args(argv)
    step = read_step(args.dump)
    device = choose_device(args.device)
    describe(step)
    rerun = replay(step, device, args.dump)
    norm = "not computed" if math.isnan(rerun.norm) else rerun.norm
    print(f"again:    loss {rerun.total}, gradient norm {norm}")
    if math.isfinite(rerun.total) and math.isfinite(rerun.norm):
        print(f"not reproduced on {device}: this time the step is finite")
        return 1
    print(f"first wrong: {rerun.module}")
    return 0


def read_step(path: str) -> dict[str, Any]:
    """What a run saved. Raises UserError if the file is something else."""
    step = read_checkpoint(path, flag="dump")
    missing = {"images", "mask", "targets", "random", "model", "args", "scale", "losses"} - set(step)
    if missing:
        names = ", ".join(sorted(missing))
        raise UserError(f"dump {path} is no step that a run saved: it lacks {names}; name a nonfinite_*.pth")
    return step


def describe(step: Mapping[str, Any]) -> None:
    """Print what the run computed, and the images."""
    wrong = ", ".join(name for name, value in step["losses"].items() if not math.isfinite(value))
    print(f"epoch {step['epoch']}, step {step['step']}, process {step['process']} of {step['processes']}")
    print(f"recorded: loss {step['loss']}, gradient norm {step['grad_norm']}; terms {wrong or 'all finite'}")

    # An image with NaN or a box of no size is a usual cause.
    batch = zip(step["image_ids"], step["images"], step["mask"], step["targets"], strict=True)
    for image_id, image, mask, target in batch:
        height, width = (~mask[:, 0]).sum().item(), (~mask[0]).sum().item()
        boxes = target["boxes"]
        finite = "" if torch.isfinite(image).all() else ", NOT FINITE"
        line = f"  image {image_id}: {height} x {width}{finite}; {len(boxes)} boxes"
        if len(boxes):
            line += f", smallest side {boxes[:, 2:].min().item():.2g} of the image"
        print(line)


def replay(step: Mapping[str, Any], device: torch.device, source: str) -> Rerun:
    """The step once more: same weights, batch, random state, precision and scale of the gradient."""
    flags = {**step["args"], "backbone_weights": "none", "resume": "", "eval": False}
    config = Config().with_flags(flags)
    # the weights come from the file
    model, criterion, _ = build_model(config)
    load_state(model, {"model": step["model"]}, source)
    move_to_device(model.train(), device, config.run)
    # the batch, as the loader would give it
    images = NestedTensor(step["images"], step["mask"]).to(device)
    targets = [{name: value.to(device) for name, value in target.items()} for target in step["targets"]]
    loss_of = training_loss(model, criterion, config.run.amp)
    # last: what is above draws random numbers too
    set_torch_state(step["random"], device)
    return run_again(model, lambda: loss_of(images, targets), step["scale"])


if __name__ == "__main__":
    run_as_command(lambda: sys.exit(main(sys.argv[1:])))
