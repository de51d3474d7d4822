"""The frozen CLIP as a backbone.

Shape letters: B images, (h, w) patch grid, D joint embedding, E width of the image transformer.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone
from torch import nn

from reclip_d2.backbones.dense import DenseCLIP
from reclip_d2.backbones.dense_attention import ValueAttention
from reclip_d2.backbones.precision import tower_precision
from reclip_d2.backbones.vision import dense_image_features, last_block_input
from reclip_d2.config import load_config
from reclip_d2.errors import ReclipError
from tests.helpers import EMBED_DIM, register_tiny_model, tiny_clip, tiny_dense, tiny_tokenizer


@pytest.fixture(scope="module")
def dense() -> DenseCLIP:
    return tiny_dense()


def test_is_a_registered_backbone_built_from_the_config(tmp_path_factory):
    cfg = load_config("")
    cfg.MODEL.CLIP.NAME = register_tiny_model(tmp_path_factory.mktemp("model"))
    cfg.MODEL.CLIP.PRETRAINED = "random"
    cfg.MODEL.CLIP.AUTOCAST = "bfloat16"
    cfg.MODEL.CLIP.VALUE_PATH_RESIDUAL = False
    cfg.MODEL.BACKBONE.NAME = "DenseCLIP"
    assert BACKBONE_REGISTRY.get("DenseCLIP") is DenseCLIP
    backbone = build_backbone(cfg)
    assert isinstance(backbone, DenseCLIP)
    assert backbone.autocast_dtype is torch.bfloat16
    assert backbone.attention.residual is False
    assert backbone.name == cfg.MODEL.CLIP.NAME


@pytest.mark.parametrize(
    ("device", "has_bfloat16", "fine_tune", "chosen", "expected"),
    [
        ("cpu", True, False, "auto", "float32"),
        ("cuda", True, False, "auto", "bfloat16"),
        ("cuda:1", True, False, "auto", "bfloat16"),
        ("cuda", False, False, "auto", "float32"),  # Turing and older
        ("cuda", True, True, "auto", "float32"),  # a tower that trains
        ("cuda", True, False, "float32", "float32"),
        ("cpu", False, True, "bfloat16", "bfloat16"),
    ],
)
def test_automatic_precision(monkeypatch, device, has_bfloat16, fine_tune, chosen, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    cfg = load_config("")
    assert cfg.MODEL.CLIP.AUTOCAST == "auto"
    cfg.MODEL.DEVICE, cfg.MODEL.CLIP.FINE_TUNE, cfg.MODEL.CLIP.AUTOCAST = device, fine_tune, chosen
    assert tower_precision(cfg) == expected


def test_shapes_that_detectron2_asks_for(dense):
    assert dense.output_shape() == {"dense": ShapeSpec(channels=EMBED_DIM, stride=8)}
    assert dense.size_divisibility == 8 and dense.patch_size == 8
    assert dense.image_size == (32, 32)
    assert dense.embed_dim == EMBED_DIM
    assert dense.logit_scale == pytest.approx(1 / 0.07, rel=1e-5)  # open_clip's initial value


def test_forward_lays_the_patches_out_row_by_row(dense):
    images = torch.randn(2, 3, 24, 56)
    output = dense(images)
    assert set(output) == {"dense"} and output["dense"].shape == (2, EMBED_DIM, 3, 7)
    flat, _ = dense_image_features(dense.clip.visual, images, ValueAttention())
    for row in range(3):
        for column in range(7):
            torch.testing.assert_close(output["dense"][:, :, row, column], flat[:, row * 7 + column])
    torch.testing.assert_close(output["dense"].norm(dim=1), torch.ones(2, 3, 7))


def test_residual_is_a_choice():
    images = torch.randn(1, 3, 32, 32)
    with_residual, without = tiny_dense(), tiny_dense(attention=ValueAttention(residual=False))
    expected, _ = dense_image_features(without.clip.visual, images, ValueAttention(residual=False))
    torch.testing.assert_close(without(images)["dense"].flatten(2).transpose(1, 2), expected)
    assert not torch.allclose(with_residual(images)["dense"], without(images)["dense"])


def test_keys(dense):
    images = torch.randn(2, 3, 16, 24)
    features, keys = dense.dense_and_keys(images)
    inputs = last_block_input(dense.clip.visual, images)
    torch.testing.assert_close(keys, inputs.block.keys(inputs.block.norm(inputs.patches)))
    assert torch.equal(features, dense(images)["dense"])
    assert dense.dense_and_keys(images, keys=False)[1] is None


def test_an_image_does_not_depend_on_its_batch(dense):
    images = torch.randn(3, 3, 24, 40)
    torch.testing.assert_close(dense(images)["dense"][1:2], dense(images[1:2])["dense"], rtol=1e-5, atol=1e-6)


def test_stays_in_eval_mode():
    dense = tiny_dense()
    model = nn.Sequential(dense, nn.BatchNorm2d(EMBED_DIM)).train()
    assert model[1].training
    assert not any(module.training for module in dense.modules())
    assert dense.train() is dense and not dense.training


def test_no_gradient_anywhere(dense):
    assert not any(parameter.requires_grad for parameter in dense.parameters())
    images = torch.randn(1, 3, 16, 16, requires_grad=True)
    assert not dense(images)["dense"].requires_grad
    assert not dense.global_features(torch.randn(1, 3, 32, 32, requires_grad=True)).requires_grad


def test_state_dict_has_none_of_its_weights(dense):
    assert dense.state_dict() == {}
    model = nn.ModuleDict({"inner": nn.ModuleDict({"clip": dense, "head": nn.Linear(2, 2)}), "tail": nn.Linear(2, 3)})
    assert set(model.state_dict()) == {"inner.head.weight", "inner.head.bias", "tail.weight", "tail.bias"}


def test_global_features_are_open_clips_image_embedding():
    clip = tiny_clip()
    dense = DenseCLIP(clip, tiny_tokenizer(), name="tiny")
    images = torch.randn(3, 3, 32, 32)
    expected = clip.encode_image(images)
    expected = expected / expected.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(dense.global_features(images), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_float32_close_to_full_precision(dtype):
    images = torch.randn(2, 3, 32, 48)
    full, low = tiny_dense(), tiny_dense(autocast_dtype=dtype)
    got = low(images)["dense"]
    assert got.dtype == torch.float32
    assert not torch.equal(got, full(images)["dense"])  # autocast was on
    assert F.cosine_similarity(got, full(images)["dense"], dim=1).min() > 0.995
    torch.testing.assert_close(got.norm(dim=1), torch.ones(2, 4, 6), rtol=1e-4, atol=1e-4)
    native = images[:, :, :32, :32]
    assert low.global_features(native).dtype == torch.float32
    assert F.cosine_similarity(low.global_features(native), full.global_features(native)).min() > 0.995
    assert low.dense_and_keys(images)[1].dtype == torch.float32


def test_positional_embedding(dense):
    weights = dense.clip.visual.positional_embedding
    native = dense.positional_embedding((4, 4))
    assert native.shape == (32, 4, 4)
    for row in range(4):
        for column in range(4):
            assert torch.equal(native[:, row, column], weights[1 + row * 4 + column])
    other = dense.positional_embedding((2, 7))
    expected = F.interpolate(native[None], size=(2, 7), mode="bicubic", align_corners=False)[0]
    torch.testing.assert_close(other, expected)


def test_a_copy_is_independent(dense):
    twin = copy.deepcopy(dense)
    twin.clip.visual.proj.zero_()
    twin.text_encoder.token_embedding.weight.zero_()
    assert dense.clip.visual.proj.abs().max() > 0
    assert torch.equal(twin.text_features(["sky"]), twin.text_features(["water"]))
    assert not torch.equal(dense.text_features(["sky"]), dense.text_features(["water"]))


# ---- fine-tuned -----------------------------------------------------------------------------------------------


def test_fine_tuning_lets_the_image_tower_train_and_nothing_else():
    dense, frozen = tiny_dense(fine_tune=True), tiny_dense()
    images = torch.randn(2, 3, 32, 40)
    features = dense(images)["dense"]
    torch.testing.assert_close(features, frozen(images)["dense"], rtol=1e-5, atol=1e-6)
    (features * torch.randn_like(features)).sum().backward()
    for name, parameter in dense.clip.named_parameters():
        assert parameter.requires_grad == name.startswith("visual."), name
        assert (parameter.grad is not None) == name.startswith("visual."), name
    with torch.no_grad():
        assert not dense(images)["dense"].requires_grad
    assert not dense.global_features(images[..., :32]).requires_grad  # for hypotheses, which nothing learns through
    assert not any(module.training for module in dense.train().modules())


def test_fine_tuning_without_the_residual_leaves_out_what_is_not_computed():
    dense = tiny_dense(fine_tune=True, attention=ValueAttention(residual=False))
    images = torch.randn(1, 3, 32, 32)
    features = dense(images)["dense"]
    (features * torch.randn_like(features)).sum().backward()
    asked = {name for name, p in dense.clip.visual.named_parameters() if p.requires_grad}
    assert asked == {name for name, p in dense.clip.visual.named_parameters() if p.grad is not None}
    assert "transformer.resblocks.2.mlp.c_fc.weight" not in asked and "transformer.resblocks.1.ln_2.bias" in asked


def test_the_positional_embedding_is_read_as_it_is_and_without_gradient():
    dense = tiny_dense(fine_tune=True)
    before = dense.positional_embedding((3, 5))
    with torch.no_grad():
        dense.clip.visual.positional_embedding.add_(2.0)
    for size in [(3, 5), (4, 4)]:
        assert not dense.positional_embedding(size).requires_grad
    torch.testing.assert_close(dense.positional_embedding((3, 5)), before + 2.0)


def test_state_dict_has_the_image_tower_that_was_fine_tuned():
    dense = tiny_dense(fine_tune=True)
    tower = dense.clip.visual.state_dict()
    assert set(dense.state_dict()) == {f"clip.visual.{name}" for name in tower}
    model = nn.ModuleDict({"inner": nn.ModuleDict({"clip": dense, "head": nn.Linear(2, 2)})})
    own = {f"inner.clip.clip.visual.{name}" for name in tower}
    assert set(model.state_dict()) == own | {"inner.head.weight", "inner.head.bias"}
    fingerprint, twin = dense.fingerprint, tiny_dense(fine_tune=True)
    with torch.no_grad():
        dense.clip.visual.proj.add_(1.0)
    twin.load_state_dict(dense.state_dict(), strict=False)
    assert torch.equal(twin.clip.visual.proj, dense.clip.visual.proj)
    assert twin.fingerprint == dense.fingerprint == fingerprint == tiny_dense().fingerprint


# ---- windows in one pass ----------------------------------------------------------------------------------------


def test_window_features_have_length_one_and_follow_the_windows():
    dense = tiny_dense()
    image = torch.randn(1, 3, 32, 48)
    windows = torch.tensor([[0, 0, 16, 16], [32, 16, 48, 32]])
    features = dense.window_features(image, windows)
    assert features.shape == (1, 2, dense.embed_dim) and not features.requires_grad
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(1, 2))
    swapped = dense.window_features(image, windows.flip(0))
    torch.testing.assert_close(swapped, features.flip(1))


def test_window_features_of_a_block_that_is_not_there():
    with pytest.raises(ReclipError, match=r"HYPOTHESIS.SPLIT_BLOCK is 3; the blocks of tiny are 0 to 2"):
        tiny_dense().window_features(torch.zeros(1, 3, 8, 8), torch.tensor([[0, 0, 8, 8]]), split=3)


def test_window_features_need_a_class_token_that_is_read():
    clip = tiny_clip(pool_type="avg")
    dense = DenseCLIP(clip, tiny_tokenizer(), name="average")
    with pytest.raises(ReclipError, match="one_pass needs a CLIP whose global feature is its class token"):
        dense.window_features(torch.zeros(1, 3, 8, 8), torch.tensor([[0, 0, 8, 8]]))
