"""Training and evaluation loops: what they wait for, what they report, what they refuse."""

from __future__ import annotations

import copy
import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import box_convert, generalized_box_iou

from datasets import build_dataset
from datasets.coco import read_annotations
from datasets.coco_eval import evaluate_results
from datasets.loader import build_loader
from datasets.samplers import EvalBatches
from engine import evaluate, train_one_epoch, training_loss
from models import build_model, matcher
from models.matcher import HungarianMatcher, Targets
from tests.golden import recipe
from tests.helpers import BATCHFORMER, SMALL_IMAGES, SMALL_MODEL, write_coco
from util.box_ops import generalized_iou
from util.checkpoint import read_checkpoint
from util.config import parse_config
from util.errors import UserError
from util.nested_tensor import NestedTensor
from util.optim import build_optimizer, lr_factor
from util.step import updater as updater_module
from util.step.log import StepLog
from util.step.metrics import EpochSums, MeanOnDevice, published_names
from util.step.not_finite import FiniteWatch, StepInputs
from util.step.random_state import torch_state
from util.step.transfer import HostCopy
from util.step.updater import AveragedWeights, Updater

CPU = torch.device("cpu")


def setup(*flags, seed=0):
    torch.manual_seed(seed)
    config = parse_config([*SMALL_MODEL, *flags])
    model, criterion, postprocessors = build_model(config)
    return model, criterion, postprocessors, build_optimizer(model, config)


def batches(count, size=(64, 64), images=2):
    """Batches as a loader gives them."""
    out = []
    for i in range(count):
        targets = recipe.targets([size] * images, [2, 3][:images], num_classes=4, name=f"targets{i}")
        out.append((NestedTensor.from_images(recipe.images([size] * images, name=f"images{i}")), targets))
    return out


def train(model, criterion, optimizer, data, **options):
    options = {"clip_max_norm": 0.1, "accumulate_steps": 1, "dump_dir": None} | options
    watch = FiniteWatch(model, training_loss(model, criterion, "off"), {}, options.pop("dump_dir"))
    updater = Updater(optimizer, **options)
    notes = StepLog(0, len(data), EpochSums(), watch, criterion.weight_dict)
    return train_one_epoch(model, criterion, data, updater, notes)


# ---- what a step waits for

# operators whose result a host needs before it can go on
WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "_unique2",
    "nonzero_numpy",
)


class WaitingOps(TorchDispatchMode):
    """Counts operators that wait for a GPU: they give numbers to the host, have a shape that
    depends on values, or copy a number from the host's memory.
    """

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[-1]
        by_mask = name in ("index", "index_put", "index_put_") and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )
        ragged = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None and len(args) < 3
        # `x[indices] = 1` makes a tensor of the 1 on the host, up to PyTorch 2.14 at least
        of_a_number = name in ("index_put", "index_put_") and args[2].dim() == 0
        if name in WAITING or by_mask or ragged or of_a_number:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_waits(monkeypatch):
    """The waits in a block: operators as above, and every way from a tensor to the host."""
    seen = []

    def note(name):
        original = getattr(torch.Tensor, name)

        def method(self, *args, **kwargs):
            seen.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, method)

    with monkeypatch.context() as patch, WaitingOps() as ops:
        monkeypatch = patch
        original_tensor = torch.tensor

        def tensor(*args, **kwargs):
            if kwargs.get("device") is not None:  # a copy from pageable memory, which waits
                seen.append("tensor")
            return original_tensor(*args, **kwargs)

        patch.setattr(torch, "tensor", tensor)
        for name in ("cpu", "item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"):
            note(name)
        yield seen
    seen += ops.seen


@pytest.mark.parametrize("flags", [(), BATCHFORMER, ("--with_box_refine", "--two_stage", *BATCHFORMER)])
def test_a_step_waits_for_the_device_once(flags, monkeypatch):
    """Forward, losses, backward, clipping, step, sums and finite check, on a step that logs
    nothing.
    """
    model, criterion, _, optimizer = setup(*flags)
    model.train()
    criterion.train()
    images, targets = batches(1)[0]
    averaged = AveragedWeights(model, 0.9)
    updater = Updater(optimizer, clip_max_norm=0.1, averaged=averaged)
    meter, watch = MeanOnDevice(), FiniteWatch(model, training_loss(model, criterion, "off"), {}, None)
    read_late = []
    # what was sent to the host a step ago has arrived with the matching: reading it waits for
    # nothing
    monkeypatch.setattr(
        watch, "check", lambda: read_late.append(watch._expected[-1]) if watch._expected else None
    )

    def step(number):
        losses = criterion(model(images), targets)
        watch.check()
        total = criterion.total(losses)
        scale = updater.backward(total, 1)
        norm = updater.step()
        meter.update(losses)
        watch.expect(StepInputs(0, number, images, targets, torch_state(CPU)), losses, total, norm, scale)

    step(0)  # the optimiser makes its state
    with counted_waits(monkeypatch) as waits:
        step(1)
    host_only = {"numpy"}  # of the matcher's host copies, after the one transfer
    assert [w for w in waits if w not in host_only] == ["cpu"], waits
    assert len(read_late) == 1
    assert torch.isfinite(read_late[0].get()).all()


def test_the_waits_are_noticed(monkeypatch):
    values, index = torch.zeros(3), torch.tensor([1])
    with counted_waits(monkeypatch) as waits:
        values.index_put_((index,), torch.tensor(1.0))
        values.sum().item()
    assert waits == ["item", "index_put_", "_local_scalar_dense"]


@pytest.mark.gpu
def test_a_step_on_a_gpu_waits_once():
    """CUDA itself says so: any wait but the matcher's transfer is an error."""
    model, criterion, _, _ = setup(*BATCHFORMER)
    model.cuda().train()
    optimizer = build_optimizer(model, parse_config([*SMALL_MODEL, *BATCHFORMER]))
    updater = Updater(optimizer, clip_max_norm=0.1, averaged=AveragedWeights(model, 0.9))
    images, targets = batches(1)[0]
    images = images.to(torch.device("cuda"))
    targets = [{k: v.cuda() for k, v in t.items()} for t in targets]
    transfers = []

    def to_host(*tensors):
        transfers.append(len(tensors))
        torch.cuda.set_sync_debug_mode("default")
        flat = torch.cat([t.flatten() for t in tensors]).cpu()
        torch.cuda.set_sync_debug_mode("error")
        return [
            p.view(t.shape) for p, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)
        ]

    # anomaly mode shows the forward operation whose backward waits
    with pytest.MonkeyPatch.context() as patch, torch.autograd.set_detect_anomaly(True, check_nan=False):
        patch.setattr("models.matcher.to_host", to_host)
        for number in range(3):
            torch.cuda.set_sync_debug_mode("default" if number == 0 else "error")
            try:
                updater.backward(criterion.total(criterion(model(images), targets)), 1)
                updater.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert len(transfers) == 3


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_copy_from_another_than_the_current_gpu_has_arrived_when_it_is_read():
    with torch.cuda.device(1):
        values = torch.zeros(1000, device="cuda:1")
        torch.cuda._sleep(100_000_000)
        values += 1
    assert torch.cuda.current_device() == 0
    assert HostCopy(values).get().eq(1).all()


# ---- matching


@pytest.mark.parametrize("many", [matcher.MANY, 0])
def test_matching_is_that_of_each_image_by_itself(many, monkeypatch):
    monkeypatch.setattr(matcher, "MANY", many)
    generator = torch.Generator().manual_seed(0)
    logits, boxes = (
        torch.randn(3, 2, 9, 5, generator=generator),
        torch.rand(3, 2, 9, 4, generator=generator) * 0.5 + 0.1,
    )
    targets = recipe.targets([(10, 10)] * 2, [4, 2], num_classes=5)
    flat = Targets.from_list(targets)
    ((queries, matched),) = HungarianMatcher(2, 5, 2)([(logits, boxes, flat)])
    assert queries.shape == matched.shape == (3, 6)
    start = 0
    for image, target in enumerate(targets):
        n = len(target["labels"])
        for layer in range(3):
            probability = logits[layer, image].sigmoid()[:, target["labels"]]
            focal = 0.25 * (1 - probability) ** 2 * -(probability + 1e-8).log()
            focal -= 0.75 * probability**2 * -(1 - probability + 1e-8).log()
            distance = torch.cdist(boxes[layer, image], target["boxes"], p=1)
            giou = generalized_box_iou(
                *(box_convert(x, "cxcywh", "xyxy") for x in (boxes[layer, image], target["boxes"]))
            )
            rows, columns = linear_sum_assignment((2 * focal + 5 * distance - 2 * giou).numpy())
            mine = slice(start, start + n)
            assert (queries[layer, mine] - (layer * 2 + image) * 9).tolist() == rows.tolist()
            assert (matched[layer, mine] - start).tolist() == columns.tolist()
        start += n


def test_generalized_iou_equals_torchvision():
    a, b = (box_convert(torch.rand(20, 4) * 0.4 + 0.1, "cxcywh", "xyxy") for _ in range(2))
    torch.testing.assert_close(generalized_iou(a[:, None], b[None]), generalized_box_iou(a, b))


def test_more_targets_than_queries(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits, boxes = torch.randn(2, 2, 3, 5, generator=generator), torch.rand(2, 2, 3, 4, generator=generator)
    flat = Targets.from_list(recipe.targets([(10, 10)] * 2, [0, 7], num_classes=5))
    found = []
    for many in (matcher.MANY, 0):
        monkeypatch.setattr(matcher, "MANY", many)
        ((queries, targets),) = HungarianMatcher(2, 5, 2)([(logits, boxes, flat)])
        assert queries.tolist() == [[3, 4, 5], [9, 10, 11]]
        found.append(targets.tolist())
    assert found[0] == found[1]


@pytest.mark.parametrize("many", [matcher.MANY, 0])
def test_matching_survives_nan(many, monkeypatch):
    monkeypatch.setattr(matcher, "MANY", many)
    logits, boxes = torch.full((1, 1, 4, 3), float("nan")), torch.full((1, 1, 4, 4), float("nan"))
    flat = Targets.from_list(recipe.targets([(10, 10)], [2], num_classes=3))
    ((queries, _),) = HungarianMatcher(2, 5, 2)([(logits, boxes, flat)])
    assert len(set(queries.flatten().tolist())) == 2


# ---- training


def test_training_lowers_the_loss():
    model, criterion, _, optimizer = setup(*BATCHFORMER, "--lr", "1e-3", "--dropout", "0")
    data = batches(1)
    first = train(model, criterion, optimizer, data)["loss"]
    for _ in range(25):
        last = train(model, criterion, optimizer, data)["loss"]
    assert last < 0.7 * first


def test_log_has_the_published_names():
    model, criterion, _, optimizer = setup("--with_box_refine", "--two_stage")
    stats = train(model, criterion, optimizer, batches(2))
    parts = ("loss_ce", "loss_bbox", "loss_giou")
    for suffix in ("", "_0", "_enc"):
        assert {f"{p}{suffix}" for p in parts} | {f"{p}{suffix}_unscaled" for p in parts} <= set(stats)
        assert f"cardinality_error{suffix}_unscaled" in stats
    assert {"lr", "class_error", "grad_norm", "loss", "class_error_unscaled"} <= set(stats)
    weights = criterion.weight_dict
    assert stats["loss"] == pytest.approx(sum(stats[f"{name}_unscaled"] * w for name, w in weights.items()))
    assert stats["loss_bbox"] == pytest.approx(5 * stats["loss_bbox_unscaled"])


def test_accumulation_averages_gradients(monkeypatch):
    """Three batches, two to a step: the second step takes the last batch alone."""
    model, criterion, _, optimizer = setup("--dropout", "0", "--sgd", "--clip_max_norm", "0")
    gradients = []
    monkeypatch.setattr(
        updater_module,
        "step_if_finite",
        lambda o, finite: gradients.append(model.query_embed.weight.grad.clone()),
    )
    data = batches(3)
    train(model, criterion, optimizer, data, accumulate_steps=2, clip_max_norm=0.0)
    single = []
    for images, targets in data:
        model.zero_grad()
        criterion.total(criterion(model(images), targets)).backward()
        single.append(model.query_embed.weight.grad.clone())
    assert len(gradients) == 2
    torch.testing.assert_close(gradients[0], (single[0] + single[1]) / 2)
    torch.testing.assert_close(gradients[1], single[2])


@pytest.mark.parametrize(("clip", "expected"), [(0.1, 0.1), (0.0, None)])
def test_clipping(clip, expected, monkeypatch):
    model, criterion, _, optimizer = setup()
    norms = []

    def note(*_):
        norms.append(
            torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
        )

    monkeypatch.setattr(updater_module, "step_if_finite", note)
    updater = Updater(optimizer, clip_max_norm=clip)
    images, targets = batches(1)[0]
    updater.backward(criterion.total(criterion(model(images), targets)), 1)
    note()
    norm = updater.step().item()
    assert norm == pytest.approx(norms[0], rel=1e-5)
    assert norms[1] == pytest.approx(expected or norms[0], rel=1e-4)


def test_schedule():
    assert [lr_factor(e, 40, ()) for e in (0, 39, 40, 79, 80)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert [lr_factor(e, 40, (3, 5)) for e in (2, 3, 4, 5, 50)] == pytest.approx([1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("sgd", [(), ("--sgd",)])
@pytest.mark.parametrize("fused", [False, None, "missing"])
def test_an_optimiser_goes_on_whatever_made_its_state_was_fused_or_not(fused, sgd):
    """As on Apple's GPUs, where it is not, and in PyTorch before 2.0, which did not know the word."""

    def updater():
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        return layer, Updater(build_optimizer(layer, parse_config([*SMALL_MODEL, *sgd])), clip_max_norm=0.0)

    def step(layer, updater):
        updater.backward(layer(torch.ones(1, 3)).square().sum(), 1)
        updater.step()
        return layer.weight.detach().clone()

    layer, before = updater()
    step(layer, before)
    state = copy.deepcopy(before.state_dict())
    for group in state["optimizer"]["param_groups"]:
        del group["fused"]
        group |= {} if fused == "missing" else {"fused": fused}
    resumed_layer, resumed = updater()
    resumed_layer.load_state_dict(layer.state_dict())
    resumed.load_state_dict(state)
    assert torch.equal(step(resumed_layer, resumed), step(layer, before))


# ---- numbers that are not finite


@pytest.mark.parametrize("sgd", [(), ("--sgd",)])
def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_weights(tmp_path, sgd):
    model, criterion, _, optimizer = setup(*BATCHFORMER, *sgd)
    data = batches(4)
    images, targets = data[2]
    data[2] = (NestedTensor(images.tensors.clone(), images.mask), targets)
    data[2][0].tensors[1, 0, 5, 5] = float("nan")
    seen = []
    hook = model.register_forward_pre_hook(
        lambda m, i: seen.append({k: v.clone() for k, v in m.state_dict().items()})
    )
    with pytest.raises(UserError, match="step 2") as error:
        train(model, criterion, optimizer, data, dump_dir=tmp_path)
    hook.remove()
    message = str(error.value)
    assert "backbone.0.body.conv1 (forward)" in message
    assert "loss_ce" in message
    assert "[0, 1]" in message
    dump = read_checkpoint(tmp_path / "nonfinite_0000_000002_process0.pth")
    assert dump["step"] == 2
    assert dump["image_ids"] == [0, 1]
    assert torch.isnan(dump["images"]).sum() == 1
    assert not math.isfinite(dump["losses"]["loss_ce"])
    assert dump["module"].startswith("backbone.0.body.conv1")
    for name, value in dump["model"].items():
        assert torch.equal(value, seen[2][name]), "the weights are those from before the step"


def test_the_module_whose_gradient_goes_wrong_is_named():
    model, criterion, _, optimizer = setup("--dropout", "0")

    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    layer = model.transformer.encoder.layers[1].linear2
    layer.register_forward_hook(lambda m, i, out: Explode.apply(out))
    with pytest.raises(UserError, match=r"encoder.layers.1.(linear2|dropout2) \(gradient"):
        train(model, criterion, optimizer, batches(2))


def test_a_watched_step_that_is_fine_goes_on():
    model, criterion, _, optimizer = setup()
    watch = FiniteWatch(model, training_loss(model, criterion, "off"), {}, None)
    watch.check()
    losses = {"a": torch.tensor(1.0)}
    watch.expect(StepInputs(0, 0, None, [], {}), losses, losses["a"], torch.tensor(2.0), None)
    watch.check()


# ---- evaluation


def test_evaluation_is_that_of_pycocotools_by_hand(tmp_path):
    write_coco(tmp_path, num_train=5)
    config = parse_config([*SMALL_MODEL, *SMALL_IMAGES, "--coco_path", str(tmp_path)])
    dataset = build_dataset("val", config)
    model, criterion, postprocessors, _ = setup()
    recipe.fill(model)
    loader = build_loader(dataset, EvalBatches(5, 2, 0, 1), 0, CPU)
    result = evaluate(model, criterion, postprocessors, loader, dataset, config.run)
    model.eval()
    expected, losses = [], []
    for group in EvalBatches(5, 2, 0, 1):
        images, targets = zip(*(dataset[i] for i in group), strict=True)
        with torch.no_grad():
            outputs = model(list(images))
            losses.append(criterion.eval()(outputs, targets)["loss_ce"].item())
        for target, found in zip(
            targets,
            postprocessors["bbox"](outputs, torch.stack([t["orig_size"] for t in targets])),
            strict=True,
        ):
            for score, label, (x0, y0, x1, y1) in zip(
                found["scores"], found["labels"], found["boxes"], strict=True
            ):
                box = [x0.item(), y0.item(), (x1 - x0).item(), (y1 - y0).item()]
                expected.append([target["image_id"].item(), label.item(), score.item(), *box])
    ours = [[r["image_id"], r["category_id"], r["score"], *r["bbox"]] for r in result.results]
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-4)
    assert result.stats["loss_ce_unscaled"] == pytest.approx(np.mean(losses))
    assert len(result.stats["coco_eval_bbox"]) == 12
    assert result.tables["precision"].shape[0] == 10


def test_perfect_detections_have_ap_1_and_none_have_0(tmp_path):
    write_coco(tmp_path, num_train=3)
    truth = read_annotations(tmp_path / "annotations/instances_val2017.json")
    perfect = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 1.0}
        for a in truth.anns.values()
    ]
    assert evaluate_results(truth, perfect).stats[0] == pytest.approx(1)
    assert (
        evaluate_results(truth, perfect[::-1]).stats.tolist()
        == evaluate_results(truth, perfect).stats.tolist()
    )
    assert evaluate_results(truth, []).stats[0] == 0
    unknown = [{**perfect[0], "category_id": 0}]
    assert evaluate_results(truth, unknown).stats[0] == 0, (
        "a class that the data does not have is no detection"
    )


def test_published_names_weigh():
    stats = published_names({"loss_ce": 2.0, "class_error": 50.0, "grad_norm": 3.0}, {"loss_ce": 2.0})
    unscaled = {"loss_ce_unscaled": 2.0, "class_error_unscaled": 50.0}
    assert stats == {"class_error": 50.0, "grad_norm": 3.0, "loss": 4.0, "loss_ce": 4.0} | unscaled


@pytest.mark.parametrize("sgd", [(), ("--sgd",)])
def test_a_first_step_that_is_left_out_leaves_no_trace(sgd, monkeypatch, request):
    """Fused SGD would go on with a momentum of whatever lay in memory, which here is NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    config = parse_config([*SMALL_MODEL, *sgd])
    results = []
    for spoilt in (False, True):
        layer = torch.nn.Linear(2000, 500)
        torch.nn.init.constant_(layer.weight, 0.5)
        updater = Updater(build_optimizer(layer, config), clip_max_norm=0.1)
        for loss in ([torch.tensor(float("nan"))] if spoilt else []) + [torch.tensor(1.0)] * 2:
            updater.backward((layer.weight * loss).sum(), 1)
            updater.step()
        results.append(layer.weight.detach().clone())
    assert torch.equal(*results)
