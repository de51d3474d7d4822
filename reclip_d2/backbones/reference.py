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

    Only the vectors ``v`` train; all classes share them. The backbone encodes the texts
    (:meth:`VisionLanguageBackbone.reference`).

    Attributes:
        vectors: ``(L, F)``.
        segments: for each class the token ids after the vectors, including the end token.
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
            backbone: gives sizes and tokens; it is not stored, but passed to :meth:`forward`.
            class_names: one name per class (the first of its synonyms).
            prompt_length: maximum of L. The longest name must fit in the context, so
                ``L = min(prompt_length, context_length - 2 - longest name)``; a reduced L is logged.
            init_std: standard deviation of the normal distribution that initialises the vectors (CoOp: 0.02).
            token_limit: 0 for whole names. k reproduces the public code of ReCLIP++ (k = 3): the first k tokens of
                ``name EOS`` are used, and the feature is read at the largest token id, which is EOS unless it was cut
                off.

        Raises:
            ReclipError: a name has no tokens or too many, or the text tower does not support prompts.
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
            raise ReclipError(f"MODEL.BIAS_HEAD.NAME_TOKENS {token_limit} leaves no room for the prompt: lower it")
        if length < prompt_length:
            logger.info(
                "Reference prompt: L = %d instead of %d, so that the longest class name (%d tokens) fits",
                length, prompt_length, room - 1,
            )  # fmt: skip
        self.layout = backbone.reference_layout(self.segments, length)
        self.vectors = nn.Parameter(torch.randn(length, backbone.text_width) * init_std)

    def forward(self, backbone: VisionLanguageBackbone | TextEncoder) -> Tensor:
        """Reference text features ``(C, D)`` before normalisation; differentiable in the prompt vectors."""
        return backbone.reference(self.vectors, self.layout)

    def digest(self) -> str:
        """Hash of the segments, which the weights do not show: eight hex digits."""
        tokens = [token for segment in self.segments for token in segment]
        ends = list(itertools.accumulate(map(len, self.segments)))
        return hashlib.sha256(f"{tokens} {ends}".encode()).hexdigest()[:8]


def cut_name(tokens: Sequence[int], limit: int) -> list[int]:
    """First ``limit`` tokens of a name, cut after the largest id (the first of several).

    The public code of ReCLIP++ reads the feature there; later tokens cannot affect it, since the transformer is causal.
    """
    kept = list(tokens[:limit])
    return kept[: kept.index(max(kept)) + 1]


def normalize_reference(features: Tensor, norm: str) -> Tensor:
    """Normalise the Reference features W_r ``(C, D)``: each ``row`` to length 1, or the whole ``matrix``, as in the
    public code of ReCLIP++."""
    if norm == "row":
        return F.normalize(features, dim=-1)
    return features / features.norm()
