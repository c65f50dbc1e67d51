"""Reading the golden cases: models with the recipe's weights, loaded from a published-style
checkpoint file.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models import build_model
from tests.golden import recipe
from util.checkpoint import load_weights
from util.config import parse_config

FOLDER = Path(__file__).resolve().parent / "golden"
# weights come from the checkpoint: there is nothing to download
NO_DOWNLOAD = ["--backbone_weights", "none"]


@dataclass(frozen=True)
class Case:
    name: str
    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def images(self) -> list[torch.Tensor]:
        return recipe.images(self.facts["sizes"])

    @property
    def targets(self) -> list[dict[str, torch.Tensor]]:
        return recipe.targets(self.facts["sizes"], self.facts["counts"])


def case_names(mode: str) -> list[str]:
    return sorted(path.stem for path in FOLDER.glob(f"*_{mode}.json"))


def read_case(name: str) -> Case:
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return Case(name, json.loads((FOLDER / f"{name}.json").read_text()), dict(arrays))


def write_published_checkpoint(case: Case, path: Path) -> None:
    """As the published program saves: every alias, a pickled Namespace, and the entries a profiler
    leaves.
    """
    same = case.facts["same_tensor_as"]
    state = {
        name: _tensor(same.get(name, name), tuple(shape)) for name, shape in case.facts["state_dict"].items()
    }
    state["transformer.total_params"] = torch.zeros(1)
    torch.save({"model": state, "epoch": 49, "args": argparse.Namespace(lr=2e-4, bf=1, device="cuda")}, path)


# most cases share the backbone, and drawing forty million numbers takes longer than using them
_tensor = lru_cache(maxsize=None)(recipe.tensor_for)


def load_case(name: str, folder: Path):
    """The case, and model, criterion, postprocessors and report with its weights loaded, in its
    mode.
    """
    case = read_case(name)
    path = folder / "published.pth"
    write_published_checkpoint(case, path)
    config = parse_config([*case.facts["flags"], *NO_DOWNLOAD])
    model, criterion, postprocessors = build_model(config)
    report = load_weights(model, str(path))
    path.unlink()
    training = case.facts["mode"] == "train"
    recipe.no_dropout(model)
    model.train(training)
    criterion.train(training)
    return case, config, model, criterion, postprocessors, report
