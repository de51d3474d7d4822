"""Bias extraction: both biases of CLIP as one map of bias logits M_b (section III-B), Eqs. (2) and (3).

The bias head of ReCLIP, the conference model, is in ``reclip_bias_head.py``.

Shape letters: B images, n = h*w patches, C classes, D width of the joint embedding, E width of the image transformer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from reclip_d2.backbones.interface import VisionLanguageBackbone
from reclip_d2.backbones.reference import ReferencePrompt, normalize_reference
from reclip_d2.errors import ReclipError
from reclip_d2.modeling.numerics import full_precision

BIAS_HEAD_REGISTRY = Registry("BIAS_HEAD")
BIAS_HEAD_REGISTRY.__doc__ = """
Registry of bias heads: :class:`BiasHead` modules that compute the bias logits M_b. They are built by
``obj(cfg, backbone, class_names)``.
"""


def build_bias_head(cfg: CfgNode, backbone: VisionLanguageBackbone, class_names: Sequence[str]) -> nn.Module:
    """Build the bias head of ``MODEL.BIAS_HEAD.NAME``."""
    return BIAS_HEAD_REGISTRY.get(cfg.MODEL.BIAS_HEAD.NAME)(cfg, backbone, class_names)


@full_precision
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
    """Space-preference bias: W_p, a 1x1 convolution of CLIP's positional embedding PE."""

    def __init__(self, width: int, embed_dim: int, init: str = "default") -> None:
        """
        Args:
            width: E.
            embed_dim: D.
            init: ``default`` (PyTorch's), or ``zero``, for a bias of zero before training.
        """
        super().__init__()
        self.conv = nn.Conv2d(width, embed_dim, kernel_size=1)
        if init == "zero":
            nn.init.zeros_(self.conv.weight)
            nn.init.zeros_(self.conv.bias)

    def forward(self, positional_embedding: Tensor) -> Tensor:
        """Positional features W_p ``(n, D)`` of a positional embedding ``(E, h, w)``."""
        return self.conv(positional_embedding[None]).flatten(2)[0].T


class BiasHead(nn.Module):
    """Base class of bias heads: the Reference prompt, Eq. (1), for the class preference, and the computation of M_b.

    A head is affine in the image features: ``M_b = A + Z S^T``. Subclasses define

    - :meth:`shared_bias`: A ``(n, C)``, the same for all images of one resolution;
    - :meth:`class_bias`: S ``(C, D)``, if the head is ``image_dependent``.

    Distillation requires this form, since a student inherits A and S in place of the head. A head that is not affine
    defines :meth:`image_bias` in place of :meth:`class_bias`; it can be trained and used, but not distilled.

    Only :meth:`reference_features` needs a CLIP.
    """

    image_dependent: bool = False

    def __init__(self, reference_prompt: ReferencePrompt, reference_norm: str = "row") -> None:
        """
        Args:
            reference_norm: ``row`` or ``matrix``, see :func:`~reclip_d2.backbones.reference.normalize_reference`.
        """
        super().__init__()
        self.reference_prompt = reference_prompt
        self.reference_norm = reference_norm

    def reference_features(self, backbone: VisionLanguageBackbone) -> Tensor:
        """Reference text features W_r ``(C, D)``."""
        return normalize_reference(self.reference_prompt(backbone), self.reference_norm)

    def shared_bias(self, positional_embedding: Tensor, reference_features: Tensor) -> Tensor:
        """A ``(n, C)``, the part of M_b that all images share, from PE ``(E, h, w)`` and W_r ``(C, D)``."""
        raise NotImplementedError

    def class_bias(self, reference_features: Tensor) -> Tensor | None:
        """S ``(C, D)`` from W_r ``(C, D)``; None if M_b does not depend on the image.

        Raises:
            ReclipError: the head is not affine in the image features.
        """
        if not self.image_dependent:
            return None
        raise ReclipError(
            f"MODEL.BIAS_HEAD.NAME {type(self).__name__} is not affine in the image features (it has no class_bias),"
            " so a student cannot inherit it: set MODEL.STUDENT.HEAD query or original, or use another bias head"
        )

    def image_bias(self, reference_features: Tensor, features: Tensor) -> Tensor:
        """``Z S^T`` ``(B, n, C)``, the part of M_b that depends on the image, from W_r ``(C, D)`` and Z
        ``(B, D, h, w)``."""
        return query_logits(features, self.class_bias(reference_features)).flatten(2).transpose(1, 2)

    def check_affine(self, reference_features: Tensor) -> None:
        """Raise :class:`ReclipError` unless :meth:`image_bias` is ``Z S^T``, for heads that override both methods."""
        slope = self.class_bias(reference_features)
        if slope is None:
            return
        probe = torch.randn(1, slope.shape[1], 2, 2, generator=torch.Generator().manual_seed(0)).to(slope)
        expected = query_logits(probe, slope).flatten(2).transpose(1, 2)
        off = (self.image_bias(reference_features, probe) - expected).abs().max()
        if not bool(off <= 1e-3 * expected.abs().max()):
            raise ReclipError(
                f"MODEL.BIAS_HEAD.NAME {type(self).__name__} is not affine in the image features: its image_bias is not"
                " Z S^T with S its class_bias, so a student cannot inherit it"
            )

    def add_image_bias(self, shared: Tensor, reference_features: Tensor, features: Tensor | None) -> Tensor:
        """Bias logits M_b.

        Args:
            shared: A ``(n, C)`` from :meth:`shared_bias`, or ``(B, n, C)``.
            reference_features: W_r ``(C, D)``.
            features: Z ``(B, D, h, w)``; may be None unless the head is ``image_dependent``.

        Returns:
            ``shared`` as it is; ``(B, n, C)`` for an ``image_dependent`` head.
        """
        if not self.image_dependent:
            return shared
        if features is None:
            raise ValueError(f"{type(self).__name__} needs the image features: its bias depends on the image")
        return shared + self.image_bias(reference_features, features)


def build_reference_prompt(
    cfg: CfgNode, backbone: VisionLanguageBackbone, class_names: Sequence[str]
) -> ReferencePrompt:
    """Build the Reference prompt of ``MODEL.BIAS_HEAD``, with one text per class."""
    keys = cfg.MODEL.BIAS_HEAD
    names = list(keys.REFERENCE_NAMES) or list(class_names)
    if len(names) != len(class_names):
        raise ReclipError(
            f"MODEL.BIAS_HEAD.REFERENCE_NAMES has {len(names)} names for {len(class_names)} classes: give one per class"
        )
    return ReferencePrompt(
        backbone,
        names,
        prompt_length=keys.PROMPT_LENGTH,
        init_std=keys.PROMPT_INIT_STD,
        token_limit=keys.NAME_TOKENS,
    )


@BIAS_HEAD_REGISTRY.register()
class ReCLIPPPBiasHead(BiasHead):
    """Bias head of ReCLIP++: the class preference (Reference prompt) and the space preference (projection of the
    positional embedding) are encoded independently, then multiplied, Eq. (2)."""

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
            reference_norm: ``row`` or ``matrix``, see :func:`~reclip_d2.backbones.reference.normalize_reference`.
        """
        super().__init__(reference_prompt, reference_norm)
        self.positional_projection = positional_projection

    @classmethod
    def from_config(
        cls, cfg: CfgNode, backbone: VisionLanguageBackbone, class_names: Sequence[str]
    ) -> dict[str, object]:
        width = backbone.positional_width
        return {
            "reference_prompt": build_reference_prompt(cfg, backbone, class_names),
            "positional_projection": PositionalProjection(
                width, backbone.embed_dim, init=cfg.MODEL.BIAS_HEAD.PROJECTION_INIT
            ),
            "reference_norm": cfg.MODEL.BIAS_HEAD.REFERENCE_NORM,
        }

    def shared_bias(self, positional_embedding: Tensor, reference_features: Tensor) -> Tensor:
        """M_b ``(n, C)`` by Eq. (2)."""
        return bias_logits(self.positional_projection(positional_embedding), reference_features)


RECTIFICATIONS = ("subtract", "add", "none")


def bias_to_subtract(bias: Tensor | None, rectification: str) -> Tensor | None:
    """What Eq. (3) subtracts: M_b, or, in the ablations of Table V, -M_b (``add``) or None for zero (``none``)."""
    if rectification == "none" or bias is None:
        return None
    return -bias if rectification == "add" else bias


def rectified_logits(logits: Tensor, bias: Tensor | None) -> Tensor:
    """Eq. (3): ``M = M_q - M_b``.

    Args:
        logits: M_q ``(B, C, h, w)``.
        bias: M_b ``(n, C)``, broadcast over the batch, or ``(B, n, C)``; None for zero. See :func:`bias_to_subtract`.

    Returns:
        M ``(B, C, h, w)``.
    """
    if bias is None:
        return logits
    return logits - bias.transpose(-1, -2).unflatten(-1, logits.shape[-2:])


@full_precision
def query_logits(features: Tensor, query_features: Tensor) -> Tensor:
    """Query logits ``M_q = Z W_q^T``: CLIP's segmentation without rectification (section III-A).

    Args:
        features: Z ``(B, D, h, w)``.
        query_features: W_q ``(C, D)``.

    Returns:
        M_q ``(B, C, h, w)``, cosine similarities.
    """
    return torch.einsum("bdhw,cd->bchw", features, query_features)
