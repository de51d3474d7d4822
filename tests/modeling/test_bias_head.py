"""Equations (2) and (3), and the bias head of ReCLIP++.

Shape letters: B images, (h, w) patch grid, n = h*w patches, C classes, D joint embedding, E width of the transformer.
"""

import pytest
import torch
from torch import nn

from reclip_d2.backbones.reference import ReferencePrompt
from reclip_d2.config import load_config
from reclip_d2.errors import ReclipError
from reclip_d2.modeling.bias_head import (
    BIAS_HEAD_REGISTRY,
    BiasHead,
    PositionalProjection,
    ReCLIPPPBiasHead,
    bias_logits,
    bias_to_subtract,
    build_bias_head,
    query_logits,
    rectified_logits,
)
from reclip_d2.modeling.meta_arch.distillation import inherit
from tests.helpers import EMBED_DIM, bias_of, make_rectified, tiny_dense


def test_equation_2():
    positional, reference = torch.randn(6, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    got = bias_logits(positional, reference)
    for n in range(6):
        for k in range(3):
            assert got[n, k].item() == pytest.approx(sum(positional[n, d] * reference[k, d] for d in range(5)).item())


def test_positional_projection_is_a_matrix_product():
    projection = PositionalProjection(7, 5).double()
    embedding = torch.randn(7, 2, 3, dtype=torch.float64)
    got = projection(embedding)
    assert got.shape == (6, 5)
    weight = projection.conv.weight[:, :, 0, 0]
    for row in range(2):
        for column in range(3):
            expected = weight @ embedding[:, row, column] + projection.conv.bias
            torch.testing.assert_close(got[row * 3 + column], expected)


def test_query_logits_are_cosine_similarities():
    features = torch.nn.functional.normalize(torch.randn(2, 5, 2, 3, dtype=torch.float64), dim=1)
    query = torch.nn.functional.normalize(torch.randn(4, 5, dtype=torch.float64), dim=1)
    got = query_logits(features, query)
    assert got.shape == (2, 4, 2, 3)
    for b, k, i, j in [(0, 0, 0, 0), (1, 3, 1, 2), (1, 2, 0, 1)]:
        expected = torch.cosine_similarity(features[b, :, i, j], query[k], dim=0)
        assert got[b, k, i, j].item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize(("mode", "sign"), [("subtract", -1), ("add", 1), ("none", 0)])
def test_equation_3_on_a_grid_that_is_not_square(mode, sign):
    logits = torch.randn(2, 4, 2, 3, dtype=torch.float64)
    bias = torch.randn(6, 4, dtype=torch.float64)
    got = rectified_logits(logits, bias_to_subtract(bias, mode))
    for b in range(2):
        for k in range(4):
            for row in range(2):
                for column in range(3):
                    expected = logits[b, k, row, column] + sign * bias[row * 3 + column, k]
                    assert got[b, k, row, column].item() == pytest.approx(expected.item(), abs=1e-15)


@pytest.mark.parametrize(("mode", "sign"), [("subtract", -1), ("add", 1)])
def test_equation_3_with_a_bias_for_each_image(mode, sign):
    logits = torch.randn(2, 4, 2, 3, dtype=torch.float64)
    bias = torch.randn(2, 6, 4, dtype=torch.float64)
    got = rectified_logits(logits, bias_to_subtract(bias, mode))
    for b in range(2):
        assert torch.equal(got[b : b + 1], rectified_logits(logits[b : b + 1], bias_to_subtract(bias[b], mode)))
    assert got[1, 3, 0, 2].item() == pytest.approx((logits[1, 3, 0, 2] + sign * bias[1, 2, 3]).item(), abs=1e-15)


def test_without_bias_the_logits_stay():
    logits = torch.randn(1, 4, 2, 3)
    assert torch.equal(rectified_logits(logits, None), logits)
    assert bias_to_subtract(torch.ones(6, 4), "none") is None


def _head(norm: str = "row") -> tuple[ReCLIPPPBiasHead, nn.Module]:
    backbone = tiny_dense()
    prompt = ReferencePrompt(backbone, ["sky", "tall tree", "water"], prompt_length=4)
    return ReCLIPPPBiasHead(prompt, PositionalProjection(32, EMBED_DIM), reference_norm=norm), backbone


@pytest.mark.parametrize("norm", ["row", "matrix"])
def test_head_multiplies_the_two_biases(norm):
    head, backbone = _head(norm)
    size = (2, 5)
    bias = bias_of(head, backbone, torch.randn(1, EMBED_DIM, *size))
    assert bias.shape == (10, 3)
    text = head.reference_prompt(backbone).double()
    text = text / (text.norm(dim=1, keepdim=True) if norm == "row" else text.square().sum().sqrt())
    places = backbone.positional_embedding(size).flatten(1).T.double()
    conv = head.positional_projection.conv
    places = places @ conv.weight[:, :, 0, 0].T.double() + conv.bias.double()
    torch.testing.assert_close(bias.double(), places @ text.T, rtol=1e-4, atol=1e-6)


def test_head_combines_what_was_stored_without_a_clip_or_an_image():
    head, backbone = _head()
    features = torch.randn(2, EMBED_DIM, 3, 4)
    embedding, reference = backbone.positional_embedding((3, 4)), head.reference_features(backbone)
    expected = bias_of(head, backbone, features)
    assert not head.image_dependent
    shared = head.shared_bias(embedding, reference)
    for given in (None, features, features[:1] + 1):
        assert torch.equal(head.add_image_bias(shared, reference, given), expected)


class Quadratic(BiasHead):
    """Not affine in the features, so it has no ``class_bias``."""

    image_dependent = True

    def shared_bias(self, positional_embedding, reference_features):
        return positional_embedding.new_zeros(positional_embedding[0].numel(), len(reference_features))

    def image_bias(self, reference_features, features):
        return query_logits(features, reference_features).square().flatten(2).transpose(1, 2)


class Pretender(Quadratic):
    """Not affine either, with a ``class_bias`` that its ``image_bias`` contradicts."""

    def class_bias(self, reference_features):
        return reference_features


class Affine(Quadratic):
    """An image-dependent head that defines only ``class_bias``."""

    image_bias = BiasHead.image_bias

    def class_bias(self, reference_features):
        return 2 * reference_features


def test_a_head_is_affine_by_its_two_parts():
    head, backbone = _head()
    reference, embedding = head.reference_features(backbone), backbone.positional_embedding((3, 4))
    assert head.class_bias(reference) is None
    head.check_affine(reference)
    affine = Affine(head.reference_prompt)
    affine.check_affine(reference)
    features = torch.randn(2, EMBED_DIM, 3, 4)
    expected = torch.einsum("bdhw,cd->bhwc", features, 2 * reference).flatten(1, 2)
    torch.testing.assert_close(
        affine.add_image_bias(affine.shared_bias(embedding, reference), reference, features), expected
    )


@pytest.mark.parametrize("kind", [Quadratic, Pretender])
def test_a_head_that_is_not_affine_cannot_be_inherited(kind):
    teacher = make_rectified(decoder=False)
    teacher.bias_head = kind(teacher.bias_head.reference_prompt)
    assert teacher.eval().mask_logits(torch.randn(1, 3, 32, 40)).shape == (1, 4, 4, 5)  # it works, and
    assert "bias_map" not in inherit(teacher, "query", (4, 5))
    with pytest.raises(ReclipError, match=rf"BIAS_HEAD.NAME {kind.__name__} is not affine in the image") as caught:
        inherit(teacher, "query_bias", (4, 5))
    assert "a student cannot inherit it" in str(caught.value) and "\n" not in str(caught.value)


def test_head_trains_the_prompt_and_the_projection():
    head, backbone = _head()
    bias_of(head, backbone, torch.randn(1, EMBED_DIM, 4, 4)).square().sum().backward()
    trained = {name: parameter.grad.abs().max() for name, parameter in head.named_parameters()}
    assert set(trained) == {
        "reference_prompt.vectors",
        "positional_projection.conv.weight",
        "positional_projection.conv.bias",
    }
    assert min(trained.values()) > 0
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_head_from_the_config():
    cfg = load_config("")
    cfg.MODEL.BIAS_HEAD.PROMPT_LENGTH = 3
    cfg.MODEL.BIAS_HEAD.PROMPT_INIT_STD = 0.5
    cfg.MODEL.BIAS_HEAD.REFERENCE_NORM = "matrix"
    head = build_bias_head(cfg, tiny_dense(), ["sky", "water"])
    assert isinstance(head, ReCLIPPPBiasHead) and head.reference_norm == "matrix"
    assert head.reference_prompt.vectors.shape == (3, 32)
    assert head.reference_prompt.vectors.std().item() == pytest.approx(0.5, rel=0.3)
    assert head.positional_projection.conv.weight.shape == (EMBED_DIM, 32, 1, 1)
    assert "ReCLIPPPBiasHead" in BIAS_HEAD_REGISTRY
