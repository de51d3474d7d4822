"""``DenseCLIP``: an open_clip ViT, frozen by default, as a backbone with one feature per patch.

Shape letters: B images, (H, W) size in pixels, (h, w) patch grid, D width of the joint embedding, E width of
the image transformer.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn

from reclip_d2.backbones.architectures import image_side, open_clip_name
from reclip_d2.backbones.build import build_clip, clip_fingerprint, embedding_shape
from reclip_d2.backbones.compat import OWN_IMAGE_TOWER, adapt_image_tower
from reclip_d2.backbones.dense_attention import DenseAttention, ValueAttention, build_dense_attention
from reclip_d2.backbones.frozen_layers import use_frozen_layers
from reclip_d2.backbones.interface import BackboneSummary, VisionLanguageBackbone
from reclip_d2.backbones.packed_texts import PackedTexts
from reclip_d2.backbones.positions import positions_on_grid, resize_positional_embedding
from reclip_d2.backbones.precision import AUTOCAST_DTYPES, tower_precision
from reclip_d2.backbones.settings import PixelStatistics, default_pixel_statistics, pixel_statistics
from reclip_d2.backbones.text import TextEncoder
from reclip_d2.backbones.vision import (
    check_image_tower,
    dense_image_features,
    global_image_features,
)
from reclip_d2.backbones.windows import patches_inside, window_image_features
from reclip_d2.errors import ReclipError


@BACKBONE_REGISTRY.register()
class DenseCLIP(VisionLanguageBackbone):
    """Frozen image and text towers of an open_clip ViT.

    Nothing trains: parameters need no gradient, and checkpoints hold the ``fingerprint`` in place of the weights.

    With ``fine_tune`` (Table VI) the image tower trains: Z carries gradient, and checkpoints hold the tower's weights.
    The text tower and the logit scale stay frozen, and the ``fingerprint`` remains the pretrained CLIP's.
    """

    @configurable
    def __init__(
        self,
        clip: nn.Module,
        tokenizer: object,
        *,
        name: str,
        attention: DenseAttention | None = None,
        autocast_dtype: torch.dtype | None = None,
        image_tower: str = OWN_IMAGE_TOWER,
        fine_tune: bool = False,
        pixel_statistics: PixelStatistics | None = None,
    ) -> None:
        """
        Args:
            clip: an open_clip model with a ViT image tower.
            tokenizer: its tokenizer.
            name: its open_clip name, for messages and checkpoints.
            attention: replaces the last block; None for the value path.
            autocast_dtype: precision of the image tower; its output is float32.
            image_tower: result of :func:`~reclip_d2.backbones.compat.adapt_image_tower`, for checkpoints.
            fine_tune: train the image tower.
            pixel_statistics: how images are normalised; None for OpenAI's mean and standard deviation.
        """
        super().__init__()
        check_image_tower(clip.visual, name)
        self.name = name
        self.fingerprint = clip_fingerprint(clip)
        if image_tower != OWN_IMAGE_TOWER:  # not in the weights, but the features depend on it
            self.fingerprint = hashlib.sha256(f"{self.fingerprint} {image_tower}".encode()).hexdigest()
        self.clip = clip.requires_grad_(False).eval()
        use_frozen_layers(clip)
        self.text_encoder = TextEncoder(clip, tokenizer)
        self.attention = (ValueAttention() if attention is None else attention).requires_grad_(False).eval()
        self.autocast_dtype = autocast_dtype
        self.image_tower = image_tower
        self.fine_tune = fine_tune
        self.pixel_statistics = pixel_statistics or default_pixel_statistics()
        if fine_tune:
            for parameter in _parameters_of_dense_features(clip.visual, self.attention):
                parameter.requires_grad_(True)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> dict[str, object]:
        keys = cfg.MODEL.CLIP
        attention = build_dense_attention(cfg)
        clip, tokenizer = build_clip(keys.NAME, keys.PRETRAINED)
        check_image_tower(clip.visual, keys.NAME)
        image_tower = adapt_image_tower(clip.visual, keys.LAYER_NORM_EPS, keys.IMAGE_ACTIVATION, keys.CLASS_TOKEN)
        return {
            "clip": clip,
            "tokenizer": tokenizer,
            "name": open_clip_name(keys.NAME),
            "attention": attention,
            "autocast_dtype": AUTOCAST_DTYPES[tower_precision(cfg)],
            "image_tower": image_tower,
            "fine_tune": keys.FINE_TUNE,
            "pixel_statistics": pixel_statistics(cfg),
        }

    @classmethod
    def summary(cls, cfg: CfgNode) -> BackboneSummary:
        name = cfg.MODEL.CLIP.NAME
        return BackboneSummary(open_clip_name(name), *embedding_shape(name), image_side(name))

    # ---- sizes ---------------------------------------------------------------------------------------------------

    @property
    def patch_size(self) -> int:
        return self.clip.visual.patch_size[0]

    @property
    def stride(self) -> int:
        return self.patch_size // self.attention.upsampling

    @property
    def image_size(self) -> tuple[int, int]:
        height, width = self.clip.visual.image_size
        return height, width

    @property
    def embed_dim(self) -> int:
        return self.clip.visual.output_dim

    @property
    def positional_width(self) -> int:
        return self.clip.visual.positional_embedding.shape[1]

    @property
    def logit_scale(self) -> float:
        return self.clip.logit_scale.exp().item()

    # ---- images --------------------------------------------------------------------------------------------------

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.autocast_dtype)

    def dense_and_keys(
        self, images: Tensor, image_sizes: Sequence[tuple[int, int]] | None = None, keys: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """See :meth:`VisionLanguageBackbone.dense_and_keys`. Z carries gradient only with ``fine_tune``."""
        if keys and self.attention.upsampling != 1:
            raise ReclipError(
                f"MODEL.MASKCLIP.KEY_SMOOTHING compares the keys of CLIP's patches; MODEL.CLIP.DENSE_ATTENTION"
                f" {self.attention.name} gives features on a finer grid: set one of the two to its default"
            )
        with torch.set_grad_enabled(self.fine_tune and torch.is_grad_enabled()), self._autocast(images.device):
            features, inputs = dense_image_features(self.clip.visual, images, self.attention, image_sizes)
            block = inputs.block
            key_features = block.keys(block.norm(inputs.patches)).float() if keys else None
        height, width = (side * self.attention.upsampling for side in inputs.grid)
        return features.transpose(1, 2).unflatten(2, (height, width)), key_features

    @torch.no_grad()
    def global_features(self, images: Tensor) -> Tensor:
        """Global image features ``(B, D)`` of length 1, those of open_clip's ``encode_image``, at ``image_size``."""
        with self._autocast(images.device):
            features = global_image_features(self.clip.visual, images)
            features = self.clip.encode_image(images) if features is None else features
        return F.normalize(features.float(), dim=-1)

    @torch.no_grad()
    def window_features(self, images: Tensor, windows: Tensor, split: int = 0) -> Tensor:
        """See :meth:`VisionLanguageBackbone.window_features` and
        :func:`~reclip_d2.backbones.windows.window_image_features`."""
        visual = self.clip.visual
        if getattr(visual, "pool_type", "tok") != "tok":
            raise ReclipError(
                f"HYPOTHESIS.METHOD one_pass needs a CLIP whose global feature is its class token; {self.name} averages"
                " its patches: set HYPOTHESIS.METHOD crops"
            )
        blocks = len(visual.transformer.resblocks)
        if not 0 <= split < blocks:
            raise ReclipError(f"HYPOTHESIS.SPLIT_BLOCK is {split}; the blocks of {self.name} are 0 to {blocks - 1}")
        grid = images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
        inside = patches_inside(windows.to(images.device), grid, self.patch_size)
        with self._autocast(images.device):
            features = window_image_features(visual, images, inside, split)
        return F.normalize(features.float(), dim=-1)

    # ---- positions -----------------------------------------------------------------------------------------------

    def positional_embedding(self, size: tuple[int, int]) -> Tensor:
        """Positional embedding PE of the patches, resized to the grid (h, w): ``(E, h, w)``.

        Detached: if the image tower is fine-tuned, its PE trains through Z only, not through the bias head that reads
        it here.
        """
        positions = positions_on_grid(self.clip.visual, size).detach()
        return positions[1:].transpose(0, 1).unflatten(1, size)

    @property
    def positional_grid(self) -> tuple[int, int]:
        height, width = self.clip.visual.grid_size
        return int(height), int(width)

    @contextlib.contextmanager
    def on_grid(self, grid: tuple[int, int]) -> Iterator[None]:
        visual = self.clip.visual
        before = visual.positional_embedding, visual.grid_size
        with torch.no_grad():
            embedding = resize_positional_embedding(visual.positional_embedding, tuple(visual.grid_size), grid)
        visual.positional_embedding = nn.Parameter(embedding.clone(), requires_grad=False)
        visual.grid_size = grid
        try:
            yield
        finally:
            visual.positional_embedding, visual.grid_size = before

    # ---- texts ---------------------------------------------------------------------------------------------------

    @property
    def text_width(self) -> int:
        return self.text_encoder.text_width

    @property
    def context_length(self) -> int:
        return self.text_encoder.context_length

    @property
    def end_token(self) -> int:
        return self.text_encoder.end_token

    def name_tokens(self, name: str) -> list[int]:
        return self.text_encoder.name_tokens(name)

    def token_embeddings(self, tokens: Tensor) -> Tensor:
        return self.text_encoder.token_embeddings(tokens)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        return self.text_encoder.text_features(texts)

    def reference_layout(self, segments: Sequence[Sequence[int]], prompt_length: int) -> PackedTexts:
        return self.text_encoder.reference_layout(segments, prompt_length)

    def reference(self, vectors: Tensor, layout: PackedTexts) -> Tensor:
        return self.text_encoder.reference(vectors, layout)

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def trained_weights(self) -> tuple[str, ...]:
        return ("clip.visual.",) if self.fine_tune else ()

    def identity(self) -> dict[str, Any]:
        changed: dict[str, Any] = {} if self.image_tower == OWN_IMAGE_TOWER else {"image_tower": self.image_tower}
        if self.fine_tune:
            changed["MODEL.CLIP.FINE_TUNE"] = True
        return {"clip": self.name, **changed, **self.attention.identity(), "fingerprint": self.fingerprint}


def _parameters_of_dense_features(visual: nn.Module, attention: DenseAttention) -> list[nn.Parameter]:
    """The parameters that Z depends on. Distributed training expects a gradient for every parameter that needs one."""
    last = visual.transformer.resblocks[-1]
    mlp = {*last.ln_2.parameters(), *last.mlp.parameters(), *last.ls_2.parameters()}
    unused = set() if attention.uses_mlp else mlp
    return [parameter for parameter in visual.parameters() if parameter not in unused]
