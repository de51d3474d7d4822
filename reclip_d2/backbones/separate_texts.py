"""The Reference prompt of all classes, Eq. (1), for a text transformer that is not causal: one sequence per class.

Shape letters: C classes, L prompt vectors, T tokens of a text (the whole context), F width of the text transformer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# Sequences that are encoded together.
BATCH = 256


class SeparateTexts(nn.Module):
    """Texts ``[start][v_1]...[v_L][segment][padding]``. Every token may attend to all others, padding included, so that
    classes cannot share the prompt's hidden states.

    Attributes:
        tokens: ``(C, T)`` token ids; those at the places of prompt vectors are not used.
        ends: ``(C,)``, position at which the feature is read.
    """

    def __init__(
        self,
        start_token: int,
        segments: Sequence[Sequence[int]],
        prompt_length: int,
        context_length: int,
        padding: int = 0,
        pool: str = "argmax",
    ) -> None:
        """
        Args:
            segments: for each class the token ids after the prompt.
            prompt_length: L.
            context_length: T.
            padding: token id after the end.
            pool: where open_clip reads the feature: "first", "last", or else the last token of the segment.
        """
        super().__init__()
        rows = [[start_token, *[padding] * prompt_length, *segment] for segment in segments]
        ends = [{"first": 0, "last": context_length - 1}.get(pool, len(row) - 1) for row in rows]
        tokens = torch.tensor([row + [padding] * (context_length - len(row)) for row in rows])
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("ends", torch.tensor(ends), persistent=False)

    def encode(
        self, transformer: nn.Module, embed: Callable[[Tensor], Tensor], positions: Tensor, vectors: Tensor
    ) -> Tensor:
        """Hidden states ``(C, F)`` at the ends, before the final norm.

        Args:
            embed: token ids to embeddings.
            positions: positional embedding ``(T, F)``.
            vectors: prompt vectors ``(L, F)``.
        """
        length = len(vectors)
        states = []
        for tokens, ends in zip(self.tokens.split(BATCH), self.ends.split(BATCH), strict=True):
            embedded = embed(tokens)
            prompt = vectors.expand(len(tokens), -1, -1)
            sequences = torch.cat([embedded[:, :1], prompt, embedded[:, 1 + length :]], dim=1) + positions
            hidden = transformer(sequences, attn_mask=None)
            states.append(hidden[torch.arange(len(tokens), device=hidden.device), ends])
        return torch.cat(states)
