"""Shows on one GPU within some minutes what only a GPU can show: speed first, then whether all is
right.

    ./tools/gpu_check.sh out  # summary.md, figures.json and logs.tar.gz in the folder out
    ./tools/gpu_check.sh out --device cpu --minutes 5  # tries the steps at small sizes where there is no GPU

Needs Python 3.10 or later with torch and torchvision, and no network. Kernels that were built
beforehand are used if they compute right; else a CUDA toolkit is needed. Steps for which something
is missing are skipped, those for which no time is left are left out, and both are said. The exit
status is 1 if a step failed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from util.errors import UserError, run_as_command


def main() -> int:
    args = _parse()
    check_device(args.device)

    from tools.gpu_check.runner import Check

    with tempfile.TemporaryDirectory() as work:
        passed = Check(args.folder, Path(work), args.device, args.minutes).run()
    print((args.folder / "summary.md").read_text())
    return 0 if passed else 1


def check_device(device: str) -> None:
    """Raises UserError if it is not there."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        remedy = "run this on a machine that has one, or try the steps with --device cpu"
        raise UserError(f"no GPU: torch {torch.__version__} sees no CUDA device here; {remedy}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "./tools/gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="for the results")
    parser.add_argument("--minutes", type=float, default=8, help="for all steps together (8)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: small sizes (cuda)")
    return parser.parse_args()


if __name__ == "__main__":
    run_as_command(lambda: sys.exit(main()))
