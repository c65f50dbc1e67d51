"""Plot the curves of one or several runs: average precision, losses and learning rate by epoch."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# a script sees only its own folder, not the project
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from util.config import make_parser
from util.draw.curves import Row, read_log
from util.draw.plots import plot_run
from util.errors import UserError, run_as_command

EXAMPLE = """\
  python tools/plot_logs.py exps/baseline exps/batchformer --output curve.png
"""


def parser() -> argparse.ArgumentParser:
    made = make_parser("tools/plot_logs.py", __doc__, EXAMPLE)
    add = made.add_argument
    add("runs", type=Path, nargs="+", help="a run's output folder, which has log.txt, or such a file")
    add("--output", type=Path, default=Path("curve.png"), help="picture to write: .png, .pdf or .svg")
    return made


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    try:
        logs = read_runs(args.runs)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        plot_run(logs, args.output)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error
    print(f"{args.output}: {', '.join(f'{name} ({len(rows)} rows)' for name, rows in logs.items())}")


def read_runs(paths: Sequence[Path]) -> dict[str, list[Row]]:
    """Rows by the name of the run. Raises OSError, or UserError for a log that is broken or has no
    row.
    """
    # resolved, because "." has no name
    names = [_run_name(path.resolve()) for path in paths]
    logs = {}
    for path, name in zip(paths, names, strict=True):
        rows = read_log(path / "log.txt" if path.is_dir() else path)
        if not any("epoch" in row for row in rows):
            raise UserError(f"{path} has no complete row with an epoch")
        # two runs with the same name, exps/a/run and exps/b/run, are shown by their paths
        if names.count(name) > 1:
            name = str(path)
        logs[name] = rows
    return logs


def _run_name(path: Path) -> str:
    if path.name == "log.txt":
        return path.parent.name
    # a copied log may have any name
    return path.name if path.is_dir() else path.stem


if __name__ == "__main__":
    run_as_command(lambda: main(sys.argv[1:]))
