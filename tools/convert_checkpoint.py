"""Convert a detector between this program's checkpoints and the layout of Hugging Face.

A .pth file, published or of a run, becomes a folder that transformers loads. Such a folder, its safetensors file, or the https
address of a model on the hub becomes a .pth file. Outputs are equal, and there and back gives the same tensors.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees only its own folder, not the project
from util.config import Config, make_parser, parse_config
from util.errors import UserError, run_as_command

log = logging.getLogger(__name__)

HELP = """Further flags are main.py's, for the architecture: a .pth file that does not hold its flags needs them.

examples:
  python tools/convert_checkpoint.py exps/run/checkpoint.pth converted
  python tools/convert_checkpoint.py https://huggingface.co/SenseTime/deformable-detr deformable_detr.pth
  python tools/convert_checkpoint.py two_stage.pth converted --with_box_refine --two_stage"""


def main(argv: Sequence[str]) -> None:
    parser = make_parser("tools/convert_checkpoint.py", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = HELP
    parser.add_argument("source", help="a .pth file; or Hugging Face's layout: a folder, a safetensors file or an https address")
    parser.add_argument("target", help="the folder or .pth file to write; nothing may have that name yet")
    parser.add_argument(
        "--weights", choices=("best", "model", "ema"), default="best",
        help="of a run with --ema_decay: model (the last ones), ema (the averaged ones) or best (the averaged ones, unless their "
        "last evaluation was worse); default: best",
    )  # fmt: skip
    args, architecture = parser.parse_known_args(argv)
    given = parse_config(architecture) if architecture else None
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    convert(args.source, Path(args.target), args.weights, given)


def convert(source: str, target: Path, which: str, given: Config | None) -> None:
    """Write `target` from `source`, whichever layout that has.

    Args:
        which: "best", "model" or "ema" weights of a run.
        given: the architecture, for a checkpoint that has no flags.

    Raises:
        UserError: the source can't be read or converted; the target exists.
    """
    # imported here so that --help is immediate
    from util.hugging_face import is_hugging_face
    from util.trained import choose_weights, read_trained

    to_file = is_hugging_face(source)
    if target.exists():
        raise UserError(f"target {target} exists already; remove it or give another name")
    if to_file != (target.suffix == ".pth"):
        raise UserError(f"target {target}: from {source} {'a .pth file' if to_file else 'a folder'} is made; name one")
    checkpoint = read_trained(source, "source")
    state, which = choose_weights(checkpoint, source, "source", which)
    config = architecture_of(checkpoint, state, source, given)
    check_weights(state, config, source)
    if to_file:
        write_file(checkpoint, target)
    else:
        write_folder(checkpoint, state, which, config, source, target)


def architecture_of(checkpoint: Mapping[str, Any], state: Mapping[str, Any], source: str, given: Config | None) -> Config:
    """The Config of the detector, by the checkpoint's flags or the given ones."""
    from util.trained import config_of, num_logits, saved_flags

    saved = saved_flags(checkpoint)
    if saved and given:
        raise UserError(f"source {source} holds its flags; leave those of the architecture out")
    return config_of(saved or (given or Config()).flags(), num_logits(state, f"source {source}"), f"source {source}")


def check_weights(state: Mapping[str, Any], config: Config, source: str) -> None:
    """Raise UserError unless the weights are those of the detector that `config` describes."""
    from models import build_model
    from util.checkpoint import load_state

    load_state(build_model(config)[0], {"model": state}, source, "source").require_same_architecture()


def write_file(checkpoint: Mapping[str, Any], target: Path) -> None:
    from util.checkpoint import write_atomically

    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(dict(checkpoint), target)
    named = len(checkpoint["classes"]["categories"]) if "classes" in checkpoint else 0
    log.info("%s: %d tensors; %s", target, len(checkpoint["model"]), f"{named} classes" if named else "classes without names")


def write_folder(
    checkpoint: Mapping[str, Any], state: Mapping[str, Any], which: str, config: Config, source: str, target: Path
) -> None:
    from util.class_map import classes_of
    from util.hugging_face import write_hugging_face

    classes = classes_of({**checkpoint, "model": state}, f"source {source}")
    written = write_hugging_face(state, config, classes, target)
    kind = "averaged weights" if which == "ema" else "weights"
    log.info("%s: %s, %d tensors", target, kind, len(written.weights))
    if written.batchformer:
        log.info(
            "%d tensors of BatchFormerV2 are beside them in batchformer.safetensors: transformers has no place for them, and "
            "evaluation does without",
            len(written.batchformer),
        )
    if written.left_out:
        log.info("%d counts of batch normalisation are left out: transformers freezes its statistics", len(written.left_out))


if __name__ == "__main__":
    run_as_command(lambda: main(sys.argv[1:]))
