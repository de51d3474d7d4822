"""The interface between models and vision-language backbones: :class:`VisionLanguageBackbone`.

Shape letters: B images, (H, W) size in pixels, (h, w) grid of the dense features, N windows or texts, C classes,
L prompt vectors, D width of the joint embedding of images and texts, E width of the image transformer, F width of the
text transformer.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

from reclip_d2.backbones.dense_attention.feedback import Feedback
from reclip_d2.backbones.query import cached_query_features
from reclip_d2.backbones.settings import PixelStatistics
from reclip_d2.errors import ReclipError


class BackboneSummary(NamedTuple):
    """What is known about a backbone before it is built.

    Attributes:
        name: :attr:`VisionLanguageBackbone.name`.
        embed_dim: D.
        patch_size: side of a patch in pixels.
        image_side: shorter side in pixels of the images that it was trained on.
    """

    name: str
    embed_dim: int
    patch_size: int
    image_side: int


class VisionLanguageBackbone(Backbone):
    """Image and text towers with a joint embedding. Implementations are registered with Detectron2's
    ``BACKBONE_REGISTRY`` and chosen by ``MODEL.BACKBONE.NAME``, such as :class:`~reclip_d2.backbones.dense.DenseCLIP`.

    Images are ``(B, 3, H, W)``, RGB, normalised by :attr:`pixel_statistics`, with H and W multiples of
    :attr:`size_divisibility`. All features are float32 (float64 for a float64 model). The towers are frozen, always in
    eval mode, and not in checkpoints, except for :meth:`trained_weights`.

    Attributes:
        name: name of the architecture, for messages and checkpoints.
        fingerprint: hash of the pretrained weights and of all settings that both towers' features depend on.
        pixel_statistics: mean and standard deviation for normalising images.
    """

    name: str
    fingerprint: str
    pixel_statistics: PixelStatistics

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(_drop_frozen_weights)

    def train(self, mode: bool = True) -> VisionLanguageBackbone:
        """Stays in eval mode, even if fine-tuned: the towers have neither batch norm nor dropout."""
        return super().train(False)

    # ---- sizes ---------------------------------------------------------------------------------------------------

    @classmethod
    @abc.abstractmethod
    def summary(cls, cfg: CfgNode) -> BackboneSummary:
        """Name and sizes of the backbone of ``cfg``, without building it.

        Raises:
            ReclipError: the backbone cannot be built.
        """

    @property
    @abc.abstractmethod
    def patch_size(self) -> int:
        """Side of a patch in pixels."""

    @property
    @abc.abstractmethod
    def image_size(self) -> tuple[int, int]:
        """(H, W) that the image tower was trained at: the size of inputs to :meth:`global_features`."""

    @property
    @abc.abstractmethod
    def embed_dim(self) -> int:
        """Width D of the joint embedding."""

    @property
    @abc.abstractmethod
    def positional_width(self) -> int:
        """Channels of :meth:`positional_embedding`: E for a learned one."""

    @property
    @abc.abstractmethod
    def logit_scale(self) -> float:
        """The model's factor on cosine similarities: 100 for OpenAI's CLIPs."""

    @property
    def stride(self) -> int:
        """Pixels between the patches of :meth:`dense`; a dense attention may give more patches than the tower has."""
        return self.patch_size

    @property
    def size_divisibility(self) -> int:
        """The sides of images must be multiples of this."""
        return self.patch_size

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"dense": ShapeSpec(channels=self.embed_dim, stride=self.stride)}

    # ---- images --------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def dense_and_keys(
        self, images: Tensor, image_sizes: Sequence[tuple[int, int]] | None = None, keys: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Image features Z ``(B, D, h, w)``, each patch of length 1, and, with ``keys``, the last block's keys
        ``(B, h * w, E)``, for key smoothing.

        Args:
            image_sizes: (H, W) of each image before padding; None if there is no padding. Attentions that mix patches
                ignore patches of padding (see :func:`valid_patches`).
            keys: return the keys too; otherwise None.

        Raises:
            ReclipError: ``keys`` is set, and the grid of Z is not the tower's patch grid.
        """

    def dense_with_feedback(
        self, images: Tensor, image_sizes: Sequence[tuple[int, int]] | None, feedback: Feedback
    ) -> Tensor:
        """:meth:`dense` of one image ``(1, 3, H, W)`` whose dense attention gets feedback."""
        raise ReclipError(f"TEST.REFINE sfr changes the attention of a CLIP's last block, which {self.name} lacks")

    def dense(self, images: Tensor, image_sizes: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """Image features Z ``(B, D, h, w)``, channels last in memory: see :meth:`dense_and_keys`."""
        return self.dense_and_keys(images, image_sizes, keys=False)[0]

    def forward(
        self, images: Tensor, image_sizes: Sequence[tuple[int, int]] | None = None
    ) -> dict[str, Tensor]:  # Detectron2's form
        """:meth:`dense` as ``{"dense": (B, D, h, w)}``."""
        return {"dense": self.dense(images, image_sizes)}

    @abc.abstractmethod
    def global_features(self, images: Tensor) -> Tensor:
        """Global features ``(B, D)`` of length 1 of images at :attr:`image_size`; without gradient."""

    @abc.abstractmethod
    def window_features(self, images: Tensor, windows: Tensor, split: int = 0) -> Tensor:
        """Global features of windows, all in one forward pass: ``(B, N, D)`` of length 1; without gradient.

        Args:
            windows: ``(N, 4)`` boxes (x0, y0, x1, y1) in pixels of ``images``, the ends exclusive.
            split: index of the first block with separate window tokens.

        Raises:
            ReclipError: the tower has no such block, or its global feature is not a class token.
        """

    # ---- positions -----------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def positional_embedding(self, size: tuple[int, int]) -> Tensor:
        """Positional embedding PE of the patches on the grid (h, w), detached: ``(positional_width, h, w)``.

        The tower's own, resized, or a synthetic one if the tower has none.
        """

    @property
    def positional_grid(self) -> tuple[int, int] | None:
        """Grid (h, w) of a learned positional embedding; None if there is none to resize."""
        return None

    def on_grid(self, grid: tuple[int, int]) -> contextlib.AbstractContextManager[None]:
        """Context in which the positional embedding is stored on ``grid``, so that a graph traced there does not resize
        it."""
        return contextlib.nullcontext()

    # ---- texts ---------------------------------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def text_width(self) -> int:
        """Width F of a token's embedding."""

    @property
    @abc.abstractmethod
    def context_length(self) -> int:
        """Largest number of tokens of a text, start and end included."""

    @property
    @abc.abstractmethod
    def end_token(self) -> int:
        """Id of the token that ends a text."""

    @abc.abstractmethod
    def name_tokens(self, name: str) -> list[int]:
        """Token ids of a text, without start and end tokens."""

    @abc.abstractmethod
    def token_embeddings(self, tokens: Tensor) -> Tensor:
        """Embeddings ``(T, F)`` of token ids ``(T,)``, without positions."""

    @abc.abstractmethod
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Features ``(N, D)`` of length 1 of N texts."""

    @abc.abstractmethod
    def reference_layout(self, segments: Sequence[Sequence[int]], prompt_length: int) -> nn.Module:
        """Buffers for :meth:`reference`, to encode ``[start][v_1]...[v_L][segment]`` of all classes at once; not in
        checkpoints.

        Args:
            segments: for each class the token ids after the prompt, including the end token.
            prompt_length: L.
        """

    @abc.abstractmethod
    def reference(self, vectors: Tensor, layout: nn.Module) -> Tensor:
        """Text features ``(C, D)``, not normalised, of the texts of Eq. (1); differentiable in the prompt vectors.

        Args:
            vectors: prompt vectors ``(L, F)``.
            layout: from :meth:`reference_layout`.
        """

    def query_features(
        self,
        class_names: Sequence[Sequence[str]],
        templates: Sequence[str],
        turn: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> Tensor:
        """Query text features W_q ``(C, D)`` float32 on the CPU, cached on disk.

        Args:
            class_names: for each class its name and any synonyms.
            templates: texts with one ``{}`` for the name.
            turn: makes a context that is entered for the encoding of each group of classes.
        """
        return cached_query_features(self, class_names, templates, self.key, turn)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    @property
    def key(self) -> str:
        """Cache key of both towers: the architecture (the weights do not show activations and the like) and the
        fingerprint. Text, global and window features depend on nothing else; dense features on :meth:`identity`."""
        return f"{self.name} {self.fingerprint}"

    def trained_weights(self) -> tuple[str, ...]:
        """Prefixes of the weights that train and are in checkpoints; none by default."""
        return ()

    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """All that the features depend on, as JSON values: checkpoints record and compare it.

        Contains ``clip``, the name; ``fingerprint``; and all settings with other values than their defaults, by key.
        """


def _drop_frozen_weights(module: VisionLanguageBackbone, state: dict, prefix: str, metadata: dict) -> None:
    """State-dict hook: frozen weights stay out of checkpoints."""
    trained = tuple(prefix + name for name in module.trained_weights())
    for key in [key for key in state if key.startswith(prefix)]:
        if not (trained and key.startswith(trained)):
            del state[key]


def valid_patches(
    image_sizes: Sequence[tuple[int, int]], size: tuple[int, int], patch: int, device: torch.device
) -> Tensor:
    """``(B, h * w)`` bool: patches whose centre is in the image, not in the padding.

    Args:
        image_sizes: (H, W) of each image in pixels, without padding.
        size: grid (h, w) of the padded batch.
        patch: side of a patch in pixels.
    """
    rows = (torch.arange(size[0], device=device) + 0.5) * patch
    columns = (torch.arange(size[1], device=device) + 0.5) * patch
    return torch.stack([((rows < h)[:, None] & (columns < w)[None, :]).flatten() for h, w in image_sizes])
