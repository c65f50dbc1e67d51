"""What several tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TINY_COCO = Path(os.environ.get("TINY_COCO", ROOT.parent / "shared" / "data" / "tiny_coco"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(missing_gpu)


@pytest.fixture(scope="session")
def tiny_coco() -> Path:
    """50 + 50 real COCO images; they are not part of the project."""
    if not TINY_COCO.is_dir():
        pytest.skip(f"no real images at {TINY_COCO}; name their folder with TINY_COCO")
    return TINY_COCO
