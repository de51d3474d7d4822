"""Texts with a common prefix, encoded together: the Reference prompt of all classes, Eq. (1).

Shape letters: C classes, L prompt vectors, P = 1 + L tokens of the prefix, S tokens of all segments, T = P + S tokens
of the sequence, F width of the text transformer, H heads, d width of a head, m longest segment.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

from reclip_d2.layers import autocast_copy, frozen_linear, frozen_weights

LONGEST_MASKED = 1024
"""Longest packed sequence that a GPU encodes with one mask ``(T, T)``, in fewer launches than group by group."""

ROW_MULTIPLE = 8
"""Rows of the mask have a multiple of this length in memory, or PyTorch's attention copies the mask at each call."""


class Group(NamedTuple):
    """Consecutive segments of one length."""

    first: int
    """Row of the first token, counted without the prefix."""
    segments: int
    length: int

    @property
    def rows(self) -> slice:
        """The rows of the group's tokens."""
        return slice(self.first, self.first + self.segments * self.length)


class PackedTexts(nn.Module):
    """Texts with a common prefix packed into one sequence, for a causal transformer.

    The hidden states of ``[start][v_1]...[v_L]`` are the same for all classes. They are computed once, in ::

        [start] v_1 ... v_L | segment 1 | segment 2 | ...

    where positions restart after the prefix for each segment, and each segment attends to the prefix and itself.
    Equivalent to encoding C sequences of 1 + L + len(segment) tokens, at a fraction of the cost. Segments are sorted by
    length.

    Attributes:
        start_token: ``(1,)`` id of the start token.
        segment_tokens: concatenated ids of all segments.
        positions: ``(T,)``, position in the context of each token of the sequence.
        lengths: ``(C,)``, length of each segment, in the order of the sequence.
        ends: ``(C,)``, index in the sequence of the last token of each class's segment.
        ranks: ``(C,)``, number of each class's segment in the sequence.
        owners: ``(T,)``, number of the segment of each token of the sequence; -1 for the prefix.
        mask: ``(T, T')``, see :meth:`attention_mask`; None for a sequence longer than :data:`LONGEST_MASKED`.
        prefix: P.
        groups: the segments by length.
    """

    def __init__(self, start_token: int, segments: Sequence[Sequence[int]], prompt_length: int) -> None:
        super().__init__()
        self.prefix = prefix = 1 + prompt_length
        order = sorted(range(len(segments)), key=lambda k: len(segments[k]))
        ranks = torch.empty(len(segments), dtype=torch.int64)
        ranks[order] = torch.arange(len(segments))
        segments = [segments[k] for k in order]
        lengths = torch.tensor([len(segment) for segment in segments])
        positions = list(range(prefix)) + [prefix + i for segment in segments for i in range(len(segment))]
        buffers = {
            "start_token": torch.tensor([start_token]),
            "segment_tokens": torch.tensor([token for segment in segments for token in segment]),
            "positions": torch.tensor(positions),
            "lengths": lengths,
            "ends": (prefix - 1 + lengths.cumsum(0))[ranks],
            "ranks": ranks,
            "owners": torch.tensor([-1] * prefix + [k for k, segment in enumerate(segments) for _ in segment]),
            "mask": None,
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)
        if len(positions) <= LONGEST_MASKED:
            self.mask = packed_attention_mask(self.owners, ROW_MULTIPLE)
        self.groups: list[Group] = []
        for length, same in itertools.groupby(lengths.tolist()):
            first = self.groups[-1].rows.stop if self.groups else 0
            self.groups.append(Group(first, len(list(same)), length))

    def encode(self, transformer: nn.Module, tokens: Tensor) -> Tensor:
        """Hidden states ``(C, F)`` of the last tokens of all classes.

        Args:
            transformer: an open_clip ``Transformer``.
            tokens: embedded tokens ``(T, F)`` of the sequence, with positions.
        """
        usual = all(_is_usual(block) for block in transformer.resblocks)
        if not usual:
            return transformer(tokens[None], attn_mask=self.attention_mask())[0].index_select(0, self.ends)
        if frozen_weights.is_on_gpu(tokens) and len(tokens) <= LONGEST_MASKED:
            mask = self.attention_mask()
            for block in transformer.resblocks:
                tokens = _masked_block(block, tokens, mask)
            return tokens.index_select(0, self.ends)
        *blocks, last = transformer.resblocks
        for block in blocks:
            tokens = self._block(block, tokens)
        return self._last_block(last, tokens)

    def attention_mask(self) -> Tensor:
        """The additive mask ``(T, T)`` of :func:`packed_attention_mask`, made once unless the sequence is long.

        The host reads no value of a tensor, so that a CUDA graph may contain it.
        """
        mask = packed_attention_mask(self.owners, ROW_MULTIPLE) if self.mask is None else autocast_copy(self.mask)
        return mask[:, : len(self.owners)]

    def _block(self, block: nn.Module, tokens: Tensor) -> Tensor:
        """A block on all tokens ``(T, F)``."""
        attention = block.attn
        packed = frozen_linear(block.ln_1(tokens), attention.in_proj_weight, attention.in_proj_bias)
        queries, keys, values = (_heads(part, attention) for part in packed.chunk(3, dim=-1))
        prefix = slice(0, self.prefix)
        own = F.scaled_dot_product_attention(
            queries[None, :, prefix], keys[None, :, prefix], values[None, :, prefix], is_causal=True
        )[0]
        theirs = self._attend(queries[:, self.prefix :], keys, values)
        return _rest_of_block(block, tokens, torch.cat([own, theirs], dim=1))

    def _last_block(self, block: nn.Module, tokens: Tensor) -> Tensor:
        """A block on the last tokens of the segments: ``(T, F)`` to ``(C, F)``; the others are keys and values only."""
        attention, width = block.attn, tokens.shape[-1]
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        normed = block.ln_1(tokens)
        packed = frozen_linear(normed, weight[width:], None if bias is None else bias[width:])
        keys, values = (_heads(part, attention) for part in packed.chunk(2, dim=-1))
        ends = self.prefix - 1 + self.lengths.cumsum(0)  # in the order of the sequence
        queries = frozen_linear(normed[ends], weight[:width], None if bias is None else bias[:width])
        mixed = self._attend(_heads(queries, attention), keys, values)
        return _rest_of_block(block, tokens[ends], mixed)[self.ranks]

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of the segments' tokens to the prefix and to their own segment, up to themselves.

        Args:
            queries: ``(H, S, d)``, or ``(H, C, d)`` of the last token of each segment only.
            keys, values: ``(H, T, d)``, prefix included.

        Returns:
            like ``queries``.
        """
        every = queries.shape[1] == len(self.segment_tokens)
        longest = self.groups[-1].length
        queries = queries * queries.shape[-1] ** -0.5
        own_keys, own_values = keys[:, self.prefix :], values[:, self.prefix :]
        slices, parts, first = [], [], 0
        for group in self.groups:
            each = group.length if every else 1
            rows = slice(first, first := first + group.segments * each)
            scores = _by_segment(queries[:, rows], each) @ _by_segment(own_keys[:, group.rows], group.length).mT
            if each > 1:
                later = torch.ones(each, each, dtype=torch.bool, device=scores.device).triu(1)
                scores = scores.masked_fill(later, float("-inf"))
            parts.append(F.pad(scores.flatten(1, 2), (0, longest - group.length), value=float("-inf")))
            slices.append((rows, each))
        to_prefix = queries @ keys[:, : self.prefix].mT
        weights = torch.cat([to_prefix, torch.cat(parts, dim=1)], dim=-1).softmax(-1)
        to_prefix, to_own = weights.split([self.prefix, longest], dim=-1)
        mixed = []
        for group, (rows, each) in zip(self.groups, slices, strict=True):
            attended = _by_segment(to_own[:, rows, : group.length], each)
            mixed.append((attended @ _by_segment(own_values[:, group.rows], group.length)).flatten(1, 2))
        return to_prefix @ values[:, : self.prefix] + torch.cat(mixed, dim=1)


def packed_attention_mask(owners: Tensor, multiple: int = 1) -> Tensor:
    """Additive attention mask of the packed sequence: 0 where a token attends, -inf elsewhere.

    A token of the prefix attends to the prefix up to itself; a token of a segment to the whole prefix and to its own
    segment up to itself.

    Args:
        owners: ``(T,)``, number of each token's segment; -1 for the prefix.
        multiple: the columns are padded with -inf to a multiple of this.

    Returns:
        ``(T, T')`` float32, T' = T without padding, on the device of ``owners``.
    """
    order = torch.arange(len(owners), device=owners.device)
    causal = order[:, None] >= order[None, :]
    visible = causal & ((owners[:, None] == owners[None, :]) | (owners[None, :] == -1))
    visible = F.pad(visible, (0, -len(owners) % multiple))
    return torch.zeros(visible.shape, device=owners.device).masked_fill_(~visible, float("-inf"))


def _masked_block(block: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """A block on all tokens ``(T, F)`` with a mask ``(T, T)``, in few launches."""
    attention = block.attn
    packed = frozen_linear(block.ln_1(tokens), attention.in_proj_weight, attention.in_proj_bias)
    heads = [_heads(part, attention).unsqueeze(0) for part in packed.chunk(3, dim=-1)]
    mixed = F.scaled_dot_product_attention(*heads, attn_mask=mask.to(packed.dtype))
    return _rest_of_block(block, tokens, mixed.squeeze(0))


def _is_usual(block: nn.Module) -> bool:
    """Whether a block is open_clip's usual one, whose parts :meth:`PackedTexts.encode` calls."""
    return (
        type(block) is ResidualAttentionBlock
        and not hasattr(block, "ln_1_kv")
        and block.attn.in_proj_weight is not None
        and block.attn.batch_first
    )


def _heads(tokens: Tensor, attention: nn.MultiheadAttention) -> Tensor:
    """``(T, F)`` to ``(H, T, d)``."""
    return tokens.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(0, 1)


def _by_segment(rows: Tensor, length: int) -> Tensor:
    """``(H, N * length, k)`` to ``(H, N, length, k)``."""
    return rows.unflatten(1, (-1, length))


def _rest_of_block(block: nn.Module, tokens: Tensor, mixed: Tensor) -> Tensor:
    """The block after its attention: tokens ``(T, F)`` and the heads' output ``(H, T, d)`` to ``(T, F)``."""
    output = block.attn.out_proj
    tokens = tokens + block.ls_1(frozen_linear(mixed.transpose(0, 1).flatten(1), output.weight, output.bias))
    return tokens + block.ls_2(block.mlp(block.ln_2(tokens)))
