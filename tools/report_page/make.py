"""Makes the page from the folders of runs."""

from __future__ import annotations

import base64
import filecmp
import gzip
import hashlib
import html
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs
from pycocotools.coco import COCO

from datasets.coco_eval import evaluate_results, iou_types_of, precision_tables
from datasets.detection_errors import Errors, find_errors
from datasets.panoptic.format import read_boxes
from datasets.respell import respell
from tools.report_page import charts, content
from tools.report_page.masks import MaskPairs, worst_masks
from tools.report_page.mistakes import Album, error_table, worst
from tools.report_page.runs import Result, Run, Tables, read_runs
from util.atomic import replace_text
from util.draw.curves import FIGURES, run_colors
from util.errors import UserError

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
    names: Sequence[str] | None = None,
    ablation: Mapping[str, Any] | None = None,
) -> int:
    """Write the page; returns its bytes.

    Args:
        names: of the runs; by default those of their folders.
        ablation: what tools/ablation/page.py says of runs that are not on the page.

    Raises UserError for runs or data that can't be read, or a page that can't be written.
    """
    # Notes are shown at the top of the page; every stage may add some.
    runs = read_runs(folders, names)
    notes = [f"{run.name}: {note}." for run in runs for note in run.notes]
    truth = GroundTruth.find(runs, annotations, images, notes)
    data = page_content(runs, truth, notes, num_pictures, threshold) | {"ablation": ablation}
    title = " · ".join(run.name for run in runs)
    if len(runs) > 4:
        title = f"{runs[0].name} and {len(runs) - 1} other runs"
    return write_page(data, title, output)


@dataclass(frozen=True)
class GroundTruth:
    """The annotations of the page, and the folder of their images; None where there are none.

    named: the user named the annotations, so they belong to all runs.
    """

    coco: COCO | None = None
    path: Path | None = None
    images: Path | None = None
    named: bool = False

    @classmethod
    def find(
        cls, runs: Sequence[Run], annotations: Path | None, images: Path | None, notes: list[str]
    ) -> GroundTruth:
        """What the user named, else that of the first run whose files are on this machine; adds a
        note for what is missing.
        """
        # what the user named must exist; what a record names may have moved
        if images is not None and not images.is_dir():
            raise UserError(f"--images {images} is no folder")
        places = [(file, folder) for file, folder in map(validation_data, runs) if file]
        path = annotations or next((file for file, _ in places if file.is_file()), None)
        if path is None:
            reason = f"{places[0][0]} is not there" if places else "no run says what it was evaluated on"
            remedy = "so no mistakes are shown; add --annotations and --images."
            notes.append(f"The annotations are missing ({reason}), {remedy}")
            return cls()
        coco = read_boxes(path)

        # The images must belong to these annotations, unless the user named the annotations.
        if images is None:
            own = [folder for file, folder in places if annotations or file == path]
            images = next((folder for folder in own if folder and folder.is_dir()), None)
        if images is None:
            remedy = "so boxes are drawn on an empty background; add --images."
            notes.append(f"The folder of the images is missing, {remedy}")
        else:
            respell(coco.imgs.values(), images)
        return cls(coco, path, images, named=annotations is not None)

    def is_of(self, run: Run) -> bool:
        """Whether a run was evaluated on these annotations, as far as it says."""
        theirs, _ = validation_data(run)
        if self.named or theirs is None or self.path is None or theirs.resolve() == self.path.resolve():
            return True
        # a copy of the file is the same data set
        return theirs.is_file() and filecmp.cmp(theirs, self.path, shallow=False)


def validation_data(run: Run) -> tuple[Path | None, Path | None]:
    """Annotations and images that a run was evaluated on, by its record or by its flags."""
    val = run.recorded("data", "val")
    annotations, images = val.get("annotations"), val.get("images")
    if not annotations and run.flags.get("coco_path"):
        root = Path(run.flags["coco_path"])
        annotations = run.flags.get("val_annotations") or root / "annotations" / "instances_val2017.json"
        images = run.flags.get("val_images") or root / "val2017"
    if not annotations:
        return None, None
    return Path(annotations), Path(images) if images else None


def page_content(
    runs: Sequence[Run], truth: GroundTruth, notes: list[str], num_pictures: int, threshold: float
) -> dict[str, Any]:
    """All that the page's script shows, as plain data."""
    # First the mistakes: they complete results that have detections only.
    results = content.results_of(runs)
    errors = [_errors(run, result, truth, notes, threshold) for _, run, result in results]
    names = _names(runs, truth.coco)
    classes = content.class_table([result for _, _, result in results], truth.coco, names)
    shown = [
        {name: getattr(result, name) for name in ("name", "weights", "masks", "stats")} | {"run": number}
        for number, _, result in results
    ]
    return {
        "made": datetime.now().astimezone().strftime("%-d %B %Y, %H:%M"),
        "runs": [content.summary(run) for run in runs],
        "results": shown,
        "metrics": FIGURES,
        "flags": content.flag_table(runs),
        "colors": run_colors(len(runs)),
        "curves": charts.curves(runs),
        "names": names,
        "classes": classes,
        "pr": charts.precision_recall(runs, classes["classes"]),
        "mistakes": _mistakes(results, errors, truth, notes, num_pictures, threshold),
        "notes": notes,  # last: making the rest adds to them
    }


def _names(runs: Sequence[Run], coco: COCO | None) -> dict[int, str]:
    """Class names by category id: those of the annotations, then those of the runs."""
    names: dict[int, str] = {}
    for run in runs[::-1]:  # the first run has the last word
        names |= _recorded_names(run.recorded("classes"))
    if coco:
        names |= {int(category): entry["name"] for category, entry in coco.cats.items()}
    return names


def _recorded_names(classes: Mapping[Any, Any]) -> dict[int, str]:
    """Names by category id, from what a run.json or a checkpoint has."""
    if "categories" in classes:
        return {int(category): str(name) for _, category, name in classes["categories"]}
    # old checkpoints map category ids to names
    digits = [category for category in classes if str(category).lstrip("-").isdigit()]
    return {int(category): str(classes[category]) for category in digits}


def _errors(
    run: Run, result: Result, truth: GroundTruth, notes: list[str], threshold: float
) -> Errors | None:
    """The mistakes of a result, by boxes; adds notes on what is odd. Computes missing tables from the
    detections.
    """
    # those of masks are of the same detections
    if result.masks:
        return None
    detections, coco = result.detections, truth.coco
    if detections is None:
        remedy = "evaluate again with main.py --eval --save_predictions."
        notes.append(
            f"{result.name}: there are no detections (eval/latest.json), so no mistakes are shown; {remedy}"
        )
    if detections is None or coco is None:
        return None

    # The detections must belong to these annotations.
    if not truth.is_of(run):
        notes.append(
            f"{result.name}: was evaluated on other annotations than {truth.path}, so its metrics can't be "
            "compared with the others' and its mistakes are left out; make a page of its own."
        )
        return None
    if unknown := {detection["image_id"] for detection in detections} - coco.imgs.keys():
        notes.append(
            f"{result.name}: its detections are of {len(unknown)} images that {truth.path} does not have, so "
            "its mistakes are left out; name its own with --annotations and --images."
        )
        return None

    # --save_predictions alone writes no tables.
    if result.tables is None:
        result.tables = Tables.from_plain(precision_tables(evaluate_results(coco, detections)))
        result.stats = result.stats or result.tables.stats
    # hundreds of thousands take half a minute
    log.info("%s: sorting %d detections into kinds of mistakes", result.name, len(detections))
    errors = find_errors(coco, detections)

    # Both come from the same evaluation, unless somebody has replaced a file.
    ap50, recorded = errors.average_precision(), result.tables.stats[1]
    if len(errors.objects.index) and abs(ap50 - recorded) > 1e-6:
        pair = f"AP50 {100 * ap50:.1f} and {100 * recorded:.1f}"
        reason = f"its detections and its tables are of different evaluations ({pair}); evaluate again."
        notes.append(f"{result.name}: {reason}")
    best = errors.detections.score.max(initial=0)
    if len(detections) and best < threshold:
        reason = f"no detection scores {threshold:g} or more (the highest is {best:.2f})"
        remedy = "so every object counts as missed; lower --score_threshold."
        notes.append(f"{result.name}: {reason}, {remedy}")
    return errors


def _mistakes(
    results: Sequence[tuple[int, Run, Result]],
    errors: Sequence[Errors | None],
    truth: GroundTruth,
    notes: list[str],
    num_pictures: int,
    threshold: float,
) -> dict[str, Any]:
    shown: dict[str, Any] = {"table": [], "entries": [], "pictures": [], "threshold": threshold}
    num_results = sum(one is not None for one in errors)
    if not num_results or truth.coco is None:
        needed = "an evaluation's detections (eval/latest.json) and its annotations"
        return shown | {"choice": f"Mistakes need {needed}; the top of the page says what is missing."}

    # The more runs, the fewer pictures of each: the page must stay small enough to open.
    count = min(num_pictures, max(1, MAX_PICTURES // (6 * num_results)))
    album = Album(truth.images, truth.coco)
    shown["table"] = [error_table(one, threshold) if one else None for one in errors]
    shown["entries"] = worst(errors, truth.coco, album, threshold, count)
    pairs = [
        _mask_pairs(result, one, truth, threshold, notes)
        for (_, _, result), one in zip(results, errors, strict=True)
    ]
    poor = worst_masks(errors, pairs, truth.coco, album, count)
    shown["entries"] += poor
    shown["pictures"] = album.uris
    if album.unreadable:
        what = next(iter(album.unreadable))
        if len(album.unreadable) > 1:
            what += f" and {len(album.unreadable) - 1} more images"
        remedy = "name the folder of the images with --images."
        notes.append(f"{what} can't be read in {truth.images}; {remedy}")
    if album.full:
        remedy = "the others show boxes on an empty background. Lower --num_pictures."
        notes.append(f"Not all pictures fitted on the page; {remedy}")

    order = "false positives by their score, missed objects by their size"
    if poor:
        order += ", masks by their IoU, of detections that found their object"
    choice = f"The worst {count} of each kind and run: {order}."
    if not count:
        choice = "The pictures were left out (--num_pictures 0)."
    elif not shown["entries"]:
        wrong = f"No detection of at least {threshold:g} is wrong and no object is missed"
        choice = f"{wrong}: there is nothing to show."
    return shown | {"choice": choice}


def _mask_pairs(
    result: Result, errors: Errors | None, truth: GroundTruth, threshold: float, notes: list[str]
) -> MaskPairs | None:
    """The masks of a result beside those of the objects; None if it has none, or a note if they can't be
    used.
    """
    if errors is None or truth.coco is None or truth.path is None:
        return None
    if "segm" not in iou_types_of(result.detections or []):
        return None
    try:
        return MaskPairs(errors, truth.coco, truth.path, threshold)
    except UserError as error:
        notes.append(f"{result.name}: {error}.")
        return None


def write_page(data: Mapping[str, Any], title: str, output: Path) -> int:
    """Fill the template; returns the bytes of the page. The file is replaced as a whole.

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
        # data can't end its element
        "data": text.replace("<", "\\u003c"),
    }
    # in one pass: the parts may contain braces
    template = (FOLDER / "page.html").read_text()
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_text(output, page)
    except OSError as error:
        reason = f"can't be written ({error.strerror}); name another place"
        raise UserError(f"--output {output} {reason}") from None
    return output.stat().st_size


def _digest(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
