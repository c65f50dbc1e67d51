"""Our numbers against the published implementation's (tests/golden/README.md says where they come
from).
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.golden_cases import FOLDER, case_names, load_case
from util.optim import build_optimizer
from util.step.updater import build_updater

OUTPUTS, LOSSES, GRADIENTS, TRAJECTORY = 1e-4, 1e-5, 1e-3, 1e-3  # bounds of the golden README
# published: without auxiliary losses the proposals go untrained; here they don't, so the total is
# another
OTHER_TOTAL = "no_aux_loss_two_stage_train"


@pytest.fixture(autouse=True)
def _two_threads():
    """With another number of threads sums have another order, and one gradient norm differs by 1.1e-3."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=case_names("eval"))
def eval_case(request, tmp_path):
    return load_case(request.param, tmp_path)


@pytest.fixture(params=case_names("train"))
def train_case(request, tmp_path):
    return load_case(request.param, tmp_path)


@torch.no_grad()
def test_evaluation(eval_case):
    case, _, model, criterion, postprocessors, report = eval_case
    assert not report.missing
    assert not report.unexpected
    outputs = model(case.images)
    assert_outputs(case, outputs)
    assert_losses(case, criterion(outputs, case.targets))
    sizes = torch.stack([target["orig_size"] for target in case.targets])
    assert_detections(case, postprocessors["bbox"](outputs, sizes))


def test_training(train_case):
    case, config, model, criterion, _, report = train_case
    assert not report.missing
    assert not report.unexpected
    outputs = model(case.images)
    assert_outputs(case, outputs)
    losses = criterion(outputs, case.targets)
    assert_losses(case, losses)
    trainable = {published_name(name, config) for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(case.facts["trainable"])
    if case.name == OTHER_TOTAL:
        assert losses["loss_ce_enc"].requires_grad
        return
    total = criterion.total(losses)
    assert total.item() == pytest.approx(case.facts["total"], rel=LOSSES)
    total.backward()
    assert_gradients(
        case, {published_name(n, config): p.grad for n, p in model.named_parameters() if p.requires_grad}
    )


@pytest.mark.parametrize("name", [n for n in case_names("train") if "bf_insert0" in n or n.startswith("sgd")])
def test_trajectory(name, tmp_path):
    case, config, model, criterion, _, _ = load_case(name, tmp_path)
    updater = build_updater(model, config)
    for step, (total, norm) in enumerate(case.facts["trajectory"]):
        loss = criterion.total(criterion(model(case.images), case.targets))
        # at the default rate SGD moves so little that only a tight bound tells a step from none
        assert loss.item() == pytest.approx(
            total, rel=1e-5 if name == "sgd_trajectory_train" else TRAJECTORY
        ), step
        updater.backward(loss, 1)
        assert updater.step().item() == pytest.approx(norm, rel=TRAJECTORY), step


def test_optimizer_groups(tmp_path):
    _, config, model, _, _, _ = load_case("deformable_detr_train", tmp_path)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = json.loads((FOLDER / "optimizer_groups.json").read_text())["groups"]
    for ours, published in zip(build_optimizer(model, config).param_groups, groups, strict=True):
        assert ours["lr"] == pytest.approx(published["lr"], rel=1e-12)
        assert sorted(names[id(p)] for p in ours["params"]) == sorted(published["params"])


def published_name(name, config):
    """With refinement the published optimiser knows the heads by their name in the decoder."""
    if config.transformer.with_box_refine and name.startswith("bbox_embed."):
        return "transformer.decoder." + name
    if config.transformer.two_stage and name.startswith("class_embed."):
        return "transformer.decoder." + name
    return name


def assert_outputs(case, outputs):
    for key in ("pred_logits", "pred_boxes"):
        np.testing.assert_allclose(outputs[key].detach().numpy(), case.arrays[key], atol=OUTPUTS, rtol=0)


def assert_losses(case, losses):
    for name, value in case.facts["losses"].items():
        assert losses[name].item() == pytest.approx(value, rel=LOSSES), name
    assert set(losses) == set(case.facts["losses"])


def assert_gradients(case, gradients):
    """A norm may be off by a thousandth of itself, or of a millionth of the largest: below that it
    is noise.
    """
    wanted = case.facts["grad_norm"]
    floor = 1e-6 * max(wanted.values())
    assert set(wanted) == {name for name, gradient in gradients.items() if gradient is not None}
    for name, norm in wanted.items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=GRADIENTS, abs=floor), name


def assert_detections(case, detections):
    """Scores in order; labels and boxes too, but detections whose scores tie may have changed
    places.
    """
    for i, detection in enumerate(detections):
        scores, labels, boxes = (case.arrays[key][i] for key in ("scores", "labels", "boxes"))
        np.testing.assert_allclose(detection["scores"].numpy(), scores, atol=OUTPUTS, rtol=0)
        largest = max(case.facts["sizes"][i])
        for score, label, box in zip(
            *(detection[k].numpy() for k in ("scores", "labels", "boxes")), strict=True
        ):
            ties = np.flatnonzero(np.abs(scores - score) < 1e-6)
            assert any(label == labels[t] and np.abs(box - boxes[t]).max() < OUTPUTS * largest for t in ties)
