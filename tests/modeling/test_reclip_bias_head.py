"""The bias head of ReCLIP: Z W_r^T + P.

Shape letters: B images, (h, w) patch grid, n = h*w patches, C classes, D joint embedding, E width of the transformer.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reclip_d2.config import load_config
from reclip_d2.errors import ReclipError
from reclip_d2.modeling.bias_head import BIAS_HEAD_REGISTRY, build_bias_head
from reclip_d2.modeling.reclip_bias_head import ReCLIPBiasHead, SpaceProjection
from tests.helpers import EMBED_DIM, TINY_VISION, bias_of, make_reclip_head, tiny_dense

WIDTH = TINY_VISION["width"]


# ---- the projection of the positional embedding ---------------------------------------------------------------


def test_projection_by_hand():
    """One hidden layer, one channel each, no norm: sums over 3 x 3 neighbourhoods with zeros outside."""
    projection = SpaceProjection(1, 1, (1,), norm="")
    with torch.no_grad():
        for conv, bias in zip(projection.convs, (-4.0, 1.0), strict=True):
            conv.weight.fill_(1.0)
            conv.bias.fill_(bias)
    embedding = torch.tensor([[[1.0, 2.0, 0.0], [0.0, 3.0, 1.0]]])
    # Sums of neighbours: 6 7 6 in both rows; less 4 and cut at 0: 2 3 2. Of these again, plus 1: 11 15 11.
    assert projection(embedding).flatten().tolist() == [11.0, 15.0, 11.0] * 2
    with torch.no_grad():
        projection.convs[1].bias.fill_(-14.0)  # 10 14 10 less 14: the last layer is cut at 0 as well
    assert projection(embedding).flatten().tolist() == [0.0] * 6
    assert not projection(embedding.abs() * 0).any()


def test_projection_against_loops():
    """Batch statistics over the positions of the one map; places in row-major order."""
    torch.manual_seed(0)
    projection = SpaceProjection(5, 3, (4, 6)).double().train()
    with torch.no_grad():
        for norm in projection.norms:
            norm.weight.normal_()
            norm.bias.normal_()
    embedding = torch.randn(5, 3, 4, dtype=torch.float64)
    x = embedding
    for conv, norm in zip(projection.convs, projection.norms, strict=True):
        padded = torch.zeros(x.shape[0], 5, 6, dtype=torch.float64)
        padded[:, 1:4, 1:5] = x
        out = torch.empty(conv.out_channels, 3, 4, dtype=torch.float64)
        for i in range(3):
            for j in range(4):
                patch = padded[:, i : i + 3, j : j + 3]
                out[:, i, j] = (conv.weight * patch).sum((1, 2, 3)) + conv.bias
        mean, variance = out.mean((1, 2)), out.var((1, 2), unbiased=False)
        out = (out - mean[:, None, None]) / (variance[:, None, None] + norm.eps).sqrt()
        x = (out * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)
    got = projection(embedding)
    assert got.shape == (12, 3)
    for i in range(3):
        for j in range(4):
            torch.testing.assert_close(got[4 * i + j], x[:, i, j])


def test_running_statistics_serve_in_eval_mode_at_any_resolution():
    torch.manual_seed(0)
    backbone = tiny_dense()
    projection = SpaceProjection(WIDTH, 4, (10, 6)).train()
    embedding = backbone.positional_embedding((4, 4))
    for _ in range(200):
        trained = projection(embedding)
    projection.eval()
    # Equal but for the running variance's n / (n - 1), twice over hidden layers and once at the end.
    torch.testing.assert_close(projection(embedding), trained, rtol=0.2, atol=0.15)
    state = copy.deepcopy(projection.state_dict())
    other = backbone.positional_embedding((7, 5))
    assert projection(other).shape == (35, 4)
    assert all(torch.equal(value, state[name]) for name, value in projection.state_dict().items())
    assert torch.equal(projection(embedding), projection(embedding))


def test_initial_weights():
    """Kaiming, fan out: standard deviation sqrt(2 / (9 * channels out))."""
    torch.manual_seed(0)
    projection = SpaceProjection(64, 50)
    assert [tuple(conv.weight.shape) for conv in projection.convs] == [
        (512, 64, 3, 3),
        (256, 512, 3, 3),
        (50, 256, 3, 3),
    ]
    for conv in projection.convs:
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * conv.out_channels)), rel=0.02)
    assert all(norm.weight.eq(1).all() and norm.bias.eq(0).all() for norm in projection.norms)


@pytest.mark.parametrize("norm", ["BN", "", "FrozenBN"])
def test_zero_init_prefers_nothing_and_lets_the_gradient_through(norm):
    projection = SpaceProjection(WIDTH, 4, (10, 6), norm=norm, init="zero").train()
    embedding = torch.randn(WIDTH, 3, 5)
    logits = projection(embedding)
    assert torch.equal(logits, torch.ones(15, 4))
    (logits * torch.randn(15, 4)).sum().backward()
    last = projection.norms[-1] if norm == "BN" else projection.convs[-1]
    assert last.weight.grad.abs().max() > 0 and last.bias.grad.abs().max() > 0


def test_a_norm_that_does_not_work():
    with pytest.raises(ReclipError, match=r"MODEL\.BIAS_HEAD\.NORM 'GN' does not work for 10 channels: use BN"):
        SpaceProjection(WIDTH, 4, (10, 6), norm="GN")
    with pytest.raises(ReclipError, match=r"MODEL\.BIAS_HEAD\.NORM 'nonsense'"):
        SpaceProjection(WIDTH, 4, (10, 6), norm="nonsense")
    assert SpaceProjection(WIDTH, 64, (32, 96), norm="GN")(torch.randn(WIDTH, 2, 2)).shape == (4, 64)


# ---- the head -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["row", "matrix"])
def test_bias_is_the_sum_of_its_two_parts(norm):
    backbone = tiny_dense()
    head = make_reclip_head(backbone, norm).eval()
    features = F.normalize(torch.randn(2, EMBED_DIM, 3, 5), dim=1)
    got = bias_of(head, backbone, features)
    assert got.shape == (2, 15, 4) and head.image_dependent
    text = head.reference_prompt(backbone).double()
    text = text / (text.norm(dim=1, keepdim=True) if norm == "row" else text.square().sum().sqrt())
    places = head.space_projection(backbone.positional_embedding((3, 5))).double()
    for b in range(2):
        for i in range(3):
            for j in range(5):
                expected = text @ features[b, :, i, j].double() + places[5 * i + j]
                torch.testing.assert_close(got[b, 5 * i + j].double(), expected, rtol=1e-4, atol=1e-5)


def test_each_image_has_a_bias_of_its_own():
    backbone = tiny_dense()
    head = make_reclip_head(backbone).eval()
    features = F.normalize(torch.randn(2, EMBED_DIM, 2, 2), dim=1)
    first, second = bias_of(head, backbone, features)
    assert (first - second).abs().max() > 0.01
    torch.testing.assert_close(bias_of(head, backbone, features[1:])[0], second)


def test_its_parts_need_no_clip():
    backbone = tiny_dense()
    head = make_reclip_head(backbone).eval()
    features = torch.randn(2, EMBED_DIM, 3, 4)
    embedding, reference = backbone.positional_embedding((3, 4)), head.reference_features(backbone)
    expected = bias_of(head, backbone, features)
    del backbone
    shared = head.shared_bias(embedding, reference)
    torch.testing.assert_close(head.add_image_bias(shared, reference, features), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="ReCLIPBiasHead needs the image features"):
        head.add_image_bias(shared, reference, None)


def test_gradient_reaches_the_prompt_and_the_projection_only():
    backbone = tiny_dense()
    head = make_reclip_head(backbone)
    features = torch.randn(2, EMBED_DIM, 4, 4)
    bias_of(head, backbone, features).square().sum().backward()
    trained = {name: parameter.grad.abs().max().item() for name, parameter in head.named_parameters()}
    assert {name.split(".")[0] for name in trained} == {"reference_prompt", "space_projection"}
    assert all(value > 0 for name, value in trained.items() if "convs" not in name or "bias" not in name)
    assert all(parameter.grad is None for parameter in backbone.parameters()) and features.grad is None


def test_head_from_the_config():
    cfg = load_config("")
    keys = cfg.MODEL.BIAS_HEAD
    keys.NAME, keys.PROMPT_LENGTH, keys.REFERENCE_NORM = "ReCLIPBiasHead", 3, "matrix"
    head = build_bias_head(cfg, tiny_dense(), ["sky", "water"])
    assert isinstance(head, ReCLIPBiasHead) and "ReCLIPBiasHead" in BIAS_HEAD_REGISTRY
    assert head.reference_norm == "matrix"
    assert [conv.out_channels for conv in head.space_projection.convs] == [512, 256, 2]
    assert head.reference_prompt.vectors.shape == (3, 32)
    assert all(isinstance(norm, nn.BatchNorm2d) for norm in head.space_projection.norms)
    keys.SPACE_CHANNELS, keys.NORM, keys.PROJECTION_INIT = [7], "", "zero"
    projection = build_bias_head(cfg, tiny_dense(), ["sky", "water"]).space_projection
    assert [conv.out_channels for conv in projection.convs] == [7, 2]
    assert torch.equal(projection(torch.randn(32, 2, 2)), torch.ones(4, 2))
    keys.REFERENCE_NAMES = ["one"]
    with pytest.raises(ReclipError, match="REFERENCE_NAMES has 1 names for 2 classes"):
        build_bias_head(cfg, tiny_dense(), ["sky", "water"])
    with pytest.raises(ReclipError, match=r"SPACE_CHANNELS is \[8, 0\]; it must be .* a whole number from 1"):
        load_config("", ["MODEL.BIAS_HEAD.SPACE_CHANNELS", "[8, 0]"])
