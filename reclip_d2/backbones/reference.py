"""The learnable Reference prompt, Eq. (1).

Shape letters: C classes, L prompt vectors, D width of the joint embedding, F width of the text transformer.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclip_d2.backbones.interface import VisionLanguageBackbone
from reclip_d2.backbones.text import TextEncoder
from reclip_d2.errors import ReclipError

logger = logging.getLogger(__name__)


class ReferencePrompt(nn.Module):
    """Reference text of every class, Eq. (1): ``R_i = [SOS][v_1]...[v_L][name_i][EOS]``.

    The vectors ``v`` are shared by the classes and are all that trains. The backbone encodes the texts
    (:meth:`VisionLanguageBackbone.reference`).

    Attributes:
        vectors: ``(L, F)``.
        segments: for each class the token ids that follow the vectors, the end token included.
    """

    def __init__(
        self,
        backbone: VisionLanguageBackbone | TextEncoder,
        class_names: Sequence[str],
        prompt_length: int = 73,
        init_std: float = 0.02,
        token_limit: int = 0,
    ) -> None:
        """
        Args:
            backbone: read for sizes and tokens only; it is passed to :meth:`forward` and not kept.
            class_names: one name a class (the first of its synonyms).
            prompt_length: L wanted. The longest name must fit in the context as well:
                ``L = min(prompt_length, context_length - 2 - longest name)``, which is logged if it is less.
            init_std: the vectors start from a normal distribution of this standard deviation (CoOp: 0.02).
            token_limit: 0 takes a name whole. k reproduces the public code of ReCLIP++ (k = 3): of ``name EOS`` the
                first k tokens are taken, and the feature is read at the largest token id, which is EOS where it was
                not cut off.

        Raises:
            ReclipError: a name has no tokens or too many, or the text tower cannot take prompts.
        """
        super().__init__()
        context = backbone.context_length
        names = [backbone.name_tokens(name) for name in class_names]
        for name, tokens in zip(class_names, names, strict=True):
            if not tokens:
                raise ReclipError(f"class name {name!r} has no tokens: rename the class")
            if len(tokens) > context - 2:
                raise ReclipError(
                    f"class name {name!r} has {len(tokens)} tokens, more than the {context - 2} that the text encoder"
                    " takes: shorten it"
                )
        self.segments = [[*tokens, backbone.end_token] for tokens in names]
        room = token_limit or max(map(len, self.segments))
        if token_limit:
            self.segments = [cut_name(segment, token_limit) for segment in self.segments]
        length = min(prompt_length, context - 1 - room)
        if token_limit and length < 1:
            raise ReclipError(f"MODEL.BIAS_HEAD.NAME_TOKENS {token_limit} leaves the prompt no room: lower it")
        if length < prompt_length:
            logger.info(
                "Reference prompt: L = %d instead of %d, so that the longest class name (%d tokens) fits",
                length, prompt_length, room - 1,
            )  # fmt: skip
        self.layout = backbone.reference_layout(self.segments, length)
        self.vectors = nn.Parameter(torch.randn(length, backbone.text_width) * init_std)

    def forward(self, backbone: VisionLanguageBackbone | TextEncoder) -> Tensor:
        """Reference text features before their norm: ``(C, D)``; differentiable in the prompt vectors."""
        return backbone.reference(self.vectors, self.layout)

    def digest(self) -> str:
        """Hash of the segments, eight hex digits: the weights do not show them."""
        tokens = [token for segment in self.segments for token in segment]
        ends = list(itertools.accumulate(map(len, self.segments)))
        return hashlib.sha256(f"{tokens} {ends}".encode()).hexdigest()[:8]


def cut_name(tokens: Sequence[int], limit: int) -> list[int]:
    """First ``limit`` tokens of a name, up to the one with the largest id (the first of several).

    The public code of ReCLIP++ reads the feature there. What follows cannot reach it, the transformer being causal.
    """
    kept = list(tokens[:limit])
    return kept[: kept.index(max(kept)) + 1]


def normalize_reference(features: Tensor, norm: str) -> Tensor:
    """Norm of the Reference features W_r ``(C, D)``: each ``row`` to length 1, or the whole ``matrix`` (as the
    public code of ReCLIP++ does)."""
    if norm == "row":
        return F.normalize(features, dim=-1)
    return features / features.norm()
