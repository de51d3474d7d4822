"""``DenseCLIP``: a CLIP, frozen by default, as a Detectron2 backbone that gives a feature for each patch.

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

from reclip_d2.backbones.architectures import open_clip_name
from reclip_d2.backbones.build import build_clip, clip_fingerprint
from reclip_d2.backbones.compat import OWN_IMAGE_TOWER, adapt_image_tower
from reclip_d2.backbones.text import TextEncoder
from reclip_d2.backbones.vision import (
    check_value_path,
    key_path,
    last_block_input,
    patches_inside,
    project_dense,
    resize_positional_embedding,
    window_image_features,
)
from reclip_d2.errors import ReclipError

AUTOCAST_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@BACKBONE_REGISTRY.register()
class DenseCLIP(Backbone):
    """Frozen image and text towers of an open_clip ViT.

    ``forward`` gives the image features Z of section III-A as ``{"dense": (B, D, h, w)}``, each patch of
    length 1. Nothing here trains: parameters need no gradient, the module stays in eval mode whatever a
    trainer calls, and its weights do not enter checkpoints (the ``fingerprint`` does, in their place).

    ``fine_tune`` (Table VI) lets the image tower train: Z carries gradient, and the tower's weights enter checkpoints.
    The text tower and the logit scale stay frozen, and the ``fingerprint`` stays that of the pretrained CLIP.
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
        fine_tune: bool = False,
    ) -> None:
        """
        Args:
            clip: an open_clip model with a ViT image tower.
            tokenizer: its tokenizer.
            name: its open_clip name, for messages and checkpoints.
            value_path_residual: keep the residual connections and the MLP of the last block.
            autocast_dtype: run the image tower in this precision; its output is float32.
            image_tower: what :func:`~reclip_d2.backbones.compat.adapt_image_tower` has changed, for checkpoints.
            fine_tune: the image tower trains.
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
        self.fine_tune = fine_tune
        if fine_tune:
            for parameter in _parameters_of_dense_features(clip.visual, value_path_residual):
                parameter.requires_grad_(True)
        self.register_state_dict_post_hook(_drop_frozen_weights)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> dict[str, object]:
        keys = cfg.MODEL.CLIP
        clip, tokenizer = build_clip(keys.NAME, keys.PRETRAINED)
        check_value_path(clip.visual, keys.NAME)
        image_tower = adapt_image_tower(clip.visual, keys.LAYER_NORM_EPS, keys.IMAGE_ACTIVATION, keys.CLASS_TOKEN)
        return {
            "clip": clip,
            "tokenizer": tokenizer,
            "name": open_clip_name(keys.NAME),
            "value_path_residual": keys.VALUE_PATH_RESIDUAL,
            "autocast_dtype": AUTOCAST_DTYPES[keys.AUTOCAST],
            "image_tower": image_tower,
            "fine_tune": keys.FINE_TUNE,
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
        """Stays in eval mode, when fine-tuned too: a CLIP has neither batch norm nor dropout to train with."""
        return super().train(False)

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.autocast_dtype)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Image features Z ``{"dense": (B, D, h, w)}`` of normalised images ``(B, 3, H, W)`` whose sides are
        multiples of the patch. The memory lies as (B, h, w, D). Only with ``fine_tune`` they carry gradient."""
        return {"dense": self.dense_and_keys(images, keys=False)[0]}

    def dense_and_keys(self, images: Tensor, keys: bool = True) -> tuple[Tensor, Tensor | None]:
        """Image features Z ``(B, D, h, w)`` and, if wanted, the last block's keys ``(B, h * w, E)``."""
        visual = self.clip.visual
        with torch.set_grad_enabled(self.fine_tune and torch.is_grad_enabled()), self._autocast(images.device):
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

    @torch.no_grad()
    def window_features(self, images: Tensor, windows: Tensor, split: int = 0) -> Tensor:
        """Global features of windows, all in one forward pass: ``(B, N, D)`` of length 1.

        Args:
            images: ``(B, 3, H, W)``, normalised; H and W are multiples of the patch size.
            windows: ``(N, 4)`` boxes (x0, y0, x1, y1) in pixels of ``images``, the ends exclusive.
            split: block from which on the windows go their own way, see
                :func:`~reclip_d2.backbones.vision.window_image_features`.
        """
        visual = self.clip.visual
        if getattr(visual, "pool_type", "tok") != "tok":
            raise ReclipError(
                f"HYPOTHESIS.METHOD one_pass needs a CLIP whose global feature is its class token; {self.name} averages"
                " its patches: take HYPOTHESIS.METHOD crops"
            )
        blocks = len(visual.transformer.resblocks)
        if not 0 <= split < blocks:
            raise ReclipError(f"HYPOTHESIS.SPLIT_BLOCK is {split}; the blocks of {self.name} are 0 to {blocks - 1}")
        grid = images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
        inside = patches_inside(windows.to(images.device), grid, self.patch_size)
        with self._autocast(images.device):
            features = window_image_features(visual, images, inside, split)
        return F.normalize(features.float(), dim=-1)

    def positional_embedding(self, size: tuple[int, int]) -> Tensor:
        """Positional embedding PE of the patches, resized to the grid (h, w): ``(E, h, w)``.

        Detached: a fine-tuned image tower trains its PE as a part of its own, and what reads it here (the bias head)
        follows. PE stays that reader's input and is not bent to its ends.
        """
        visual = self.clip.visual
        own = visual.positional_embedding.detach()
        positions = resize_positional_embedding(own, tuple(visual.grid_size), size)
        return positions[1:].transpose(0, 1).unflatten(1, size)


def _parameters_of_dense_features(visual: nn.Module, residual: bool) -> list[nn.Parameter]:
    """The parameters that Z is computed with. A gradient is expected of every parameter that needs one, where several
    processes train together."""
    last = visual.transformer.resblocks[-1]
    unused = set() if residual else {*last.ln_2.parameters(), *last.mlp.parameters(), *last.ls_2.parameters()}
    return [parameter for parameter in visual.parameters() if parameter not in unused]


def _drop_frozen_weights(module: DenseCLIP, state: dict, prefix: str, metadata: dict) -> None:
    """State-dict hook: frozen weights stay out of checkpoints, those of a fine-tuned image tower are in them."""
    trained = f"{prefix}clip.visual."
    for key in [key for key in state if key.startswith(prefix)]:
        if not (module.fine_tune and key.startswith(trained)):
            del state[key]
