"""What users rely on: flags, importable names, files of runs and checkpoints.

A change of internals must not change these, so the tests go through commands and published names.
`tests/fixtures/make.py` wrote the fixtures at commit 828990c. Write the tables again only for a change
that users are meant to see. Exit codes have tests of their own: 2 in test_bad_input.py, 74 in
faults/storage.py, 75 and 130 in test_preemption.py, 76 in test_launch.py.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import pkgutil
import re
import runpy
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from tests.helpers import BATCHFORMER, ROOT, SMALL_IMAGES, SMALL_MODEL, write_coco
from tests.processes import run_forked, run_main_forked
from util import errors

FIXTURES = ROOT / "tests" / "fixtures"

# what made the runs in tests/fixtures, beside data and epochs
SMALL = (*SMALL_IMAGES, *SMALL_MODEL, "--enc_layers", "1", "--num_workers", "0", "--log_every", "1")
# averaged weights, a frozen backbone, and a checkpoint within an epoch that has gradients of half a step
AVERAGED = ("--lr_backbone", "0", "--ema_decay", "0.9", "--accumulate_steps", "2", "--save_every", "3")
# the other optimiser, heads, norm and log entries; the classes are those of the annotations
OTHERS = ("--num_classes", "auto", "--backbone_norm", "bn", "--sgd", "--with_box_refine", "--two_stage")
SKIPPING = ("--on_nan", "skip", "--on_bad_image", "skip")
RUNS = {"batchformer": (*SMALL, *BATCHFORMER, *AVERAGED), "plain": (*SMALL, *OTHERS, *SKIPPING)}
NUM_IMAGES = (8, 3)  # for training and for evaluation
# flags that differ when a run of the fixtures is resumed
CHANGED = {"coco_path", "output_dir", "epochs", "resume"}
# flags that did not exist when the runs were written
NEW = {
    "bf_across_processes",
    "bf_control",
    "bf_dropout",
    "bf_heads",
    "bf_mask_padding",
    "compile",
    "float32_matmul",
    "panoptic_overlap",
    "panoptic_score",
}


def table(name: str) -> list[str]:
    return (FIXTURES / f"{name}.txt").read_text().splitlines()


class Caught(BaseException):
    """Ends a command as soon as it has made its parser.

    It is no Exception, so that the command does not handle it.
    """


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of a command, caught when the command starts to parse."""
    script, *arguments = command.split()
    found: list[argparse.ArgumentParser] = []

    def catch(parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        found.append(parser)
        raise Caught

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # another test may have loaded the module
        patch.setattr(argparse.ArgumentParser, "parse_known_args", catch)
        patch.setattr(os, "cpu_count", lambda: 2)  # a default follows it
        patch.setattr(sys, "path", [str(ROOT), *sys.path])
        module = arguments.pop(0) if script == "-m" else ""
        patch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(Caught):
            if module:
                runpy.run_module(module, run_name="__main__")
            else:
                runpy.run_path(str(ROOT / script), run_name="__main__")
    return found[0]


def flags_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    """A line for every flag and argument: spellings, how many values, default and choices."""
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield from (f"{name} {line}" for line in flags_of(command))
            continue
        values = {0: "switch", None: "one value"}.get(action.nargs, f"values {action.nargs}")
        line = f"{', '.join(action.option_strings) or action.dest}: {values}, default {plain(action.default)}"
        line += ", required" if action.required else ""
        yield line + (f", of {plain(action.choices)}" if action.choices else "")


def plain(value: object) -> object:
    """A default or choices. None and SUPPRESS, tuple and list, text and Path are alike for users."""
    if value is None or value == argparse.SUPPRESS:
        return "none"
    if isinstance(value, (tuple, dict)):
        return list(value)
    if isinstance(value, Path):
        return repr(str(value))
    return repr(value)


def all_flags() -> list[str]:
    """The flags of the table's commands, sorted.

    Of a command that has every flag of main.py, only the others and those with another default are listed.
    """
    of_main = list(flags_of(parser_of("main.py")))
    lines = []
    for command in {line.partition(" | ")[0] for line in table("flags")}:
        flags = list(flags_of(parser_of(command)))
        if command != "main.py" and spellings(of_main) <= spellings(flags):
            flags = ["(every flag of main.py)", *(flag for flag in flags if flag not in of_main)]
        lines += [f"{command} | {flag}" for flag in flags]
    return sorted(lines)


def spellings(lines: Sequence[str]) -> set[str]:
    return {line.partition(":")[0] for line in lines}


def signature(name: str) -> str:
    """`name` with the names of its parameters."""
    return f"{name}({', '.join(inspect.signature(pkgutil.resolve_name(name)).parameters)})"


def test_flags():
    assert all_flags() == table("flags")


def test_names_that_readme_and_docs_import():
    lines = table("names")
    assert [signature(line.partition("(")[0]) for line in lines] == lines


@pytest.mark.parametrize("script", table("scripts"))
def test_scripts_stay_and_can_be_started(script):
    assert (ROOT / script).is_file()
    assert script.endswith(".py") or os.access(ROOT / script, os.X_OK)


def test_exit_codes():
    """That runs end with them is tested elsewhere, by these names."""
    names = ("USER_ERROR", "NOT_SAVED", "PREEMPTED", "LOST_PROCESS", "INTERRUPTED")
    assert [getattr(errors, f"EXIT_{name}") for name in names] == [2, 74, 75, 76, 130]


# ---- runs that an earlier version of the program wrote

METRICS = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large")
METRICS += ("AR 1", "AR 10", "AR 100", "AR small", "AR medium", "AR large")


def metrics_in(output: str) -> tuple[str, ...]:
    """The names of the twelve numbers that an evaluation prints."""
    return tuple(re.findall(r"(A[PR]\d*(?: [a-z]+| \d+)?) (?:\d+\.\d|-)", output))


def layout(value: object, path: str = "") -> Iterator[str]:
    """A line for every entry of nested data: its path, and what it is. Positions in lists are left out."""
    if isinstance(value, dict):
        for name, item in value.items():
            if name not in NEW:
                yield from layout(item, f"{path}/{name}")
    elif isinstance(value, list):
        for item in value:
            yield from layout(item, f"{path}/*")
    elif isinstance(value, torch.Tensor):
        yield f"{path} {value.dtype} {list(value.shape)}"
    else:
        yield f"{path} {type(value).__name__}"


def layout_of(checkpoint: Path) -> set[str]:
    lines = layout(torch.load(checkpoint, weights_only=True))
    # PyTorch alone decides these, and its versions differ
    return {line for line in lines if not line.startswith(("/optimizer/param_groups", "/lr_scheduler"))}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_coco(folder, *NUM_IMAGES)
    return folder


@pytest.fixture(scope="module", params=RUNS)
def resumed(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The folder of an earlier run of two epochs, and a copy that is resumed for a third epoch."""
    before, out = FIXTURES / request.param, tmp_path_factory.mktemp("runs") / request.param
    shutil.copytree(before, out)
    within_an_epoch = list(out.glob("resume_*.pth"))
    if within_an_epoch:
        (out / "checkpoint.pth").unlink()
    resume = "auto" if within_an_epoch else str(out / "checkpoint.pth")
    flags = (*RUNS[request.param], "--coco_path", str(data), "--output_dir", str(out), "--epochs", "3")
    result = run_main_forked(*flags, "--resume", resume)
    assert (result.returncode, result.stderr) == (0, "")
    assert "resume:" not in result.stdout, "a warning"
    return before, out


def lines_of(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_a_resumed_run_writes_the_same_entries(resumed):
    before, out = resumed
    old, new = lines_of(before / "log.txt"), lines_of(out / "log.txt")
    assert [line["epoch"] for line in new] == [0, 1, 2]
    assert new[0] == old[0]
    assert [list(line) for line in new[1:]] == [list(old[1])] * 2
    assert len(new[2]["test_coco_eval_bbox"]) == 12
    assert layout_of(out / "checkpoint.pth") == layout_of(before / "checkpoint.pth")
    assert re.search(rb"sha256:[0-9a-f]{64}$", (out / "checkpoint.pth").read_bytes())
    assert layout_of(out / "eval" / "latest.pth") == layout_of(before / "eval" / "latest.pth")
    if before.name == "batchformer":
        within_an_epoch = out / "resume_0002_000000006.pth", before / "resume_0001_000000006.pth"
        assert layout_of(within_an_epoch[0]) == layout_of(within_an_epoch[1])


def test_a_resumed_run_writes_the_same_files(resumed):
    before, out = resumed
    names = {str(path.relative_to(before)) for path in before.rglob("*")} | {"resume_0003_000000000.pth"}
    if before.name == "batchformer":
        names |= {"resume_0002_000000006.pth"}
        names -= {"resume_0001_000000006.pth"}  # --keep 2
    assert {str(path.relative_to(out)) for path in out.rglob("*")} == names
    old, new = (json.loads((folder / "run.json").read_text()) for folder in resumed)
    assert set(new["starts"][-1].pop("changed_flags")) == CHANGED
    assert {line for line in layout(new) if "commit" not in line} == set(layout(old))
    assert {name for name, value in old["flags"].items() if value != new["flags"][name]} == CHANGED
    assert set(new["flags"]) - set(old["flags"]) == NEW


@pytest.mark.parametrize("kind", RUNS)
def test_evaluation_of_a_checkpoint(kind, data, tmp_path):
    flags = ("--coco_path", str(data), "--num_workers", "0", "--output_dir", str(tmp_path / "out"))
    checkpoint = str(FIXTURES / kind / "checkpoint.pth")
    result = run_main_forked(*flags, "--save_predictions", "--resume", checkpoint, "--eval")
    assert (result.returncode, result.stderr) == (0, "")
    weights = ("", "_ema") if kind == "batchformer" else ("",)
    assert metrics_in(result.stdout) == METRICS * len(weights)
    files = {f"eval{of}.pth" for of in weights} | {f"predictions{of}.json" for of in weights} | {"run.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    assert layout_of(tmp_path / "out" / "eval.pth") == layout_of(FIXTURES / kind / "eval" / "latest.pth")
    predictions = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert list(predictions[0]) == ["image_id", "category_id", "bbox", "score"]


@pytest.mark.parametrize("kind", RUNS)
def test_checkpoints_in_python(kind, data):
    from datasets import build_dataset
    from models import build_model, load_detector, load_model
    from util.checkpoint import load_weights
    from util.config import parse_config

    checkpoint = FIXTURES / kind / "checkpoint.pth"
    picture = next((data / "val2017").iterdir())
    detector = load_detector(checkpoint)
    found = detector(picture).above(0.0)
    assert found.boxes.shape == (len(found.scores), 4)
    assert len(found.names) == len(found.labels) == len(found.category_ids) == len(found.queries)
    assert list(detector.classes.names.values()) == ["one", "two", "three"]
    assert len(detector.outputs([detector.prepare(picture)])["pred_boxes"]) == 1

    model, criterion, postprocessors, config = load_model(checkpoint, coco_path=data, lr=1e-4)
    images, targets = zip(*[build_dataset("train", config)[i] for i in range(2)], strict=True)
    losses = criterion(model(list(images)), targets)
    assert criterion.total(losses).isfinite()
    outputs = model.eval()(list(images))
    detections = postprocessors["bbox"](outputs, torch.ones(2, 2))
    assert set(detections[0]) == {"scores", "labels", "boxes", "queries"}
    flags = (*RUNS[kind], "--num_classes", str(config.data.num_classes), "--save_every", "0")
    fresh = build_model(parse_config(flags))[0]
    assert not load_weights(fresh, str(checkpoint)).missing


def test_tools_read_the_folder_of_a_run(data, tmp_path):
    runs = [str(FIXTURES / kind) for kind in RUNS]
    images = ("--images", str(data / "val2017"))
    annotations = ("--annotations", str(data / "annotations" / "instances_val2017.json"))
    for arguments in (
        ("tools/report.py", *runs, *images, *annotations, "--output", str(tmp_path / "report.html")),
        ("tools/plot_logs.py", *runs, "--output", str(tmp_path / "curve.png")),
    ):
        result = run_forked(*arguments)
        assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "curve.png"}
