"""The mask decoder, Eq. (4), against a literal convolution of the concatenation.

Shape letters: B images, (h, w) patch grid, C classes, D joint embedding.
"""

import pytest
import torch
from torch import Tensor, nn

from reclip_d2.config import load_config
from reclip_d2.errors import ReclipError
from reclip_d2.modeling.mask_decoder import MaskDecoder

B, C, D, H, W = 2, 3, 4, 4, 6


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(B, C, H, W, dtype=torch.float64), torch.randn(B, D, H, W, dtype=torch.float64)


def literal_convolution(decoder: MaskDecoder, logits: Tensor, features: Tensor, padding_mode: str) -> Tensor:
    """Convolution of concat(Z, M), one output value after the other."""
    x = torch.cat([features, logits], dim=1)
    weight, bias = decoder.conv.weight, decoder.conv.bias
    reach = weight.shape[-1] // 2
    out = torch.zeros(B, C, H, W, dtype=torch.float64)
    for i in range(H):
        for j in range(W):
            value = bias.expand(B, C)
            for di in range(-reach, reach + 1):
                for dj in range(-reach, reach + 1):
                    row, column = i + di, j + dj
                    if padding_mode == "zeros" and not (0 <= row < H and 0 <= column < W):
                        continue
                    row, column = min(max(row, 0), H - 1), min(max(column, 0), W - 1)
                    value = value + x[:, :, row, column] @ weight[:, :, di + reach, dj + reach].T
            out[:, :, i, j] = value
    return out


def literal_batch_norm(x: Tensor, norm: nn.Module, training: bool) -> Tensor:
    if training:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    else:
        mean, variance = norm.running_mean, norm.running_var
    x = (x - mean[:, None, None]) / (variance[:, None, None] + norm.eps).sqrt()
    return x * norm.weight[:, None, None] + norm.bias[:, None, None]


@pytest.mark.parametrize("padding_mode", ["replicate", "zeros"])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("training", [True, False])
def test_equation_4(padding_mode, kernel_size, training):
    decoder = MaskDecoder(D, C, kernel_size=kernel_size, padding_mode=padding_mode).double().train(training)
    nn.init.normal_(decoder.norm.weight)
    nn.init.normal_(decoder.norm.bias)
    decoder.norm.running_mean.normal_()
    decoder.norm.running_var.uniform_(0.5, 2)
    logits, features = inputs()
    expected = literal_convolution(decoder, logits, features, padding_mode)
    expected = literal_batch_norm(expected, decoder.norm, training)
    torch.testing.assert_close(decoder(logits, features), expected, rtol=0, atol=1e-12)


def test_gradients_equal_those_of_the_concatenation():
    decoder = MaskDecoder(D, C, norm="").double()
    weights = torch.randn(B, C, H, W, dtype=torch.float64)
    grads = []
    for forward in (decoder, lambda m, z: literal_convolution(decoder, m, z, "replicate")):
        logits, features = (x.requires_grad_() for x in inputs())
        torch.manual_seed(1)
        logits, features = torch.randn_like(logits).requires_grad_(), torch.randn_like(features).requires_grad_()
        (forward(logits, features) * weights).sum().backward()
        grads.append([logits.grad, features.grad, decoder.conv.weight.grad, decoder.conv.bias.grad])
        decoder.zero_grad()
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_no_gradient_to_frozen_features():
    decoder = MaskDecoder(D, C)
    logits, features = (x.float() for x in inputs())
    decoder(logits.requires_grad_(), features).square().sum().backward()
    assert features.grad is None and logits.grad is not None


@pytest.mark.parametrize("padding_mode", ["replicate", "zeros"])
@pytest.mark.parametrize("kernel_size", [1, 5])
def test_identity_passes_the_logits_through(padding_mode, kernel_size):
    decoder = MaskDecoder(D, C, kernel_size=kernel_size, padding_mode=padding_mode, init="identity", norm="").double()
    logits, features = inputs()
    assert torch.equal(decoder(logits, features), logits)
    normed = MaskDecoder(D, C, padding_mode=padding_mode, init="identity").double().train()
    torch.testing.assert_close(normed(logits, features), literal_batch_norm(logits, normed.norm, True))


def test_identity_still_trains_on_features_and_logits():
    decoder = MaskDecoder(D, C, init="identity").double()
    logits, features = inputs()
    (decoder(logits, features) * torch.randn_like(logits)).sum().backward()
    assert decoder.conv.weight.grad[:, :D].abs().max() > 1e-3
    assert decoder.conv.weight.grad[:, D:].abs().max() > 1e-3


@pytest.mark.parametrize(("norm", "kind"), [("BN", nn.BatchNorm2d), ("", nn.Identity), ("SyncBN", nn.Module)])
def test_norms_by_name(norm, kind):
    assert isinstance(MaskDecoder(D, C, norm=norm).norm, kind)


def test_group_norm_where_it_fits():
    decoder = MaskDecoder(D, 32, norm="GN")
    assert isinstance(decoder.norm, nn.GroupNorm)


@pytest.mark.parametrize("norm", ["GN", "BatchNorm"])
def test_a_norm_that_cannot_be_is_one_line(norm):
    """20 classes cannot be divided into GroupNorm's 32 groups; "BatchNorm" is not a name in Detectron2."""
    with pytest.raises(ReclipError, match=r"MODEL\.MASK_DECODER\.NORM"):
        MaskDecoder(D, 20, norm=norm)


def test_from_the_config():
    cfg = load_config("", ["MODEL.MASK_DECODER.KERNEL_SIZE", "3", "MODEL.MASK_DECODER.PADDING_MODE", "zeros"])
    cfg.MODEL.MASK_DECODER.INIT = "identity"
    cfg.MODEL.MASK_DECODER.NORM = ""
    decoder = MaskDecoder(cfg, 4, 3)
    assert decoder.conv.weight.shape == (3, 7, 3, 3) and decoder.padding_mode == "zeros"
    logits, features = (x.float() for x in inputs())
    assert torch.equal(decoder(logits, features), logits)
