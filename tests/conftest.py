"""What several tests share."""

from __future__ import annotations

import multiprocessing.util
import os
import sys
import tempfile
from collections.abc import Iterator
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


@pytest.fixture(scope="session", autouse=True)
def _temporary_folder_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """TMPDIR for what tests and their processes leave in it, killed ones above all; it goes with the session.

    Its path is short, as sockets lie in it (108 bytes). Beside it lie pytest's own folder, which keeps what failed tests wrote,
    and that of multiprocessing in this process, which goes when the process ends.
    """
    tmp_path_factory.getbasetemp()
    multiprocessing.util.get_temp_dir()
    with tempfile.TemporaryDirectory(prefix="t", ignore_cleanup_errors=True) as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", None)  # it is looked up once
        yield


@pytest.fixture(scope="session")
def tiny_coco() -> Path:
    """50 + 50 real COCO images; they are not part of the project."""
    if not TINY_COCO.is_dir():
        pytest.skip(f"no real images at {TINY_COCO}; name their folder with TINY_COCO")
    return TINY_COCO
