"""--deterministic: the same bits in every run on the same machine.

An operation that cannot do that ends the run with an error that names it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from util.errors import UserError

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
# eight buffers of 4 MiB: cuBLAS then takes its workspace in a fixed order
FIXED_WORKSPACE = ":4096:8"
# parts of the messages: PyTorch raises a plain RuntimeError
_NO_IMPLEMENTATION = " does not have a deterministic implementation"
_NO_FIXED_WORKSPACE = "not deterministic because it uses CuBLAS"


def make_deterministic() -> None:
    """Make PyTorch and models/ops use deterministic algorithms, and refuse operations without one.

    Call it before anything computes on a GPU: cuBLAS reads its environment variable once. A value
    that is set already is kept. Equal bits also need the same machine, versions, and number of
    processes and threads.
    """
    os.environ[CUBLAS] = os.environ.get(CUBLAS) or FIXED_WORKSPACE
    torch.use_deterministic_algorithms(True)
    # it writes NaN into every new tensor to find errors; no result here depends on new memory
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 - no attribute for mypy
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False  # it chooses kernels by their time


@contextmanager
def explaining_refusals() -> Iterator[None]:
    """A block in which PyTorch's error about a missing deterministic algorithm becomes a UserError.

    Every other error passes.
    """
    try:
        yield
    except RuntimeError as error:
        explanation = _explanation(str(error))
        if explanation is None:
            raise
        raise UserError(explanation) from None


def _explanation(message: str) -> str | None:
    """Culprit and remedy; None for a message about something else."""
    operation, found, _ = message.partition(_NO_IMPLEMENTATION)
    if found:
        # in the backward the operation can follow other lines
        name = operation.splitlines()[-1].removeprefix("RuntimeError: ")
        return (
            f"--deterministic: {name} has no deterministic implementation in PyTorch "
            f"{torch.__version__}; leave out "
            "--deterministic, or the flag that brought this operation in"
        )
    if _NO_FIXED_WORKSPACE in message:
        return (
            f"--deterministic: products of matrices are not deterministic with "
            f"{CUBLAS}={os.environ.get(CUBLAS, '')}; unset it, set it to {FIXED_WORKSPACE}, or "
            f"leave out --deterministic"
        )
    return None
