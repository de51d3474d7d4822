"""The families of open_clip's ViTs as backbones: each config made small, with its own patch, image size and activation.

What enters the last block is taken from open_clip's own forward pass, and the value path from there on is written out.

Shape letters: B images, n = h*w patches, E width of the image transformer.
"""

import json
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from reclip_d2.backbones.dense import DenseCLIP
from reclip_d2.config import load_config
from reclip_d2.modeling.build import build_clip_backbone

# Name: side of the image, of a patch, activation.
FAMILIES = {
    "ViT-B-16-quickgelu": (224, 16, "quick"),
    "ViT-B-32": (224, 32, "gelu"),
    "ViT-B-32-256": (256, 32, "gelu"),
    "ViT-B-16-plus-240": (240, 16, "gelu"),
    "ViT-L-14": (224, 14, "gelu"),
    "ViT-L-14-quickgelu": (224, 14, "quick"),
    "ViT-L-14-336": (336, 14, "gelu"),
    "ViT-L-14-336-quickgelu": (336, 14, "quick"),
    "ViT-H-14": (224, 14, "gelu"),  # heads of 80
    "ViT-M-16-alt": (224, 16, "gelu"),  # layer scale
}


def register_small(name: str, folder: Path) -> str:
    """The model ``<name>-small``: as ``name``, with two heads, three layers and a small text tower."""
    small = f"{name}-small"
    if small not in open_clip.list_models():
        config = open_clip.get_model_config(name)
        vision = config["vision_cfg"]
        config["embed_dim"] = 24
        vision.update(layers=3, width=2 * vision.get("head_width", 64))
        config["text_cfg"].update(layers=1, width=32, heads=2)
        path = folder / f"{small}.json"
        path.write_text(json.dumps(config))
        open_clip.add_model_config(path)
    return small


def config_of(name: str, folder: Path) -> CfgNode:
    cfg = load_config("")
    cfg.MODEL.CLIP.NAME = register_small(name, folder)
    cfg.MODEL.CLIP.PRETRAINED = "random"
    cfg.MODEL.CLIP.TEMPLATES = "photo"
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "DenseCLIP"
    return cfg


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path) -> tuple[str, DenseCLIP]:
    """(name, small backbone of its kind), built from a config."""
    return request.param, build_clip_backbone(config_of(request.param, tmp_path))


def value_path_by_hand(visual: torch.nn.Module, tokens: torch.Tensor, quick: bool) -> torch.Tensor:
    """Z ``(B, n, D)`` of the tokens ``(B, 1 + n, E)`` that enter the last block."""
    block = visual.transformer.resblocks[-1]
    _, _, weight = block.attn.in_proj_weight.chunk(3)
    _, _, bias = block.attn.in_proj_bias.chunk(3)
    x = block.ln_1(tokens) @ weight.T + bias
    x = x @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
    x = tokens + x * getattr(block.ls_1, "gamma", 1)
    hidden = block.ln_2(x) @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias
    hidden = hidden * torch.sigmoid(1.702 * hidden) if quick else F.gelu(hidden)
    hidden = hidden @ block.mlp.c_proj.weight.T + block.mlp.c_proj.bias
    x = visual.ln_post(x + hidden * getattr(block.ls_2, "gamma", 1)) @ visual.proj
    return F.normalize(x[:, 1:], dim=-1)


def test_value_path(family):
    name, backbone = family
    side, patch, activation = FAMILIES[name]
    assert backbone.image_size == (side, side) and backbone.patch_size == patch
    visual, seen = backbone.clip.visual, []
    hook = visual.transformer.resblocks[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randn(1, 3, side, side)
    expected_global = F.normalize(backbone.clip.encode_image(images), dim=-1)
    hook.remove()
    grid = side // patch
    assert seen[0].shape[1] == 1 + grid * grid
    expected = value_path_by_hand(visual, seen[0], activation == "quick").transpose(1, 2).unflatten(2, (grid, grid))
    torch.testing.assert_close(backbone(images)["dense"], expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(backbone.global_features(images), expected_global)


def test_images_of_other_sizes(family):
    name, backbone = family
    patch = FAMILIES[name][1]
    dense = backbone(torch.randn(2, 3, 3 * patch, 5 * patch))["dense"]
    assert dense.shape == (2, 24, 3, 5)
    torch.testing.assert_close(dense.norm(dim=1), torch.ones(2, 3, 5))
    assert backbone.positional_embedding((3, 5)).shape == (backbone.clip.visual.positional_embedding.shape[1], 3, 5)


def small_model(name: str, architecture: str, tmp_path: Path, datasets) -> torch.nn.Module:
    """A model of three classes on a small backbone of the kind."""
    cfg = config_of(name, tmp_path)
    cfg.DATASETS.TEST = (datasets("reclip_test_family", [], ["sky", "tall tree", "water"]),)
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.BIAS_HEAD.PROMPT_LENGTH = 4
    return build_model(cfg)


@pytest.mark.parametrize("architecture", ["MaskCLIP", "RectifiedCLIP"])
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14-336"])
def test_segmentation(name, architecture, tmp_path, datasets):
    """For an image whose sides are not multiples of the patch."""
    model = small_model(name, architecture, tmp_path, datasets).eval()
    image = torch.randint(0, 256, (3, 75, 101), dtype=torch.uint8)
    with torch.no_grad():
        (output,) = model([{"image": image, "height": 75, "width": 101}])
    assert output["sem_seg"].shape == (3, 75, 101)
    assert torch.isfinite(output["sem_seg"]).all()


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14"])
def test_training_reaches_all_trained_parts(name, tmp_path, datasets):
    model = small_model(name, "RectifiedCLIP", tmp_path, datasets).train()
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    losses = model([{"image": image, "hypothesis": torch.tensor([0, 2])} for image in images])
    sum(losses.values()).backward()
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert {key.split(".")[0] for key in trained} == {"bias_head", "mask_decoder"}
    for key, parameter in trained.items():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
