"""The image tower of open_clip's models with a Vision Transformer of timm: SigLIP, SigLIP 2, EVA-CLIP, EVA-02 CLIP,
Perception Encoder, ViTamin, MobileCLIP-B.

Shape letters: B images, (H, W) size in pixels, (h, w) patch grid, n = h*w patches, E width of the image transformer,
D width of the joint embedding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from reclip_d2.backbones.dense_attention import AttentionInput, DenseAttention, EarlierBlocks
from reclip_d2.backbones.interface import valid_patches
from reclip_d2.backbones.positions import resize_positional_embedding
from reclip_d2.backbones.timm_tokens import (
    embed_patches,
    patch_side,
    positions_on_grid,
    rotary_embedding,
    stored_grid,
    unplaced_tokens,
)
from reclip_d2.backbones.timm_vit import TimmBlock, attention_pool_values
from reclip_d2.backbones.towers import ImageTower, normalized
from reclip_d2.errors import ReclipError


class TimmTower(ImageTower):
    """open_clip's ``TimmModel`` with a ``VisionTransformer`` or ``Eva``."""

    pools_class_token = False  # for windows: timm's blocks take no class token for each

    def __init__(self, visual: nn.Module) -> None:
        self.module = visual
        trunk = visual.trunk
        self.trunk = trunk
        height, width = visual.image_size
        self.image_size = (height, width)
        self.patch_size = patch_side(trunk)
        self.embed_dim = output_width(visual)
        self.width = trunk.embed_dim
        self.depth = len(trunk.blocks)
        self.is_pooled = trunk.attn_pool is not None
        self.positional_grid = None if trunk.pos_embed is None else stored_grid(trunk)

    def last_block_input(
        self,
        images: Tensor,
        earlier_blocks: Sequence[int] = (),
        image_sizes: Sequence[tuple[int, int]] | None = None,
        attention: DenseAttention | None = None,
    ) -> AttentionInput:
        """Run all blocks but the last: see :func:`~reclip_d2.backbones.vision.last_block_input`."""
        tokens, grid = embed_patches(self.trunk, images)
        rotary = rotary_embedding(self.trunk, images[0, 0, :: self.patch_size, :: self.patch_size], tokens.dtype)
        *blocks, last = (TimmBlock(block, rotary) for block in self.trunk.blocks)
        valid = None
        if image_sizes is not None and any(tuple(size) != tuple(images.shape[-2:]) for size in image_sizes):
            valid = valid_patches(image_sizes, grid, self.patch_size, images.device)
        run = EarlierBlocks(earlier_blocks, attention if valid is None else None, self.trunk.num_prefix_tokens)
        for index, block in enumerate(blocks):
            tokens = run(index, block, tokens, block)
        return AttentionInput(
            images,
            last,
            tokens,
            grid,
            class_tokens=self.trunk.num_prefix_tokens,
            valid=valid,
            earlier=run.inputs,
            kept=run.kept,
            count=self.depth,
            is_pooled=self.is_pooled,
        )

    def project(self, patches: Tensor) -> Tensor:
        """What the tower does with its pooled feature, for each patch after the last block: ``(B, n, E)`` to
        ``(B, n, D)``.

        The final norm, the value path of an attention pooling, the norm after pooling, and the heads of timm and
        open_clip.
        """
        trunk = self.trunk
        features = trunk.norm(patches)
        if trunk.attn_pool is not None:
            features = attention_pool_values(trunk.attn_pool, features)
        return self.module.head(trunk.head(trunk.fc_norm(features)))

    def dense(
        self, images: Tensor, attention: DenseAttention, image_sizes: Sequence[tuple[int, int]] | None = None
    ) -> tuple[Tensor, AttentionInput]:
        inputs = self.last_block_input(images, attention.earlier_blocks(self.depth), image_sizes, attention)
        return normalized(attention.refine(self.project(attention(inputs)), inputs)), inputs

    def global_features(self, images: Tensor) -> Tensor | None:
        return None

    def window_features(self, images: Tensor, inside: Tensor, split: int) -> Tensor:
        raise ReclipError("windows in one pass need an open_clip ViT: set HYPOTHESIS.METHOD crops")

    def positions(self, grid: tuple[int, int]) -> Tensor:
        return positions_on_grid(self.trunk, grid)[unplaced_tokens(self.trunk) :]

    @contextlib.contextmanager
    def on_grid(self, grid: tuple[int, int]) -> Iterator[None]:
        trunk = self.trunk
        if trunk.pos_embed is None:
            yield
            return
        before, own = trunk.pos_embed, stored_grid(trunk)
        with torch.no_grad():
            resized = resize_positional_embedding(before[0], own, grid, unplaced_tokens(trunk))
        trunk.pos_embed = nn.Parameter(resized[None].clone(), requires_grad=False)
        trunk.reclip_grid = grid
        try:
            yield
        finally:
            trunk.pos_embed, trunk.reclip_grid = before, own

    def dense_parameters(self, attention: DenseAttention) -> list[nn.Parameter]:
        """Found by the gradients of the features of a small image."""
        parameters = list(self.module.parameters())
        before = [parameter.requires_grad for parameter in parameters]
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            size = 2 * self.patch_size
            image = torch.zeros(1, 3, size, size, device=parameters[0].device, dtype=parameters[0].dtype)
            with torch.enable_grad():
                total = self.dense(image, attention)[0].sum()
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        finally:
            for parameter, needed in zip(parameters, before, strict=True):
                parameter.requires_grad_(needed)
        return [parameter for parameter, used in zip(parameters, gradients, strict=True) if used is not None]


def output_width(visual: nn.Module) -> int:
    """Width D of the features of open_clip's ``TimmModel``."""
    layers = [module for module in visual.head.modules() if isinstance(module, nn.Linear)]
    if layers:
        return layers[-1].out_features
    trunk = visual.trunk
    return trunk.head.out_features if isinstance(trunk.head, nn.Linear) else trunk.num_features
