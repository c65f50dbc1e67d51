"""Fine-tune a detector on data of yours, and make the report of the run.

It is main.py with a schedule for some thousand images (12 epochs at half of the published rates).
After an interruption the same command resumes the run. At the end it makes the page of
tools/report.py. All flags are main.py's; a flag that is given replaces the default here.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# a script sees only its own folder, not the project
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from util.config import make_parser, parse_with_config
from util.errors import UserError, run_as_command

EXAMPLE = (
    "python tools/finetune.py --coco_path data/mine --finetune "
    "r50_deformable_detr-checkpoint.pth --output_dir exps/mine"
)
DEFAULTS = {
    "epochs": 12,
    "lr_drop": 10,
    "lr": 1e-4,
    "lr_backbone": 1e-5,
    "output_dir": "exps/finetune",
    "resume": "auto",
}


def main(argv: Sequence[str]) -> None:
    """Train and make the report. Raises UserError."""
    parser = make_parser("tools/finetune.py", __doc__, EXAMPLE)
    parser.usage = "python tools/finetune.py --coco_path DIR --finetune CHECKPOINT [flags of main.py]"
    _, config = parse_with_config(parser, argv, **DEFAULTS)
    if not config.run.finetune:
        raise UserError("--finetune is missing: the checkpoint to start from; to start from none use main.py")

    # imported here so that --help does not import torch
    from main import main as train
    from tools.report_page.make import make_page

    train(config)
    if os.environ.get("RANK", "0") == "0":  # one process makes the page
        folder = Path(config.run.output_dir)
        make_page([folder], folder / "report.html")
        logging.info("%s: open it in a browser", folder / "report.html")


if __name__ == "__main__":
    run_as_command(lambda: main(sys.argv[1:]))
