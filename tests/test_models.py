"""Relations that hold in the detector, with and without BatchFormerV2."""

from __future__ import annotations

import copy
import math
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch.utils._python_dispatch import TorchDispatchMode

from models import batchformer, build_model
from models.backbone import build_body
from models.heads import decode_boxes
from models.position_encoding import PositionEmbeddingLearned, PositionEmbeddingSine
from models.token_batch import encoder_reference_points
from tests.golden import recipe
from tests.helpers import BATCHFORMER, SMALL_MODEL
from util.config import parse_config
from util.errors import UserError
from util.nested_tensor import NestedTensor

SIZES = [(64, 80), (48, 72), (80, 60)]


def build(*flags):
    torch.manual_seed(0)
    config = parse_config([*SMALL_MODEL, *flags])
    model, criterion, postprocessors = build_model(config)
    # fresh heads say the same of every query; the recipe's weights make every part count
    recipe.fill(model)
    recipe.no_dropout(model)
    return model, criterion, postprocessors


@pytest.fixture
def batch():
    return recipe.images(SIZES), recipe.targets(SIZES, [3, 0, 5], num_classes=4)


def copy_weights(source, target):
    target.load_state_dict(source.state_dict(), strict=False)


@pytest.mark.parametrize(
    "bf",
    [
        BATCHFORMER,
        ("--bf", "1", "--insert_idx", "0", "1", "--bt_num_layers", "2"),
        ("--bf", "7", "--insert_idx", "1"),
    ],
)
@torch.no_grad()
def test_evaluation_with_batchformer_is_bit_identical_to_without(bf, batch):
    with_bf, without = build(*bf)[0].eval(), build()[0].eval()
    copy_weights(with_bf, without)
    ours, plain = with_bf(batch[0]), without(batch[0])
    assert ours["num_streams"] == 1
    for key in ("pred_logits", "pred_boxes"):
        assert torch.equal(ours[key], plain[key])


@pytest.mark.parametrize("extra", [(), ("--with_box_refine", "--two_stage")])
@pytest.mark.parametrize("insertions", [("0",), ("0", "1"), ("1", "0")])
def test_plain_half_of_training_is_training_without_batchformer(insertions, extra, batch):
    with_bf = build("--bf", "1", "--share_bf", "0", "--insert_idx", *insertions, *extra)[0].train()
    without = build(*extra)[0].train()
    copy_weights(with_bf, without)
    ours, plain = with_bf(batch[0]), without(batch[0])
    assert ours["num_streams"] == 2
    for key in ("pred_logits", "pred_boxes"):
        half, mixed = ours[key].chunk(2)
        torch.testing.assert_close(half, plain[key], atol=1e-5, rtol=0)
        assert not torch.allclose(mixed, plain[key], atol=1e-3), "the mixed half must not be a copy"


def test_mixed_stream_relates_images_and_the_plain_one_does_not(batch):
    """Changing one image changes the mixed outputs of another, never its plain ones."""
    model = build(*BATCHFORMER)[0].train()
    images = recipe.images([(64, 64)] * 2)
    changed = [images[0], images[1] + 1]
    before, after = model(images)["pred_logits"], model(changed)["pred_logits"]
    plain, mixed = 0, 2
    torch.testing.assert_close(before[plain], after[plain], atol=1e-5, rtol=0)
    assert (before[mixed] - after[mixed]).abs().max() > 1e-3


def test_two_streams_share_targets_and_count_twice(batch):
    """With outputs repeated by hand, two streams cost what one does: every loss is divided by twice
    the boxes.
    """
    model, criterion, _ = build()
    outputs = model.eval()(batch[0])
    doubled = {k: torch.cat([v, v]) for k, v in outputs.items() if isinstance(v, torch.Tensor)} | {
        "num_streams": 2
    }
    doubled["aux_outputs"] = [
        {k: torch.cat([v, v]) for k, v in aux.items()} for aux in outputs["aux_outputs"]
    ]
    once, twice = criterion(outputs, batch[1]), criterion(doubled, batch[1])
    for name in once:
        torch.testing.assert_close(once[name], twice[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "7"])
@torch.no_grad()
def test_eval_bf_acts_on_the_single_stream(mode, batch):
    flags = ("--bf", mode, "--share_bf", "0", "--insert_idx", "0", "--insert_idx", "1")
    plain, acting = build(*flags)[0].eval(), build(*flags, "--eval_bf")[0].eval()
    a, b = plain(batch[0]), acting(batch[0])
    assert b["num_streams"] == 1
    assert a["pred_logits"].shape == b["pred_logits"].shape
    assert (a["pred_logits"] - b["pred_logits"]).abs().max() > 1e-3
    one_stream = build("--bf", "7", "--share_bf", "0", "--insert_idx", "0", "1")[0].train()
    torch.testing.assert_close(b["pred_logits"], one_stream(batch[0])["pred_logits"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_more_positions_than_cuda_takes_go_through_the_module_in_parts(batch, monkeypatch):
    model = build("--bf", "7", "--insert_idx", "0", "--eval_bf")[0].eval()
    calls = []
    model.transformer.bf.register_forward_hook(lambda module, args, out: calls.append(args[0].shape[1]))
    whole = model(batch[0])["pred_logits"]
    (positions,) = calls
    monkeypatch.setattr(batchformer, "MOST_POSITIONS", positions - 7)
    in_parts = model(batch[0])["pred_logits"]
    assert calls == [positions, positions - 7, 7]
    torch.testing.assert_close(in_parts, whole, atol=1e-5, rtol=0)


def test_more_queries_than_proposals_are_refused():
    model, _, _ = build("--with_box_refine", "--two_stage", "--num_queries", "90")
    with pytest.raises(UserError, match="--num_queries 90 is more than the 85 proposals"):
        model(recipe.images([(64, 64)]))


def test_order_of_insertions_does_not_matter(batch):
    a, b = (build("--bf", "1", "--insert_idx", *order)[0].train() for order in (("0", "1"), ("1", "0")))
    assert torch.equal(a(batch[0])["pred_logits"], b(batch[0])["pred_logits"])


@torch.no_grad()
def test_images_of_one_size_do_not_depend_on_their_batch():
    model = build()[0].eval()
    images = recipe.images([(64, 64)] * 3)
    together = model(images)["pred_boxes"]
    for i, image in enumerate(images):
        torch.testing.assert_close(model([image])["pred_boxes"][0], together[i], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "flags", [(), ("--with_box_refine",), ("--with_box_refine", "--two_stage"), BATCHFORMER]
)
def test_no_targets_and_more_targets_than_queries(flags):
    model, criterion, _ = build(*flags, "--num_queries", "4")
    model.train()
    images = recipe.images([(64, 64)] * 2)
    for counts in ([0, 0], [9, 0], [6, 7]):
        losses = criterion(model(images), recipe.targets([(64, 64)] * 2, counts, num_classes=4))
        total = criterion.total(losses)
        assert torch.isfinite(total)
        model.zero_grad()
        total.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        if not any(counts):
            assert losses["loss_bbox"] == losses["loss_giou"] == 0
            assert losses["class_error"] == 100


def test_dilation_keeps_the_stride():
    flags = (*SMALL_MODEL, "--backbone", "resnet50", "--backbone_norm", "frozen_bn", "--dilation")
    for levels, strides in (("1", [16]), ("4", [8, 16, 16])):
        with torch.device("meta"):
            model, _, _ = build_model(parse_config([*flags, "--num_feature_levels", levels]))
            features = model.backbone[0](
                NestedTensor(torch.empty(1, 3, 64, 64), torch.empty(1, 64, 64, dtype=torch.bool))
            )
        assert [64 // f.tensors.shape[2] for f in features] == strides


def test_what_trains_in_the_backbone():
    def trains(*flags):
        model, _, _ = build_model(parse_config([*SMALL_MODEL, *flags]))
        return {
            name.split(".")[0] for name, p in model.backbone[0].body.named_parameters() if p.requires_grad
        }

    deep = {"layer2", "layer3", "layer4"}
    assert trains("--backbone_norm", "frozen_bn") == deep
    assert trains("--backbone_norm", "gn") == deep | {"conv1", "bn1", "layer1"}
    assert trains("--lr_backbone", "0") == set()


def test_imagenet_weights_offline_say_what_to_do(monkeypatch):
    def offline(self, *args, **kwargs):
        raise URLError("no route")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", offline)
    with pytest.raises(UserError, match="--backbone_weights none") as error:
        build_body("resnet18", "frozen_bn", "imagenet", dilation=False, multi_scale=True)
    assert "resnet18" in str(error.value)
    assert "checkpoints" in str(error.value)


def test_backbone_weights_from_a_file(tmp_path):
    source = torchvision.models.resnet18(weights=None)
    torch.save(source.state_dict(), tmp_path / "r18.pth")
    loaded = build_body("resnet18", "frozen_bn", str(tmp_path / "r18.pth"), dilation=False, multi_scale=True)
    assert torch.equal(loaded.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
    with pytest.raises(UserError, match="--backbone"):
        build_body("resnet34", "frozen_bn", str(tmp_path / "r18.pth"), dilation=False, multi_scale=True)
    with pytest.raises(UserError, match="does not exist"):
        build_body("resnet18", "frozen_bn", str(tmp_path / "none.pth"), dilation=False, multi_scale=True)


def test_drop_path_thins_training_only(batch):
    images = batch[0]
    with_drop, without = build("--drop_path", "0.9")[0], build()[0]
    with torch.no_grad():
        assert torch.equal(with_drop.eval()(images)["pred_logits"], without.eval()(images)["pred_logits"])
        torch.manual_seed(1)
        assert not torch.allclose(
            with_drop.train()(images)["pred_logits"], without.train()(images)["pred_logits"], atol=1e-3
        )
    assert [layer.drop_path.p for layer in with_drop.transformer.encoder.layers] == [0.0, 0.9]


def test_first_values():
    """A fresh model says every class with probability 0.01, and boxes of sigmoid(-2) around its
    reference points.
    """
    model, _, _ = build_model(parse_config([*SMALL_MODEL]))
    assert model.class_embed[0].bias.sigmoid().mean().item() == pytest.approx(0.01, rel=1e-3)
    assert model.class_embed[0] is model.class_embed[1]
    boxes = model.eval()(recipe.images([(64, 64)]))["pred_boxes"]
    torch.testing.assert_close(boxes[..., 2:], torch.full_like(boxes[..., 2:], 1 / (1 + math.exp(2))))
    refined, _, _ = build_model(parse_config([*SMALL_MODEL, "--with_box_refine"]))
    biases = [head.layers[-1].bias[2:].tolist() for head in refined.bbox_embed]
    assert biases == [[-2.0, -2.0], [0.0, 0.0]]
    two_stage, _, _ = build_model(parse_config([*SMALL_MODEL, "--with_box_refine", "--two_stage"]))
    assert len(two_stage.bbox_embed) == 3
    assert not any(head.layers[-1].bias.any() for head in two_stage.bbox_embed)


def test_position_encodings():
    mask = torch.zeros(2, 6, 8, dtype=torch.bool)
    mask[1, 4:] = True
    mask[1, :, 5:] = True
    levels = [mask[:, ::2, ::2], mask]
    assert PositionEmbeddingSine(8)(levels).shape == (2, 12 + 48, 16)
    sine = PositionEmbeddingSine(8)(levels)[:, 12:].mT.unflatten(-1, (6, 8))
    # the slowest pair of y's features turns 1 / 10 of a circle's 2 pi over the unpadded height
    y = (torch.arange(4) + 0.5) / 4 * 2 * math.pi
    torch.testing.assert_close(sine[1, 0, :4, 0], y.sin(), atol=1e-5, rtol=0)
    torch.testing.assert_close(sine[1, 1, :4, 0], y.cos(), atol=1e-5, rtol=0)
    learned = PositionEmbeddingLearned(8, 10)
    out = learned(levels)[:, 12:].mT.unflatten(-1, (6, 8))
    assert torch.equal(out[0, :8, 3, 5], learned.col_embed.weight[5])
    assert torch.equal(out[0, 8:, 3, 5], learned.row_embed.weight[3])
    with pytest.raises(UserError, match="--position_embedding"):
        learned([torch.zeros(1, 4, 11, dtype=torch.bool)])


def test_positions_are_counted_in_integers():
    """Sums of floats depend on the order of the additions, and --deterministic may refuse them on a
    GPU.
    """
    counted = []

    class Cumsum(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            counted.extend([out.dtype] if func._schema.name == "aten::cumsum" else [])
            return out

    with Cumsum():
        PositionEmbeddingSine(8)([torch.zeros(1, 6, 8, dtype=torch.bool)])
    assert counted == [torch.int32, torch.int32]


def test_reference_points_are_pixel_centres():
    ratios = torch.tensor([[[0.5, 1.0], [1.0, 1.0]]])
    points = encoder_reference_points(((2, 4), (1, 2)), ratios)
    assert points.shape == (1, 10, 2, 2)
    # second pixel of the first row: x = 1.5 of 2 valid columns, which is 0.75 of the image and
    # 0.375 of the padded level
    torch.testing.assert_close(points[0, 1, 0], torch.tensor([0.375, 0.25]))
    torch.testing.assert_close(points[0, 1, 1], torch.tensor([0.75, 0.25]))


def test_decoded_boxes_start_at_their_reference():
    reference = torch.tensor([[0.3, 0.6, 0.2, 0.1]])
    torch.testing.assert_close(decode_boxes(torch.zeros(1, 4), reference), reference)
    torch.testing.assert_close(decode_boxes(torch.zeros(1, 4), reference[:, :2])[:, :2], reference[:, :2])


def test_postprocess():
    _, _, postprocessors = build()
    logits = torch.full((1, 3, 4), -5.0)
    logits[0, 1, 2], logits[0, 2, 0] = 3.0, 1.0
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.5, 0.25, 0.5, 0.5], [0.1, 0.1, 0.2, 0.2]]])
    (found,) = postprocessors["bbox"](
        {"pred_logits": logits, "pred_boxes": boxes}, torch.tensor([[200, 100]])
    )
    assert len(found["scores"]) == 12, "no more than there are pairs"
    assert found["labels"][:2].tolist() == [2, 0]
    torch.testing.assert_close(found["boxes"][0], torch.tensor([25.0, 0, 75, 100]))
    with pytest.raises(ValueError, match="target_sizes"):
        postprocessors["bbox"]({"pred_logits": logits, "pred_boxes": boxes}, torch.tensor([[200, 100]] * 2))


def test_models_can_be_copied(batch):
    model = build(*BATCHFORMER)[0].train()
    twin = copy.deepcopy(model)
    assert torch.equal(model(batch[0])["pred_logits"], twin(batch[0])["pred_logits"])
    twin.eval()
    assert model(batch[0])["num_streams"] == 2, "the copy's BatchFormerV2 is its own"
    assert twin(batch[0])["num_streams"] == 1
