"""Fine-tune a detector on data of yours, and make the report of the run.

It is main.py with a schedule that suits some thousand images (12 epochs at half of the published
rates), going on by itself where it was interrupted, and tools/report.py afterwards. All flags are
main.py's, and one that is given replaces the default here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # a script sees only its own folder, not the project
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


def finetune(argv: Sequence[str]) -> None:
    parser = make_parser("tools/finetune.py", __doc__, EXAMPLE)
    parser.usage = "python tools/finetune.py --coco_path DIR --finetune CHECKPOINT [flags of main.py]"
    _, config = parse_with_config(parser, argv, **DEFAULTS)
    if not config.run.finetune:
        raise UserError("--finetune is missing: the checkpoint to start from; to start from none use main.py")
    from main import main  # torch, which takes seconds
    from tools.report_page.make import make_page

    main(config)
    if os.environ.get("RANK", "0") == "0":  # of several processes one makes it
        page = Path(config.run.output_dir) / "report.html"
        make_page([Path(config.run.output_dir)], page)
        print(f"{page}: open it in a browser")


if __name__ == "__main__":
    run_as_command(lambda: finetune(sys.argv[1:]))
