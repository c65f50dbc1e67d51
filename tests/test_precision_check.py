"""What is tried before a run in mixed precision; the same run gives the same bits whatever lies in
freed memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import random
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode

from models import build_model
from tests.golden import recipe
from tests.helpers import BATCHFORMER, SMALL_MODEL
from util.config import parse_config
from util.errors import UserError
from util.nested_tensor import NestedTensor
from util.step import precision_check
from util.step.precision import LOW_TYPES, autocast
from util.step.precision_check import check_precision
from util.step.updater import build_updater

CPU = torch.device("cpu")
LOW = tuple(LOW_TYPES.values())
CONVOLUTION = {"convolution": 0}
# a fault for each operator, and the shapes of a call that is small with n = 2 and not with n = 12
FAULTS = {
    "conv2d": (CONVOLUTION, lambda n: [(2, 8, n, 12), (16, 8, 3, 3)]),
    "conv2d's gradients": ({"convolution_backward": 1}, lambda n: [(2, 8, n, 12), (16, 8, 3, 3)]),
    "linear": ({"addmm": 1}, lambda n: [(1, n, 16), (24, 16), (24,)]),
    "scaled_dot_product_attention": ({".*attention.*": 0}, lambda n: [(2, 2, n, 16)] * 3),
}


class Fault(TorchDispatchMode):
    """A processor on which operators give old memory for small inputs, as some do.

    Args:
        inputs: patterns of the names of PyTorch's operators, and which argument of theirs is the
            input.
        types: in which they do so.
    """

    def __init__(self, inputs: dict[str, int], types: tuple[torch.dtype, ...] = LOW) -> None:
        super().__init__()
        self.inputs, self.types = inputs, types

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        for fault, index in self.inputs.items():
            if (
                re.fullmatch(fault, name)
                and args[index].dtype in self.types
                and min(args[index].shape[-2:]) <= 2
            ):
                return apply(torch.empty_like, out)
        return out


def apply(function, out):
    if isinstance(out, Tensor):
        return function(out)
    return type(out)(apply(function, x) if isinstance(x, Tensor) else x for x in out)


@pytest.fixture(params=["bf16", "fp16"])
def amp(request):
    return request.param


@pytest.fixture(autouse=True)
def replaced():
    """What is mended in this process: nothing before a test, whatever ran earlier, and nothing
    after it.
    """
    precision_check._replaced.clear()
    yield precision_check._replaced
    precision_check._replaced.clear()


@pytest.fixture
def layers():
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.Linear(16, 24), nn.MultiheadAttention(32, 2)
    )


def test_a_device_is_tried_before_the_run(amp, layers):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    check_precision(layers, amp)
    assert torch.equal(torch.get_rng_state(), before), "the run's random numbers must not depend on it"
    assert all(x.grad is None for x in layers.parameters())
    elsewhere = nn.Linear(2, 2, device="meta")
    check_precision(elsewhere, "off")
    with pytest.raises(UserError, match=f"--amp {amp} can't be used on meta: ") as error:
        check_precision(elsewhere, amp)
    assert "\n" not in str(error.value)


def test_an_operator_that_the_device_lacks_is_named(monkeypatch, layers):
    def missing(*args, **kwargs):
        raise RuntimeError("\"conv2d_cpu\" not implemented for 'Half'\nand a trace")

    monkeypatch.setattr(F, "conv2d", missing)
    with pytest.raises(UserError, match="conv2d_cpu.*not implemented for 'Half'.*use --amp bf16") as error:
        check_precision(layers, "fp16")
    assert "\n" not in str(error.value)
    check_precision(layers, "off")


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_is_computed_in_float32_where_it_is_small(name, amp, layers, replaced, caplog):
    caplog.set_level("INFO")
    fault, shapes = FAULTS[name]
    operator = name.removesuffix("'s gradients")
    function, options = getattr(F, operator), {"padding": 1} if operator == "conv2d" else {}
    with Fault(fault):
        check_precision(layers, amp)
        check_precision(layers, amp)
    told = [
        record.getMessage()
        for record in caplog.records
        if f"wrong numbers for {operator} of" in record.getMessage()
    ]
    assert operator in replaced
    assert len(told) == 1, "it is said once"

    small, large = (
        [torch.rand(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes(n)]
        for n in (2, 12)
    )
    with Fault(fault), autocast(amp, CPU):
        mended, other = function(*small, **options), function(*large, **options)
    assert torch.equal(mended, function(*small, **options).to(LOW_TYPES[amp])), "float32, rounded at the end"
    replaced.clear()
    with autocast(amp, CPU):
        assert torch.equal(other, function(*large, **options)), "what is not small is computed as it was"


def test_what_can_t_be_mended_ends_the_run(amp, layers):
    with Fault(CONVOLUTION, (*LOW, torch.float32)), pytest.raises(UserError) as error:
        check_precision(layers, amp)
    assert f"--amp {amp} can't be used on cpu: PyTorch" in str(error.value)
    assert "gives wrong numbers for conv2d of [2, 8, 2, 1] and [16, 8, 3, 3], in float32 too" in str(
        error.value
    )
    assert "\n" not in str(error.value)


def test_every_kind_of_convolution_and_product_of_a_model_is_tried():
    model = small_model()[0]
    calls = {call for module in model.modules() for call in precision_check._small_calls(module)}
    tried = {call.shapes[1] for call in calls}
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert {tuple(weight.shape) for weight in weights} <= tried
    extra = model.input_proj[3][0]  # of the level beyond the backbone's
    assert any(
        call.shapes[1:] == (extra.weight.shape, extra.bias.shape) and ("stride", (2, 2)) in call.options
        for call in calls
    )


@contextlib.contextmanager
def garbage(byte: int):
    """A block in which the C library fills what is freed with a byte, and what is newly taken with
    its complement.
    """
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc can fill memory")
    perturb = -6  # M_PERTURB of malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(perturb, byte)
    try:
        yield
    finally:
        libc.mallopt(perturb, 0)


GARBAGE = (
    0x3C,
    0x41,
)  # 0.01 and 12 in bfloat16; their complements -196 and -3.8e-1: a fault shows as other numbers, not as NaN


def sizes(count, smallest, largest):
    """Heights and widths of the two images of each of `count` steps."""
    rng = random.Random(0)
    return [
        [(rng.randint(smallest, largest), rng.randint(smallest, largest)) for _ in range(2)]
        for _ in range(count)
    ]


def small_model(*flags):
    torch.manual_seed(0)
    config = parse_config(
        [*SMALL_MODEL, *BATCHFORMER, "--ema_decay", "0.9", "--accumulate_steps", "2", *flags]
    )
    model, criterion, _ = build_model(config)
    recipe.fill(model)
    return model.train(), criterion, build_updater(model, config)


def train(amp, sizes, byte):
    """Losses, gradient norms and last weights, averages too, of a step for every pair of sizes."""
    model, criterion, updater = small_model("--amp", amp)
    if updater.scaler:  # from the first step on no gradient overflows, so that the weights change
        updater.scaler = GradScaler("cpu", init_scale=2**8)
    seen = []
    with garbage(byte):
        for step, pair in enumerate(sizes):
            images = NestedTensor.from_images(recipe.images(pair))
            with autocast(amp, CPU):
                outputs = model(images)
            loss = criterion.total(criterion(outputs, recipe.targets(pair, [3, 1], num_classes=4)))
            updater.backward(loss, 2)
            seen += [loss.detach(), *([updater.step()] if step % 2 else [])]
    return [
        *map(torch.as_tensor, seen),
        *model.state_dict().values(),
        *updater.averaged.model.state_dict().values(),
    ]


def same_bits(one, other):
    return all(map(torch.equal, one, other))


@pytest.mark.slow
# many processors take seconds for a step in float16
@pytest.mark.parametrize(("amp", "counts"), [("bf16", (30, 2, 2)), ("fp16", (0, 1, 1))])
def test_training_gives_the_same_bits_whatever_was_in_freed_memory(amp, counts):
    """On images of 64 to 96 pixels, and on smaller ones, whose maps are two and one pixels wide."""
    large, small, smallest = counts
    pairs = sizes(large, 64, 96) + sizes(small, 33, 64) + sizes(smallest, 20, 32)
    check_precision(small_model()[0], amp)
    first, second = (train(amp, pairs, byte) for byte in GARBAGE)
    assert all(x.isfinite().all() for x in first)
    assert same_bits(first, second)


def test_an_exported_graph_has_no_condition_of_this_processor():
    class Low(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            with autocast("bf16", CPU):
                return self.convolution(x)

    precision_check._compute_in_float32("conv2d")
    free = {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    image = torch.zeros(1, 3, 16, 16)
    program = torch.export.export(Low(), (image,), dynamic_shapes=(free,), strict=False)
    assert program.module()(image[..., :4, :4]).shape == (1, 4, 2, 2)


def test_a_processor_that_reads_other_memory_gives_other_bits_unless_it_was_tried_before():
    pairs = sizes(4, 33, 64)
    with Fault({"convolution": 0, "convolution_backward": 1}):
        assert not same_bits(*(train("bf16", pairs, byte) for byte in GARBAGE))
        check_precision(small_model()[0], "bf16")
        mended = train("bf16", pairs, GARBAGE[0])
        assert same_bits(mended, train("bf16", pairs, GARBAGE[1]))
    with Fault({}):
        assert same_bits(mended, train("bf16", pairs, GARBAGE[1])), "the fault is never met"
