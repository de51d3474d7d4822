"""The text tower of a frozen CLIP.

Shape letters: N texts, C classes, L prompt vectors, T tokens of a text, F width of the text transformer, D width of the
joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclip_d2.backbones.packed_texts import PackedTexts
from reclip_d2.backbones.separate_texts import SeparateTexts
from reclip_d2.backbones.tokens import text_tokens
from reclip_d2.layers import autocast_copy


class TextEncoder(nn.Module):
    """The text tower of an open_clip model, with its tokenizer.

    Shares the model's modules: nothing is copied, and a frozen model stays frozen.
    """

    def __init__(self, clip: nn.Module, tokenizer: object) -> None:
        """
        Args:
            clip: an open_clip ``CLIP``, ``CustomTextCLIP`` or ``CoCa`` with a ``TextTransformer``.
            tokenizer: its tokenizer, from ``open_clip.get_tokenizer``.
        """
        super().__init__()
        tower = getattr(clip, "text", clip)
        self.tokenizer = tokenizer
        self.token_embedding = tower.token_embedding
        self.positional_embedding = tower.positional_embedding
        self.transformer = tower.transformer
        self.ln_final = tower.ln_final
        self.text_projection = tower.text_projection
        self.class_token = getattr(tower, "cls_emb", None)  # CoCa appends it to the padded text, and reads it
        mask = getattr(tower, "attn_mask", None)
        self.is_causal = mask is not None and torch.equal(mask, causal_mask(len(mask)).to(mask))
        self.tokens = text_tokens(tokenizer, getattr(tower, "pad_id", None) or 0)
        # open_clip's CLIP copies these two settings from its text tower under other names.
        self._pool_type = getattr(tower, "text_pool_type", None) or getattr(tower, "pool_type", None)
        self._end_id = getattr(tower, "text_eos_id", None) or getattr(tower, "eos_id", None)
        # Bound methods, not modules: registering `clip` would register its image tower here.
        self._encode_text = clip.encode_text
        self._padding_mask = None if self.class_token is None else tower._build_additive_mask

    @property
    def text_width(self) -> int:
        """Width F of a token embedding."""
        return self.token_embedding.weight.shape[1]

    @property
    def embed_dim(self) -> int:
        """Width D of a text embedding."""
        if isinstance(self.text_projection, nn.Linear):
            return self.text_projection.out_features
        return self.text_width if self.text_projection is None else self.text_projection.shape[1]

    @property
    def context_length(self) -> int:
        """Largest number of tokens of a text, start and end included."""
        return self.positional_embedding.shape[0] - (self.class_token is not None)

    @property
    def end_token(self) -> int:
        """Id of the token that ends a text."""
        return self.tokens.end

    def name_tokens(self, name: str) -> list[int]:
        """Token ids of a class name, without start and end tokens."""
        return list(self.tokens.encode(name))

    def token_embeddings(self, tokens: Tensor) -> Tensor:
        """Embeddings ``(T, F)`` of token ids ``(T,)``, without positions."""
        return self.token_embedding(tokens.to(self.token_embedding.weight.device))

    def project(self, hidden: Tensor) -> Tensor:
        """Final LayerNorm and projection of the end tokens' hidden states: ``(..., F)`` to ``(..., D)``."""
        hidden = self.ln_final(hidden)
        if isinstance(self.text_projection, nn.Linear):
            return self.text_projection(hidden)
        return hidden if self.text_projection is None else hidden @ autocast_copy(self.text_projection)

    def text_features(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Features ``(N, D)`` float32 of N texts, each of length 1.

        In a causal transformer, tokens after the end do not affect the embedding. So the texts are sorted by length,
        and each batch is truncated to its longest text: the same embeddings at a fraction of the cost. Towers that read
        the padding get every text at full length.
        """
        tokens = self.tokenizer(list(texts)).to(self.token_embedding.weight.device)
        if (ends := self._read_positions(tokens)) is None:
            rows = [self._encode_text(batch) for batch in tokens.split(batch_size)]
            return F.normalize(torch.cat(rows).float(), dim=-1)
        order = ends.argsort(stable=True)
        embeddings = torch.cat([self._encode_short(tokens[rows], ends[rows]) for rows in order.split(batch_size)])
        return embeddings[order.argsort()]

    def _read_positions(self, tokens: Tensor) -> Tensor | None:
        """Position at which the embedding of each text ``(N, T)`` is read: ``(N,)``; None if later tokens affect it."""
        if not self.is_causal or self.class_token is not None:
            return None
        if self._pool_type == "argmax":
            return tokens.argmax(dim=1)
        if self._pool_type == "eos":
            return (tokens == self._end_id).int().argmax(dim=1)
        return None

    def _encode_short(self, tokens: Tensor, ends: Tensor) -> Tensor:
        """Embeddings ``(N, D)`` of length 1 of texts ``(N, T)``, read at ``ends`` ``(N,)``."""
        length = int(ends.max()) + 1
        embedded = self.token_embedding(tokens[:, :length]) + self.positional_embedding[:length]
        hidden = self.transformer(embedded, attn_mask=causal_mask(length).to(embedded))
        return F.normalize(self.project(hidden[torch.arange(len(tokens), device=ends.device), ends]).float(), dim=-1)

    def reference_layout(self, segments: Sequence[Sequence[int]], prompt_length: int) -> PackedTexts | SeparateTexts:
        """The texts of all classes as one packed sequence (:class:`PackedTexts`) or, if classes cannot share the
        prompt's hidden states, as one sequence each (:class:`SeparateTexts`)."""
        tokens = self.tokens
        pool = "class" if self.class_token is not None else self._pool_type
        if self.is_causal and pool in ("argmax", "eos") and len(tokens.start) == 1:
            return PackedTexts(tokens.start[0], segments, prompt_length)
        return SeparateTexts(tokens.start, segments, prompt_length, self.context_length, tokens.padding, pool)

    def reference(self, vectors: Tensor, layout: PackedTexts | SeparateTexts) -> Tensor:
        """Features ``(C, D)``, not normalised, of the texts of C classes with prompt vectors ``(L, F)``."""
        embed = self.token_embedding
        if isinstance(layout, SeparateTexts):
            return layout.encode(embed, vectors, self._encode_embedded)
        vectors = vectors.to(embed.weight.dtype)
        tokens = torch.cat([embed(layout.start_token), vectors, embed(layout.segment_tokens)])
        tokens = tokens + self.positional_embedding[layout.positions]
        return self.project(layout.encode(self.transformer, tokens))

    def _encode_embedded(self, embedded: Tensor, tokens: Tensor, ends: Tensor) -> Tensor:
        """Features ``(N, D)``, read at ``ends`` ``(N,)``, of embedded texts ``(N, T, F)`` without positions.

        Args:
            tokens: their ids ``(N, T)``, for a mask of the padding.
        """
        mask = None
        if self.class_token is not None:
            embedded = torch.cat([embedded, self.class_token.to(embedded).expand(len(embedded), 1, -1)], dim=1)
            mask = self._padding_mask(tokens, embedded.shape[1], embedded.dtype)
        length = embedded.shape[1]
        if self.is_causal:
            causal = causal_mask(length).to(embedded)
            mask = causal if mask is None else causal + mask
        hidden = self.transformer(embedded + self.positional_embedding[:length], attn_mask=mask)
        return self.project(hidden[torch.arange(len(tokens), device=hidden.device), ends])


def causal_mask(length: int) -> Tensor:
    """Additive attention mask ``(length, length)`` of a causal transformer: -inf above the diagonal, 0 elsewhere."""
    return torch.full((length, length), float("-inf")).triu(1)
