"""Adding a dense attention: one class and a key make it available wherever dense features are used."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from reclip_d2.backbones.dense_attention import (
    DENSE_ATTENTION_REGISTRY,
    AttentionInput,
    DenseAttention,
    build_dense_attention,
    dense_attention_class,
)
from reclip_d2.config import load_config
from reclip_d2.errors import ReclipError
from reclip_d2.export import ExportOptions, export_model
from reclip_d2.export.export import FORMATS
from reclip_d2.hypothesis.training_records import build_training_records
from reclip_d2.modeling.build import check_registered_parts
from reclip_d2.modeling.checkpoint import ReclipCheckpointer
from tests.backbones.literal import PATCH, literal_layer_norm, literal_tokens
from tests.helpers import isolated_cache, random_image, register_tiny_model, tiny_clip, tiny_dense, write_scenes

__all__ = ["isolated_cache"]

NAMES = ["sky", "tall tree", "water", "brick wall"]


class Dummy(DenseAttention):
    """Uses every input: class token, grid, valid patches, an earlier block, images by a helper model."""

    name = "dummy"

    def __init__(self) -> None:
        super().__init__()
        self.helper = nn.Conv2d(3, 1, PATCH, PATCH)
        self.seen: list[AttentionInput] = []

    def earlier_blocks(self, count: int) -> Sequence[int]:
        return (count - 2,)

    def forward(self, inputs: AttentionInput) -> Tensor:
        self.seen.append(inputs)
        block, normed = inputs.block, inputs.block.norm(inputs.tokens)
        scores = block.queries(normed) @ block.queries(normed).transpose(1, 2)
        earlier = inputs.earlier[1]
        scores = scores + earlier.block.keys(earlier.block.norm(earlier.tokens)).mean(-1)[:, None]
        if inputs.valid is not None:
            scores = scores.masked_fill(~F.pad(inputs.valid, [inputs.class_tokens, 0], value=True)[:, None], -1e4)
        helped = self.helper(inputs.images).flatten(2).transpose(1, 2)
        return block.output(scores.softmax(-1) @ block.values(normed))[:, inputs.class_tokens :] + helped

    def refine(self, features: Tensor, inputs: AttentionInput) -> Tensor:
        return features - features.mean(1, keepdim=True)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    DENSE_ATTENTION_REGISTRY.register(Dummy)
    yield
    del DENSE_ATTENTION_REGISTRY._obj_map["dummy"]


@pytest.fixture
def cfg(tmp_path, datasets, isolated_cache) -> CfgNode:
    datasets("reclip_test_attention", write_scenes(tmp_path / "scenes", 3), NAMES)
    options = {
        "MODEL.CLIP.NAME": register_tiny_model(tmp_path),
        "MODEL.CLIP.PRETRAINED": "random",
        "MODEL.CLIP.TEMPLATES": "photo",
        "MODEL.CLIP.DENSE_ATTENTION": "dummy",
        "MODEL.BACKBONE.NAME": "DenseCLIP",
        "MODEL.META_ARCHITECTURE": "RectifiedCLIP",
        "MODEL.DEVICE": "cpu",
        "DATASETS.TRAIN": ("reclip_test_attention",),
        "HYPOTHESIS.WINDOW_RATIO": 0.5,
    }
    return load_config("", list(itertools.chain(*options.items())))


def with_key(cfg: CfgNode, value: str) -> CfgNode:
    other = cfg.clone()
    other.MODEL.CLIP.DENSE_ATTENTION = value
    return other


def literal_dummy(dense: nn.Module, image: Tensor) -> Tensor:
    """Z ``(n, D)`` of one image ``(3, H, W)``."""
    visual, helper = dense.clip.visual, dense.attention.helper
    states = [literal_tokens(visual, image)[None]]
    for block in visual.transformer.resblocks:
        states.append(block(states[-1]))
    packed = []
    for index in (1, 2):
        block = visual.transformer.resblocks[index]
        normed = literal_layer_norm(states[index][0], block.ln_1)
        packed.append(normed @ block.attn.in_proj_weight.T + block.attn.in_proj_bias)
    query, value = packed[1][:, :32], packed[1][:, 64:]
    weights = (query @ query.T + packed[0][:, 32:64].mean(1)).softmax(-1)
    attention = visual.transformer.resblocks[2].attn
    out = ((weights @ value) @ attention.out_proj.weight.T + attention.out_proj.bias)[1:]
    out = out + (F.conv2d(image[None], helper.weight, stride=8).flatten() + helper.bias)[:, None]
    features = literal_layer_norm(out, visual.ln_post) @ visual.proj
    features = features - features.mean(0)
    return features / features.norm(dim=1, keepdim=True)


# ---- the registry ---------------------------------------------------------------------------------------------


def test_names_are_the_classes_own():
    assert dense_attention_class("dummy") is Dummy
    with pytest.raises(AssertionError, match="already registered"):
        DENSE_ATTENTION_REGISTRY.register()(Dummy)


def test_an_unknown_name_is_one_line_with_the_names_there_are(cfg):
    other = with_key(cfg, "nothing")
    for check in (check_registered_parts, build_model):
        with pytest.raises(ReclipError) as caught:
            check(other)
        message = str(caught.value)
        assert message.startswith("MODEL.CLIP.DENSE_ATTENTION 'nothing' is not registered: choose one of ")
        assert {"dummy", "value"} <= set(message.rpartition(" one of ")[2].split(", ")) and "\n" not in message


def test_a_key_of_the_value_path_is_not_for_others(cfg):
    cfg.MODEL.CLIP.VALUE_PATH_RESIDUAL = False
    with pytest.raises(ReclipError, match="VALUE_PATH_RESIDUAL False is for .* value, not dummy"):
        build_dense_attention(cfg)
    assert build_dense_attention(with_key(cfg, "value")).residual is False


# ---- in a backbone --------------------------------------------------------------------------------------------


def test_gets_what_the_literal_formula_needs():
    dense = tiny_dense(attention=Dummy()).double()
    images = torch.randn(2, 3, 24, 40, dtype=torch.float64)
    features = dense(images)["dense"].flatten(2).transpose(1, 2)
    expected = torch.stack([literal_dummy(dense, image) for image in images])
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-10)


def test_padding_is_told_apart_from_the_image():
    dense = tiny_dense(attention=Dummy())
    padded, sizes = torch.zeros(2, 3, 32, 40), [(32, 40), (16, 24)]
    padded[0], padded[1, :, :16, :24] = torch.randn(3, 32, 40), torch.randn(3, 16, 24)
    dense(padded, sizes)
    valid = dense.attention.seen[-1].valid.unflatten(1, (4, 5))
    assert valid[0].all() and valid[1].sum() == 6 and valid[1, :2, :3].all()
    dense(padded)
    assert dense.attention.seen[-1].valid is None


def test_more_patches_than_the_tower_has():
    class Finer(Dummy):
        upsampling = 2

        def forward(self, inputs: AttentionInput) -> Tensor:
            height, width = inputs.grid
            maps = inputs.patches.unflatten(1, (height, width))
            return maps.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)

    dense = tiny_dense(attention=Finer())
    images = torch.randn(1, 3, 24, 40)
    features = dense.dense(images)
    assert dense.stride == 4 and dense.size_divisibility == 8 and dense.output_shape()["dense"].stride == 4
    assert features.shape[-2:] == (6, 10)
    torch.testing.assert_close(features[..., ::2, ::2], features[..., 1::2, 1::2])
    with pytest.raises(ReclipError, match="KEY_SMOOTHING .* dummy gives features on a finer grid"):
        dense.dense_and_keys(images)


def test_a_helper_model_is_frozen_and_in_no_checkpoint():
    dense = tiny_dense(attention=Dummy(), fine_tune=True)
    assert not any(parameter.requires_grad for parameter in dense.attention.parameters())
    assert all(key.startswith("clip.visual.") for key in dense.state_dict())
    images = torch.randn(1, 3, 32, 32)
    (dense(images)["dense"] * torch.randn(1, 24, 4, 4)).sum().backward()
    visual = tiny_clip().visual
    asked = {name for name, p in dense.clip.visual.named_parameters() if p.requires_grad}
    assert asked == {name for name, p in dense.clip.visual.named_parameters() if p.grad is not None}
    mlp = {
        name
        for name, _ in visual.named_parameters()
        if name.startswith(("transformer.resblocks.2.mlp", "transformer.resblocks.2.ln_2"))
    }
    assert asked == {name for name, _ in visual.named_parameters()} - mlp


# ---- by the key, everywhere -----------------------------------------------------------------------------------


def test_training_and_evaluation_use_it(cfg):
    torch.manual_seed(0)
    model, usual = build_model(cfg), build_model(with_key(cfg, "value"))
    assert isinstance(model.backbone.attention, Dummy)
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    usual.load_state_dict(model.state_dict())
    batch = [
        {"image": random_image(0, 32, 40), "hypothesis": torch.tensor([0, 2])},
        {"image": random_image(1, 16, 24), "hypothesis": torch.tensor([1])},
    ]
    losses = []
    for one in (model, usual):
        torch.manual_seed(0)
        losses.append(sum(one.train()(batch).values()).item())
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)
    seen = model.backbone.attention.seen
    assert seen[-1].valid is not None and not seen[-1].valid[1].all()  # the second image is padded
    record = {"image": batch[0]["image"]}
    outputs = []
    for one in (model, usual):
        one.eval().label_maps = False
        outputs.append(one([record])[0]["sem_seg"])
    assert not torch.allclose(*outputs, atol=1e-3)


def test_checkpoints_record_it_and_are_refused_by_another(cfg, tmp_path):
    model, usual = build_model(cfg), build_model(with_key(cfg, "value"))
    assert model.identity()["MODEL.CLIP.DENSE_ATTENTION"] == "dummy"
    assert "MODEL.CLIP.DENSE_ATTENTION" not in usual.identity()  # checkpoints of before are the value path's
    assert not any(key.startswith("backbone.") for key in model.state_dict())
    remedy = "use the MODEL.CLIP.DENSE_ATTENTION that it was trained with, or another checkpoint"
    for saves, loads, words in ((model, usual, "dummy instead of value"), (usual, model, "value instead of dummy")):
        ReclipCheckpointer(saves, str(tmp_path)).save("model")
        ReclipCheckpointer(saves).load(str(tmp_path / "model.pth"))
        with pytest.raises(ReclipError, match=f"of another MODEL.CLIP.DENSE_ATTENTION: {words}; {remedy}"):
            ReclipCheckpointer(loads).load(str(tmp_path / "model.pth"))


@pytest.mark.parametrize("method", ["crops", "one_pass", "image"])
def test_hypotheses_read_no_dense_features_and_are_shared(cfg, isolated_cache, method):
    """Global features of images and windows: the file made with the value path is valid for any attention."""
    cfg.HYPOTHESIS.METHOD = method
    records = build_training_records(with_key(cfg, "value"))
    assert build_training_records(cfg) == records
    assert len(list((isolated_cache / "hypotheses").glob("[!.]*"))) == 1


@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("target", FORMATS)
def test_it_is_exported(cfg, target, tmp_path):
    model = build_model(cfg).eval()
    model.label_maps = False
    results = export_model(model, tmp_path / "file", ExportOptions(format=target))
    assert len(results) == 2 and all(result.within(1e-5) for result in results)
    assert model.backbone.attention.seen
