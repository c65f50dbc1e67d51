"""What is recorded of a network is what it computed, and recording changes nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import build_model
from models.inspection import as_in_training, recording
from models.ops import reference
from tests.helpers import SMALL_MODEL
from util.config import parse_config

TWO_STREAMS = ("--bf", "1", "--share_bf", "0", "--insert_idx", "0", "--insert_idx", "1")
SHARED = ("--bf", "1", "--insert_idx", "0", "--insert_idx", "1", "--bt_num_layers", "2")
KINDS = {
    "plain": (),
    "refined": ("--with_box_refine",),
    "two-stage": ("--with_box_refine", "--two_stage"),
    "two streams": TWO_STREAMS,
    "shared": SHARED,
    "one stream": ("--bf", "7", "--insert_idx", "0"),
}


def small_model(*flags: str):
    """The network in evaluation mode, with weights that make every query and head sample at places
    of its own.
    """
    torch.manual_seed(0)
    model = build_model(parse_config([*SMALL_MODEL, *flags]))[0].eval()
    for name, parameter in model.named_parameters():
        if "sampling_offsets" in name or "attention_weights" in name:
            nn.init.normal_(parameter.data, std=0.3)
    return model


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    """Of different sizes, so that two of them are padded."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, *size, generator=generator) for size in ((64, 80), (48, 96), (64, 64))]


def run(model, images, in_training: bool):
    with torch.no_grad():
        if not in_training:
            return model(images)
        with as_in_training(model):
            return model(images)


class Calls(list):
    """What modules got and gave: (module, args, kwargs, output), in order."""

    def watch(self, modules):
        for module in modules:
            module.register_forward_hook(lambda *call: self.append(call), with_kwargs=True)
        return self


@pytest.mark.parametrize(("kind", "amp"), [*((kind, False) for kind in KINDS), ("two streams", True)])
def test_recording_leaves_every_output_as_it_is_to_the_bit(kind, amp, images):
    model, in_training = small_model(*KINDS[kind]), "stream" in kind or kind == "shared"
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        before = run(model, images, in_training)
        with recording(model):
            during = run(model, images, in_training)
        after = run(model, images, in_training)
    for outputs in (during, after):
        assert (
            outputs["num_streams"] == before["num_streams"] == (2 if kind in ("two streams", "shared") else 1)
        )
        for name in ("pred_logits", "pred_boxes"):
            assert torch.equal(outputs[name], before[name])


def test_nothing_stays_behind_in_the_network(images):
    model = small_model(*TWO_STREAMS)
    with pytest.raises(KeyError), recording(model) as record:
        run(model, images, in_training=True)
        raise KeyError
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(module.training for module in model.modules())
    assert len(record.batch) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_samples_and_weights_give_the_layers_output_again(kind, images):
    model = small_model(*KINDS[kind])
    layers = model.transformer.encoder.layers, model.transformer.decoder.layers
    calls = Calls().watch(
        [*(layer.self_attn for layer in layers[0]), *(layer.cross_attn for layer in layers[1])]
    )
    with recording(model) as record:
        run(model, images, in_training="stream" in kind or kind == "shared")
    seen = [*record.encoder, *record.decoder]
    assert len(seen) == len(calls) == 4
    for attention, (module, args, kwargs, output) in zip(seen, calls, strict=True):
        value = module.value_proj(args[2]).masked_fill(kwargs["input_padding_mask"][..., None], 0.0)
        value = value.unflatten(-1, (module.n_heads, -1))
        sampled = reference.forward(value, attention.spatial_shapes, attention.locations, attention.weights)
        torch.testing.assert_close(module.output_proj(sampled), output, rtol=1e-4, atol=1e-5)
        assert torch.equal(attention.padding_mask, kwargs["input_padding_mask"])
        # not so if every query sampled alike
        assert attention.weights.std(1).min() > 0


@pytest.mark.parametrize("kind", ["two streams", "shared", "one stream"])
def test_recorded_attention_across_the_batch_gives_the_modules_output_again(kind, images):
    model = small_model(*KINDS[kind])
    modules = [
        module for module in model.transformer.bf.modules() if isinstance(module, nn.MultiheadAttention)
    ]
    calls = Calls().watch(modules)
    with recording(model) as record:
        run(model, images, in_training=True)
    assert len(record.batch) == len(calls) == {"two streams": 2, "shared": 4, "one stream": 1}[kind]
    for weights, (module, args, _, output) in zip(record.batch, calls, strict=True):
        tokens = args[2]  # [N, S, C]: the batch is the sequence
        value = F.linear(
            tokens, module.in_proj_weight[-tokens.shape[-1] :], module.in_proj_bias[-tokens.shape[-1] :]
        )
        value = value.unflatten(-1, (module.num_heads, -1))
        mixed = torch.einsum("smij,jsmd->ismd", weights, value).flatten(-2)
        torch.testing.assert_close(module.out_proj(mixed), output[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_what_is_left_out_is_not_recorded(images):
    model = small_model(*TWO_STREAMS)
    with recording(model) as full:
        run(model, images, in_training=True)
    with recording(model, deformable=False) as record:
        run(model, images, in_training=True)
    assert not record.encoder
    assert not record.decoder
    assert torch.equal(record.batch[1], full.batch[1])
    assert record.spatial_shapes == full.encoder[1].spatial_shapes
    # of the batch, which the second encoder layer got twice
    assert torch.equal(record.padding_mask.repeat(2, 1), full.encoder[1].padding_mask)


def test_in_evaluation_no_image_attends_to_another(images):
    model = small_model(*TWO_STREAMS)
    with recording(model) as record:
        run(model, images, in_training=False)
    assert record.batch == []
    assert len(record.encoder) == 2


def test_the_plain_stream_is_what_evaluation_gives_and_the_mixed_one_is_not(images):
    model = small_model(*TWO_STREAMS)
    evaluated, trained = run(model, images, False), run(model, images, True)
    plain, mixed = trained["pred_logits"].chunk(2)
    torch.testing.assert_close(plain, evaluated["pred_logits"], rtol=1e-4, atol=1e-5)
    assert (mixed - plain).abs().max() > 1e-3


def test_as_in_training_has_no_dropout(images):
    model = small_model(*TWO_STREAMS)
    assert torch.equal(run(model, images, True)["pred_logits"], run(model, images, True)["pred_logits"])


def test_places_in_the_image_do_not_depend_on_the_padding():
    """The reference points of the encoder are the centres of its tokens, whatever the batch is
    padded to.
    """
    model = small_model()
    image, larger = torch.randn(3, 64, 64), torch.randn(3, 128, 96)
    with recording(model) as record:
        run(model, [image, larger], False)
    attention = record.encoder[0]
    height, width = attention.spatial_shapes[0]
    assert (height, width) == (16, 12)
    points = attention.references_in_image()[0, : height * width, 0].unflatten(0, (height, width))
    # 8 x 8 tokens are the image's own
    torch.testing.assert_close(points[0, :8, 0], (torch.arange(8) + 0.5) / 8)
    torch.testing.assert_close(points[:8, 0, 1], (torch.arange(8) + 0.5) / 8)
    offsets = attention.locations_in_image() - attention.references_in_image()[:, :, None, :, None]
    in_level = attention.locations - attention.reference_points[:, :, None, :, None]
    larger_by = torch.tensor([12 / 8, 16 / 8]).expand_as(offsets[0, :, :, 0])
    torch.testing.assert_close(offsets[0, :, :, 0], in_level[0, :, :, 0] * larger_by, rtol=1e-3, atol=1e-5)


def test_references_are_boxes_in_the_layers_after_a_refinement(images):
    model = small_model("--with_box_refine")
    with recording(model) as record:
        outputs = run(model, images, False)
    assert record.decoder[0].references_in_image().shape[-1] == 2
    boxes = record.decoder[1].references_in_image()
    torch.testing.assert_close(boxes[:, :, 2], outputs["aux_outputs"][0]["pred_boxes"])
