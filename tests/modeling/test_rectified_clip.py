"""RectifiedCLIP: its predictions, and its cached bias.

Shape letters: B images, C classes, (h, w) patch grid, n = h*w patches.
"""

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, build_model

from reclip_d2.config import load_config
from reclip_d2.modeling.bias_head import bias_logits, bias_to_subtract, query_logits, rectified_logits
from reclip_d2.modeling.meta_arch.rectified_clip import RectifiedCLIP
from tests.helpers import make_maskclip, make_rectified, random_image, register_tiny_model


def normalised(model, seed: int = 0, size: tuple[int, int] = (32, 40)) -> torch.Tensor:
    return model.preprocess_image([{"image": random_image(seed, *size)}]).tensor


def bias_by_hand(model, size: tuple[int, int]) -> torch.Tensor:
    head, embedding = model.bias_head, model.backbone.positional_embedding(size)
    return bias_logits(head.positional_projection(embedding), head.reference_features(model.backbone))


@pytest.mark.parametrize("rectification", ["subtract", "add", "none"])
def test_without_decoder_equals_equation_3(rectification):
    model = make_rectified(decoder=False, rectification=rectification).eval()
    images = normalised(model)
    query = query_logits(model.backbone(images)["dense"], model.query_features)
    expected = rectified_logits(query, bias_to_subtract(bias_by_hand(model, (4, 5)), rectification))
    got = model.mask_logits(images)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert torch.allclose(got, query) == (rectification == "none")


@pytest.mark.parametrize("rectification", ["subtract", "add", "none"])
def test_with_decoder_equals_equations_3_and_4(rectification):
    model = make_rectified(rectification=rectification).eval()
    images = normalised(model)
    features = model.backbone(images)["dense"]
    rectified = rectified_logits(
        query_logits(features, model.query_features),
        bias_to_subtract(bias_by_hand(model, (4, 5)), rectification),
    )
    torch.testing.assert_close(model.mask_logits(images), model.mask_decoder(rectified, features), rtol=0, atol=1e-5)


def test_identity_decoder_without_norm_passes_m_through():
    plain, passing = (
        make_rectified(decoder=False).eval(),
        make_rectified(decoder={"init": "identity", "norm": ""}).eval(),
    )
    passing.bias_head.load_state_dict(plain.bias_head.state_dict())
    images = normalised(plain)
    torch.testing.assert_close(passing.mask_logits(images), plain.mask_logits(images), rtol=0, atol=1e-5)


def test_none_without_decoder_is_maskclip():
    model = make_rectified(decoder=False, rectification="none").eval()
    record = {"image": random_image(3, 21, 50), "height": 30, "width": 60}
    expected = make_maskclip()([record])[0]["sem_seg"]
    torch.testing.assert_close(model([record])[0]["sem_seg"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("decoder", [True, False])
def test_any_size_and_batch_mates(decoder):
    model = make_rectified(decoder=decoder).eval()
    records = [{"image": random_image(i, *size)} for i, size in enumerate([(31, 47), (8, 8), (5, 64)])]
    outputs = model(records)
    for record, output in zip(records, outputs, strict=True):
        assert output["sem_seg"].shape == (4, *record["image"].shape[1:])
        torch.testing.assert_close(output["sem_seg"], model([record])[0]["sem_seg"], rtol=0, atol=1e-6)
        assert not output["sem_seg"].requires_grad


# ---- the cached bias ------------------------------------------------------------------------------------------


def test_bias_is_computed_once_a_resolution_in_eval_mode(monkeypatch):
    model = make_rectified(decoder=False).eval()
    places, texts = [], []
    shared_bias, reference_features = model.bias_head.shared_bias, model.bias_head.reference_features
    monkeypatch.setattr(
        model.bias_head,
        "shared_bias",
        lambda embedding, reference: places.append(tuple(embedding.shape[1:])) or shared_bias(embedding, reference),
    )
    monkeypatch.setattr(
        model.bias_head,
        "reference_features",
        lambda backbone: texts.append(1) or reference_features(backbone),
    )
    for size in [(32, 32), (32, 32), (32, 40), (32, 32)]:
        model([{"image": random_image(0, *size)}])
    assert places == [(4, 4), (4, 5)] and len(texts) == 1


def test_a_bias_of_other_weights_is_forgotten():
    model, other = make_rectified(decoder=False).eval(), make_rectified(decoder=False).eval()
    with torch.no_grad():
        other.bias_head.positional_projection.conv.bias.add_(1.0)
    record = {"image": random_image(0)}
    before = model([record])[0]["sem_seg"]
    model.load_state_dict(other.state_dict())
    loaded = model([record])[0]["sem_seg"]
    assert not torch.allclose(before, loaded, atol=1e-3)
    model.train()
    with torch.no_grad():
        model.bias_head.positional_projection.conv.bias.sub_(2.0)
    model.eval()
    assert not torch.allclose(loaded, model([record])[0]["sem_seg"], atol=1e-3)


def test_caches_follow_the_model_to_another_dtype():
    model = make_rectified(decoder=False).eval()
    model([{"image": random_image(0)}])
    assert model.double().bias_logits((4, 4)).dtype == torch.float64


def test_bias_kept_from_inference_does_not_enter_training():
    model = make_rectified(decoder=False).eval()
    model([{"image": random_image(0)}])
    model.train()
    assert model.bias_logits((4, 4)).requires_grad


# ---- state ----------------------------------------------------------------------------------------------------


def test_state_holds_trained_parts_only():
    keys = set(make_rectified().state_dict())
    assert keys == {
        "bias_head.reference_prompt.vectors",
        "bias_head.positional_projection.conv.weight",
        "bias_head.positional_projection.conv.bias",
        "mask_decoder.conv.weight",
        "mask_decoder.conv.bias",
        "mask_decoder.norm.weight",
        "mask_decoder.norm.bias",
        "mask_decoder.norm.running_mean",
        "mask_decoder.norm.running_var",
        "mask_decoder.norm.num_batches_tracked",
    }


def test_only_bias_head_and_decoder_train():
    model = make_rectified()
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"bias_head", "mask_decoder"}


def test_a_state_of_its_own_loads_strictly_and_a_part_does_not():
    model = make_rectified()
    model.load_state_dict(model.state_dict())
    state = model.state_dict()
    del state["mask_decoder.conv.bias"]
    with pytest.raises(RuntimeError, match=r"mask_decoder\.conv\.bias"):
        model.load_state_dict(state)


def test_from_the_config(tmp_path, datasets):
    datasets("reclip_test_model", [], ["sky", "water", "brick wall"])
    cfg = load_config("")
    cfg.MODEL.META_ARCHITECTURE = "RectifiedCLIP"
    cfg.MODEL.BACKBONE.NAME = "DenseCLIP"
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.CLIP.NAME = register_tiny_model(tmp_path)
    cfg.MODEL.CLIP.PRETRAINED = "random"
    cfg.MODEL.CLIP.TEMPLATES = "photo"
    cfg.MODEL.BIAS_HEAD.RECTIFICATION = "add"
    cfg.MODEL.GUMBEL.HARD = False
    cfg.MODEL.LOSS.COVERAGE_WEIGHT = 2.0
    cfg.DATASETS.TRAIN = ("reclip_test_model",)
    model = build_model(cfg)
    assert isinstance(model, RectifiedCLIP) and "MaskCLIP" in META_ARCH_REGISTRY
    assert model.rectification == "add" and model.gumbel_hard is False
    assert model.loss_weights == {"contrastive": 1.0, "coverage": 2.0, "outside": 0.0, "anchor": 0.0}
    assert model.gumbel_tau == model.loss_tau == pytest.approx(0.07, rel=1e-4)  # the inverse of the logit scale
    assert model.bias_head.reference_prompt.vectors.shape[0] == 73
    assert model.num_classes == 3 and model.templates == "photo"
    cfg.MODEL.MASK_DECODER.ENABLED = False
    cfg.MODEL.GUMBEL.TAU, cfg.MODEL.LOSS.TAU = 0.5, 0.25
    model = build_model(cfg)
    assert model.mask_decoder is None and (model.gumbel_tau, model.loss_tau) == (0.5, 0.25)
