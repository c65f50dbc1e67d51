"""BatchFormerV2's controls, and what it can do beyond the published module."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models import build_model
from models.batchformer import BatchFormerV2, build_modules
from models.token_batch import TokenBatch
from models.weights.architecture import config_of
from models.weights.finetune import fine_tune
from tests.across_processes import NUM_IMAGES, images_and_targets
from tests.golden import recipe
from tests.helpers import BATCHFORMER, SMALL_MODEL
from tests.processes import run_main_together
from util.class_map import unnamed_classes
from util.config import parse_config
from util.distributed.exchange import apart, exchanges
from util.errors import UserError
from util.nested_tensor import NestedTensor

SHAPES = ((4, 6), (2, 3))
POSITIONS = 30
WIDTH = 8
NUM_POSITIONS = 163  # of the images of across_processes.py, on four levels


def batch_of(num_images: int, padding: torch.Tensor | None = None) -> TokenBatch:
    """Random tokens; padding: [B, S] bool."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(num_images, POSITIONS, WIDTH, generator=generator)
    if padding is None:
        padding = torch.zeros(num_images, POSITIONS, dtype=torch.bool)
    ratios = torch.ones(num_images, 2, 2)
    points = torch.zeros(num_images, POSITIONS, 2, 2)
    return TokenBatch(tokens, torch.zeros_like(tokens), padding, ratios, points, SHAPES)


def modules_of(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    defaults = {"shared": True, "num_layers": 1, "num_heads": 2, "dropout": 0.0, "control": "none"}
    return build_modules(WIDTH, 1, (0,), **defaults | options).train()


def mixed_by(modules: torch.nn.Module, batch: TokenBatch, **options) -> torch.Tensor:
    """The mixed stream [B, S, C]."""
    doubled = BatchFormerV2(modules, 1, (0,), False, **options)(0, batch)
    plain, mixed = doubled.streams()
    assert torch.equal(plain, batch.tokens)
    return mixed


def build(*flags: str) -> torch.nn.Module:
    torch.manual_seed(3)
    model, _, _ = build_model(parse_config([*SMALL_MODEL, "--dropout", "0", *flags]))
    return model


# --- controls ---


def test_the_identity_control_gives_two_plain_streams_to_the_bit():
    batch = batch_of(3)
    assert torch.equal(mixed_by(modules_of(control="identity"), batch), batch.tokens)
    images, _ = images_and_targets()
    model = build(*BATCHFORMER, "--bf_control", "identity")
    assert not [name for name, _ in model.named_parameters() if ".bf." in name], "it has no weights"
    recipe.fill(model)
    outputs = model.train()(NestedTensor.from_images(images))
    assert outputs["num_streams"] == 2
    for name in ("pred_logits", "pred_boxes"):
        plain, mixed = outputs[name].chunk(2)
        assert torch.equal(plain, mixed)


def test_without_dropout_two_equal_streams_have_the_loss_and_gradients_of_one():
    """The losses are divided by the boxes of both streams (docs/batchformer.md)."""
    images, targets = images_and_targets()
    found = []
    for flags in ((), (*BATCHFORMER, "--bf_control", "identity")):
        model, criterion, _ = build_model(parse_config([*SMALL_MODEL, "--dropout", "0", *flags]))
        recipe.fill(model)
        loss = criterion.total(criterion(model.train()(NestedTensor.from_images(images)), targets))
        loss.backward()
        found.append((loss, [p.grad for p in model.parameters() if p.grad is not None]))
    (plain, gradients), (identity, theirs) = found
    torch.testing.assert_close(identity, plain, rtol=1e-5, atol=0)
    for ours, other in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(other, ours, rtol=1e-3, atol=1e-4 * float(ours.abs().max()))


def test_the_copies_control_relates_an_image_to_itself_alone():
    batch, modules = batch_of(3), modules_of()
    copies = mixed_by(modules, batch, control="copies")
    # attention among equal tokens is that of a batch of one image
    for i in range(3):
        alone = mixed_by(modules, batch.with_tokens(batch.tokens[i : i + 1]))
        torch.testing.assert_close(copies[i : i + 1], alone)
    others = batch.with_tokens(torch.cat([batch.tokens[:1], batch.tokens[1:] + 1]))
    assert torch.equal(mixed_by(modules, others, control="copies")[0], copies[0])
    assert not torch.allclose(mixed_by(modules, others)[0], mixed_by(modules, batch)[0])


@pytest.mark.parametrize("other", ["--eval_bf", "--bf_mask_padding", "--bf_across_processes"])
def test_a_control_stands_alone(other):
    with pytest.raises(UserError, match="--bf_control identity is for --bf 1 without"):
        parse_config([*BATCHFORMER, "--bf_control", "identity", other])
    with pytest.raises(UserError, match="--bf_control copies is for --bf 1 without"):
        parse_config(["--bf", "7", "--insert_idx", "0", "--bf_control", "copies"])


def test_all_variants_begin_with_the_weights_of_the_plain_detector():
    plain = build().state_dict()
    for flags in (
        BATCHFORMER,
        (*BATCHFORMER, "--bf_control", "identity"),
        ("--bf", "7", "--insert_idx", "0", "1", "--bt_num_layers", "2"),
    ):
        weights = build(*flags).state_dict()
        assert all(torch.equal(weights[name], value) for name, value in plain.items())
        torch.manual_seed(3)
        expected = torch.rand(5)
        build(*flags)
        after = torch.rand(5)
        build()
        assert torch.equal(after, torch.rand(5)), "what is drawn later is the same too"
        assert not torch.equal(after, expected)


# --- padding ---


def padding_of(*columns: int) -> torch.Tensor:
    """[B, S]: each image has content in its first so many columns of the finest level."""
    finest = torch.arange(6)[None, None] >= torch.tensor(columns)[:, None, None]
    coarse = torch.arange(3)[None, None] >= (torch.tensor(columns)[:, None, None] + 1) // 2
    return torch.cat([finest.expand(-1, 4, -1).flatten(1), coarse.expand(-1, 2, -1).flatten(1)], 1)


def test_masked_padding_changes_no_content():
    padding = padding_of(6, 4, 3)
    batch, modules = batch_of(3, padding), modules_of()
    mixed = mixed_by(modules, batch, mask_padding=True)
    changed = torch.where(
        padding[..., None], batch.tokens + 10 * torch.randn(3, POSITIONS, WIDTH), batch.tokens
    )
    assert torch.equal(
        mixed_by(modules, batch.with_tokens(changed), mask_padding=True)[~padding], mixed[~padding]
    )
    assert not torch.allclose(mixed_by(modules, batch.with_tokens(changed))[~padding], mixed[~padding])


def test_padding_and_content_without_company_stay_as_they_are():
    padding = padding_of(6, 4, 3)
    batch = batch_of(3, padding)
    mixed = mixed_by(modules_of(), batch, mask_padding=True)
    alone = (~padding).sum(0) == 1
    unchanged = padding | alone
    assert alone.any() and torch.equal(mixed[unchanged], batch.tokens[unchanged])
    assert not torch.isclose(mixed[~unchanged], batch.tokens[~unchanged]).all(-1).any()


def test_images_in_company_are_related_as_in_a_batch_of_their_own():
    """Where the third image is padding, the first two are as in a batch of two."""
    padding = padding_of(6, 6, 2)
    batch, modules = batch_of(3, padding), modules_of(num_layers=2)
    mixed = mixed_by(modules, batch, mask_padding=True)
    two = mixed_by(modules, replace(batch_of(2), tokens=batch.tokens[:2]), mask_padding=True)
    torch.testing.assert_close(mixed[:2, padding[2]], two[:, padding[2]])


def test_gradients_with_masked_padding_are_finite():
    batch = batch_of(2, padding_of(0, 3))  # the first image is nothing but padding
    tokens = batch.tokens.requires_grad_()
    modules = modules_of()
    mixed_by(modules, batch, mask_padding=True).square().sum().backward()
    assert tokens.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in modules.parameters())


def test_in_later_insertions_only_the_mixed_half_is_masked():
    images, _ = images_and_targets()
    model = build("--bf", "1", "--insert_idx", "0", "1", "--bf_mask_padding", "--bf_dropout", "0").train()
    outputs = model(NestedTensor.from_images(images))
    assert outputs["pred_logits"].isfinite().all() and len(outputs["pred_logits"]) == 2 * NUM_IMAGES


# --- the images of all processes ---


@pytest.mark.parametrize(
    "flags", [(), ("--bf_mask_padding", "--checkpoint_encoder")], ids=["published", "masked"]
)
def test_processes_relate_all_images_as_one_process_with_the_whole_batch(flags, tmp_path):
    """Outputs and gradients, with images of different sizes in each process."""
    steps = {}
    for processes in (1, 2, 3):
        output = str(tmp_path / f"of{processes}_")
        step = (output, "--bf_across_processes", *flags)
        run_main_together(
            *step,
            processes=processes,
            output=tmp_path / f"log{processes}",
            script="tests/across_processes.py",
        )
        steps[processes] = [torch.load(f"{output}{rank}.pt") for rank in range(processes)]
    whole = steps[1][0]
    assert whole["sent"] == 0
    for processes in (2, 3):
        # all tokens but its own share, there and back, forward and backward (docs/batchformer.md)
        own_tokens = NUM_IMAGES // processes * NUM_POSITIONS * 64 * 4  # bytes: 64 channels of float32
        masks = NUM_IMAGES // processes * NUM_POSITIONS if flags else 0
        # --checkpoint_encoder repeats the forward as far as the backward needs it: the way there
        repeated = 1.25 if flags else 1
        expected = (4 * own_tokens * repeated + 2 * masks) * (processes - 1) / processes
        assert steps[processes][0]["sent"] == pytest.approx(expected, rel=0.01)
        for name in ("logits", "boxes"):
            # plain and mixed halves of each process
            halves = [step[name].chunk(2) for step in steps[processes]]
            together = torch.cat([half[0] for half in halves] + [half[1] for half in halves])
            torch.testing.assert_close(together, whole[name], rtol=1e-4, atol=1e-5)
        gradients = steps[processes][0]["gradients"]
        assert gradients.keys() == whole["gradients"].keys()
        for name, gradient in gradients.items():
            scale = whole["gradients"][name].abs().max()
            torch.testing.assert_close(
                gradient, whole["gradients"][name], rtol=1e-3, atol=1e-4 * float(scale)
            )


def test_a_step_that_is_run_again_alone_exchanges_nothing(monkeypatch):
    monkeypatch.setattr("util.distributed.exchange.world_size", lambda: 2)
    assert exchanges()
    with apart():
        assert not exchanges()
    assert exchanges()


# --- sizes ---


def test_heads_and_dropout_are_those_of_the_flags():
    modules = build(*BATCHFORMER, "--bf_heads", "2", "--bf_dropout", "0.25").transformer.bf[0]
    assert modules.self_attn.num_heads == 2
    assert modules.self_attn.dropout == modules.dropout.p == modules.dropout1.p == modules.dropout2.p == 0.25
    with pytest.raises(UserError, match="--hidden_dim 64 must be a multiple of --bf_heads 3"):
        parse_config([*SMALL_MODEL, *BATCHFORMER, "--bf_heads", "3"])


def test_fine_tuning_keeps_the_heads_of_the_module():
    """Its weights fit any number of heads."""
    config = parse_config([*SMALL_MODEL, *BATCHFORMER, "--bf_heads", "2"])
    model, _, _ = build_model(config)
    content = {"model": model.state_dict(), "args": config.flags()}
    classes = unnamed_classes(content["model"])
    fine_tune(model, config, classes, content, "a.pth")
    with pytest.raises(UserError, match="a.pth has BatchFormerV2 with 2 heads; give --bf_heads 2"):
        fine_tune(model, config.with_flags({"bf_heads": 4}), classes, content, "a.pth")


def test_of_a_control_there_is_no_attention_to_look_at():
    flags = (*SMALL_MODEL, *BATCHFORMER, "--bf_control", "copies")
    model, _, _ = build_model(parse_config(flags))
    content = {"model": model.state_dict(), "args": parse_config(flags).flags()}
    with pytest.raises(UserError, match="a.pth was trained with --bf_control copies"):
        config_of(content, "a.pth", batchformer=True)
    assert config_of(content, "a.pth").batchformer.bf == 0
