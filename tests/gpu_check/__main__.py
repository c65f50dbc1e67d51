"""Shows on one GPU within some minutes what only a GPU can show: speed first, then correctness.

    ./tools/gpu_check.sh out  # summary.md and logs.tar.gz in the folder out
    ./tools/gpu_check.sh out --device cpu --minutes 5  # tries the steps at small sizes where there is no GPU

Needs Python 3.10 or later with torch and torchvision, and no network. Kernels that were built
before are used if they compute correctly; otherwise a CUDA toolkit is needed. A step for which
something is missing is skipped, and a step for which no time is left is left out; the summary says
so. The exit status is 1 if a step failed.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from tests.gpu_check.prepare import device_parser
from tests.gpu_check.runner import Check
from util.errors import UserError, run_as_command


def main() -> int:
    parser = device_parser(__doc__, "./tools/gpu_check.sh")
    parser.add_argument("folder", type=Path, help="for the results")
    parser.add_argument("--minutes", type=float, default=8, help="for all steps together (8)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        remedy = "run this on a machine that has one, or try the steps with --device cpu"
        raise UserError(f"no GPU: torch {torch.__version__} sees no CUDA device here; {remedy}")

    # data, checkpoints and logs go into a temporary folder; only results are kept
    with tempfile.TemporaryDirectory() as work:
        passed = Check(args.folder, Path(work), args.device, args.minutes).run()
    print((args.folder / "summary.md").read_text())
    return 0 if passed else 1


if __name__ == "__main__":
    run_as_command(lambda: sys.exit(main()))
