"""Image-tower settings of the public code, against literal formulas."""

import copy

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from reclip_d2.backbones.compat import adapt_image_tower, read_class_token
from reclip_d2.backbones.dense import DenseCLIP
from reclip_d2.config import load_config
from reclip_d2.errors import ReclipError
from tests.helpers import register_tiny_model, tiny_clip


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "token.safetensors"
    safetensors.torch.save_file({"class_embedding": torch.linspace(-1, 1, 32).view(1, 1, 32)}, path)
    return str(path)


def norm(x, module, eps):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * module.weight + module.bias


def literal_first_block(visual, images, token, eps, activation):
    """Tokens after the first block, written out with explicit heads."""
    patches = F.conv2d(images, visual.conv1.weight, stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([token.expand(len(images), 1, -1), patches], 1) + visual.positional_embedding
    x = norm(x, visual.ln_pre, 1e-5)
    block = visual.transformer.resblocks[0]
    y = norm(x, block.ln_1, eps)
    q, k, v = (y @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).chunk(3, -1)
    heads = [t.unflatten(-1, (2, 16)).transpose(1, 2) for t in (q, k, v)]
    weights = (heads[0] @ heads[1].transpose(-1, -2) / 4.0).softmax(-1)
    out = (weights @ heads[2]).transpose(1, 2).flatten(2)
    x = x + out @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
    hidden = norm(x, block.ln_2, eps) @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias
    return x + activation(hidden) @ block.mlp.c_proj.weight.T + block.mlp.c_proj.bias


def quick(x):
    return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize("eps", [0.0, 0.3])
@pytest.mark.parametrize("name", ["own", "gelu"])
@pytest.mark.parametrize("with_token", [False, True])
def test_the_first_block_literally(token_file, eps, name, with_token):
    visual = tiny_clip(quick_gelu=True).double().visual
    token = torch.linspace(-1, 1, 32).double() if with_token else visual.class_embedding.clone()
    adapt_image_tower(visual, eps, name, token_file if with_token else "")
    images = torch.randn(2, 3, 32, 32).double()
    tokens = []
    visual.transformer.resblocks[0].register_forward_hook(lambda module, inputs, output: tokens.append(output))
    visual(images)
    expected = literal_first_block(visual, images, token, eps or 1e-5, F.gelu if name == "gelu" else quick)
    tolerance = 1e-7 if with_token else 1e-10  # the token comes as float32
    torch.testing.assert_close(tokens[0], expected, rtol=0, atol=tolerance)


def test_only_the_blocks_of_the_image_tower_change():
    clip = tiny_clip(quick_gelu=True)
    before = copy.deepcopy(clip)
    assert adapt_image_tower(clip.visual, 1e-6, "gelu") == "eps 1e-06 gelu"
    assert {b.ln_1.eps for b in clip.visual.transformer.resblocks} == {1e-6}
    assert {b.ln_2.eps for b in clip.visual.transformer.resblocks} == {1e-6}
    assert clip.visual.ln_pre.eps == clip.visual.ln_post.eps == clip.ln_final.eps == 1e-5
    assert {b.ln_1.eps for b in clip.transformer.resblocks} == {1e-5}
    texts = torch.randint(1, 49000, (2, 77))
    assert torch.equal(clip.encode_text(texts), before.encode_text(texts))
    images = torch.randn(1, 3, 32, 32)
    assert not torch.allclose(clip.encode_image(images), before.encode_image(images), atol=1e-5)


def test_nothing_changes_by_default():
    clip = tiny_clip()
    state = copy.deepcopy(clip.state_dict())
    assert adapt_image_tower(clip.visual) == "own"
    assert clip.visual.transformer.resblocks[0].ln_1.eps == 1e-5
    assert all(torch.equal(value, state[name]) for name, value in clip.state_dict().items())


def test_config_keys_reach_the_backbone_and_its_fingerprint(tmp_path, token_file):
    cfg = load_config("", ["MODEL.CLIP.NAME", register_tiny_model(tmp_path), "MODEL.CLIP.PRETRAINED", "random"])
    own = DenseCLIP(cfg, None)
    assert own.image_tower == "own" and own.clip.visual.transformer.resblocks[0].ln_1.eps == 1e-5
    fingerprints = {own.fingerprint}
    for key, value in (("LAYER_NORM_EPS", 1e-6), ("IMAGE_ACTIVATION", "gelu"), ("CLASS_TOKEN", token_file)):
        other = cfg.clone()
        other.merge_from_list([f"MODEL.CLIP.{key}", value])
        backbone = DenseCLIP(other, None)
        fingerprints.add(backbone.fingerprint)
        assert not any(parameter.requires_grad for parameter in backbone.parameters())
        if key == "CLASS_TOKEN":
            torch.testing.assert_close(backbone.clip.visual.class_embedding.detach(), torch.linspace(-1, 1, 32))
    assert len(fingerprints) == 4
    assert DenseCLIP(cfg, None).fingerprint == own.fingerprint  # the settings of one model are not another's


def test_bad_class_tokens(tmp_path, token_file):
    with pytest.raises(ReclipError, match=r"has 32 values; this CLIP's .* 768"):
        read_class_token(token_file, 768)
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"token": torch.zeros(32)}, other)
    torch.save(torch.zeros(32), tmp_path / "token.pt")
    for path in (other, tmp_path / "token.pt", tmp_path / "none.safetensors"):
        with pytest.raises(ReclipError, match="MODEL.CLIP.CLASS_TOKEN") as caught:
            read_class_token(path, 32)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"), [("MODEL.CLIP.LAYER_NORM_EPS", "-1.0"), ("MODEL.CLIP.IMAGE_ACTIVATION", "relu")]
)
def test_bad_keys(key, value):
    with pytest.raises(ReclipError, match=key):
        load_config("", [key, value])
