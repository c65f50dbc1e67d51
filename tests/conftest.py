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

from tests.helpers import SMALL_IMAGES, SMALL_MODEL, write_coco
from tests.processes import run_main_forked

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TINY_COCO = Path(os.environ.get("TINY_COCO", ROOT.parent / "shared" / "data" / "tiny_coco"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(missing_gpu)


@pytest.fixture(scope="session", autouse=True)
def _temporary_folder_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """TMPDIR for what tests and their processes leave in it, killed ones above all; it goes with
    the session.

    Its path is short, as sockets lie in it (108 bytes). Beside it lie pytest's own folder, which
    keeps what failed tests wrote, and that of multiprocessing in this process, which goes when the
    process ends.
    """
    tmp_path_factory.getbasetemp()
    multiprocessing.util.get_temp_dir()
    with (
        tempfile.TemporaryDirectory(prefix="t", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", None)  # it is looked up once
        yield


@pytest.fixture(scope="session")
def tiny_coco() -> Path:
    """50 + 50 real COCO images; they are not part of the project."""
    if not TINY_COCO.is_dir():
        pytest.skip(f"no real images at {TINY_COCO}; name their folder with TINY_COCO")
    return TINY_COCO


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory) -> Path:
    """The folder of a run of 2 epochs of 4 steps, gone on with from the middle of the second, with
    one epoch more.

    Noise images, --tensorboard and --ema_decay.
    """
    folder = tmp_path_factory.mktemp("run")
    write_coco(folder / "data", num_train=8, num_val=3)
    flags = (
        "--coco_path",
        str(folder / "data"),
        *SMALL_IMAGES,
        *SMALL_MODEL,
        "--batch_size",
        "2",
        "--num_workers",
        "0",
        "--log_every",
        "1",
        "--save_every",
        "3",
        "--tensorboard",
        "--output_dir",
        str(folder / "out"),
        "--ema_decay",
        "0.9",
    )
    result = run_main_forked(*flags, "--epochs", "2")
    assert result.returncode == 0, result.stderr
    for file in folder.glob("out/checkpoint*.pth"):
        file.unlink()
    (folder / "out" / "resume_0002_000000000.pth").unlink()
    result = run_main_forked(*flags, "--epochs", "3", "--resume", "auto")
    assert result.returncode == 0, result.stderr
    assert "resume_0001_000000006.pth" in result.stdout
    assert result.stderr == "", "no warnings"
    return folder / "out"
