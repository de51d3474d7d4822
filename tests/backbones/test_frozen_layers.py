"""``reclip_d2.backbones.frozen_layers``: the layers of the frozen towers compute what torch's do."""

import copy

import pytest
import torch
from torch import nn

from reclip_d2.backbones.frozen_layers import FrozenLinear, FrozenMultiheadAttention, use_frozen_layers

T, E = 48, 64


def block() -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = {"attn": nn.MultiheadAttention(E, 4, batch_first=True), "fc": nn.Linear(E, 256)}
    for parameter in layers["attn"].parameters():
        nn.init.normal_(parameter, std=0.2)
    return nn.ModuleDict(layers).requires_grad_(False).eval()


@pytest.mark.parametrize("masked", [False, True])
def test_the_same_as_torchs(masked):
    plain = block()
    frozen = copy.deepcopy(plain)
    use_frozen_layers(frozen)
    assert type(frozen["attn"]) is FrozenMultiheadAttention and type(frozen["fc"]) is FrozenLinear
    assert frozen.state_dict().keys() == plain.state_dict().keys()
    mask = torch.full((T, T), float("-inf")).triu(1) if masked else None
    inputs = torch.randn(2, T, E, dtype=torch.float64)
    wide = None if mask is None else mask.double()
    expected = plain.double()["attn"](inputs, inputs, inputs, need_weights=False, attn_mask=wide)[0]
    x = inputs.float().requires_grad_(True)
    found, weights = frozen["attn"](x, x, x, need_weights=False, attn_mask=mask)
    assert weights is None
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    torch.testing.assert_close(frozen["fc"](x).double(), plain["fc"](inputs), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    inputs.requires_grad_(True)
    again = plain["attn"](inputs, inputs, inputs, need_weights=False, attn_mask=wide)
    (expected,) = torch.autograd.grad(again[0].sum(), inputs)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_options_are_torchs():
    plain = block()
    frozen = copy.deepcopy(plain)
    use_frozen_layers(frozen)
    x, other = torch.randn(2, T, E), torch.randn(2, 5, E)
    ignored = torch.zeros(2, T, dtype=torch.bool)
    ignored[:, -3:] = True
    for options in ({}, {"need_weights": True}, {"need_weights": False, "key_padding_mask": ignored}):
        for found, expected in zip(frozen["attn"](x, x, x, **options), plain["attn"](x, x, x, **options), strict=True):
            assert (found is None) == (expected is None)
            assert found is None or torch.equal(found, expected)
    cross = frozen["attn"](x, other, other, need_weights=False)[0]
    assert torch.equal(cross, plain["attn"](x, other, other, need_weights=False)[0])


def test_trained_weights_get_gradients():
    model = block().requires_grad_(True)
    use_frozen_layers(model)
    x = torch.randn(2, T, E)
    (model["attn"](x, x, x, need_weights=False)[0].sum() + model["fc"](x).sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
