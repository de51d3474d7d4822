"""Small models of open_clip with an image tower of timm: the real classes, registered under names of their own."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch
from timm.models import register_model
from timm.models.eva import _create_eva
from timm.models.vision_transformer import _create_vision_transformer
from timm.models.vitamin import GeGluMlp, VitCfg, VitConvCfg, _create_vitamin
from torch import nn

from reclip_d2.backbones.dense import DenseCLIP
from tests.helpers import TINY_TEXT, tiny_tokenizer

SMALL = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 2}
EVA02 = {
    **SMALL,
    "qkv_fused": False,
    "mlp_ratio": 4 * 2 / 3,
    "swiglu_mlp": True,
    "scale_mlp": True,
    "scale_attn_inner": True,
    "use_rot_pos_emb": True,
    "ref_feat_shape": (16, 16),
}


@register_model
def small_siglip(pretrained: bool = False, **options: object) -> nn.Module:
    """SigLIP: no class token, attention pooling."""
    arguments = {**SMALL, "patch_size": 14, "img_size": 56, "class_token": False, "global_pool": "map"}
    return _create_vision_transformer("vit_base_patch16_siglip_224", pretrained, **{**arguments, **options})


@register_model
def small_clip(pretrained: bool = False, **options: object) -> nn.Module:
    """A CLIP's ViT (MobileCLIP2-L-14)."""
    arguments = {**SMALL, "pre_norm": True}
    return _create_vision_transformer("vit_large_patch14_clip_224", pretrained, **{**arguments, **options})


@register_model
def small_eva02(pretrained: bool = False, **options: object) -> nn.Module:
    """EVA-02 CLIP: rotary and absolute positions, SwiGLU, norms inside."""
    return _create_eva("eva02_base_patch16_clip_224", pretrained, **{**EVA02, **options})


@register_model
def small_rotary(pretrained: bool = False, **options: object) -> nn.Module:
    """EVA-02 without absolute positions, averaged, with layer scale."""
    arguments = {**EVA02, "use_abs_pos_emb": False, "init_values": 0.5, "qkv_fused": True}
    return _create_eva("eva02_base_patch16_clip_224", pretrained, **{**arguments, **options})


@register_model
def small_post_norm(pretrained: bool = False, **options: object) -> nn.Module:
    """EVA02-E CLIP: norms after the branches."""
    return _create_eva("eva02_enormous_patch14_clip_224", pretrained, **{**SMALL, "use_post_norm": True, **options})


@register_model
def small_perception(pretrained: bool = False, **options: object) -> nn.Module:
    """Perception Encoder: rotary and absolute positions, class token, attention pooling."""
    arguments = {
        **SMALL,
        "global_pool": "map",
        "attn_type": "rope",
        "use_pre_transformer_norm": True,
        "use_rot_pos_emb": True,
        "ref_feat_shape": (4, 4),
        "rope_grid_offset": 1.0,
        "rope_grid_indexing": "xy",
        "attn_pool_num_heads": 2,
        "attn_pool_mlp_ratio": 4.0,
    }
    return _create_eva("vit_pe_core_base_patch16_224", pretrained, **{**arguments, **options})


@register_model
def small_vitamin(pretrained: bool = False, **options: object) -> nn.Module:
    """ViTamin-XL: convolutions before the transformer, no positional embedding, averaged."""
    arguments = {
        "img_size": 64,
        "embed_dim": 32,
        "depth": 3,
        "num_heads": 2,
        "mlp_layer": GeGluMlp,
        "mlp_ratio": 2.0,
        "class_token": False,
        "global_pool": "avg",
        "pos_embed": "none",
        "embed_cfg": VitCfg(
            embed_dim=(8, 16, 32),
            depths=(1, 1, 1),
            stem_width=8,
            conv_cfg=VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6),
            head_type="1d",
        ),
    }
    return _create_vitamin("vitamin_small_224", pretrained, **{**arguments, **options})


# Name: open_clip's settings of the image tower.
TOWERS = {
    "small_siglip": {"image_size": 56, "timm_pool": "map", "timm_proj": "none"},
    "small_clip": {"image_size": 64, "timm_pool": "token", "timm_proj": None},
    "small_eva02": {"image_size": 64, "timm_pool": "token", "timm_proj": None},
    "small_rotary": {"image_size": 64, "timm_pool": "avg", "timm_proj": None},
    "small_post_norm": {"image_size": 64, "timm_pool": "token", "timm_proj": None},
    "small_perception": {"image_size": 64, "timm_pool": "map", "timm_proj": None},
    "small_vitamin": {"image_size": 64, "timm_pool": "", "timm_proj": "linear"},
}
PATCH = {name: 14 if name == "small_siglip" else 16 for name in TOWERS}


def config_of(name: str) -> dict:
    """open_clip's config of a model with one of :data:`TOWERS`."""
    width = 32 if name == "small_siglip" else 24
    vision = {"timm_model_name": name, **TOWERS[name]}
    return {"embed_dim": width, "vision_cfg": vision, "text_cfg": dict(TINY_TEXT), "custom_text": True}


def architecture_file(name: str, folder: Path, **text: object) -> str:
    """:func:`config_of` as a file for ``MODEL.CLIP.NAME``."""
    config = config_of(name)
    config["text_cfg"].update(text)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    return str(path)


def tiny_timm_clip(name: str, seed: int = 0) -> open_clip.CustomTextCLIP:
    """A random model in eval mode. No weight is 0 or 1, so that each one matters."""
    config = config_of(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CustomTextCLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key != "logit_scale":
                    parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def timm_dense(name: str, **arguments: object) -> DenseCLIP:
    """:func:`tiny_timm_clip` as a backbone."""
    return DenseCLIP(tiny_timm_clip(name), tiny_tokenizer(), **{"name": name, **arguments})
