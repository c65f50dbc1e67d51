"""Write a detector as one file that runs without this project, and check that it detects the same.

The file takes bytes of RGB images of any size and gives boxes in pixels: .onnx for ONNX Runtime, OpenVINO
and others, .pt2 for PyTorch (torch.export). With --verify the checkpoint and the file detect on the same
images. Where they differ, the program ends with an error, and the file does not get its name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# a script sees only its own folder, not the project
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from util.config import add_detector_flags, add_weights_flag, detector_flags, make_parser
from util.errors import UserError, run_as_command

EXAMPLE = "python tools/export.py --resume exps/run/checkpoint.pth --output model.onnx --verify data/coco"
AMP = {"float32": "off", "float16": "fp16", "bfloat16": "bf16"}


def parser() -> argparse.ArgumentParser:
    made = make_parser("tools/export.py", __doc__, EXAMPLE)
    add = made.add_argument
    text = "the checkpoint, published or ours: a path or an https address"
    add("--resume", "--checkpoint", required=True, help=text)
    add("--output", type=Path, required=True, help="the file to write: .onnx or .pt2")
    text = "of products; locations and boxes stay float32 in all"
    add("--precision", default="float32", choices=AMP, help=text)
    add("--opset", type=int, default=18, help="version of ONNX's operators, from 18 to 23")
    add(
        "--raw", action="store_true", help="give logits and boxes of all queries, not the 100 best detections"
    )
    text = "a data set in COCO's layout: compare the file with the checkpoint on its validation images"
    add("--verify", metavar="FOLDER", help=text)
    add("--images", type=int, default=500, help="of --verify: how many, chosen evenly")
    text = "of --verify: images at once, padded to the largest of them"
    add("--batch_size", type=int, default=1, help=text)
    text = "of --verify: what runs the file; default: onnxruntime, torch for .pt2"
    add("--runtime", default="", choices=("onnxruntime", "openvino", "torch"), help=text)
    add_weights_flag(made)
    add_detector_flags(made)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the flags say. Raises UserError."""
    args = parser().parse_args(argv)
    if args.images < 1 or args.batch_size < 1:
        raise UserError("--images and --batch_size must be at least 1")
    # imported here so that --help needs no torch
    from models import load_detector
    from models.export.runtime import runtime_of
    from models.export.write import check_output, write
    from tools.exported.verify import open_images, verify
    from util.checkpoint import is_exported

    amp = AMP[args.precision]
    check_output(args.output, args.opset, amp)
    if is_exported(args.resume):
        raise UserError(f"--resume {args.resume} was exported already; give the checkpoint")
    if args.verify:
        runtime_of(args.output, args.runtime)
    detector = load_detector(
        args.resume,
        device="cpu",
        weights=args.weights,
        batch_size=args.batch_size,
        **detector_flags(args),
    )
    images = open_images(args.verify, detector, args.images) if args.verify else None

    # it gets its name when it has passed
    path = args.output
    if images:
        path = path.with_name(f"{path.stem}.unverified{path.suffix}")
    print(f"exporting {args.resume}, which takes a minute or two", flush=True)
    write(detector, path, amp=amp, raw=args.raw, opset=args.opset)
    if images:
        verify(detector, path, images, args.runtime)
        path.replace(args.output)
    print(f"{args.output}: {args.output.stat().st_size / 2**20:.1f} MiB in {args.precision}")


if __name__ == "__main__":
    run_as_command(main)
