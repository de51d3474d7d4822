"""The Reference prompt of all classes, Eq. (1), one sequence per class: for text towers in which classes cannot share
the prompt's hidden states.

Shape letters: C classes, B of them that are encoded together, L prompt vectors, T tokens of a text (the whole context),
F width of the text transformer, D width of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# Sequences that are encoded together.
BATCH = 256


class SeparateTexts(nn.Module):
    """Texts ``[start][v_1]...[v_L][segment][padding]``, for a transformer that is not causal, that has a class token
    after the padding (CoCa), or a tokenizer without start token.

    Attributes:
        tokens: ``(C, T)`` token ids. Those at the places of prompt vectors stand for tokens that are not padding, and
            are not used otherwise.
        ends: ``(C,)``, position at which the feature is read.
    """

    def __init__(
        self,
        start: Sequence[int],
        segments: Sequence[Sequence[int]],
        prompt_length: int,
        context_length: int,
        padding: int = 0,
        pool: str = "argmax",
    ) -> None:
        """
        Args:
            start: ids of the start token, or of none.
            segments: for each class the token ids after the prompt.
            prompt_length: L.
            context_length: T.
            padding: token id after the end.
            pool: where the feature is read: "first", "last", "class" (after the last token), or else the last token of
                the segment.
        """
        super().__init__()
        self.first = len(start)
        rows = [[*start, *segment[:1] * prompt_length, *segment] for segment in map(list, segments)]
        places = {"first": 0, "last": context_length - 1, "class": context_length}
        ends = [places.get(pool, len(row) - 1) for row in rows]
        tokens = torch.tensor([row + [padding] * (context_length - len(row)) for row in rows])
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("ends", torch.tensor(ends), persistent=False)

    def encode(
        self,
        embed: Callable[[Tensor], Tensor],
        vectors: Tensor,
        finish: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Features ``(C, D)``.

        Args:
            embed: token ids to embeddings.
            vectors: prompt vectors ``(L, F)``.
            finish: maps embedded sequences ``(B, T, F)`` without positions, their :attr:`tokens` and :attr:`ends` to
                features ``(B, D)``.
        """
        first, last = self.first, self.first + len(vectors)
        features = []
        for tokens, ends in zip(self.tokens.split(BATCH), self.ends.split(BATCH), strict=True):
            embedded = embed(tokens)
            prompt = vectors.to(embedded.dtype).expand(len(tokens), -1, -1)
            embedded = torch.cat([embedded[:, :first], prompt, embedded[:, last:]], dim=1)
            features.append(finish(embedded, tokens, ends))
        return torch.cat(features)
