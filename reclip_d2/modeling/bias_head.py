"""Bias extraction: the two biases of CLIP as one bias logit map M_b (section III-B).

Shape letters: n = h*w patches, C classes, D width of the joint embedding, E width of the image transformer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from reclip_d2.clip.dense import DenseCLIP
from reclip_d2.clip.reference import ReferencePrompt, normalize_reference
from reclip_d2.errors import ReclipError

BIAS_HEAD_REGISTRY = Registry("BIAS_HEAD")
BIAS_HEAD_REGISTRY.__doc__ = """
Registry of bias heads: modules that map a grid size to the bias logits M_b. The registered object is called as
``obj(cfg, backbone, class_names)`` and its ``forward(backbone, size)`` returns ``(n, C)``.
"""


def build_bias_head(cfg: CfgNode, backbone: DenseCLIP, class_names: Sequence[str]) -> nn.Module:
    """Build ``MODEL.BIAS_HEAD.NAME``."""
    return BIAS_HEAD_REGISTRY.get(cfg.MODEL.BIAS_HEAD.NAME)(cfg, backbone, class_names)


def bias_logits(positional_features: Tensor, reference_features: Tensor) -> Tensor:
    """Eq. (2): ``M_b = W_p W_r^T``.

    Args:
        positional_features: W_p ``(n, D)``.
        reference_features: W_r ``(C, D)``.

    Returns:
        M_b ``(n, C)``: the same for all images of one resolution.
    """
    return positional_features @ reference_features.T


class PositionalProjection(nn.Module):
    """Space-preference bias: a 1x1 convolution of CLIP's positional embedding gives W_p. PE is its only input."""

    def __init__(self, width: int, embed_dim: int, init: str = "default") -> None:
        """
        Args:
            width: E.
            embed_dim: D.
            init: ``default`` (PyTorch's), or ``zero``: before training there is no bias.
        """
        super().__init__()
        self.conv = nn.Conv2d(width, embed_dim, kernel_size=1)
        if init == "zero":
            nn.init.zeros_(self.conv.weight)
            nn.init.zeros_(self.conv.bias)

    def forward(self, positional_embedding: Tensor) -> Tensor:
        """Positional features W_p ``(n, D)`` of a positional embedding ``(E, h, w)``."""
        return self.conv(positional_embedding[None]).flatten(2)[0].T


@BIAS_HEAD_REGISTRY.register()
class ReCLIPPPBiasHead(nn.Module):
    """Bias head of ReCLIP++: class preference in the Reference prompt, space preference in a projection of the
    positional embedding, each encoded without the other, then multiplied (Eq. 2)."""

    @configurable
    def __init__(
        self,
        reference_prompt: ReferencePrompt,
        positional_projection: PositionalProjection,
        *,
        reference_norm: str = "row",
    ) -> None:
        """
        Args:
            reference_norm: ``row`` or ``matrix``, see :func:`~reclip_d2.clip.reference.normalize_reference`.
        """
        super().__init__()
        self.reference_prompt = reference_prompt
        self.positional_projection = positional_projection
        self.reference_norm = reference_norm

    @classmethod
    def from_config(cls, cfg: CfgNode, backbone: DenseCLIP, class_names: Sequence[str]) -> dict[str, object]:
        width = backbone.positional_embedding((1, 1)).shape[0]
        names = list(cfg.MODEL.BIAS_HEAD.REFERENCE_NAMES) or list(class_names)
        if len(names) != len(class_names):
            raise ReclipError(
                f"MODEL.BIAS_HEAD.REFERENCE_NAMES has {len(names)} names for {len(class_names)} classes: one a class"
            )
        return {
            "reference_prompt": ReferencePrompt(
                backbone.text_encoder,
                names,
                prompt_length=cfg.MODEL.BIAS_HEAD.PROMPT_LENGTH,
                init_std=cfg.MODEL.BIAS_HEAD.PROMPT_INIT_STD,
                token_limit=cfg.MODEL.BIAS_HEAD.NAME_TOKENS,
            ),
            "positional_projection": PositionalProjection(
                width, backbone.embed_dim, init=cfg.MODEL.BIAS_HEAD.PROJECTION_INIT
            ),
            "reference_norm": cfg.MODEL.BIAS_HEAD.REFERENCE_NORM,
        }

    def reference_features(self, backbone: DenseCLIP) -> Tensor:
        """Reference text features W_r ``(C, D)``."""
        return normalize_reference(self.reference_prompt(backbone.text_encoder), self.reference_norm)

    def positional_features(self, backbone: DenseCLIP, size: tuple[int, int]) -> Tensor:
        """Positional features W_p ``(n, D)`` on the grid (h, w)."""
        return self.positional_projection(backbone.positional_embedding(size))

    def forward(self, backbone: DenseCLIP, size: tuple[int, int]) -> Tensor:
        """Bias logits M_b ``(n, C)`` on the grid (h, w)."""
        return bias_logits(self.positional_features(backbone, size), self.reference_features(backbone))


RECTIFICATIONS = ("subtract", "add", "none")


def rectified_logits(query_logits: Tensor, bias: Tensor | None, rectification: str = "subtract") -> Tensor:
    """Eq. (3): ``M = M_q - M_b``; ``add`` and ``none`` are the ablation of Table V.

    Args:
        query_logits: M_q ``(B, C, h, w)``.
        bias: M_b ``(n, C)``, broadcast over the batch; unused (may be None) for ``none``.

    Returns:
        M ``(B, C, h, w)``.
    """
    if rectification == "none" or bias is None:
        return query_logits
    bias = bias.T.unflatten(1, query_logits.shape[-2:])
    return query_logits - bias if rectification == "subtract" else query_logits + bias


def query_logits(features: Tensor, query_features: Tensor) -> Tensor:
    """Query logits ``M_q = Z W_q^T``: CLIP's own segmentation (section III-A).

    Args:
        features: Z ``(B, D, h, w)``.
        query_features: W_q ``(C, D)``.

    Returns:
        M_q ``(B, C, h, w)``, cosine similarities.
    """
    return torch.einsum("bdhw,cd->bchw", features, query_features)
