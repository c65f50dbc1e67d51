"""Run a step again whose loss or gradient was not finite, and name the first module that went
wrong.

A run saves such a step as nonfinite_<epoch>_<step>_process<n>.pth in its --output_dir: batch,
weights, random state and flags.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # a script sees only its own folder, not the project
from engine import training_loss
from models import build_model
from util.checkpoint import load_state, read_checkpoint
from util.config import Config, make_parser
from util.distributed.processes import choose_device
from util.errors import UserError, run_as_command
from util.nested_tensor import NestedTensor
from util.step.not_finite import Rerun, run_again
from util.step.precision_check import check_precision
from util.step.random_state import set_torch_state

EXAMPLE = "python tools/replay.py exps/run/nonfinite_0003_000120_process0.pth"


def main(argv: Sequence[str]) -> int:
    """Exit status 0 if the step went wrong again, 1 if it was finite this time."""
    parser = make_parser("tools/replay.py", __doc__, EXAMPLE)
    parser.add_argument("dump", help="the file that the run saved")
    where = (
        "cuda, cpu, ...; default: cuda where there is one. The same bits as in the run only on "
        "the device of the run"
    )
    parser.add_argument("--device", default="", help=where)
    args = parser.parse_args(argv)
    step = read_step(args.dump)
    device = choose_device(args.device)
    print("\n".join(describe(step)))
    rerun = replay(step, device, args.dump)
    print(
        f"again:    loss {rerun.total}, gradient norm "
        f"{'not computed' if math.isnan(rerun.norm) else rerun.norm}"
    )
    reproduced = not math.isfinite(rerun.total) or not math.isfinite(rerun.norm)
    print(
        f"first wrong: {rerun.module}"
        if reproduced
        else f"not reproduced on {device}: this time the step is finite"
    )
    return 0 if reproduced else 1


def read_step(path: str) -> dict[str, Any]:
    """What a run saved. Raises UserError if the file is something else."""
    step = read_checkpoint(path, flag="dump")
    lacking = {"images", "mask", "targets", "random", "model", "args", "scale", "losses"} - set(step)
    if lacking:
        raise UserError(
            f"dump {path} is no step that a run saved: it lacks {', '.join(sorted(lacking))}; name "
            f"a nonfinite_*.pth"
        )
    return step


def describe(step: Mapping[str, Any]) -> list[str]:
    """What the run saw."""
    wrong = ", ".join(name for name, value in step["losses"].items() if not math.isfinite(value))
    lines = [
        f"epoch {step['epoch']}, step {step['step']}, process {step['process']} of {step['processes']}",
        f"recorded: loss {step['loss']}, gradient norm {step['grad_norm']}; terms {wrong or 'all finite'}",
    ]
    for image_id, image, mask, target in zip(
        step["image_ids"], step["images"], step["mask"], step["targets"], strict=True
    ):
        height, width = (~mask[:, 0]).sum().item(), (~mask[0]).sum().item()
        finite = "" if torch.isfinite(image).all() else ", NOT FINITE"
        boxes = target["boxes"]
        smallest = f", smallest side {boxes[:, 2:].min().item():.2g} of the image" if len(boxes) else ""
        lines.append(f"  image {image_id}: {height} x {width}{finite}; {len(boxes)} boxes{smallest}")
    return lines


def replay(step: Mapping[str, Any], device: torch.device, source: str) -> Rerun:
    """The step once more: same weights, batch, random state, precision and scale of the gradient."""
    config: Config = Config().with_flags(
        {**step["args"], "backbone_weights": "none", "resume": "", "eval": False}
    )
    model, criterion, _ = build_model(config)
    load_state(model, {"model": step["model"]}, source)
    check_precision(model.to(device).train(), config.run.amp)
    images = NestedTensor(step["images"], step["mask"]).to(device)
    targets = [{name: value.to(device) for name, value in target.items()} for target in step["targets"]]
    loss_of = training_loss(model, criterion, config.run.amp)
    set_torch_state(step["random"], device)
    return run_again(model, lambda: loss_of(images, targets), step["scale"])


if __name__ == "__main__":
    run_as_command(lambda: sys.exit(main(sys.argv[1:])))
