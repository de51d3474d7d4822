"""Text towers of Hugging Face's transformers (XLM-RoBERTa, mT5, NLLB, ...), as open_clip wraps them.

Shape letters: N texts, C classes, L prompt vectors, T tokens of a text, F width of the text transformer, D width of the
joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reclip_d2.backbones.separate_texts import SeparateTexts
from reclip_d2.backbones.text import TextEncoder
from reclip_d2.backbones.tokens import text_tokens
from reclip_d2.errors import ReclipError


class HuggingFaceTextEncoder(TextEncoder):
    """open_clip's ``HFTextEncoder``, with its tokenizer. Its transformer attends to all tokens but the padding."""

    is_causal = False
    class_token = None

    def __init__(self, clip: nn.Module, tokenizer: object) -> None:
        """
        Args:
            clip: an open_clip ``CustomTextCLIP`` with an ``HFTextEncoder``.
            tokenizer: its ``HFTokenizer``.

        Raises:
            ReclipError: the tokenizer is not of this tower.
        """
        nn.Module.__init__(self)
        tower = clip.text
        self.tokenizer = tokenizer
        self.tokens = text_tokens(tokenizer)
        self.transformer = tower.transformer
        self.token_embedding = tower.transformer.get_input_embeddings()
        self.pooler = tower.pooler
        self.projection = tower.proj
        self._padding = tower.config.pad_token_id
        self._width = tower.output_dim
        self._encode_text = clip.encode_text
        if self.tokens.padding != self._padding:
            raise ReclipError(
                f"the tokenizer pads with id {self.tokens.padding}, the text tower expects {self._padding}: they are of"
                " different models; set MODEL.CLIP.TEXT_FILES to the files of the tower"
            )

    @property
    def embed_dim(self) -> int:
        return self._width

    @property
    def context_length(self) -> int:
        return self.tokenizer.context_length

    def reference_layout(self, segments: Sequence[Sequence[int]], prompt_length: int) -> SeparateTexts:
        """One sequence for each class."""
        return SeparateTexts(self.tokens.start, segments, prompt_length, self.context_length, self._padding)

    def _encode_embedded(self, embedded: Tensor, tokens: Tensor, ends: Tensor) -> Tensor:
        """Features ``(N, D)`` of embedded texts ``(N, T, F)``: the transformer adds positions, and open_clip's pooler
        says which states count (``ends`` does not)."""
        mask = (tokens != self._padding).long()
        states = self.transformer(inputs_embeds=embedded, attention_mask=mask)
        return self.projection(self.pooler(states, mask))

    def _read_positions(self, tokens: Tensor) -> torch.Tensor | None:
        return None


def text_encoder(clip: nn.Module, tokenizer: object) -> TextEncoder:
    """The text tower of an open_clip model, with its tokenizer."""
    of_hugging_face = hasattr(getattr(clip, "text", None), "pooler")
    return (HuggingFaceTextEncoder if of_hugging_face else TextEncoder)(clip, tokenizer)
