"""The image tower of a CLIP behind one interface, and the one of open_clip.

Shape letters: B images, (H, W) size in pixels, (h, w) patch grid, n = h*w patches, N windows, E width of the image
transformer, D width of the joint embedding.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclip_d2.backbones.dense_attention import AttentionInput, DenseAttention
from reclip_d2.backbones.positions import positions_on_grid, resize_positional_embedding
from reclip_d2.backbones.vision import dense_image_features, global_image_features
from reclip_d2.backbones.windows import window_image_features


class ImageTower(abc.ABC):
    """What a backbone needs of the image tower of an open_clip model. It has no weights: it is made for a module when
    it is used.

    Attributes:
        module: the open_clip module.
        patch_size: side of a patch in pixels.
        image_size: (H, W) that the tower was trained at.
        embed_dim: D.
        width: E.
        depth: number of transformer blocks.
        pools_class_token: whether the global feature is that of a class token.
        is_pooled: whether it pools its patches by attention after the last block.
        positional_grid: grid (h, w) of the learned positional embedding; None without one.
    """

    module: nn.Module
    patch_size: int
    image_size: tuple[int, int]
    embed_dim: int
    width: int
    depth: int
    pools_class_token: bool
    is_pooled: bool
    positional_grid: tuple[int, int] | None

    @abc.abstractmethod
    def dense(
        self, images: Tensor, attention: DenseAttention, image_sizes: Sequence[tuple[int, int]] | None = None
    ) -> tuple[Tensor, AttentionInput]:
        """Image features Z ``(B, n', D)``, each of length 1, of the attention's n' output patches; and the last block's
        input.

        Args:
            images: ``(B, 3, H, W)``, normalised; H and W are multiples of the patch size.
            image_sizes: (H, W) of each image without padding; None if none is padded.
        """

    @abc.abstractmethod
    def global_features(self, images: Tensor) -> Tensor | None:
        """Global features ``(B, D)``, not normalised, of images at :attr:`image_size`; None to use open_clip's."""

    @abc.abstractmethod
    def window_features(self, images: Tensor, inside: Tensor, split: int) -> Tensor:
        """Global features ``(B, N, D)`` of windows, not normalised: see
        :func:`~reclip_d2.backbones.windows.window_image_features`. For towers that pool a class token."""

    @abc.abstractmethod
    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The learned positional embedding of the patches on the grid: ``(n, E)``."""

    @abc.abstractmethod
    def on_grid(self, grid: tuple[int, int]) -> contextlib.AbstractContextManager[None]:
        """Context in which the learned positional embedding is stored on ``grid``."""

    @abc.abstractmethod
    def dense_parameters(self, attention: DenseAttention) -> list[nn.Parameter]:
        """The parameters that Z depends on. Distributed training expects a gradient for every parameter that needs
        one."""


class OpenClipTower(ImageTower):
    """open_clip's ``VisionTransformer``."""

    def __init__(self, visual: nn.Module) -> None:
        self.module = visual
        self.patch_size = visual.patch_size[0]
        height, width = visual.image_size
        self.image_size = (height, width)
        self.embed_dim = visual.output_dim
        self.width = visual.positional_embedding.shape[1]
        self.depth = len(visual.transformer.resblocks)
        self.is_pooled = visual.attn_pool is not None
        self.pools_class_token = getattr(visual, "pool_type", "tok") == "tok" and not self.is_pooled
        height, width = visual.grid_size
        self.positional_grid = (int(height), int(width))

    def dense(
        self, images: Tensor, attention: DenseAttention, image_sizes: Sequence[tuple[int, int]] | None = None
    ) -> tuple[Tensor, AttentionInput]:
        return dense_image_features(self.module, images, attention, image_sizes)

    def global_features(self, images: Tensor) -> Tensor | None:
        return global_image_features(self.module, images)

    def window_features(self, images: Tensor, inside: Tensor, split: int) -> Tensor:
        return window_image_features(self.module, images, inside, split)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        return positions_on_grid(self.module, grid)[1:]

    @contextlib.contextmanager
    def on_grid(self, grid: tuple[int, int]) -> Iterator[None]:
        visual = self.module
        before = visual.positional_embedding, visual.grid_size
        with torch.no_grad():
            embedding = resize_positional_embedding(visual.positional_embedding, tuple(visual.grid_size), grid)
        visual.positional_embedding = nn.Parameter(embedding.clone(), requires_grad=False)
        visual.grid_size = grid
        try:
            yield
        finally:
            visual.positional_embedding, visual.grid_size = before

    def dense_parameters(self, attention: DenseAttention) -> list[nn.Parameter]:
        last = self.module.transformer.resblocks[-1]
        mlp = {*last.ln_2.parameters(), *last.mlp.parameters(), *last.ls_2.parameters()}
        pooling = self.module.attn_pool
        unused = set() if attention.uses_mlp or pooling is not None else mlp
        if pooling is not None:  # its value path has no queries
            unused |= {
                pooling.query,
                *pooling.ln_q.parameters(),
                pooling.attn.q_proj_weight,
                pooling.attn.k_proj_weight,
            }
        return [parameter for parameter in self.module.parameters() if parameter not in unused]


def normalized(features: Tensor) -> Tensor:
    """Features of length 1, float32 (float64 for a float64 model)."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
