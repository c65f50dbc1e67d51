"""--checkpoint_encoder: the same bits with less memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from models import build_model
from tests.golden import recipe
from tests.helpers import BATCHFORMER, SMALL_IMAGES, SMALL_MODEL, write_coco
from tests.processes import run_main_together
from util.checkpoint import read_checkpoint
from util.config import parse_config
from util.nested_tensor import NestedTensor
from util.step.precision import autocast

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
RANDOM = ("--dropout", "0.2", "--drop_path", "0.3")  # beside BatchFormerV2's dropout of 0.5
TWO_STAGE = ("--with_box_refine", "--two_stage")
EVERYWHERE = ("--share_bf", "1", "--insert_idx", "0", "1", "--bt_num_layers", "2")
CASES = [
    ("off", ()),
    ("off", TWO_STAGE),
    ("off", BATCHFORMER),
    ("off", ("--bf", "1", *EVERYWHERE, *TWO_STAGE)),
    ("off", ("--bf", "7", *EVERYWHERE, "--with_box_refine")),
    ("bf16", (*BATCHFORMER, *TWO_STAGE)),
    ("bf16", ("--bf", "7", *EVERYWHERE)),
    ("fp16", BATCHFORMER),
]
SIZES = [(64, 80), (48, 72)]


def build(*flags, device="cpu"):
    torch.manual_seed(0)
    model, criterion, _ = build_model(parse_config([*SMALL_MODEL, *RANDOM, *flags]))
    recipe.fill(model)
    return model.to(device), criterion


def images(device="cpu"):
    return NestedTensor.from_images(recipe.images(SIZES)).to(device)


def step(amp, *flags, device):
    """Losses, gradients by parameter and the state of the random numbers after a training step."""
    model, criterion = build(*flags, device=device)
    targets = [
        {name: x.to(device) for name, x in t.items()} for t in recipe.targets(SIZES, [3, 5], num_classes=4)
    ]
    torch.manual_seed(1)
    with autocast(amp, torch.device(device)):
        outputs = model.train()(images(device))
    losses = criterion(outputs, targets)
    criterion.total(losses).backward()
    return losses, {name: p.grad for name, p in model.named_parameters()}, torch.rand(4, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("amp", "flags"), CASES)
def test_losses_gradients_and_random_numbers_are_the_same_bits(amp, flags, device):
    """With dropout and stochastic depth everywhere. On a GPU atomic sums are in no order, unless it
    must be a fixed one.
    """
    torch.use_deterministic_algorithms(device == "cuda", warn_only=True)
    try:
        losses, gradients, random = step(amp, *flags, device=device)
        again_losses, again_gradients, again_random = step(amp, *flags, "--checkpoint_encoder", device=device)
    finally:
        torch.use_deterministic_algorithms(False)
    assert list(gradients) == list(again_gradients), "the names of the parameters"
    for name, loss in losses.items():
        assert torch.equal(loss, again_losses[name]), name
    for name, gradient in gradients.items():
        assert (gradient is None) == (again_gradients[name] is None), name
        assert gradient is None or torch.equal(gradient, again_gradients[name]), name
    assert torch.equal(random, again_random)


def calls_of_layers(model):
    calls = []
    for i, layer in enumerate(model.transformer.encoder.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    return calls


def test_layers_run_again_in_the_backward_and_only_in_training():
    model, _ = build("--checkpoint_encoder", *BATCHFORMER)
    calls = calls_of_layers(model)
    outputs = model.train()(images())
    assert calls == [0, 1]
    outputs["pred_logits"].sum().backward()
    assert calls == [0, 1, 1, 0]
    calls.clear()
    with torch.no_grad():
        model(images())
    model.eval()(images())["pred_logits"].sum().backward()
    assert calls == [0, 1, 0, 1]


def kept_bytes(model):
    """What autograd keeps of the encoder between forward and backward, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def only_here(forward):
        def run(tokens):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                return forward(tokens)

        return run

    encoder = model.transformer.encoder
    encoder.forward = only_here(encoder.forward)
    outputs = model.train()(images())
    assert outputs["pred_logits"].requires_grad
    return sum(kept.values())


def test_nothing_is_kept_but_the_tokens_between_the_layers():
    tokens = 8 * 10 + 4 * 5 + 2 * 3 + 1 * 2  # of the four levels at 64 x 80
    in_bytes = tokens * 64 * 4
    two_images_then_two_streams = 2 * in_bytes + 4 * in_bytes
    kept = kept_bytes(build(*BATCHFORMER, "--checkpoint_encoder")[0])
    assert two_images_then_two_streams <= kept < 1.1 * two_images_then_two_streams, (
        "beside them only what PyTorch notes"
    )
    assert kept_bytes(build(*BATCHFORMER)[0]) > 10 * two_images_then_two_streams


def test_pytorch_is_shown_the_tensors_whose_random_state_it_must_bring_back(monkeypatch):
    """It looks for devices among the arguments and does not look into objects: on a GPU other
    dropout masks would follow.
    """
    shown = []

    def watched(run, *args, **how):
        shown.append(args)
        return checkpoint(run, *args, **how)

    monkeypatch.setattr("models.encoder.checkpoint", watched)
    model, _ = build("--checkpoint_encoder")
    model.train()(images())
    assert len(shown) == 2
    assert all(isinstance(tokens, torch.Tensor) and tokens.shape[-1] == 64 for (tokens,) in shown)


def test_two_processes_train_to_the_same_bits(tmp_path):
    write_coco(tmp_path / "data", num_train=8, num_val=2)
    states = []
    for name, extra in (("kept", ()), ("again", ("--checkpoint_encoder",))):
        out = tmp_path / name
        run_main_together(
            "--coco_path",
            str(tmp_path / "data"),
            *SMALL_IMAGES,
            *SMALL_MODEL,
            *RANDOM,
            *BATCHFORMER,
            *TWO_STAGE,
            *extra,
            "--num_workers",
            "0",
            "--device",
            "cpu",
            "--epochs",
            "1",
            "--accumulate_steps",
            "2",
            "--output_dir",
            str(out),
            processes=2,
            output=out / "log",
        )
        states.append(read_checkpoint(out / "checkpoint.pth")["model"])
    assert list(states[0]) == list(states[1])
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
