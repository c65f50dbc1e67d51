"""The command line: argparse, made from the table of flags.

No torch here, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from util.config.checks import plain_text
from util.config.config import Config
from util.config.fields import FLAGS, GROUPS
from util.config.flag import Flag
from util.errors import UserError

WEIGHTS = ("auto", "model", "ema")  # of a checkpoint

# of main.py; other programs pass theirs
_DESCRIPTION = "Train and evaluate Deformable DETR with BatchFormerV2 on COCO-format data."
_EXAMPLE = """\
  python main.py --coco_path data/coco --output_dir exps/batchformer \\
      --batch_size 3 --bf 1 --share_bf 0 --insert_idx 0
  python main.py --coco_path data/coco --output_dir exps/batchformer --resume auto [the same flags]
  python main.py --coco_path data/coco --resume exps/batchformer/checkpoint.pth --eval

Ranges: docs/flags.md. Several GPUs: tools/run_dist_launch.sh. Own data: tools/convert_dataset.py.
Error messages and exit codes: docs/troubleshooting.md, docs/reliability.md."""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and one spelling of each flag. Keeps the line breaks of descriptions."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # spellings with dashes are accepted, and would double the length of --help
        shown = copy.copy(action)
        shown.option_strings = [text for text in action.option_strings if "-" not in text.lstrip("-")]
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        # an empty text and a switch that is off say nothing
        if default is False or default in (None, "", argparse.SUPPRESS):
            return action.help
        return f"{action.help} (default: {plain_text(default) or 'none'})"


class _Parser(argparse.ArgumentParser):
    # parsers of subcommands are made with the same three arguments
    def __init__(self, prog: str, description: str, example: str = "") -> None:
        super().__init__(
            prog,
            description=description,
            epilog=f"example:\n  {example.strip()}" if example else None,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,  # with a typing error something else would be trained
        )

    def error(self, message: str) -> NoReturn:
        # argparse lists unknown flags and their values in the message
        words = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
        if message.startswith("unrecognized") and words:
            wrong = f"--{words[0][2:].replace('-', '_')}"
            near = difflib.get_close_matches(wrong, self._option_string_actions, n=1)
            message += "".join(f"; did you mean {flag}?" for flag in near)
        raise UserError(f"{message} ({self.prog} --help lists the flags)")


def make_parser(prog: str, description: str, example: str = "") -> argparse.ArgumentParser:
    """A parser that raises UserError instead of ending the process, and shows defaults and the
    `example` in its help.
    """
    return _Parser(f"python {prog}", description, example)


def parse_config(argv: Sequence[str] | None = None) -> Config:
    """Flags (default: the command line's) to a Config. Raises UserError for what argparse or a
    check refuses.
    """
    parser = make_parser("main.py", _DESCRIPTION, _EXAMPLE)
    parser.usage = "python main.py [flags]"
    return parse_with_config(parser, argv)[1]


def parse_with_config(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, **defaults: Any
) -> tuple[argparse.Namespace, Config]:
    """For programs with flags of their own besides main's: the namespace, and the Config of main's
    flags in it.

    `defaults` are the program's own for some of main's flags. With --resume or --finetune the
    Config is not settled yet.
    """
    # every flag of the table, spelt with underscores and with dashes
    sections = {name: parser.add_argument_group(group.__doc__) for name, group in GROUPS.items()}
    for name, flag in FLAGS.items():
        # a name of one word has one spelling
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        sections[flag.group].add_argument(*spellings, dest=name, **_options(flag))
    # launchers pass it, and no user
    parser.add_argument("--local_rank", "--local-rank", type=_local_rank, help=argparse.SUPPRESS)
    parser.set_defaults(**defaults)

    # a script in configs/ gives its flags before --help, which shows them as defaults
    words = sys.argv[1:] if argv is None else list(argv)
    if "--help" in words[1:]:
        parser.set_defaults(**vars(parser.parse_args(words[: words.index("--help")])))

    # argparse keeps the values of a namespace for flags that are absent
    not_given: list[Any] = []
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(FLAGS, not_given)))
    # a flag that was given has another object than the marker, even if its value is the default
    given = frozenset(name for name in FLAGS if getattr(args, name) is not not_given)
    for name in FLAGS.keys() - given:
        setattr(args, name, parser.get_default(name))
    # a checkpoint decides the flags that were not given
    settled = not (args.resume or args.finetune or args.frozen_weights)
    return args, Config().with_flags(vars(args), given=given, settled=settled)


def add_score_threshold_flag(parser: argparse.ArgumentParser, help: str) -> None:
    """--score_threshold, from 0 to 1: the same in every tool that shows detections."""
    parser.add_argument("--score_threshold", type=score, default=0.3, help=help)


def score(text: str) -> float:
    """A number from 0 to 1. argparse shows this function's name if it is no number at all."""
    value = float(text)
    if not 0 <= value <= 1:  # NaN too
        raise argparse.ArgumentTypeError(f"{text} must be a number from 0 to 1")
    return value


def add_weights_flag(parser: argparse.ArgumentParser) -> None:
    """--weights: which weights of a checkpoint are used (models/weights/load.py)."""
    parser.add_argument(
        "--weights",
        default="auto",
        choices=WEIGHTS,
        help="ema: the averaged weights of --ema_decay; model: the others; auto: the averaged if "
        "the checkpoint has them, unless its last evaluation found them worse",
    )


def add_detector_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of main.py that the weights of a checkpoint do not show, for programs that need no
    others of main.py's.
    """
    group = parser.add_argument_group(
        "flags of main.py that a checkpoint may not have", "default: the checkpoint's, else main.py's"
    )
    for name, flag in FLAGS.items():
        if flag.in_tools:
            # absent means that the checkpoint decides
            group.add_argument(f"--{name}", **{**_options(flag), "default": argparse.SUPPRESS})


def detector_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Those of `add_detector_flags` that were given."""
    return {name: getattr(args, name) for name, flag in FLAGS.items() if flag.in_tools and name in args}


def _options(flag: Flag) -> dict[str, Any]:
    """Arguments of `add_argument`."""
    help = argparse.SUPPRESS if flag.refused else flag.help
    options: dict[str, Any] = {"default": flag.default, "help": help}
    if isinstance(flag.default, bool):
        return options | {"action": "store_true"}
    options |= {"type": flag.parse, "choices": flag.choices}
    # argparse shows the choices themselves
    if not flag.choices:
        options["metavar"] = flag.placeholder
    if flag.repeat:
        # "+": without a value the flag would do nothing
        options |= {"action": "extend", "nargs": "+"}
    elif isinstance(flag.default, tuple):
        options["nargs"] = "*"
    return options


def _local_rank(text: str) -> None:
    """The flag of torch.distributed.launch, which repeats a variable of torchrun."""
    if os.environ.get("LOCAL_RANK") != text:
        raise argparse.ArgumentTypeError(
            f"{text} is from a launcher that does not set LOCAL_RANK; start with torchrun"
        )
