"""The inherited head: on the teacher's own features it gives the teacher's own logits, without a CLIP.

Shape letters: B images, (h, w) grid, C classes, D width of the joint embedding.
"""

import pytest
import torch
import torch.nn.functional as F

from reclip_d2.modeling.bias_head import query_logits
from reclip_d2.modeling.meta_arch.distillation import inherit
from reclip_d2.modeling.query_head import LearnableQuery
from reclip_d2.modeling.student.inherited import HEADS, InheritedHead
from tests.helpers import (
    CLASS_NAMES,
    EMBED_DIM,
    bias_of,
    make_maskclip,
    make_reclip,
    make_rectified,
    make_student,
    random_image,
    tiny_dense,
)

GRID = (4, 5)


def with_own_statistics(teacher):
    """Running statistics of its norms that are neither 0 nor 1, and eval mode."""
    for layer in teacher.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.uniform_(0.1, 0.5)
            layer.running_var.uniform_(0.5, 2.0)
    return teacher.eval()


TEACHERS = {
    f"{name} {'with' if decoder else 'without'} decoder, {mode}": (make, decoder, mode)
    for name, make in (("ReCLIP++", make_rectified), ("ReCLIP", make_reclip))
    for decoder in (True, False)
    for mode in ("subtract", "add", "none")
}


def make_teacher(kind: str):
    if kind == "MaskCLIP":
        return make_maskclip()
    make, decoder, mode = TEACHERS[kind]
    return with_own_statistics(make(decoder=decoder, rectification=mode))


def features_of(teacher, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Z ``(2, D, 4, 5)`` and the teacher's mask logits ``(2, C, 4, 5)`` of two images of 32 x 40 px."""
    images = teacher.preprocess_image([{"image": random_image(seed + i, 32, 40)} for i in range(2)])
    with torch.no_grad():
        return teacher.segment(images.tensor)


def inherited_head(teacher, head: str = "query_bias_decoder", grid: tuple[int, int] = GRID) -> InheritedHead:
    return make_student(teacher, head=head, grid=grid).inherited


@pytest.mark.parametrize("kind", [*TEACHERS, "MaskCLIP"])
@torch.no_grad()
def test_on_the_teachers_features_it_gives_the_teachers_logits(kind):
    teacher = make_teacher(kind)
    head = inherited_head(teacher).train()  # even if a trainer calls it
    features, expected = features_of(teacher)
    if head.gives_cosines:
        expected = expected * teacher.backbone.logit_scale
    torch.testing.assert_close(head(features), expected, rtol=1e-4, atol=1e-4)
    assert head.gives_cosines == ("with decoder" not in kind)


@torch.no_grad()
def test_the_comparison_feels_every_component():
    """The test above would fail without the bias, and without each image's part of it."""
    for kind in ("ReCLIP++ without decoder, subtract", "ReCLIP without decoder, subtract"):
        teacher = make_teacher(kind)
        features, expected = features_of(teacher)
        expected = expected * teacher.backbone.logit_scale
        for part in ("bias_map", "class_bias"):
            head = inherited_head(teacher)
            if getattr(head, part) is not None:
                getattr(head, part).zero_()
                assert (head(features) - expected).abs().max() > 0.01


@pytest.mark.parametrize("make", [make_rectified, make_reclip])
@torch.no_grad()
def test_on_another_grid_the_map_is_resized(make):
    teacher = with_own_statistics(make(decoder=False))
    head, scale = inherited_head(teacher), teacher.backbone.logit_scale
    features = F.normalize(torch.randn(2, EMBED_DIM, 9, 7), dim=1)
    bias = bias_of(teacher.bias_head, teacher.backbone, torch.zeros(1, EMBED_DIM, *GRID))
    bias = bias.reshape(20, len(CLASS_NAMES)).T.reshape(1, len(CLASS_NAMES), *GRID)
    expected = query_logits(features, teacher.query_features) - F.interpolate(bias, (9, 7), mode="bicubic")
    if make is make_reclip:
        expected -= query_logits(features, teacher.bias_head.reference_features(teacher.backbone))
    torch.testing.assert_close(head(features), expected * scale, rtol=1e-4, atol=1e-4)


# ---- Table IX ---------------------------------------------------------------------------------------------------


def test_components_of_each_head():
    teacher = make_rectified()
    parts = {head: set(inherited_head(teacher, head).state_dict()) for head in HEADS}
    common = {"query_features", "logit_scale"}
    assert parts["original"] == common | {"classifier.weight", "classifier.bias"}
    assert parts["query"] == common
    assert parts["query_bias"] == common | {"bias_map"}
    decoder = {f"mask_decoder.{key}" for key in teacher.mask_decoder.state_dict()}
    assert parts["query_bias_decoder"] == common | {"bias_map"} | decoder
    reclip = make_reclip()
    assert set(inherited_head(reclip).state_dict()) == common | {"bias_map", "class_bias"}
    for head in HEADS[1:]:
        assert set(inherited_head(make_maskclip(), head).state_dict()) == common


@torch.no_grad()
def test_logits_of_each_head():
    teacher = with_own_statistics(make_rectified())
    features, decoded = features_of(teacher)
    scale = teacher.backbone.logit_scale
    queries = query_logits(features, teacher.query_features)
    bias = bias_of(teacher.bias_head, teacher.backbone, features).T.unflatten(1, GRID)
    original = inherited_head(teacher, "original")
    expected = {
        "original": F.conv2d(features, original.classifier.weight, original.classifier.bias),
        "query": queries * scale,
        "query_bias": (queries - bias) * scale,
        "query_bias_decoder": decoded,
    }
    for head, logits in expected.items():
        module = original if head == "original" else inherited_head(teacher, head)
        torch.testing.assert_close(module(features), logits, rtol=1e-4, atol=1e-4, msg=head)


@pytest.mark.parametrize("head", HEADS)
def test_only_a_classifier_of_the_students_own_trains(head):
    module = inherited_head(make_rectified(), head).train()
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained == ({"classifier.weight", "classifier.bias"} if head == "original" else set())
    assert head != "query_bias_decoder" or not module.mask_decoder.norm.training
    before = {key: value.clone() for key, value in module.state_dict().items()}
    module(F.normalize(torch.randn(2, EMBED_DIM, *GRID), dim=1))
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_it_is_a_copy():
    teacher = make_rectified()
    head = inherited_head(teacher)
    copied = {key: value.clone() for key, value in head.state_dict().items()}
    with torch.no_grad():
        for tensor in (*teacher.mask_decoder.state_dict().values(), teacher.query_features):
            tensor.zero_()
    for key, value in head.state_dict().items():
        assert torch.equal(value, copied[key]), key
    assert teacher.mask_decoder.conv.weight.requires_grad  # the student's is frozen, the teacher's was left as it was


def test_the_state_that_is_inherited_leaves_a_learnt_classifier_out():
    assert set(inherit(make_rectified().eval(), "original", GRID)) == {"query_features", "logit_scale"}


@torch.no_grad()
def test_a_query_that_the_teacher_has_learnt_is_inherited():
    backbone = tiny_dense()
    learnt = LearnableQuery(backbone, [name for name, *_ in CLASS_NAMES])
    teacher = with_own_statistics(make_rectified(query_head=learnt))
    learnt.prompt.vectors.add_(torch.randn_like(learnt.prompt.vectors))
    features, expected = features_of(teacher.train().eval())
    head = inherited_head(teacher)
    torch.testing.assert_close(head(features), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.query_features, learnt(teacher.backbone))
    assert (head.query_features - teacher.template_query_features).abs().max() > 0.01
