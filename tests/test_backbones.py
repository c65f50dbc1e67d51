"""Every network of --backbone: its entry agrees with the network that it builds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

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
