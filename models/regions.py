"""--compile: torch.compile for the parts of a detector in which a training step spends its time.

Each region is compiled by itself. Between the regions are BatchFormerV2, which changes the number of
images, and small functions that are called once a step. Regions of equal shapes share their code, so
six encoder layers cost one compilation. Sizes of images are symbols in that code: another size needs
no other code.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from models.backbone import Backbone
from models.deformable_detr import DeformableDETR
from util.errors import UserError

log = logging.getLogger(__name__)

# Codes for one function: a ResNet has eight shapes of blocks, and --drop_path gives each layer a rate
# of its own. PyTorch's limit is 8. Beyond it PyTorch warns, and runs the function as it is written.
MOST_CODES = 32


def check_compiler(device: torch.device) -> None:
    """Raise UserError if torch.compile lacks something that it needs on a device."""
    # as torch._inductor and Triton look for them
    if device.type == "cuda":
        commands = [os.environ.get("CC", "gcc"), "clang"]
        if importlib.util.find_spec("triton") is None:
            raise UserError(_refusal(device, "Triton is not installed", "pip install triton"))
    else:
        commands = [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]
    if not any(shutil.which(word) for command in commands for word in shlex.split(command)[:1]):
        found = f"no compiler is found ({' or '.join(commands)})"
        raise UserError(_refusal(device, found, "install GCC"))
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise UserError(_refusal(device, "Python's headers are not installed", "install python3-dev"))


def _refusal(device: torch.device, reason: str, remedy: str) -> str:
    return f"--compile can't be used on {device}: {reason}; {remedy}, or leave --compile out"


def compile_regions(model: DeformableDETR, backend: str = "inductor") -> None:
    """Let the regions of a detector be compiled when they first run. Names in its state dict stay.

    A copy of the model (the averaged weights) is not compiled. `backend` is that of torch.compile.
    """
    _prepare_compiler()
    found = regions(model)
    for modules in found.values():
        for module in modules:
            module.compile(dynamic=True, backend=backend)
    names = ", ".join(f"{len(modules)} {name}" for name, modules in found.items())
    log.info("--compile: %s are compiled in the first steps; evaluation is not compiled", names)
    model.register_forward_pre_hook(CompilationLog())


def _prepare_compiler() -> None:
    """Settings of torch.compile that hold for the whole process."""
    from torch._inductor import config, lowering  # takes a second

    # Sides that are equal in the first image are not equal in every image.
    torch.fx.experimental._config.use_duck_shape = False
    torch._dynamo.config.recompile_limit = MOST_CODES
    # The only floats are rates of dropout and the like. As symbols they cost a second attempt.
    torch._dynamo.config.specialize_float = True
    # It would cut a region where a bucket of DDP ends. Regions are smaller than buckets as they are.
    torch._dynamo.config.optimize_ddp = False
    # Maps keep the order of their channels: another one would fix their sizes in the backward.
    config.layout_optimization = False
    # PyTorch 2.14 fixes the sizes of the maps where it plans the backward of a convolution, and each size
    # would be compiled anew. Called as it is, the operator takes any size.
    backward = torch.ops.aten.convolution_backward.default
    lowering.lowerings[backward] = lowering.fallback_handler(backward)


def regions(model: DeformableDETR) -> dict[str, list[nn.Module]]:
    """The modules that are compiled, by what they are; a module that has several places once."""
    backbone = model.backbone[0]
    assert isinstance(backbone, Backbone)
    stages = [child for child in backbone.body.children() if isinstance(child, nn.Sequential)]
    heads = [*model.class_embed, *model.bbox_embed]
    return {
        # Not the backbone as a whole: equal blocks share code, and it compiles in less time.
        "blocks of the backbone": [block for stage in stages for block in stage],
        "encoder layers": list(model.transformer.encoder.layers),
        "decoder layers": list(model.transformer.decoder.layers),
        "heads": list(dict.fromkeys(heads)),
    }


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """A block in which compiled regions run as they are written.

    Evaluation does: a checkpoint gives the same bits with and without --compile. So does the search
    for a number that is not finite, which looks into the regions.
    """
    if any(module._compiled_call_impl is not None for module in model.modules()):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


class CompilationLog:
    """Says at the start of a step what was compiled since it was asked last; a hook of the model.

    The backward of a region is compiled when it first runs, so only the next step knows the sum.
    """

    def __init__(self) -> None:
        self._codes, self._seconds, self._breaks = _compiled_so_far()

    def __call__(self, *_: object) -> None:
        codes, seconds, breaks = _compiled_so_far()
        if codes > self._codes:
            log.info("--compile: %d graphs compiled in %.0f s", codes - self._codes, seconds - self._seconds)
        for reason in sorted(breaks - self._breaks):
            log.warning("--compile: a part of a region is not compiled: %s", reason.splitlines()[0])
        self._codes, self._seconds, self._breaks = codes, seconds, breaks


def _compiled_so_far() -> tuple[int, float, frozenset[str]]:
    """Of this process: compiled graphs, seconds that they took, and why functions were cut."""
    counters = torch._dynamo.utils.counters
    seconds = torch._dynamo.utils.calculate_time_spent()["total_wall_time"]
    return counters["stats"]["unique_graphs"], seconds, frozenset(counters["graph_break"])
