"""The learnable Reference prompt, Eq. (1), and its shared-prefix encoding.

Shape letters: C classes, L prompt vectors, T tokens of the packed sequence, E width of the text transformer,
D width of the joint embedding.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclip_d2.backbones.text import TextEncoder
from reclip_d2.errors import ReclipError

logger = logging.getLogger(__name__)


class ReferencePrompt(nn.Module):
    """Reference text of every class, Eq. (1): ``R_i = [SOS][v_1]...[v_L][name_i][EOS]``.

    The vectors ``v`` are shared by the classes, and CLIP's text transformer is causal; so the hidden states of
    ``[SOS][v_1]...[v_L]`` are the same for all classes. They are computed once, in one packed sequence ::

        [SOS] v_1 ... v_L | name_1 EOS | name_2 EOS | ...

    where the positions restart after the prefix and a mask lets each name see the prefix and itself. This is
    the same function as encoding C sequences of L + 2 + len(name) tokens, at a fraction of the work.
    """

    def __init__(
        self,
        text_encoder: TextEncoder,
        class_names: Sequence[str],
        prompt_length: int = 73,
        init_std: float = 0.02,
        token_limit: int = 0,
    ) -> None:
        """
        Args:
            text_encoder: read for sizes and tokens only; it is passed to :meth:`forward` and not kept.
            class_names: one name a class (the first of its synonyms).
            prompt_length: L wanted. The longest name must fit in the context beside it:
                ``L = min(prompt_length, context_length - 2 - longest name)``, which is logged when it bites.
            init_std: the vectors start from a normal distribution of this standard deviation (CoOp: 0.02).
            token_limit: 0 takes a name whole. k reproduces the public code of ReCLIP++ (k = 3): of ``name EOS`` the
                first k tokens are taken, and the feature is read at the largest token id, which is EOS where it was
                not cut off.
        """
        super().__init__()
        if not text_encoder.is_causal:
            raise ReclipError("the Reference prompt needs a CLIP whose text transformer is causal")
        names = [text_encoder.name_tokens(name) for name in class_names]
        for name, tokens in zip(class_names, names, strict=True):
            if not tokens:
                raise ReclipError(f"class name {name!r} has no tokens: rename the class")
            if len(tokens) > text_encoder.context_length - 2:
                raise ReclipError(
                    f"class name {name!r} has {len(tokens)} tokens, more than the"
                    f" {text_encoder.context_length - 2} that the text encoder takes: shorten it"
                )
        end = text_encoder.tokenizer.eot_token_id
        segments = [[*tokens, end] for tokens in names]
        room = token_limit or max(map(len, segments))
        if token_limit:
            segments = [cut_name(segment, token_limit) for segment in segments]
        length = min(prompt_length, text_encoder.context_length - 1 - room)
        if token_limit and length < 1:
            raise ReclipError(f"MODEL.BIAS_HEAD.NAME_TOKENS {token_limit} leaves the prompt no room: lower it")
        if length < prompt_length:
            logger.info(
                "Reference prompt: L = %d instead of %d, so that the longest class name (%d tokens) fits",
                length, prompt_length, room - 1,
            )  # fmt: skip
        self.vectors = nn.Parameter(torch.randn(length, text_encoder.width) * init_std)

        prefix = 1 + length
        positions = list(range(prefix)) + [prefix + i for segment in segments for i in range(len(segment))]
        lengths = torch.tensor([len(segment) for segment in segments])
        self.register_buffer("start_token", torch.tensor([text_encoder.tokenizer.sot_token_id]), persistent=False)
        self.register_buffer("name_tokens", torch.tensor(sum(segments, [])), persistent=False)
        self.register_buffer("positions", torch.tensor(positions), persistent=False)
        self.register_buffer("ends", prefix - 1 + lengths.cumsum(0), persistent=False)
        self.register_buffer("attn_mask", packed_attention_mask(prefix, lengths), persistent=False)

    def forward(self, text_encoder: TextEncoder) -> Tensor:
        """Reference text features before their norm: ``(C, D)``; differentiable in the prompt vectors."""
        embed = text_encoder.token_embedding
        vectors = self.vectors.to(embed.weight.dtype)
        tokens = torch.cat([embed(self.start_token), vectors, embed(self.name_tokens)])
        tokens = tokens + text_encoder.positional_embedding[self.positions]
        hidden = text_encoder.transformer(tokens[None], attn_mask=self.attn_mask)[0]
        return text_encoder.project(hidden[self.ends])


def cut_name(tokens: Sequence[int], limit: int) -> list[int]:
    """First ``limit`` tokens of a name, up to the one with the largest id (the first of several).

    The public code of ReCLIP++ reads the feature there. What follows cannot reach it, the transformer being causal.
    """
    kept = list(tokens[:limit])
    return kept[: kept.index(max(kept)) + 1]


def packed_attention_mask(prefix: int, lengths: Tensor) -> Tensor:
    """Additive attention mask of the packed sequence: 0 where a token may look, -inf elsewhere.

    A token of the prefix sees the prefix up to itself; a token of a name sees the whole prefix and its own
    name up to itself.

    Args:
        prefix: tokens of the shared prefix, start included.
        lengths: ``(C,)`` tokens of each name, end included.

    Returns:
        ``(T, T)`` float32, T = prefix + lengths.sum().
    """
    owner = torch.cat([torch.full((prefix,), -1), torch.arange(len(lengths)).repeat_interleave(lengths)])
    order = torch.arange(len(owner))
    causal = order[:, None] >= order[None, :]
    visible = causal & ((owner[:, None] == owner[None, :]) | (owner[None, :] == -1))
    return torch.zeros(visible.shape).masked_fill_(~visible, float("-inf"))


def normalize_reference(features: Tensor, norm: str) -> Tensor:
    """Norm of the Reference features W_r ``(C, D)``: each ``row`` to length 1, or the whole ``matrix`` (as the
    public code of ReCLIP++ does)."""
    if norm == "row":
        return F.normalize(features, dim=-1)
    return features / features.norm()
