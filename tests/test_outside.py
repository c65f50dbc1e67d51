"""What users rely on: flags, importable names, files of runs and checkpoints. Internals may change, this may not.

The tests go through commands and published names only. `tests/fixtures` was written by `tests/fixtures/make.py` at commit
828990c; make the tables again only for a change that users are to see. Exit codes have tests of their own: 2 in
test_bad_input.py, 74 in test_checkpoint_folder.py, 75 and 130 in test_preemption.py, 76 in test_launch.py.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import runpy
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from tests.helpers import ROOT

FIXTURES = ROOT / "tests" / "fixtures"

COMMANDS = (
    "main.py",
    "benchmark.py",
    "benchmark.py op",
    "-m datasets.synthetic",
    "tools/check_data.py",
    "tools/convert_checkpoint.py",
    "tools/convert_dataset.py",
    "tools/draw_detections.py",
    "tools/explain.py",
    "tools/finetune.py",
    "tools/plot_logs.py",
    "tools/predict.py",
    "tools/replay.py",
    "tools/report.py",
    "tools/run_with_submitit.py",
    "tools/subset_coco.py",
)
SCRIPTS = (
    "configs/r101_deformable_detr.sh",
    "configs/r50_deformable_detr.sh",
    "configs/r50_deformable_detr_plus_iterative_bbox_refinement.sh",
    "configs/r50_deformable_detr_plus_iterative_bbox_refinement_plus_plus_two_stage.sh",
    "configs/r50_deformable_detr_single_scale.sh",
    "configs/r50_deformable_detr_single_scale_dc5.sh",
    "configs/synthetic.sh",
    "models/ops/make.sh",
    "models/ops/test.py",
    "tools/overfit.sh",
    "tools/quickstart.sh",
    "tools/run_dist_launch.sh",
    "tools/run_dist_slurm.sh",
    "tools/test.sh",
)
# README and docs import these
NAMES = (
    "datasets.build_dataset",
    "models.build_model",
    "models.load_detector",
    "models.load_model",
    "models.inspection.as_in_training",
    "models.inspection.recording",
    "models.ops.functions.MSDeformAttnFunction.apply",
    "models.ops.functions.ms_deform_attn",
    "models.ops.functions.ms_deform_attn_core_pytorch",
    "models.ops.functions.ms_deform_attn_fused",
    "models.ops.linear.TokenLinear",
    "models.ops.modules.MSDeformAttn",
    "util.checkpoint.load_weights",
    "util.config.parse_config",
    "util.optim.build_optimizer",
    "util.video.VideoReader",
    "util.visualizer.draw_boxes",
)


class Caught(BaseException):
    """Ends a command as soon as it has made its parser. No Exception, so that the command does not handle it."""


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
    if value is None or value == argparse.SUPPRESS:
        return "none"
    return (
        str(value)
        if isinstance(value, Path)
        else list(value)
        if isinstance(value, (tuple, dict))
        else repr(value)
    )


def all_flags() -> list[str]:
    """The flags of every command, sorted. Where a command has all of main.py's, only those that differ are listed."""
    lines: list[str] = []
    of_main: list[str] = []
    for command in COMMANDS:
        flags = list(flags_of(parser_of(command)))
        of_main = of_main or flags
        if command != "main.py" and spellings(of_main) <= spellings(flags):
            flags = ["(every flag of main.py)", *(flag for flag in flags if flag not in of_main)]
        lines += [f"{command} {flag}" for flag in flags]
    return sorted(lines)


def spellings(lines: Sequence[str]) -> set[str]:
    return {line.partition(":")[0] for line in lines}


def signature(name: str) -> str:
    """`name` with the names of its parameters."""
    parts = name.split(".")
    value: object = None
    for i in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[i:]:
            value = getattr(value, attribute)
        break
    assert callable(value), name
    return f"{name}({', '.join(inspect.signature(value).parameters)})"


def test_flags():
    assert all_flags() == (FIXTURES / "flags.txt").read_text().splitlines()


def test_names():
    assert [signature(name) for name in NAMES] == (FIXTURES / "names.txt").read_text().splitlines()


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_stay_and_can_be_started(script):
    assert (ROOT / script).is_file()
