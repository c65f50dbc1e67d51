"""Convert a detector between this program's checkpoints and the layout of Hugging Face.

A .pth file, published or of a run, becomes a folder that transformers loads. Such a folder, its
safetensors file, or the https address of a model on the hub becomes a .pth file. Outputs are equal,
and converting back gives the same tensors.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# a script sees only its own folder, not the project
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from util.checkpoint import MASK_HEAD
from util.config import Config, add_detector_flags, add_weights_flag, detector_flags, make_parser
from util.errors import UserError, run_as_command

log = logging.getLogger(__name__)

EXAMPLE = """python tools/convert_checkpoint.py exps/run/checkpoint.pth converted
  python tools/convert_checkpoint.py https://huggingface.co/SenseTime/deformable-detr deformable_detr.pth"""


def parser() -> argparse.ArgumentParser:
    result = make_parser("tools/convert_checkpoint.py", __doc__, EXAMPLE)
    add = result.add_argument
    add(
        "source",
        help="a .pth file; or Hugging Face's layout: a folder, a safetensors file or an https address",
    )
    add("target", help="the folder or .pth file to write; it must not exist")
    add_weights_flag(result)
    add_detector_flags(result)
    return result


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    convert(args.source, Path(args.target), args.weights, **detector_flags(args))


def convert(source: str, target: Path, which: str = "auto", **architecture: Any) -> None:
    """Write `target` from `source`, whichever layout that has.

    Args:
        which: "auto", "model" or "ema" weights of a run.
        architecture: flags that replace what the checkpoint says.

    Raises:
        UserError: the source can't be read or converted; the target exists.
    """
    # imported here so that --help does not import torch
    from models.weights.architecture import MODULES, config_of, flags_in
    from models.weights.hugging_face_files import is_hugging_face
    from models.weights.load import choose_weights, read_trained

    # the target
    to_file = is_hugging_face(source)
    if target.exists():
        raise UserError(f"target {target} exists already; remove it or give another name")
    if to_file != (target.suffix == ".pth"):
        kind = "a .pth file" if to_file else "a folder"
        raise UserError(f"target {target}: {source} is converted to {kind}; name one")

    # the source
    checkpoint = read_trained(source, "source")
    state, which = choose_weights(checkpoint, source, "source", which)
    checkpoint = {**checkpoint, "model": state}
    config = config_of(checkpoint, source, "source", **architecture)

    # The other layout. A folder's config.json must agree with its weights.
    if to_file:
        check_weights(state, config.with_flags({**checkpoint.get("args", {}), "resume": source}), source)
        write_file(checkpoint, target)
        return
    check_weights(state, config, source)
    # prediction does not need the flags of BatchFormerV2
    modules = flags_in(checkpoint, MODULES, f"source {source}")
    if modules.get("bf"):
        config = config.with_flags(modules)
    write_folder(checkpoint, which, config, source, target)


def check_weights(state: Mapping[str, Any], config: Config, source: str) -> None:
    """Raise UserError unless the weights are those of the detector that `config` describes."""
    from models import build_model
    from util.checkpoint import load_state
    from util.class_map import unnamed_classes

    # building is the surest test
    model, _, _ = build_model(config, unnamed_classes(state))
    load_state(model, {"model": state}, source, "source").require_same_architecture()


def write_file(checkpoint: Mapping[str, Any], target: Path) -> None:
    """Write a .pth file."""
    from util.checkpoint import write_atomically

    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(dict(checkpoint), target)
    # published files have no names of classes
    classes = "classes without names"
    if "classes" in checkpoint:
        classes = f"{len(checkpoint['classes']['categories'])} classes"
    log.info("%s: %d tensors; %s", target, len(checkpoint["model"]), classes)


def write_folder(
    checkpoint: Mapping[str, Any], which: str, config: Config, source: str, target: Path
) -> None:
    """Write a folder in Hugging Face's layout, and say what transformers has no place for."""
    from models.weights.hugging_face import write_hugging_face
    from util.class_map import classes_of

    classes = classes_of(checkpoint, f"source {source}")
    written = write_hugging_face(checkpoint["model"], config, classes, target)
    kind = "averaged weights" if which == "ema" else "weights"
    log.info("%s: %s, %d tensors", target, kind, len(written.weights))
    if written.batchformer:
        log.info(
            "%d tensors of BatchFormerV2 are beside them in batchformer.safetensors: transformers "
            "has no place for them, and evaluation does not need them",
            len(written.batchformer),
        )
    of_masks = sum(name.startswith(MASK_HEAD) for name in written.left_out)
    if of_masks:
        log.info("%d tensors of the mask head are left out: transformers' detector has boxes only", of_masks)
    if counts := len(written.left_out) - of_masks:
        log.info("%d counts of batch normalisation are left out: transformers freezes its statistics", counts)


if __name__ == "__main__":
    run_as_command(lambda: main(sys.argv[1:]))
