"""``DenseCLIP``: a frozen CLIP as a Detectron2 backbone that gives a feature for each patch.

Shape letters: B images, (H, W) size in pixels, (h, w) patch grid, D width of the joint embedding, E width of
the image transformer.
"""

from __future__ import annotations

import contextlib
import hashlib

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from reclip_d2.clip.build import build_clip, clip_fingerprint
from reclip_d2.clip.compat import OWN_IMAGE_TOWER, adapt_image_tower
from reclip_d2.clip.text import TextEncoder
from reclip_d2.clip.vision import (
    check_value_path,
    key_path,
    last_block_input,
    project_dense,
    resize_positional_embedding,
)

AUTOCAST_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@BACKBONE_REGISTRY.register()
class DenseCLIP(Backbone):
    """Frozen image and text towers of an open_clip ViT.

    ``forward`` gives the image features Z of section III-A as ``{"dense": (B, D, h, w)}``, each patch of
    length 1. Nothing here trains: parameters need no gradient, the module stays in eval mode whatever a
    trainer calls, and its weights do not enter checkpoints (the ``fingerprint`` does, in their place).
    """

    @configurable
    def __init__(
        self,
        clip: nn.Module,
        tokenizer: object,
        *,
        name: str,
        value_path_residual: bool = True,
        autocast_dtype: torch.dtype | None = None,
        image_tower: str = OWN_IMAGE_TOWER,
    ) -> None:
        """
        Args:
            clip: an open_clip model with a ViT image tower.
            tokenizer: its tokenizer.
            name: its open_clip name, for messages and checkpoints.
            value_path_residual: keep the residual connections and the MLP of the last block.
            autocast_dtype: run the image tower in this precision; its output is float32.
            image_tower: what :func:`~reclip_d2.clip.compat.adapt_image_tower` has changed, for checkpoints.
        """
        super().__init__()
        check_value_path(clip.visual, name)
        self.name = name
        self.fingerprint = clip_fingerprint(clip)
        if image_tower != OWN_IMAGE_TOWER:  # not in the weights, but what the tower computes depends on it
            self.fingerprint = hashlib.sha256(f"{self.fingerprint} {image_tower}".encode()).hexdigest()
        self.clip = clip.requires_grad_(False).eval()
        self.text_encoder = TextEncoder(clip, tokenizer)
        self.value_path_residual = value_path_residual
        self.autocast_dtype = autocast_dtype
        self.image_tower = image_tower
        self.register_state_dict_post_hook(_drop_own_weights)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> dict[str, object]:
        keys = cfg.MODEL.CLIP
        clip, tokenizer = build_clip(keys.NAME, keys.PRETRAINED)
        check_value_path(clip.visual, keys.NAME)
        image_tower = adapt_image_tower(clip.visual, keys.LAYER_NORM_EPS, keys.IMAGE_ACTIVATION, keys.CLASS_TOKEN)
        return {
            "clip": clip,
            "tokenizer": tokenizer,
            "name": keys.NAME,
            "value_path_residual": keys.VALUE_PATH_RESIDUAL,
            "autocast_dtype": AUTOCAST_DTYPES[keys.AUTOCAST],
            "image_tower": image_tower,
        }

    @property
    def key(self) -> str:
        """Names this CLIP: the architecture (activations and such are not in the weights) and the fingerprint."""
        return f"{self.name} {self.fingerprint}"

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.clip.visual.patch_size[0]

    @property
    def size_divisibility(self) -> int:
        return self.patch_size

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) that the CLIP was trained at: the size of a crop for its global feature."""
        height, width = self.clip.visual.image_size
        return height, width

    @property
    def embed_dim(self) -> int:
        """Width D of the joint embedding."""
        return self.clip.visual.output_dim

    @property
    def logit_scale(self) -> float:
        """CLIP's own factor on cosine similarities: 100 for OpenAI's models."""
        return self.clip.logit_scale.exp().item()

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"dense": ShapeSpec(channels=self.embed_dim, stride=self.patch_size)}

    def train(self, mode: bool = True) -> DenseCLIP:
        """Stays in eval mode: the CLIP is frozen."""
        return super().train(False)

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.autocast_dtype)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Image features Z ``{"dense": (B, D, h, w)}`` of normalised images ``(B, 3, H, W)`` whose sides are
        multiples of the patch. The memory lies as (B, h, w, D)."""
        return {"dense": self.dense_and_keys(images, keys=False)[0]}

    @torch.no_grad()
    def dense_and_keys(self, images: Tensor, keys: bool = True) -> tuple[Tensor, Tensor | None]:
        """Image features Z ``(B, D, h, w)`` and, if wanted, the last block's keys ``(B, h * w, E)``."""
        visual = self.clip.visual
        with self._autocast(images.device):
            tokens, (height, width) = last_block_input(visual, images)
            features = project_dense(visual, tokens, self.value_path_residual)
            key_features = key_path(visual.transformer.resblocks[-1], tokens).float() if keys else None
        return features.transpose(1, 2).unflatten(2, (height, width)), key_features

    @torch.no_grad()
    def global_features(self, images: Tensor) -> Tensor:
        """Global image features ``(B, D)`` of length 1: open_clip's own ``encode_image``, at ``image_size``."""
        with self._autocast(images.device):
            features = self.clip.encode_image(images)
        return F.normalize(features.float(), dim=-1)

    def positional_embedding(self, size: tuple[int, int]) -> Tensor:
        """Positional embedding PE of the patches, resized to the grid (h, w): ``(E, h, w)``."""
        visual = self.clip.visual
        positions = resize_positional_embedding(visual.positional_embedding, tuple(visual.grid_size), size)
        return positions[1:].transpose(0, 1).unflatten(1, size)


def _drop_own_weights(module: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
    """State-dict hook: a frozen CLIP's weights stay out of checkpoints."""
    for key in [key for key in state if key.startswith(prefix)]:
        del state[key]
