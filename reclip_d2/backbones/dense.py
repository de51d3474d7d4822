"""``DenseCLIP``: a model of open_clip with a ViT, frozen by default, as a backbone with one feature per patch.

Shape letters: B images, (H, W) size in pixels, (h, w) patch grid, D width of the joint embedding, E width of
the image transformer.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
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
from reclip_d2.backbones.dense_attention.feedback import AttentionWithFeedback, Feedback
from reclip_d2.backbones.frozen_layers import use_frozen_layers
from reclip_d2.backbones.hugging_face_text import text_encoder
from reclip_d2.backbones.interface import BackboneSummary, VisionLanguageBackbone
from reclip_d2.backbones.packed_texts import PackedTexts
from reclip_d2.backbones.precision import AUTOCAST_DTYPES, tower_precision
from reclip_d2.backbones.settings import PixelStatistics, default_pixel_statistics, pixel_statistics
from reclip_d2.backbones.synthetic_positions import sine_positions
from reclip_d2.backbones.timm_tower import TimmTower
from reclip_d2.backbones.towers import ImageTower, OpenClipTower
from reclip_d2.backbones.vision import check_image_tower
from reclip_d2.backbones.windows import patches_inside
from reclip_d2.errors import ReclipError


@BACKBONE_REGISTRY.register()
class DenseCLIP(VisionLanguageBackbone):
    """Frozen image and text towers of an open_clip model, whose image tower is a ViT of open_clip or timm.

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
        positions: str = "own",
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
            positions: what :meth:`positional_embedding` is: "own", the tower's if it has one, or "sine", synthetic.
        """
        super().__init__()
        check_image_tower(clip.visual, name)
        self.name = name
        self.fingerprint = clip_fingerprint(clip)
        if image_tower != OWN_IMAGE_TOWER:  # not in the weights, but the features depend on it
            self.fingerprint = hashlib.sha256(f"{self.fingerprint} {image_tower}".encode()).hexdigest()
        self.clip = clip.requires_grad_(False).eval()
        use_frozen_layers(clip)
        self.text_encoder = text_encoder(clip, tokenizer)
        if digest := self.text_encoder.tokens.digest:  # not in the weights either
            self.fingerprint = hashlib.sha256(f"{self.fingerprint} {digest}".encode()).hexdigest()
        self.attention = (ValueAttention() if attention is None else attention).requires_grad_(False).eval()
        self.autocast_dtype = autocast_dtype
        self.image_tower = image_tower
        self.fine_tune = fine_tune
        self.pixel_statistics = pixel_statistics or default_pixel_statistics()
        self.positions = positions
        if self.tower.is_pooled and isinstance(self.attention, ValueAttention) and not self.attention.residual:
            raise ReclipError(
                f"MODEL.CLIP.VALUE_PATH_RESIDUAL False is for the last block, but {name} has the value path in its"
                " attention pooling: remove the key"
            )
        if fine_tune:
            for parameter in self.tower.dense_parameters(self.attention):
                parameter.requires_grad_(True)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> dict[str, object]:
        keys = cfg.MODEL.CLIP
        attention = build_dense_attention(cfg)
        clip, tokenizer = build_clip(keys.NAME, keys.PRETRAINED, keys.TEXT_FILES)
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
            "positions": keys.POSITIONS,
        }

    @classmethod
    def summary(cls, cfg: CfgNode) -> BackboneSummary:
        name = cfg.MODEL.CLIP.NAME
        return BackboneSummary(open_clip_name(name), *embedding_shape(name), image_side(name))

    @property
    def tower(self) -> ImageTower:
        """The image tower: a view of the model's module."""
        visual = self.clip.visual
        return TimmTower(visual) if hasattr(visual, "trunk") else OpenClipTower(visual)

    # ---- sizes ---------------------------------------------------------------------------------------------------

    @property
    def patch_size(self) -> int:
        return self.tower.patch_size

    @property
    def stride(self) -> int:
        return self.patch_size // self.attention.upsampling

    @property
    def image_size(self) -> tuple[int, int]:
        return self.tower.image_size

    @property
    def embed_dim(self) -> int:
        return self.tower.embed_dim

    @property
    def positional_width(self) -> int:
        return self.tower.width // 4 * 4 if self._has_sine_positions else self.tower.width

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
            features, inputs = self.tower.dense(images, self.attention, image_sizes)
            block = inputs.block
            key_features = block.keys(block.norm(inputs.patches)).float() if keys else None
        return self._as_map(features, inputs.grid), key_features

    @torch.no_grad()
    def dense_with_feedback(
        self, images: Tensor, image_sizes: Sequence[tuple[int, int]] | None, feedback: Feedback
    ) -> Tensor:
        """See :meth:`VisionLanguageBackbone.dense_with_feedback`."""
        attention = AttentionWithFeedback(self.attention, feedback)
        with self._autocast(images.device):
            features, inputs = self.tower.dense(images, attention, image_sizes)
        return self._as_map(features, inputs.grid)

    def _as_map(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """``(B, n', D)`` of the tower to ``(B, D, h, w)``."""
        height, width = (side * self.attention.upsampling for side in grid)
        # Not unflatten: see TransformerBlock.split_heads.
        return features.transpose(1, 2).view(features.shape[0], -1, height, width)

    @torch.no_grad()
    def global_features(self, images: Tensor) -> Tensor:
        """Global image features ``(B, D)`` of length 1, those of open_clip's ``encode_image``, at ``image_size``."""
        with self._autocast(images.device):
            features = self.tower.global_features(images)
            features = self.clip.encode_image(images) if features is None else features
        return F.normalize(features.float(), dim=-1)

    @torch.no_grad()
    def window_features(self, images: Tensor, windows: Tensor, split: int = 0) -> Tensor:
        """See :meth:`VisionLanguageBackbone.window_features` and
        :func:`~reclip_d2.backbones.windows.window_image_features`."""
        tower = self.tower
        if not tower.pools_class_token:
            raise ReclipError(
                "HYPOTHESIS.METHOD one_pass needs a CLIP whose global feature is its class token, with a ViT of"
                f" open_clip, which {self.name} does not have: set HYPOTHESIS.METHOD crops"
            )
        blocks = tower.depth
        if not 0 <= split < blocks:
            raise ReclipError(f"HYPOTHESIS.SPLIT_BLOCK is {split}; the blocks of {self.name} are 0 to {blocks - 1}")
        grid = images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
        inside = patches_inside(windows.to(images.device), grid, self.patch_size)
        with self._autocast(images.device):
            features = tower.window_features(images, inside, split)
        return F.normalize(features.float(), dim=-1)

    # ---- positions -----------------------------------------------------------------------------------------------

    @property
    def _has_sine_positions(self) -> bool:
        return self.positions == "sine" or self.tower.positional_grid is None

    def positional_embedding(self, size: tuple[int, int]) -> Tensor:
        """Positional embedding PE of the patches, resized to the grid (h, w), or synthetic: ``(E, h, w)``.

        Detached: if the image tower is fine-tuned, its PE trains through Z only, not through the bias head that reads
        it here.
        """
        if self._has_sine_positions:
            return sine_positions(self.positional_width, size, self.clip.logit_scale)
        return self.tower.positions(size).detach().transpose(0, 1).unflatten(1, size)

    @property
    def positional_grid(self) -> tuple[int, int] | None:
        return self.tower.positional_grid

    def on_grid(self, grid: tuple[int, int]) -> contextlib.AbstractContextManager[None]:
        return self.tower.on_grid(grid)

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
        if self.positions != "own":
            changed["MODEL.CLIP.POSITIONS"] = self.positions
        return {"clip": self.name, **changed, **self.attention.identity(), "fingerprint": self.fingerprint}
