"""DiH-CLIP (Duan, Yang, Wang, "DIH-CLIP: Unleashing the Diversity of Multi-Head Self-Attention for Training-Free
Open-Vocabulary Semantic Segmentation", ICCV 2025).

Shape letters: B images, G heads, n patches, T tokens, E width of the transformer.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from reclip_d2.backbones.dense_attention.base import DENSE_ATTENTION_REGISTRY, AttentionInput, TransformerBlock
from reclip_d2.backbones.dense_attention.rows import countable, fits, mean_similarity, row_blocks, softmax_of_positive
from reclip_d2.backbones.dense_attention.self_calibration import (
    MIDDLE,
    SCALE,
    SelfCalibratedAttention,
    block_output,
    patches_of,
    scaled,
)
from reclip_d2.backbones.dense_attention.softmax import valid_tokens


class HeadRows(abc.ABC):
    """Rows ``(B, G, rows, T)`` of an attention, by the slice of their queries."""

    @abc.abstractmethod
    def __call__(self, rows: slice) -> Tensor: ...

    @abc.abstractmethod
    def of_heads(self, heads: Tensor) -> HeadRows:
        """Some of the heads, by their indices ``(B, G')``."""


@DENSE_ATTENTION_REGISTRY.register()
class DiHCLIPAttention(SelfCalibratedAttention):
    """:class:`SelfCalibratedAttention` in which the heads of lowest entropy mix the values of all heads.

    The last block's attention is ``A_g = (softmax(3 (S - mean S)) + softmax(k k^T / sqrt(d))) / 2`` of head g, and its
    output ``sum A_g V / G`` over the selected heads, with the values V ``(n, E)`` of all heads. Middle features are the
    output of a middle block plus ``out_proj(sum softmax(k k^T / sqrt(d)) V)`` over its selected heads, those of its own
    attention ``softmax(q k^T / sqrt(d))`` of lowest entropy.

    The paper's text removes heads by a threshold; its code keeps a number of heads, as here.
    """

    name = "dihclip"
    options = {
        "threshold": "MODEL.CLIP.CALIBRATED_THRESHOLD",
        "class_token": "MODEL.CLIP.CALIBRATED_CLASS_TOKEN",
        "heads": "MODEL.CLIP.DIHCLIP_HEADS",
    }

    def __init__(self, threshold: float = 0.4, class_token: float = 0.3, heads: int = 4) -> None:
        """
        Args:
            threshold, class_token: see :class:`SelfCalibratedAttention`.
            heads: number of selected heads.
        """
        super().__init__(threshold, class_token)
        self.heads = heads

    def calibrated(self, inputs: AttentionInput) -> tuple[Tensor, Tensor]:
        index = scaled(MIDDLE, inputs.count)
        middle = patches_of(block_output(inputs, index), inputs)
        if index >= 0:
            earlier = inputs.earlier[index]
            block, normed = earlier.block, earlier.block.norm(earlier.tokens)
            queries, keys = (block.split_heads(project(normed)) for project in (block.queries, block.keys))
            valid = valid_tokens(inputs)
            own, alike = (_SoftmaxRows(part, keys, valid) for part in (queries, keys))
            mixed = self.selected(block, own, alike, block.values(normed), valid)
            middle = middle + block.output(mixed)[:, inputs.class_tokens :]
        return inputs.patches, middle

    def mixed_values(self, inputs: AttentionInput, patches: Sequence[Tensor], unit: Tensor) -> list[Tensor]:
        block, valid = inputs.block, countable(inputs.valid)
        similar = _SimilarRows(unit, valid)
        mixed = []
        for one in patches:
            normed = block.norm(one)
            keys = block.split_heads(block.keys(normed))
            weights = _AveragedRows(similar, _SoftmaxRows(keys, keys, valid))
            selected = self.selected(block, weights, weights, block.values(normed), valid)
            mixed.append(selected / block.num_heads)
        return mixed

    def selected(
        self,
        block: TransformerBlock,
        measured: HeadRows,
        weights: HeadRows,
        values: Tensor,
        valid: Tensor | None,
    ) -> Tensor:
        """``sum A_g V`` ``(B, T, E)`` over the heads of lowest entropy.

        Args:
            measured: rows of the attention whose entropy selects.
            weights: rows of A.
            values: V ``(B, T, E)``.
            valid: ``(B, T)`` bool; None for all.
        """
        per_row = values.shape[0] * block.num_heads * values.shape[1]
        blocks = list(row_blocks(values.shape[1], per_row, values.device))
        entropy = 0
        with torch.no_grad():
            for rows in blocks:
                share = measured(rows).to(torch.promote_types(values.dtype, torch.float32))
                entropies = -(share * (share + 1e-6).log2()).sum(dim=-1)
                if valid is not None:
                    entropies = entropies * valid[:, None, rows]
                entropy = entropy + entropies.sum(dim=-1)  # (B, G)
        lowest = entropy.topk(min(self.heads, block.num_heads), dim=1, largest=False).indices
        chosen = weights.of_heads(lowest)
        return torch.cat([chosen(rows).sum(dim=1).to(values.dtype) @ values for rows in blocks], dim=1)


@dataclasses.dataclass(frozen=True)
class _SoftmaxRows(HeadRows):
    """``softmax(q k^T / sqrt(d))`` of queries ``(B, G, r, d)`` and keys ``(B, G, T, d)``."""

    queries: Tensor
    keys: Tensor
    valid: Tensor | None

    def __call__(self, rows: slice) -> Tensor:
        scores = (self.queries.shape[-1] ** -0.5 * self.queries[:, :, rows]) @ self.keys.transpose(2, 3)
        if self.valid is not None:
            scores = scores.masked_fill(~self.valid[:, None, None, :], torch.finfo(scores.dtype).min)
        return scores.softmax(dim=-1)

    def of_heads(self, heads: Tensor) -> HeadRows:
        index = heads[:, :, None, None]
        queries, keys = (part.gather(1, index.expand(-1, -1, *part.shape[2:])) for part in (self.queries, self.keys))
        return _SoftmaxRows(queries, keys, self.valid)


class _SimilarRows:
    """Half of ``softmax(3 (S - mean S))``, ``(B, rows, n)``, over ``S >= mean S``; kept if all of them fit, since
    each is used four times."""

    def __init__(self, unit: Tensor, valid: Tensor | None) -> None:
        """
        Args:
            unit: m of length 1, ``(B, n, E)``.
        """
        self._unit, self._valid = unit, valid
        self._transposed, self._mean = unit.transpose(1, 2), mean_similarity(unit, valid)
        self._keeps = not torch.jit.is_tracing() and fits(unit.shape[0] * unit.shape[1] ** 2)
        self._kept: dict[int, Tensor] = {}

    def __call__(self, rows: slice) -> Tensor:
        if rows.start in self._kept:
            return self._kept[rows.start]
        scores = SCALE * (self._unit[:, rows] @ self._transposed - self._mean)
        half = softmax_of_positive(scores, self._valid) / 2
        if self._keeps:
            self._kept[rows.start] = half
        return half


@dataclasses.dataclass(frozen=True)
class _AveragedRows(HeadRows):
    """``(softmax(3 (S - mean S)) + softmax(k k^T / sqrt(d))) / 2`` of each head."""

    similar: _SimilarRows
    alike: HeadRows

    def __call__(self, rows: slice) -> Tensor:
        return torch.add(self.similar(rows)[:, None], self.alike(rows), alpha=0.5)

    def of_heads(self, heads: Tensor) -> HeadRows:
        return _AveragedRows(self.similar, self.alike.of_heads(heads))
