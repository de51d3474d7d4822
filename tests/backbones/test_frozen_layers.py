"""``reclip_d2.backbones.frozen_layers``: the layers of the frozen towers compute what torch's do."""

import copy
import sys

import pytest
import torch
from torch import nn

from reclip_d2.backbones.dense import DenseCLIP
from reclip_d2.backbones.frozen_layers import (
    FrozenLinear,
    FrozenMultiheadAttention,
    FrozenQuickGeluMlp,
    use_frozen_layers,
)
from reclip_d2.backbones.reference import ReferencePrompt
from tests.helpers import CLASS_NAMES, tiny_clip, tiny_dense

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


# ---- as on a GPU ----------------------------------------------------------------------------------------------


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Layers take the CPU for a GPU."""
    return lambda: monkeypatch.setattr("reclip_d2.layers.frozen_weights.is_on_gpu", lambda _: True)


def quick_dense(dtype=torch.float32, **arguments) -> DenseCLIP:
    return tiny_dense(quick_gelu=True, **arguments).to(dtype)


def outputs(dense: DenseCLIP) -> list[torch.Tensor]:
    """Dense, global and text features, Reference features and their gradient."""
    dtype = dense.clip.visual.proj.dtype
    images = torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    torch.manual_seed(0)
    prompt = ReferencePrompt(dense, [names[0] for names in CLASS_NAMES], prompt_length=4).to(dtype)
    reference = prompt(dense)
    (gradient,) = torch.autograd.grad(reference.square().sum(), prompt.vectors)
    square = torch.nn.functional.interpolate(images, size=(32, 32))
    texts = dense.text_features(["a photo of a tree", "water"])
    return [dense.dense(images), dense.global_features(square), texts, reference.detach(), gradient]


def test_the_towers_compute_the_same_on_a_gpu(as_on_a_gpu):
    """In float64, up to rounding; with the text tower's mask as on a GPU."""
    dense = quick_dense(torch.float64)
    assert sum(type(module) is FrozenQuickGeluMlp for module in dense.clip.modules()) == 5
    assert not any(type(module) is FrozenQuickGeluMlp for module in tiny_dense().clip.modules())
    expected = outputs(dense)
    as_on_a_gpu()
    for found, want in zip(outputs(dense), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-10)


def test_bfloat16_differs_from_autocast_by_rounding(as_on_a_gpu):
    exact = outputs(quick_dense(torch.float64))
    dense = quick_dense(autocast_dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = outputs(dense)
        as_on_a_gpu()
        found = outputs(dense)
    for ours, autocast, want in zip(found, expected, exact, strict=True):
        error, usual = (float((x.double() - want).norm() / want.norm()) for x in (ours, autocast))
        assert 0 < error <= 1.3 * usual


def test_kept_copies_change_no_bit_of_autocast(monkeypatch):
    dense = quick_dense(autocast_dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs(dense)
        for module in ("layers.frozen_linear", "backbones.vision", "backbones.text", "backbones.packed_texts"):
            monkeypatch.setattr(sys.modules[f"reclip_d2.{module}"], "autocast_copy", lambda weight: weight)
        expected = outputs(dense)
    assert all(torch.equal(ours, want) for ours, want in zip(found, expected, strict=True))


def test_an_mlp_follows_its_weights(as_on_a_gpu):
    clip = tiny_clip(quick_gelu=True)
    plain, mlp = (copy.deepcopy(clip).transformer.resblocks[0].mlp for _ in range(2))
    use_frozen_layers(nn.ModuleList([mlp]))
    as_on_a_gpu()
    x = torch.randn(3, 5, 32)
    for _ in range(2):
        torch.testing.assert_close(mlp(x), plain(x), rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            for each in (plain, mlp):
                each.c_fc.bias.add_(0.5)
    kept = mlp._kept_bias
    assert mlp(x) is not None and mlp._kept_bias is kept
    assert mlp.double()(x.double()).dtype == torch.float64
    mlp.requires_grad_(True)(x.double()).sum().backward()
    assert mlp.c_fc.bias.grad is not None
