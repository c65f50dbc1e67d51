"""From the folders of runs to the page."""

from __future__ import annotations

import base64
import filecmp
import gzip
import hashlib
import html
import json
import logging
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs
from pycocotools.coco import COCO

from datasets.coco_eval import evaluate_results, precision_tables
from datasets.coco_format import read_annotations
from datasets.detection_errors import Errors, find_errors
from datasets.respell import respell
from tools.report_page import charts, content
from tools.report_page.mistakes import Album, error_table, worst
from tools.report_page.runs import Result, Run, Tables, read_runs
from util.draw.curves import FIGURES, run_colors
from util.errors import UserError
from util.text_files import replace_text

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
MAX_PICTURES = 600  # on the page, whatever the number of runs


def make_page(
    folders: Sequence[Path],
    output: Path,
    *,
    annotations: Path | None = None,
    images: Path | None = None,
    num_pictures: int = 12,
    threshold: float = 0.3,
) -> int:
    """Write the page; its bytes. Raises UserError for runs or data that can't be read, or a page
    that can't be written.
    """
    runs = read_runs(folders)
    notes = [f"{run.name}: {note}." for run in runs for note in run.notes]
    truth = GroundTruth.find(runs, annotations, images, notes)
    data = page_content(runs, truth, notes, num_pictures, threshold)
    title = (
        " · ".join(run.name for run in runs)
        if len(runs) <= 4
        else f"{runs[0].name} and {len(runs) - 1} other runs"
    )
    return write_page(data, title, output)


class GroundTruth:
    """The annotations of the page, and the folder of their images; None where there are none.

    named: the annotations were named by the user, and so belong to all runs.
    """

    def __init__(
        self, coco: COCO | None, path: Path | None, images: Path | None, named: bool = False
    ) -> None:
        self.coco, self.path, self.images, self._named = coco, path, images, named

    @classmethod
    def find(
        cls, runs: Sequence[Run], annotations: Path | None, images: Path | None, notes: list[str]
    ) -> GroundTruth:
        """What was asked for, else what the first run says that has it on this machine; what lacks
        is noted.
        """
        if images is not None and not images.is_dir():
            raise UserError(f"--images {images} is no folder")
        places = [(file, folder) for file, folder in map(validation_data, runs) if file]
        here = [file for file, _ in places if file.is_file()]
        path = annotations or (here[0] if here else None)
        if path is None:
            known = f"{places[0][0]} is not there" if places else "no run says what it was evaluated on"
            notes.append(
                f"The annotations are missing ({known}), so no mistakes are shown; add "
                f"--annotations and --images."
            )
            return cls(None, None, None)
        folders = [
            folder for file, folder in places if folder and folder.is_dir() and (annotations or file == path)
        ]
        images = images or (folders[0] if folders else None)
        if images is None:
            notes.append(
                "The folder of the images is missing, so boxes are drawn on empty ground; add --images."
            )
        coco = read_annotations(path)
        if images is not None:
            respell(coco.imgs.values(), images)
        return cls(coco, path, images, named=annotations is not None)

    def is_of(self, run: Run) -> bool:
        """Whether a run was evaluated on these annotations, as far as it says."""
        theirs, _ = validation_data(run)
        if self._named or theirs is None or self.path is None or theirs.resolve() == self.path.resolve():
            return True
        return theirs.is_file() and filecmp.cmp(theirs, self.path, shallow=False)


def validation_data(run: Run) -> tuple[Path | None, Path | None]:
    """Annotations and images that a run was evaluated on, by its record or by its flags."""
    recorded = (run.record.get("data") or {}).get("val") or {}
    if recorded.get("annotations"):
        return Path(recorded["annotations"]), Path(recorded["images"]) if recorded.get("images") else None
    if not run.flags.get("coco_path"):
        return None, None
    root = Path(run.flags["coco_path"])
    named = run.flags.get("val_annotations"), run.flags.get("val_images")
    return Path(named[0] or root / "annotations" / "instances_val2017.json"), Path(
        named[1] or root / "val2017"
    )


def page_content(
    runs: Sequence[Run], truth: GroundTruth, notes: list[str], num_pictures: int, threshold: float
) -> dict[str, Any]:
    """All that the page's script shows, as plain data."""
    results = content.results_of(runs)
    errors = [_errors(run, result, truth, notes, threshold) for _, run, result in results]
    names = _names(runs, truth.coco)
    classes = content.class_table([result for _, _, result in results], truth.coco, names)
    return {
        "made": datetime.now().astimezone().strftime("%-d %B %Y, %H:%M"),
        "runs": [content.summary(run) for run in runs],
        "results": [
            {
                "run": number,
                "name": content.result_name(run, result),
                "weights": result.weights,
                "stats": _finite(result.stats),
            }
            for number, run, result in results
        ],
        "figures": FIGURES,
        "flags": content.flag_table(runs),
        "colors": run_colors(len(runs)),
        "curves": charts.curves(runs),
        "names": names,
        "classes": classes,
        "pr": charts.precision_recall(runs, classes["classes"]),
        "mistakes": _mistakes(errors, truth, notes, num_pictures, threshold),
        "notes": notes,  # last: making the rest adds to them
    }


def _finite(stats: Sequence[float] | None) -> list[float] | None:
    return None if stats is None else [value if math.isfinite(value) else -1.0 for value in stats]


def _names(runs: Sequence[Run], coco: COCO | None) -> dict[int, str]:
    """Class names by category id: the annotations', then the runs' own."""
    names = {int(category): entry["name"] for category, entry in coco.cats.items()} if coco else {}
    for run in runs:
        for category, name in recorded_names(run.record.get("classes")).items():
            names.setdefault(category, name)
    return names


def recorded_names(classes: Any) -> dict[int, str]:
    """Names by category id, from what a run.json or a checkpoint has."""
    if isinstance(classes, Mapping) and isinstance(classes.get("categories"), list | tuple):
        entries = [
            list(entry.values()) if isinstance(entry, Mapping) else list(entry)
            for entry in classes["categories"]
        ]
        return {int(category): str(name) for _, category, name in entries}
    if isinstance(classes, Mapping):  # checkpoints of before there was a map of classes
        return {
            int(category): str(name)
            for category, name in classes.items()
            if str(category).lstrip("-").isdigit()
        }
    return {}


def _errors(
    run: Run, result: Result, truth: GroundTruth, notes: list[str], threshold: float
) -> Errors | None:
    """The mistakes of a result, and its tables where only its detections are there; notes what is
    odd about them.
    """
    name = content.result_name(run, result)
    if result.detections is None:
        notes.append(
            f"{name}: there are no detections (eval/latest.json), so no mistakes are shown; "
            f"evaluate again with "
            "main.py --eval --save_predictions."
        )
        return None
    if truth.coco is None:
        return None
    if not truth.is_of(run):
        notes.append(
            f"{name}: was evaluated on other annotations than {truth.path}, so its figures can't "
            f"be compared with the "
            "others' and its mistakes are left out; make a page of its own."
        )
        return None
    if unknown := {detection["image_id"] for detection in result.detections} - truth.coco.imgs.keys():
        notes.append(
            f"{name}: its detections are of {len(unknown)} images that {truth.path} does not have, "
            f"so its mistakes are "
            "left out; name its own with --annotations and --images."
        )
        return None
    if result.tables is None:
        tables = precision_tables(evaluate_results(truth.coco, result.detections))
        arrays = (tables[key].numpy() for key in ("precision", "recall", "scores"))
        result.tables = Tables(*arrays, tables["category_ids"], tables["stats"])
        result.stats = result.stats or result.tables.stats
    log.info(
        "%s: %d detections to sort", name, len(result.detections)
    )  # hundreds of thousands take half a minute
    errors = find_errors(truth.coco, result.detections)
    if len(errors.objects.index) and abs(errors.average_precision() - result.tables.stats[1]) > 1e-6:
        pair = f"AP50 {100 * errors.average_precision():.1f} and {100 * result.tables.stats[1]:.1f}"
        notes.append(
            f"{name}: its detections and its tables are of different evaluations ({pair}); evaluate again."
        )
    scores = errors.detections.score
    if len(scores) and scores.max() < threshold:
        notes.append(
            f"{name}: no detection scores {threshold:g} or more (the highest is "
            f"{scores.max():.2f}), so every object "
            "counts as missed; lower --score_threshold."
        )
    return errors


def _mistakes(
    errors: Sequence[Errors | None], truth: GroundTruth, notes: list[str], num_pictures: int, threshold: float
) -> dict[str, Any]:
    shown = sum(one is not None for one in errors)
    if not shown or truth.coco is None:
        why = (
            "Mistakes need an evaluation's detections (eval/latest.json) and its annotations; what "
            "lacks is said at the top."
        )
        return {"table": [], "entries": [], "pictures": [], "threshold": threshold, "choice": why}
    table = [error_table(one, threshold) if one else None for one in errors]
    count = min(num_pictures, max(1, MAX_PICTURES // (6 * shown)))
    album = Album(truth.images, truth.coco)
    entries = worst(errors, truth.coco, album, threshold, count)
    if album.unreadable:
        first, more = album.unreadable[0], len(album.unreadable) - 1
        what = f"{first} and {more} more images" if more else first
        notes.append(f"{what} can't be read in {truth.images}; name the folder of the images with --images.")
    if album.full:
        notes.append(
            "Not all pictures fitted on the page; the others show boxes on empty ground. Lower "
            "--num_pictures."
        )
    choice = (
        f"The worst {count} of each kind and run: false positives by their score, missed objects "
        "by their size."
    )
    if not entries:
        none = (
            f"No detection of at least {threshold:g} is wrong and no object is missed: there is "
            "nothing to show."
        )
        choice = none if count else "The pictures were left out (--num_pictures 0)."
    return {
        "table": table,
        "entries": entries,
        "pictures": album.uris,
        "threshold": threshold,
        "choice": choice,
    }


def write_page(data: Mapping[str, Any], title: str, output: Path) -> int:
    """Fill the template; the file is the old one or the new one, never a part.

    The page's policy names its two scripts by their digests, so that no other can run.
    """
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    script, plotly = (FOLDER / "page.js").read_text(), get_plotlyjs()
    parts = {
        "title": html.escape(title),
        "style": (FOLDER / "page.css").read_text(),
        "script": script,
        # 2 MB instead of 4.8
        "plotly": base64.b64encode(gzip.compress(plotly.encode(), mtime=0)).decode(),
        "allowed_scripts": f"{_digest(script)} {_digest(plotly)}",
        "data": text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"),
    }
    before, *pieces = (FOLDER / "page.html").read_text().split("{{")
    page = before + "".join(parts[name] + rest for name, rest in (piece.split("}}", 1) for piece in pieces))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_text(output, page)
    except OSError as error:
        raise UserError(
            f"--output {output} can't be written ({error.strerror}); name another place"
        ) from None
    return output.stat().st_size


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
