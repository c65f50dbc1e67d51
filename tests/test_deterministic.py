"""--deterministic: equal bits, or an error that names what can't give them."""

from __future__ import annotations

import json

import pytest
import torch

from tests.helpers import BATCHFORMER, SMALL_IMAGES, SMALL_MODEL, run_main, write_coco
from tests.processes import run_forked
from util.checkpoint import read_checkpoint
from util.errors import UserError
from util.step.deterministic import explaining_refusals

TIMES = {"train_time", "eval_time", "time", "date"}  # what may differ between equal runs


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_two_runs_in_fresh_processes_give_the_same_bits(tmp_path):
    """With dropout, stochastic depth, augmentation, loader workers, BatchFormerV2 and two stages,
    on two threads.
    """
    write_coco(tmp_path / "data", num_train=8, num_val=2)
    runs = []
    for name in ("first", "second"):
        out = tmp_path / name
        result = run_main(
            "--deterministic",
            "--coco_path",
            str(tmp_path / "data"),
            *SMALL_IMAGES,
            *SMALL_MODEL,
            *BATCHFORMER,
            "--with_box_refine",
            "--two_stage",
            "--dropout",
            "0.2",
            "--drop_path",
            "0.2",
            "--num_workers",
            "2",
            "--device",
            "cpu",
            "--epochs",
            "1",
            "--batch_size",
            "4",
            "--output_dir",
            str(out),
            env={
                "OMP_NUM_THREADS": "2",
                "OMP_WAIT_POLICY": "passive",
            },  # two that spin come nowhere on a busy machine
        )
        assert result.returncode == 0, result.stderr
        lines = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
        runs.append(
            (
                read_checkpoint(out / "checkpoint.pth"),
                [{k: v for k, v in x.items() if k not in TIMES} for x in lines],
            )
        )
    (first, first_log), (second, second_log) = runs
    assert first_log == second_log
    assert_same_bits(first["model"], second["model"])
    assert_same_bits(first["optimizer"], second["optimizer"])


def assert_same_bits(a, b):
    """Of tensors in dictionaries and lists in each other."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for name in a:
            assert_same_bits(a[name], b[name])
    elif isinstance(a, (list, tuple)):
        for one, other in zip(a, b, strict=True):
            assert_same_bits(one, other)
    else:
        assert a == b


def try_what_may_be_refused():
    """Operations of which PyTorch 2.10 to 2.15 have no deterministic form."""
    torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    torch.nn.functional.max_unpool2d(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1, dtype=torch.int64), 2)


@pytest.fixture
def refused(deterministic) -> str:
    """The first of them that this PyTorch refuses."""
    try:
        try_what_may_be_refused()
    except RuntimeError as error:
        return str(error).split()[0]
    pytest.skip("this PyTorch has a deterministic form of each of them")


def test_an_operation_without_a_deterministic_form_is_named(refused):
    with (
        pytest.raises(UserError, match=f"--deterministic: {refused} has no .* leave out --det") as error,
        explaining_refusals(),
    ):
        try_what_may_be_refused()
    assert "\n" not in str(error.value)


def test_so_is_one_in_the_backward(refused):
    class Refused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            try_what_may_be_refused()
            return grad

    x = torch.zeros(1, requires_grad=True)
    with pytest.raises(UserError, match=f"--deterministic: {refused} has no"), explaining_refusals():
        Refused.apply(x).sum().backward()


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="something else") as error, explaining_refusals():
        raise RuntimeError("something else")
    assert not isinstance(error.value, UserError)


def test_cublas_without_a_fixed_workspace_is_explained(monkeypatch):
    """PyTorch's message, which only a GPU can provoke."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with (
        pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG=:0:0; unset it, set it to :4096:8"),
        explaining_refusals(),
    ):
        raise RuntimeError(
            "Deterministic behavior was enabled with either "
            "`torch.use_deterministic_algorithms(True)` or "
            "`at::Context::setDeterministicAlgorithms(true)`, but this operation is not "
            "deterministic because it uses CuBLAS and you have CUDA >= 10.2. To enable "
            "deterministic behavior in this case, you must set an environment variable"
        )


# main.py with a loss of which PyTorch has no deterministic form
PROGRAM = """
import runpy, sys
from models.criterion import SetCriterion
from tests.test_deterministic import try_what_may_be_refused

total = SetCriterion.total

def refused(self, losses):
    try_what_may_be_refused()
    return total(self, losses)

SetCriterion.total = refused
sys.argv = ["main.py", *sys.argv[1:]]
runpy.run_path("main.py", run_name="__main__")
"""


def test_a_run_that_can_not_be_deterministic_ends_with_one_line(tmp_path, refused):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    write_coco(tmp_path, num_train=2, num_val=1)
    flags = (
        "--coco_path",
        str(tmp_path),
        *SMALL_IMAGES,
        *SMALL_MODEL,
        "--num_workers",
        "0",
        "--device",
        "cpu",
        "--epochs",
        "1",
    )
    result = run_forked(str(program), "--deterministic", *flags)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(f"error: --deterministic: {refused} has no deterministic implementation")
    assert len(result.stderr.splitlines()) == 1
    assert run_forked(str(program), *flags).returncode == 0


@pytest.mark.parametrize(("before", "after"), [("", ":4096:8"), (":16:8", ":16:8")])
def test_what_is_set(tmp_path, before, after):
    program = tmp_path / "program.py"
    program.write_text("""
import os, torch
from util.step.deterministic import make_deterministic
torch.backends.cudnn.benchmark = True
torch.utils.deterministic.fill_uninitialized_memory = True
make_deterministic()
cudnn = torch.backends.cudnn
print(os.environ["CUBLAS_WORKSPACE_CONFIG"], torch.are_deterministic_algorithms_enabled(),
      torch.is_deterministic_algorithms_warn_only_enabled(), cudnn.deterministic, cudnn.benchmark,
      torch.utils.deterministic.fill_uninitialized_memory)
""")
    result = run_forked(str(program), env={"CUBLAS_WORKSPACE_CONFIG": before})
    assert result.stdout.split() == [after, "True", "False", "True", "False", "False"], result.stderr
