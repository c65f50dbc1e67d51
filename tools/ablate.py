"""Train variants of a detector with several seeds, and say whether their AP differs.

The variants are a grid over main.py's flags; the first is the baseline. What follows `--` is the
command of one run: flags of main.py, or a script of configs/ or tools/ with flags. Each run gets a
folder of its own. If this command is interrupted, the same command goes on.

Runs with equal seeds are paired: they begin with the same weights, and see the same images in the
same order with the same augmentation. Dropout can't be paired: variants draw different numbers.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# a script sees only its own folder, not the project
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.ablation.grid import OWN_FLAGS, Variant, read_grid
from util.atomic import replace_text
from util.config import make_parser
from util.errors import UserError, run_as_command

EXAMPLE = """\
  python -m datasets.synthetic --output_dir data/small --train_images 160 --val_images 40
  python tools/ablate.py --grid bf=0,1 --seeds 0 1 2 --jobs 2 --output_dir exps/ablation -- \\
      ./configs/synthetic.sh --coco_path data/small --epochs 3 --share_bf 0 --insert_idx 0
"""

if TYPE_CHECKING:
    from tools.ablation.runs import Cell

log = logging.getLogger("ablate")


def parser() -> argparse.ArgumentParser:
    made = make_parser("tools/ablate.py", __doc__, EXAMPLE)
    made.usage = "python tools/ablate.py --grid GRID --output_dir DIR [options] -- <command of a run>"
    add = made.add_argument
    grid = (
        "flags and values: 'bf=0,1 insert_idx=0,2' are four variants, 'mixed: bf=1 insert_idx=0+2' is one "
        "with a name and two places; switches take 0 and 1. Or a file with such a text on each line"
    )
    add("--grid", nargs="+", action="extend", required=True, help=grid)
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=list(range(6)),
        help="a claim needs six or more (default: 0 to 5)",
    )
    add("--output_dir", type=Path, required=True, help="folder of all runs, ablation.json and report.html")
    add("--baseline", help="name of the variant that the others are compared with (default: the first)")
    add("--jobs", type=int, default=1, help="runs at once; cores and GPUs are divided among them")
    add(
        "--print",
        action="store_true",
        help="print the commands of the runs that are missing, and run nothing",
    )
    return made


def main(argv: Sequence[str]) -> None:
    """Run what is missing, then print the table and write the page. Raises UserError."""
    split = argv.index("--") if "--" in argv else len(argv)
    args, base = parser().parse_args(argv[:split]), list(argv[split + 1 :])
    variants = _baseline_first(read_grid(args.grid), args.baseline)
    _check(args, base, variants)
    if not base or base[0].startswith("--"):
        base = ["python", "main.py", *base]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")

    # imported here so that --help answers at once
    from tools.ablation.runs import as_shell, cells_of

    record = _record(args.output_dir, base, variants)
    cells = cells_of(variants, args.seeds, args.output_dir)
    if args.print:
        print(as_shell(cells, base))
        return
    if shutil.which(base[0]) is None:
        raise UserError(f"{base[0]} can't be run: what follows -- must be flags of main.py, or a command")
    _write(args.output_dir, record)
    failed, queued = _run(cells, base, args, record)
    for name, reason in failed.items():
        print(f"left out: {name} ({reason})")
    if queued:
        print(f"{queued} runs are in the queue; after their end the same command makes the table")
    if any(cell.is_done() for cell in cells):
        _report(cells, variants, args, base, record["seconds"])
    if failed:
        count = len(failed)
        raise UserError(f"runs that failed and are left out: {count}; the same command tries them again")


def _run(
    cells: Sequence[Cell], base: list[str], args: argparse.Namespace, record: dict[str, Any]
) -> tuple[dict[str, str], int]:
    """Run what is missing; returns why runs failed, by name, and how many are in a queue."""
    from tools.ablation.runs import Runner
    from util.step.progress import duration

    failed: dict[str, str] = {}

    def on_end(cell: Cell, seconds: float, failure: str) -> None:
        # a run may have had several attempts
        record["seconds"][cell.name] = record["seconds"].get(cell.name, 0) + seconds
        _write(args.output_dir, record)
        if failure:
            failed[cell.name] = failure
            log.info("%s: %s", cell.name, failure)
        else:
            done = sum(other.is_done() for other in cells)
            log.info("%s: done in %s (%d of %d)", cell.name, duration(seconds), done, len(cells))

    queued = Runner(base, args.jobs, on_end).run(cells)
    return failed, len(queued)


def _report(
    cells: Sequence[Cell],
    variants: Sequence[Variant],
    args: argparse.Namespace,
    base: list[str],
    seconds: dict[str, float],
) -> None:
    """Print the table, and write the figures and the page."""
    from tools.ablation.summary import as_text, summarise, write_json

    by_name = {(cell.variant.name, cell.seed): cell for cell in cells}
    summary = summarise(base, variants, by_name, args.seeds, seconds)
    for comparison in summary["comparisons"]:
        _compare_images(comparison, by_name)
    print(as_text(summary))

    figures, page = args.output_dir / "ablation_results.json", args.output_dir / "report.html"
    write_json(summary, figures)
    _make_page(summary, variants, cells, page)
    print(f"\n{figures}: all figures\n{page}: open it in a browser")


def _baseline_first(variants: Sequence[Variant], name: str | None) -> list[Variant]:
    names = [variant.name for variant in variants]
    if name is not None and name not in names:
        raise UserError(f"--baseline {name} is no variant of the grid: {', '.join(names)}")
    return sorted(variants, key=lambda variant: variant.name != (name or names[0]))


def _check(args: argparse.Namespace, base: Sequence[str], variants: Sequence[Variant]) -> None:
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs} must be at least 1")
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))} must be different numbers, at least 0")
    for word in base:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in (*OWN_FLAGS, "job_dir"):
            raise UserError(f"{word} is set by the ablation itself; leave it out")
    for variant in variants:
        for name in variant.off:
            if f"--{name}" in base:
                raise UserError(
                    f"--grid: {variant.name} is without --{name}, but the command has it; leave it out"
                )


def _record(folder: Path, base: list[str], variants: Sequence[Variant]) -> dict[str, Any]:
    """What the folder's runs were started with. Raises UserError if it is something else."""
    path = folder / "ablation.json"
    record: dict[str, Any] = {"command": base, "variants": {}, "seconds": {}}
    if path.exists():
        try:
            record |= json.loads(path.read_text())
        except (ValueError, TypeError):
            raise UserError(f"{path} is damaged; name another --output_dir") from None
        # a command that has begun no run does not count
        if not any(folder.glob("*_seed*/*")):
            record |= {"command": base, "variants": {}}
        if record["command"] != base:
            before = " ".join(record["command"])
            raise UserError(
                f"--output_dir {folder} has runs of another command, {before}; name another folder"
            )
    for variant in variants:
        before = record["variants"].setdefault(variant.name, list(variant.words))
        if before != list(variant.words):
            there = " ".join(before)
            raise UserError(
                f"--output_dir {folder} has another variant {variant.name} ({there}); "
                "give this one another name"
            )
    return record


def _write(folder: Path, record: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "ablation.json", json.dumps(record, indent=1) + "\n")


def _compare_images(comparison: dict[str, Any], cells: dict[tuple[str, int], Cell]) -> None:
    """Add the bootstrap over images for the first pair whose detections and annotations are there."""
    from datasets.coco_format import read_annotations
    from datasets.coco_results import read_results
    from tools.ablation.images import difference_over_images
    from util.run.record import read_record

    for seed in comparison["seeds"]:
        pair = [cells[comparison[which], seed].folder for which in ("baseline", "variant")]
        files = [folder / "predictions.json" for folder in pair]
        truth = read_record(pair[0]).get("data", {}).get("val", {}).get("annotations")
        if truth and Path(truth).is_file() and all(file.is_file() for file in files):
            results = [read_results(file) for file in files]
            comparison["images"] = {
                "seed": seed,
                **difference_over_images(read_annotations(Path(truth)), *results),
            }
            return


def _make_page(
    summary: dict[str, Any], variants: Sequence[Variant], cells: Sequence[Cell], output: Path
) -> None:
    """The report of one run of each variant, with a section on all of them."""
    from tools.ablation.page import section
    from tools.report_page.make import make_page

    folders, shown = [], []
    for variant in variants:
        done = [cell for cell in cells if cell.variant == variant and cell.is_done()]
        if done:
            folders.append(done[0].folder)
            shown.append(variant.name)
    make_page(folders, output, names=shown, ablation=section(summary, shown))


if __name__ == "__main__":
    run_as_command(lambda: main(sys.argv[1:]))
