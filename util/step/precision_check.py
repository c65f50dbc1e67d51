"""Check of mixed precision before a run.

A device may not have all operators. And for a map of a few pixels, or a product of a few rows, a
library may use a kernel of its own, which on some processors reads memory outside of its tensors.
So each kind of layer of a model is run at small sizes on the CPU, forward and backward, with
garbage in freed memory, and compared with float64. If an operator is wrong at one size, this process
computes it in float32 at all small sizes: whether garbage does harm varies from run to run, and the
bits must not.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.config import RunConfig
from util.errors import UserError
from util.step.precision import LOW_TYPES, autocast, full_precision, use_float32_matmul

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
SMALL = 8  # pixels of a map's shorter side, or rows of a product, up to which a call is small
MAPS = [(2, 1), (1, 2), (3, 3)]  # height and width of the maps that are tried
ROWS = [1, 2, 3]  # and the rows
# bytes: NaN in every type; 13 million in bfloat16 and float32, 14.6 in float16
GARBAGE = [0xFF, 0x4B]

# name in torch.nn.functional, and of the operator -> size of a call, from its first argument
SIZES: dict[str, Callable[[Tensor], int]] = {
    "conv2d": lambda map_BCHW: min(map_BCHW.shape[-2:]),
    "linear": lambda x: x.shape[:-1].numel(),
    "scaled_dot_product_attention": lambda query: query.shape[-2],
}
# by operator; what is registered exists as long as its library
_replaced: dict[str, torch.library.Library] = {}


def move_to_device(model: nn.Module, device: torch.device, run: RunConfig) -> None:
    """Move a detector where products have the precision of --amp and --float32_matmul.

    Raises UserError if the device does not have it.
    """
    use_float32_matmul(run.float32_matmul, device)
    check_precision(model.to(device), run.amp)


def check_precision(model: nn.Module, amp: str) -> None:
    """Try PyTorch's operators in this precision, and replace those that are wrong for small inputs.

    Args:
        model: on its device.
        amp: "off", "bf16" or "fp16".

    Raises:
        UserError: the device has no such operator, or its numbers are wrong in float32 too.
    """
    if amp == "off":
        return
    device = next(model.parameters()).device
    try:
        # the random numbers of the run must not depend on this
        with torch.enable_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            _try_operators(amp, device)
            if device.type == "cpu":
                _try_small_calls(model, amp)
    except RuntimeError as error:  # NotImplementedError is one
        reason = f"PyTorch {torch.__version__} says: {str(error).splitlines()[0]}"
        raise UserError(_refusal(amp, device, reason)) from None


def _refusal(amp: str, device: torch.device, reason: str) -> str:
    other = {"bf16": "fp16", "fp16": "bf16"}[amp]
    return f"--amp {amp} can't be used on {device}: {reason}; use --amp {other}, or leave it out"


def _try_operators(amp: str, device: torch.device) -> None:
    """Run every kind of layer of the detector but deformable attention, forward and backward."""
    body = nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 1),
        nn.GroupNorm(32, 32),
    )
    layer = nn.TransformerEncoderLayer(32, 2, dim_feedforward=32)
    with autocast(amp, device):
        maps = body.to(device)(torch.zeros(2, 3, 16, 16, device=device))
        out = layer.to(device)(maps.flatten(2).transpose(1, 2))
    out.float().sum().backward()


@dataclass(frozen=True)
class Call:
    """An operator, the shapes of its tensors, and its other arguments by name."""

    operator: str
    shapes: tuple[tuple[int, ...], ...]
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return f"{self.operator} of {' and '.join(str(list(shape)) for shape in self.shapes)}"


def _try_small_calls(model: nn.Module, amp: str) -> None:
    # equal layers once
    calls = dict.fromkeys(call for module in model.modules() for call in _small_calls(module))
    for operator in SIZES:
        own = [call for call in calls if call.operator == operator]
        wrong = next((call for call in own if not _is_right(call, amp)), None)
        if wrong is None:
            continue
        what = f"PyTorch {torch.__version__} gives wrong numbers for {wrong}"
        _compute_in_float32(operator)
        if not all(_is_right(call, amp) for call in own):
            raise UserError(_refusal(amp, CPU, f"{what}, in float32 too"))
        then = f"every {operator} of at most {SMALL} pixels a side, or rows, is computed in float32"
        log.info("--amp %s on this CPU: %s; %s", amp, what, then)


def _small_calls(module: nn.Module) -> Iterator[Call]:
    """The calls of a layer with small inputs; none for other modules."""
    if isinstance(module, nn.MultiheadAttention):
        head = module.embed_dim // module.num_heads
        for rows in ROWS:
            # a tiny dropout drops nothing, and PyTorch uses another kernel
            for dropout in (0, 1e-9):
                shapes = ((2, module.num_heads, rows, head),) * 3
                yield Call("scaled_dot_product_attention", shapes, (("dropout_p", dropout),))
    elif isinstance(module, nn.Linear):
        for rows in ROWS:
            yield Call("linear", ((rows, module.in_features), *_parameter_shapes(module)))
    elif isinstance(module, nn.Conv2d):
        names = ("stride", "padding", "dilation", "groups")
        options = tuple((name, getattr(module, name)) for name in names)
        for size in MAPS:
            yield Call("conv2d", ((2, module.in_channels, *size), *_parameter_shapes(module)), options)


def _parameter_shapes(module: nn.Module) -> list[tuple[int, ...]]:
    """Of the weight, and of the bias if there is one."""
    # a convolution that applies a norm has a bias that is no parameter
    shapes = getattr(module, "shapes", None) or [p.shape for p in module.parameters(recurse=False)]
    return [tuple(shape) for shape in shapes]


def _is_right(call: Call, amp: str) -> bool:
    """Whether outputs and gradients are near float64's, and do not depend on freed memory."""
    low = LOW_TYPES[amp]
    inputs = [_noise(shape, low) for shape in call.shapes]
    exact = [x.float() for x in _results(call, [x.double() for x in inputs], "off", low)]
    first, second = (_results(call, inputs, amp, low, partial(_litter, exact, byte)) for byte in GARBAGE)
    return all(map(torch.equal, first, second)) and all(map(_is_near, first, exact))


@lru_cache(maxsize=4)  # the weights of a layer serve all its sizes
def _noise(shape: tuple[int, ...], low: torch.dtype) -> Tensor:
    """float32, and exact in the low type."""
    return (torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 0.5).to(low).float()


def _results(
    call: Call,
    inputs: Sequence[Tensor],
    amp: str,
    low: torch.dtype,
    litter: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """The output and the gradients of all inputs. `litter` runs before the forward and the backward."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    litter()
    with autocast(amp, CPU):
        out = getattr(F, call.operator)(*leaves, **dict(call.options))
    # the same in every type
    gradient = torch.linspace(-1, 1, out.numel()).to(low).to(out.dtype).view_as(out)
    litter()
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def _is_near(result: Tensor, exact: Tensor) -> bool:
    # rounding is far below a tenth of the largest number, a wrong kernel far above
    return bool((result.float() - exact).abs().max() < 0.1 * (1 + exact.abs().max()))


def _litter(like: Sequence[Tensor], byte: int) -> None:
    """Leave garbage in freed memory, in blocks of the sizes of these tensors in 16 and 32 bits."""
    blocks = [torch.full((width * x.numel(),), byte, dtype=torch.uint8) for x in like for width in (2, 4)]
    del blocks


def _compute_in_float32(operator: str) -> None:
    """Make autocast on a CPU use float32 for small calls of an operator; results stay in its type."""
    function, size = getattr(F, operator), SIZES[operator]

    def run(x: Tensor, *others: Any, **options: Any) -> Tensor:
        low = used = torch.get_autocast_dtype("cpu")
        # an exported graph runs on other processors
        if not torch.compiler.is_exporting() and size(x) <= SMALL:
            used = torch.float32
        arguments = [_cast(argument, used) for argument in (x, *others)]
        # without autocast: this function would call itself
        with full_precision(CPU):
            return function(*arguments, **options).to(low)

    _replaced[operator] = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions warn that autocast's own kernel is replaced
        _replaced[operator].impl(operator, run, "AutocastCPU")


def _cast(argument: Any, dtype: torch.dtype) -> Any:
    if isinstance(argument, Tensor) and argument.is_floating_point():
        return argument.to(dtype)
    return argument
