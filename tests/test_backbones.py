"""Every network of --backbone: its entry agrees with the network that it builds."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from models.backbone import Backbone, build_body
from util.backbones import BACKBONES, recognise


@pytest.mark.parametrize("entry", BACKBONES.values(), ids=list(BACKBONES))
def test_an_entry_says_what_its_network_is(entry):
    # the meta device: shapes without weights
    with torch.device("meta"):
        body = build_body(entry.name, "bn", "none", dilation=False, multi_scale=True)
        maps = body.eval()(torch.empty(1, 3, 64, 96))
        last = build_body(entry.name, "bn", "none", dilation=entry.can_dilate, multi_scale=False)
    assert [tuple(x.shape[1:]) for x in maps] == [
        (entry.channels[0], 8, 12),
        (entry.channels[1], 4, 6),
        (entry.channels[2], 2, 3),
    ]
    assert last.channels == entry.channels[2:]
    assert recognise({name: x.shape for name, x in body.state_dict().items()}) == entry.name
    trains = [name for name, p in Backbone(body, entry.trains).body.named_parameters() if p.requires_grad]
    assert trains
    assert not any(name.startswith(("conv1", "layer1")) for name in trains)


def test_other_weights_are_no_backbone():
    assert recognise({name: x.shape for name, x in nn.Linear(2, 2).state_dict().items()}) is None


@pytest.mark.parametrize("training", [True, False])
def test_frozen_norms_are_torchvisions_whatever_is_written_into_them(training):
    """Also by `.data`, which leaves no trace that a cache of their scales could see."""
    body = build_body("resnet18", "frozen_bn", "none", dilation=False, multi_scale=False).train(training)
    published = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d)
    images = torch.randn(1, 3, 64, 64)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        for tensor in body.state_dict(keep_vars=True).values():
            tensor.data.uniform_(0.1, 0.2, generator=generator)
        published.load_state_dict(body.state_dict(), strict=False)
        wanted = images
        for name, layer in published.named_children():
            wanted = layer(wanted)
            if name == "layer4":
                break
        torch.testing.assert_close(body(images)[-1], wanted, rtol=1e-3, atol=1e-3)
