"""Mixed precision: what is computed low, what is not, and how far the results are off.

A bound is made of eps, the step of the low type at 1 (1 / 128 for bfloat16, 1 / 1024 for float16).
"""

from __future__ import annotations

import copy
import math
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import FrozenBatchNorm2d

from models import build_model
from models.backbone import NORMS
from models.inference import prepare_for_inference
from models.matcher import Targets
from tests.golden import recipe
from tests.helpers import BATCHFORMER, SMALL_MODEL
from util.config import parse_config
from util.nested_tensor import NestedTensor
from util.step.precision import LOW_TYPES, autocast, full_precision, use_float32_matmul, widened

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TWO_STAGE = ("--with_box_refine", "--two_stage")
ONE_STREAM = ("--bf", "7", "--share_bf", "0", "--insert_idx", "0")
MODELS = [(), TWO_STAGE, BATCHFORMER, ONE_STREAM, (*BATCHFORMER, *TWO_STAGE)]
SIZES = [(64, 80), (48, 72), (80, 60)]


@pytest.fixture(params=["bf16", "fp16"])
def amp(request):
    return request.param


def build(*flags, device=CPU):
    model, criterion, postprocessors = copy.deepcopy(built(flags))
    return model.to(device), criterion, postprocessors


@lru_cache(maxsize=6)  # 45 MB each
def built(flags):
    torch.manual_seed(0)
    model, criterion, postprocessors = build_model(parse_config([*SMALL_MODEL, *flags]))
    recipe.fill(model)
    recipe.no_dropout(model)
    return model, criterion, postprocessors


def batch(device=CPU):
    targets = recipe.targets(SIZES, [3, 0, 5], num_classes=4)
    images = NestedTensor.from_images(recipe.images(SIZES)).to(device)
    return images, [{name: value.to(device) for name, value in target.items()} for target in targets]


@lru_cache(maxsize=len(MODELS))
def plain_step(*flags, device=CPU):
    return step("off", *flags, device=device)


def step(amp, *flags, device=CPU):
    """Outputs without their graph, losses by name and the gradient of all parameters, of a training
    step.
    """
    model, criterion, _ = build(*flags, device=device)
    images, targets = batch(device)
    with autocast(amp, device):
        outputs = model.train()(images)
    losses = criterion(outputs, targets)
    criterion.total(losses).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return (
        apply(torch.Tensor.detach, outputs),
        {name: losses[name].detach() for name in criterion.weight_dict},
        gradient,
    )


def all_outputs(outputs):
    layers = [
        outputs,
        *outputs.get("aux_outputs", []),
        *([outputs["enc_outputs"]] if "enc_outputs" in outputs else []),
    ]
    return [layer[key] for layer in layers for key in ("pred_logits", "pred_boxes")]


class OperatorCalls(TorchDispatchMode):
    """What the attention operator is given, after autocast has had its way."""

    def __init__(self):
        super().__init__()
        self.values, self.references = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.deformable.ms_deform_attn_fused.default:
            self.values.append(args[0])
            self.references.append(args[2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("flags", MODELS, ids=" ".join)
def test_a_step_is_that_of_float32_up_to_rounding(flags, device, amp):
    """About thirty products in a row round by up to eps / 2 each in any direction, sqrt(30) / 2 eps
    in all: 4 eps are allowed.

    A gradient jumps where a ReLU or a maximum changes sides, which a share of eps of them does in
    each of ten layers: that is sqrt(10 eps) of its norm.
    """
    device = torch.device(device)
    (_, wanted, gradient), (outputs, losses, low_gradient) = (
        plain_step(*flags, device=device),
        step(amp, *flags, device=device),
    )
    eps = torch.finfo(LOW_TYPES[amp]).eps
    assert {tensor.dtype for tensor in (*all_outputs(outputs), *losses.values())} == {torch.float32}
    for name in wanted:
        assert losses[name].item() == pytest.approx(wanted[name].item(), rel=4 * eps), name
    assert losses != wanted, "nothing was computed in low precision"
    assert low_gradient.isfinite().all()
    gradient = gradient.double()
    assert (low_gradient - gradient).norm() < math.sqrt(10 * eps) * gradient.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("flags", [(), ("--with_box_refine",), TWO_STAGE, BATCHFORMER], ids=" ".join)
def test_places_are_float32_and_values_are_not(flags, device, amp):
    device = torch.device(device)
    model, images = build(*flags, device=device)[0].train(), batch(device)[0]
    with OperatorCalls() as plain:
        model(images)
    with OperatorCalls() as low, autocast(amp, device):
        model(images)
    assert len(low.values) == len(low.references) == 4, "two layers of the encoder and two of the decoder"
    assert {value.dtype for value in low.values} == {LOW_TYPES[amp]}
    assert {reference.dtype for reference in low.references} == {torch.float32}
    exact = (
        2 if "--two_stage" in flags else 3
    )  # the encoder's, and the decoder's first that come from learned queries
    for reference, wanted in list(zip(low.references, plain.references, strict=True))[:exact]:
        assert torch.equal(reference, wanted)


@pytest.mark.parametrize("flags", [(), TWO_STAGE, BATCHFORMER], ids=" ".join)
@torch.no_grad()
def test_heads_and_boxes_are_computed_in_float32_not_cast_to_it(flags, amp):
    """Hardly a number is one of the low type's. The proposals' logits, by which the queries are
    chosen, hardly tie.
    """
    model, images = build(*flags)[0], batch()[0]
    of_heads = []
    for head in {*model.class_embed, *model.bbox_embed}:
        head.register_forward_hook(lambda head, inputs, output: of_heads.append(output))
    with autocast(amp, CPU):
        outputs = model.train()(images)
    count = sum(x.numel() for x in all_outputs(outputs))
    assert sum(x.numel() for x in of_heads) == count
    for tensor in (*all_outputs(outputs), *of_heads):
        inner = tensor[(tensor != 0) & (tensor != 1)]
        assert (inner == inner.to(LOW_TYPES[amp])).float().mean() < 0.01
    if "enc_outputs" in outputs:
        logits = outputs["enc_outputs"]["pred_logits"][0, :, 0]
        valid = logits[(outputs["enc_outputs"]["pred_boxes"][0] != 1).all(-1)]
        assert len(valid.unique()) > 0.99 * len(valid)


@pytest.mark.parametrize("norm", ["frozen_bn", "bn", "gn"])
@pytest.mark.parametrize("levels", ["1", "4"])
def test_the_backbone_keeps_its_maps_low_and_the_tokens_are_float32(norm, levels, amp):
    model, images = build("--backbone_norm", norm, "--num_feature_levels", levels)[0].train(), batch()[0]
    with autocast(amp, CPU):
        features = model.backbone[0](images)
        projected, _ = model._project(features, images.mask)
    assert {feature.tensors.dtype for feature in features} == {LOW_TYPES[amp]}
    assert {x.dtype for x in projected} == {torch.float32}
    assert len(projected) == int(levels)


@pytest.mark.parametrize("flags", [(*BATCHFORMER, *TWO_STAGE), ONE_STREAM], ids=" ".join)
def test_the_sums_along_the_residual_branches_are_float32(flags, amp):
    """Every LayerNorm takes such a sum, or what the sums begin with: on a CPU, unlike a GPU, it
    would give what it gets.
    """
    model, images = build(*flags)[0].train(), batch()[0]
    types = []
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda norm, inputs, output: types.append(output.dtype))
    with autocast(amp, CPU):
        model(images)
    assert len(types) > 10
    assert set(types) == {torch.float32}


def test_frozen_statistics_in_low_precision():
    ours = NORMS["frozen_bn"](8)
    recipe.fill(ours)
    published = FrozenBatchNorm2d(8)
    published.load_state_dict(ours.state_dict())
    x = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), published(x))
    for low in LOW_TYPES.values():
        out = ours(x.to(low))
        assert out.dtype == low
        # one rounding, of the result
        torch.testing.assert_close(
            out.float(), published(x.to(low).float()), rtol=torch.finfo(low).eps / 2, atol=1e-6
        )


@pytest.mark.parametrize("flags", [(), TWO_STAGE, BATCHFORMER], ids=" ".join)
def test_losses_and_matching_are_float32_whatever_comes_in(flags, amp):
    """Low outputs inside autocast give the bits that the same numbers in float32 give outside."""
    model, criterion, _ = build(*flags)
    images, targets = batch()
    outputs = model.train()(images)

    lowered = apply(lambda x: x.detach().to(LOW_TYPES[amp]), outputs)
    wide = apply(widened, lowered)
    with autocast(amp, CPU):
        inside = criterion(lowered, targets)
        assert criterion.total(inside).dtype == torch.float32
    outside = criterion(wide, targets)
    assert {loss.dtype for loss in inside.values()} == {torch.float32}
    assert all(torch.equal(inside[name], outside[name]) for name in outside)


def test_the_matching_tells_neighbours_of_the_low_type_apart(amp):
    """Of two queries whose logits differ by one step of the type the better is taken; costs in that
    type would tie.
    """
    low = LOW_TYPES[amp]
    worse = torch.linspace(-6, 6, 100).to(low)
    better = (worse.float() + worse.float().abs() * torch.finfo(low).eps).to(low)
    assert (better > worse).all()
    target = {"boxes": torch.full((1, 4), 0.5), "labels": torch.zeros(1, dtype=torch.int64)}
    logits_1B21 = torch.stack([worse, better], 1)[None, ..., None]
    boxes_1B24 = torch.full((1, 100, 2, 4), 0.5, dtype=low)
    matcher = build()[1].matcher
    with autocast(amp, CPU):
        ((query, _),) = matcher([(logits_1B21, boxes_1B24, Targets.from_list([target] * 100))])
    assert torch.equal(query[0], 2 * torch.arange(100) + 1)


def apply(function, value):
    """The function on every tensor of lists and dictionaries in each other."""
    if isinstance(value, list):
        return [apply(function, x) for x in value]
    if isinstance(value, dict):
        return {name: apply(function, x) for name, x in value.items()}
    return function(value) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("extra", [(), TWO_STAGE], ids=" ".join)
@torch.no_grad()
def test_evaluation_with_batchformer_is_bit_identical_to_without(extra, amp):
    images = batch()[0]
    with_bf, without = build(*BATCHFORMER, *extra)[0].eval(), build(*extra)[0].eval()
    without.load_state_dict({k: v for k, v in with_bf.state_dict().items() if ".bf." not in k})
    with autocast(amp, CPU):
        ours, plain = with_bf(images), without(images)
    assert all(torch.equal(a, b) for a, b in zip(all_outputs(ours), all_outputs(plain), strict=True))


@pytest.mark.parametrize(
    "flags", [(*BATCHFORMER, "--eval_bf"), (*ONE_STREAM, "--eval_bf", "--bt_num_layers", "2"), TWO_STAGE]
)
@torch.no_grad()
def test_evaluation_in_low_precision(flags, amp):
    model, _, postprocessors = build(*flags)
    images = batch()[0]
    sizes = torch.tensor(SIZES)
    with autocast(amp, CPU):
        low = model.eval()(images)
    plain = model(images)
    assert {x.dtype for x in all_outputs(low)} == {torch.float32}
    for a, b in zip(postprocessors["bbox"](low, sizes), postprocessors["bbox"](plain, sizes), strict=True):
        assert a["boxes"].dtype == torch.float32
        # the best score is that of the same query or, in a near tie, of its equal
        torch.testing.assert_close(
            a["scores"][0], b["scores"][0], rtol=16 * torch.finfo(LOW_TYPES[amp]).eps, atol=0
        )


def test_full_precision_ends_where_it_says():
    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    with autocast("bf16", CPU):
        assert F.linear(x, weight).dtype == torch.bfloat16
        with full_precision(CPU):
            assert F.linear(x, weight).dtype == torch.float32
        assert F.linear(x, weight).dtype == torch.bfloat16
    with autocast("off", CPU):
        assert F.linear(x, weight).dtype == torch.float32
    with full_precision(torch.device("meta")):  # where there is no autocast to be off
        assert not torch.is_autocast_enabled("cpu")
    try:
        use_float32_matmul("high", CPU)
        assert torch.get_float32_matmul_precision() == "highest", "there is no TF32 on a CPU"
        use_float32_matmul("high", torch.device("cuda"))
        with full_precision(CPU):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        use_float32_matmul("highest", CPU)
    assert torch.get_float32_matmul_precision() == "highest"
    assert widened(x) is x
    assert widened(x.double()).dtype == torch.float64


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["off", "bf16"])
@pytest.mark.parametrize("flags", [(), TWO_STAGE, (*BATCHFORMER, "--eval_bf")], ids=" ".join)
@torch.no_grad()
def test_a_detector_prepared_for_inference_gives_the_bits_of_evaluation(flags, precision):
    model, images = build(*flags, "--backbone_norm", "frozen_bn")[0].eval(), batch()[0]
    counts, outputs = [], []
    for prepare in (lambda *_: None, prepare_for_inference):
        prepare(model, precision)
        with autocast(precision, CPU), Calls() as calls:
            outputs.append(all_outputs(model(images)))
        counts.append(calls.names.count("aten::_to_copy" if precision == "bf16" else "aten::mul"))
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a, b)
    assert counts[1] < counts[0] / 2
