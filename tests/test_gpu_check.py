"""tools/gpu_check.sh as far as it gets without a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import run


def test_wrong_arguments():
    done = run("./tools/gpu_check.sh", "one", "two")
    assert done.returncode == 2
    assert "./tools/gpu_check.sh [folder]" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path):
    done = run("./tools/gpu_check.sh", str(tmp_path / "results"))
    assert done.returncode == 2
    assert "no GPU" in done.stderr and torch.__version__ in done.stderr
