"""Before a run in mixed precision: whether the device has the operators, and whether a CPU is right
about small inputs.

For a map of a few pixels or a product of a few rows a library may take a kernel that it takes for
nothing else, and on some processors such a kernel reads memory that it does not own. So each kind
of layer of a model is tried at small sizes, forward and backward, with garbage in freed memory, and
compared with float64. An operator that is wrong at one of these sizes is from then on computed in
float32 at all of them: garbage may do no harm here and harm in another run, whose bits must be the
same.
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

from util.errors import UserError
from util.step.precision import LOW_TYPES, autocast, full_precision

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
SMALL = 8  # the pixels of a map's shorter side or the rows of a product, up to which it is small
MAPS = [(2, 1), (1, 2), (3, 3)]  # height and width of those that are tried
ROWS = [1, 2, 3]
# bytes: NaN in every type; 13 million in bfloat16 and float32, 14.6 in float16
GARBAGE = [0xFF, 0x4B]

# functions of torch.nn.functional, and operators of the same names; what is small about a call, by
# its first argument
SIZES: dict[str, Callable[[Tensor], int]] = {
    "conv2d": lambda map_BCHW: min(map_BCHW.shape[-2:]),
    "linear": lambda x: x.shape[:-1].numel(),
    "scaled_dot_product_attention": lambda query: query.shape[-2],
}
_replaced: dict[
    str, torch.library.Library
] = {}  # by operator; a library holds what is registered as long as it lives


def check_precision(model: nn.Module, amp: str) -> None:
    """Try, on the model's device, what it takes from PyTorch in this precision; small calls are
    mended where need be.

    Raises:
        UserError: the device lacks an operator in this precision, or gives wrong numbers that can't
        be mended.
    """
    if amp == "off":
        return
    device = next(model.parameters()).device
    try:
        # the run's own random numbers are not to depend on this
        with torch.enable_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            _try_operators(amp, device)
            if device.type == "cpu":
                _try_small_calls(model, amp)
    except RuntimeError as error:  # NotImplementedError is one
        reason = f"PyTorch {torch.__version__} says: {str(error).splitlines()[0]}"
        raise UserError(_refusal(amp, device, reason)) from None


def _refusal(amp: str, device: torch.device, reason: str) -> str:
    other = "bf16" if amp == "fp16" else "fp16"
    return f"--amp {amp} can't be used on {device}: {reason}; use --amp {other}, or leave it out"


def _try_operators(amp: str, device: torch.device) -> None:
    """Every kind of layer of the detector once, its own attention aside, forward and backward."""
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
    # each once
    calls = dict.fromkeys(call for module in model.modules() for call in _small_calls(module))
    for operator in SIZES:
        mine = [call for call in calls if call.operator == operator]
        wrong = next((call for call in mine if not _is_right(call, amp)), None)
        if wrong is None:
            continue
        what = f"PyTorch {torch.__version__} gives wrong numbers for {wrong}"
        _compute_in_float32(operator)
        if not all(_is_right(call, amp) for call in mine):
            raise UserError(_refusal(amp, CPU, f"{what}, in float32 too"))
        then = f"every {operator} of at most {SMALL} pixels a side, or rows, is computed in float32"
        log.info("--amp %s on this CPU: %s; %s", amp, what, then)


def _small_calls(module: nn.Module) -> Iterator[Call]:
    """What a layer does to small inputs; of another module nothing."""
    if isinstance(module, nn.MultiheadAttention):
        head = module.embed_dim // module.num_heads
        for rows in ROWS:
            for dropout in (0, 1e-9):  # which drops nothing, and has PyTorch take its other way
                yield Call(
                    "scaled_dot_product_attention",
                    ((2, module.num_heads, rows, head),) * 3,
                    (("dropout_p", dropout),),
                )
    if isinstance(module, nn.Conv2d | nn.Linear):
        parameters = tuple(tuple(x.shape) for x in (module.weight, module.bias) if x is not None)
        if isinstance(module, nn.Linear):
            yield from (Call("linear", ((rows, module.in_features), *parameters)) for rows in ROWS)
        else:
            options = tuple(
                (name, getattr(module, name)) for name in ("stride", "padding", "dilation", "groups")
            )
            yield from (
                Call("conv2d", ((2, module.in_channels, *size), *parameters), options) for size in MAPS
            )


def _is_right(call: Call, amp: str) -> bool:
    """Outputs and gradients are near float64's, and the same whatever lay in the memory before."""
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
    """The output, and the gradients of all inputs; `litter` comes before the forward and before the
    backward.
    """
    leaves = [x.detach().requires_grad_() for x in inputs]
    litter()
    with autocast(amp, CPU):
        out = getattr(F, call.operator)(*leaves, **dict(call.options))
    # the same in every type
    gradient = torch.linspace(-1, 1, out.numel()).to(low).to(out.dtype).view_as(out)
    litter()
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def _is_near(result: Tensor, exact: Tensor) -> bool:
    """Rounding is far below a tenth of the largest number, and a kernel that leaves something out
    far above.
    """
    return bool((result.float() - exact).abs().max() < 0.1 * (1 + exact.abs().max()))


def _litter(like: Sequence[Tensor], byte: int) -> None:
    """Leave garbage in freed memory, in blocks as large as these tensors in low precision and in
    float32.
    """
    blocks = [torch.full((width * x.numel(),), byte, dtype=torch.uint8) for x in like for width in (2, 4)]
    del blocks


def _compute_in_float32(operator: str) -> None:
    """Have autocast on a CPU take float32 for the small calls of an operator, and round the results
    as it does else.
    """
    function, size = getattr(F, operator), SIZES[operator]

    def run(x: Tensor, *others: Any, **options: Any) -> Tensor:
        low = torch.get_autocast_dtype("cpu")
        taken = torch.float32 if size(x) <= SMALL else low
        arguments = [_cast(argument, taken) for argument in (x, *others)]
        with full_precision(CPU):
            return function(*arguments, **options).to(low)

    _replaced[operator] = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions warn that autocast's own kernel is replaced
        _replaced[operator].impl(operator, run, "AutocastCPU")


def _cast(argument: Any, dtype: torch.dtype) -> Any:
    return argument.to(dtype) if isinstance(argument, Tensor) and argument.is_floating_point() else argument
