"""Every architecture of configs/ as an exported file, at full width, compared with its checkpoint.

    python -m tests.faults.export_published

Published weights can't be had everywhere, so these are generated (tests/detected.py). A file goes through
the gate of tools/export.py twice, with single images and with three of different sizes in a batch.
"""

from __future__ import annotations

import argparse
import re
import shlex
import tempfile
import time
from pathlib import Path

from models import load_detector
from tests.detected import write_checkpoint, write_detected
from tests.helpers import ROOT, SMALL_IMAGES
from tools import export
from tools.exported.verify import open_images, verify
from util.class_map import COCO_CLASSES

# small, or 200 images take hours; two-stage has enough proposals of them
IMAGES = [*SMALL_IMAGES, "--eval_size", "192", "--max_size", "320"]
SIZES = [(384, 256), (256, 384), (320, 320), (640, 240), (200, 300)]  # width, height


def architectures() -> dict[str, list[str]]:
    """The flags that configs/ give to main.py, and those of a two-stage detector with masks, by name."""
    found = {}
    for path in sorted((ROOT / "configs").glob("r*.sh")):
        line = re.search(r"main\.py --output_dir \S+ (.*)\"\$@\"", path.read_text())
        assert line is not None
        found[path.stem] = shlex.split(line[1])
    last = next(name for name in found if name.endswith("two_stage"))
    return {**found, f"{last}_masks": [*found[last], "--masks"]}


def check(name: str, flags: list[str], folder: Path, args: argparse.Namespace) -> None:
    """Export one, and compare twice."""
    print(f"\n== {name} {' '.join(flags)}", flush=True)
    checkpoint, path = folder / "checkpoint.pth", folder / f"model{args.suffix}"
    write_checkpoint(checkpoint, [*IMAGES, "--backbone_weights", "none", *flags], COCO_CLASSES)
    write_detected(folder, checkpoint, [SIZES[i % len(SIZES)] for i in range(args.images)], spread=0.05)

    began = time.monotonic()
    command = ["--resume", str(checkpoint), "--output", str(path), "--precision", args.precision, *args.flags]
    export.main([*command, "--verify", str(folder)])
    detector = load_detector(checkpoint, device="cpu", batch_size=3)
    verify(detector, path, open_images(str(folder), detector, args.images))
    print(f"{time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    every = architectures()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(every), help="default: all")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--suffix", default=".onnx", choices=(".onnx", ".pt2"))
    parser.add_argument("--precision", default="float32")
    args, args.flags = parser.parse_known_args()
    for name in args.names:
        with tempfile.TemporaryDirectory() as folder:
            check(name, every[name], Path(folder), args)


if __name__ == "__main__":
    main()
