"""Imports point down only (docs/design.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.helpers import ROOT

PACKAGES = ("models", "datasets", "util", "engine", "main", "benchmark", "tools")
# The rooms, lowest first. A room imports from its own level and from those below.
LEVELS = (
    ("util.errors", "util.atomic", "util.allocator"),
    (
        "util.backbones",
        "util.class_map",
        "util.data_identity",
        "util.config",
        "util.checkpoint",
        "util.other_layouts",
        "util.box_ops",
        "util.nested_tensor",
    ),
    ("util.distributed", "util.images", "util.draw", "util.text_files"),
    ("util.step", "util.optim"),
    ("util.run",),
    ("models", "datasets"),
    ("engine",),
    ("main", "tools.benchmarks"),
    ("benchmark",),
    ("tools",),
)
# rooms that do not know each other, though their levels allow it
APART = ({"models", "datasets"}, {"main", "tools.benchmarks"}, {"main", "benchmark"})
FILES = [
    p for p in sorted(ROOT.rglob("*.py")) if p.relative_to(ROOT).parts[0].removesuffix(".py") in PACKAGES
]
OPERATOR = ROOT / "models" / "ops"
# what builds it, and what one of its backends is made of
OPERATOR_ALSO = {"setup.py": {"setuptools", "wheel"}, "triton_backend.py": {"triton"}}
# modules of losses and results, which never see the network
LOSS_SIDE = ("matcher", "criterion", "postprocess")
NETWORK = {
    "deformable_detr",
    "deformable_transformer",
    "encoder",
    "decoder",
    "backbone",
    "heads",
    "batchformer",
    "build",
    "ops",
}


def imports(path: Path) -> set[str]:
    """Full names of what a file imports, functions' own imports too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:  # only the operator's folder, which others take under names of their own
                assert node.level == 1, f"{path}: imports are absolute, or of the same folder"
                assert path.parent == OPERATOR, f"{path}: imports are absolute"
                module = f"models.ops.{module}".removesuffix(".")
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def room_of(module: str) -> tuple[int, str]:
    """Level and name of the room that a module belongs to."""
    for level, rooms in enumerate(LEVELS):
        for room in rooms:
            if module == room or module.startswith(f"{room}."):
                return level, room
    raise AssertionError(f"{module} belongs to no room: add it to LEVELS")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts == ("util", "__init__"):
        return
    level, room = room_of(".".join(parts))
    for name in imports(path):
        if name.split(".")[0] in PACKAGES and name != "util":
            other_level, other = room_of(name)
            assert other_level <= level, name
            assert {room, other} not in APART, name


@pytest.mark.parametrize("name", LOSS_SIDE)
def test_losses_never_import_the_network(name):
    used = {
        full.split(".")[1] for full in imports(ROOT / "models" / f"{name}.py") if full.startswith("models.")
    }
    assert not used & NETWORK


@pytest.mark.parametrize("path", sorted(OPERATOR.rglob("*.py")), ids=lambda p: p.name)
def test_the_operator_imports_torch_alone(path):
    import sys

    outside = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "models"} | OPERATOR_ALSO.get(path.name, set())
    assert all(
        name.startswith("models.ops") or name == "models"
        for name in imports(path)
        if name.startswith("models")
    )


def test_the_test_sees_an_upward_import(tmp_path):
    (tmp_path / "bad.py").write_text("def f():\n    from models.build import build_model\n")
    assert "models.build" in imports(tmp_path / "bad.py")


def test_batchformer_is_nowhere_else():
    """Whether a batch has two streams is asked in one place; the loop and the losses only carry
    their number.
    """
    for name in (
        "engine.py",
        "models/criterion.py",
        "models/encoder.py",
        "models/decoder.py",
        "models/deformable_detr.py",
    ):
        used = imports(ROOT / name)
        assert not any("batchformer" in full for full in used), name
