"""Speed of the detector, with main's flags, of its data, and of the attention operator, on any device.

    python benchmark.py --num_iters 300 --warm_iters 5 --batch_size 1  # an image of the data set
    python benchmark.py --num_iters 20 --size 800 1333  # noise of a size, no data set
    python benchmark.py train --num_iters 10 --size 320 320 --bf 1 --insert_idx 0  # against --bf 0
    python benchmark.py loader --num_iters 50  # training and evaluation images, from file to tensor
    python benchmark.py evaluation --num_iters 50  # from the files to the metrics, by part
    python benchmark.py launches --size 320 320  # kernels of a training step, and waits of the host
    python benchmark.py sweep --size 320 320 --num_iters 3 --out costs.png  # against size, queries, ...
    python benchmark.py export --num_iters 5  # an exported file in each runtime, against PyTorch
    python benchmark.py op  # the operator's backends, see op --help

--amp bf16, --masks and, of a training step, --bf, --checkpoint_encoder and --compile are timed beside
the same without them, and the memory of a training step is given at its peak. Inference with --masks,
and the one beside it, end with results in COCO's format. --against transformers times that library's
detector of the same flags too, --against_reference ours with the attention operator in plain PyTorch;
--profile adds what the time goes to; --trace writes it as a timeline, for ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import dataclasses
import pkgutil
import sys

from models.ops import benchmark as op_benchmark
from models.weights.architecture import Purpose, adopt
from util.checkpoint import read_checkpoint, weights_of
from util.class_map import AUTO, classes_of, unnamed_classes
from util.config import Config, make_parser, parse_with_config, with_classes
from util.errors import UserError, run_as_command

OPERATOR = "op"  # has flags of its own
# module of tools/benchmarks and function, imported when asked for: some need more packages than others
MODES = {
    "inference": "speed:measure_speed",
    "train": "speed:measure_speed",
    "loader": "speed:measure_items",
    "evaluation": "evaluation:measure_evaluation",
    "launches": "launches:measure_launches",
    "sweep": "sweep:measure_sweep",
    "export": "export:measure_export",
}
# flags that would have no effect in other modes
OWN_MODES = {"against": ("inference", "train"), "out": ("sweep",)}


def main() -> int | None:
    if sys.argv[1:2] == [OPERATOR]:
        return op_benchmark.main(sys.argv[2:])
    args, config = _parse()
    pkgutil.resolve_name(f"tools.benchmarks.{MODES[args.what]}")(args, config)
    return None


def _parse() -> tuple[argparse.Namespace, Config]:
    parser = make_parser("benchmark.py", __doc__)
    parser.usage = f"python benchmark.py [{'|'.join([*MODES, OPERATOR])}] [flags]"
    own = parser.add_argument_group("benchmark")
    # spelled as the published program's
    add = own.add_argument
    what = (*MODES, OPERATOR)
    add("what", nargs="?", default="inference", choices=what, help="what to measure")
    add("--num_iters", "--num-iters", type=int, default=300, help="timed iterations")
    text = "iterations before that are not counted"
    add("--warm_iters", "--warm-iters", type=int, default=5, help=text)
    text = "noise of this size instead of the data set"
    add("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help=text)
    text = "inference and train: the same detector of another library too"
    add("--against", choices=("transformers",), help=text)
    text = "the same with the attention operator in plain PyTorch too"
    add("--against_reference", action="store_true", help=text)
    add("--profile", action="store_true", help="what the time of one iteration goes to")
    add("--out", metavar="FILE", help="sweep: a picture of its tables, as .png, .svg or .pdf")
    add("--trace", metavar="FILE", help="write a timeline of one iteration, as .json or .json.gz")
    args, config = parse_with_config(parser, None, batch_size=1)
    if args.num_iters < 1 or args.warm_iters < 0 or (args.size and min(args.size) < 1):
        raise UserError("--num_iters and --size must be above 0, --warm_iters not negative")
    for flag, modes in OWN_MODES.items():
        if getattr(args, flag) and args.what not in modes:
            raise UserError(f"--{flag} is a flag of benchmark.py {' and '.join(modes)} alone")
    # the time does not depend on the weights: no download
    if config.backbone.backbone_weights == "imagenet":
        config = config.with_flags({"backbone_weights": "none"})
    resume = config.run.resume
    if not resume:
        return args, dataclasses.replace(config, settled=True)

    # the flags and classes of the checkpoint fill what the caller did not give
    checkpoint = read_checkpoint(resume)
    config = adopt(config, checkpoint, resume, purpose=Purpose.RESUME)
    if config.data.num_classes == AUTO:
        classes = classes_of(checkpoint, resume) or unnamed_classes(weights_of(checkpoint, resume))
        config = with_classes(config, classes)
    return args, config


if __name__ == "__main__":
    run_as_command(main)
