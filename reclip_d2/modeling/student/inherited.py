"""The student's head, inherited from the teacher and frozen: Query head, bias logits, mask decoder (section III-E).

Shape letters: B images, (h, w) grid of the student's features, C classes, D width of the joint embedding.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from reclip_d2.layers import resize_bicubic
from reclip_d2.modeling.bias_head import bias_to_subtract, query_logits, rectified_logits
from reclip_d2.modeling.mask_decoder import MaskDecoder

# Table IX; each adds a component. "original" learns a classifier instead.
HEADS = ("original", "query", "query_bias", "query_bias_decoder")
HEADS_WITH_BIAS = HEADS[2:]


class InheritedHead(nn.Module):
    """Computes mask logits from features like the teacher, with copied tensors: no CLIP is needed.

    The bias head is affine in the features, ``M_b = A + Z S^T`` (see :class:`~reclip_d2.modeling.bias_head.BiasHead`).
    The map A, which depends on the positional embedding, is stored on one grid and resized bicubically, as the
    positional embedding would be. S is 0 for ReCLIP++ and W_r for ReCLIP.
    """

    def __init__(
        self,
        query_features: Tensor,
        *,
        head: str = "query_bias_decoder",
        bias_map: Tensor | None = None,
        class_bias: Tensor | None = None,
        mask_decoder: MaskDecoder | None = None,
        rectification: str = "subtract",
        logit_scale: float = 1.0,
    ) -> None:
        """
        Args:
            query_features: W_q ``(C, D)``.
            head: one of :data:`HEADS`. ``original`` is a learnable 1x1 convolution in place of the inherited head; the
                others use those of the named components that the teacher has.
            bias_map: A ``(C, gh, gw)``; None without bias.
            class_bias: S ``(C, D)``; None if all images share the bias.
            mask_decoder: the teacher's, copied; None for none.
            rectification: ``subtract``, ``add`` or ``none``.
            logit_scale: CLIP's factor on cosine similarities, applied to mask logits if there is no decoder.
        """
        super().__init__()
        use_bias = head in HEADS_WITH_BIAS and rectification != "none"
        self.register_buffer("query_features", query_features.detach().clone())
        self.register_buffer("bias_map", bias_map.detach().clone() if use_bias and bias_map is not None else None)
        self.register_buffer("class_bias", class_bias.detach().clone() if use_bias and class_bias is not None else None)
        self.rectification = rectification if self.bias_map is not None else "none"
        decoder = mask_decoder if head == "query_bias_decoder" else None
        self.mask_decoder = copy.deepcopy(decoder).requires_grad_(False).eval() if decoder is not None else None
        self.classifier = nn.Conv2d(query_features.shape[1], len(query_features), 1) if head == "original" else None
        self.register_buffer("logit_scale", torch.tensor(float(logit_scale)))

    def train(self, mode: bool = True) -> InheritedHead:
        """Only the student's own classifier trains; the inherited decoder stays in eval mode."""
        super().train(mode)
        if self.mask_decoder is not None:
            self.mask_decoder.eval()
        return self

    @property
    def gives_cosines(self) -> bool:
        """Whether the mask logits are (differences of) cosine similarities, times CLIP's scale."""
        return self.classifier is None and self.mask_decoder is None

    def bias_logits(self, features: Tensor) -> Tensor | None:
        """M_b ``(n, C)``, or ``(B, n, C)`` if it depends on the image, for features ``(B, D, h, w)``."""
        if self.bias_map is None:
            return None
        size = (features.shape[-2], features.shape[-1])
        bias_map = self.bias_map[None]
        if bias_map.shape[-2:] != size:
            bias_map = resize_bicubic(bias_map, size)
        bias = bias_map[0].flatten(1).T
        if self.class_bias is None:
            return bias
        return bias + torch.einsum("bdhw,cd->bhwc", features, self.class_bias).flatten(1, 2)

    def forward(self, features: Tensor) -> Tensor:
        """The student's mask logits M^D ``(B, C, h, w)`` for features ``(B, D, h, w)``, each of length 1; the student's
        own classifier reads features that are not normalised, like DeepLab's."""
        if self.classifier is not None:
            return self.classifier(features)
        bias = bias_to_subtract(self.bias_logits(features), self.rectification)
        logits = rectified_logits(query_logits(features, self.query_features), bias)
        if self.mask_decoder is not None:
            return self.mask_decoder(logits, features)
        return logits * self.logit_scale
