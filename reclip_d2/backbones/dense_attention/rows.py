"""Attention of patches in bounded memory: rows of the score matrix, a few at a time.

Shape letters: B images, G heads, r queries, T keys, d width of a head, E width of the values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Scores that exist at once: 128 MiB in float32. A trace, whose sizes are not known, has all of them at once.
MAX_SCORES = 2**25


# Scores of several passes over them, on a CPU: 2 MiB in float32, which stay in its cache.
CACHED_SCORES = 2**19


def row_blocks(queries: int, scores_per_row: int, device: torch.device | None = None) -> Iterator[slice]:
    """Slices of the queries, such that each has at most :data:`MAX_SCORES` scores, but at least one row.

    Args:
        device: of the scores; on a CPU each slice has at most :data:`CACHED_SCORES`. None if there is a single pass.
    """
    if torch.jit.is_tracing():
        yield slice(None)
        return
    most = MAX_SCORES if device is None or device.type != "cpu" else min(MAX_SCORES, CACHED_SCORES)
    rows = max(1, most // max(1, scores_per_row))
    for start in range(0, queries, rows):
        yield slice(start, min(queries, start + rows))


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    valid: Tensor | None = None,
    bias: Callable[[slice], Tensor] | None = None,
    gain: float = 1.0,
) -> Tensor:
    """``softmax(gain q k^T / sqrt(d) + bias) v`` for each head: ``(B, G, r, d)``.

    Args:
        queries: ``(B, G, r, d)``.
        keys, values: ``(B, G, T, d)``.
        valid: ``(B, T)`` bool, the keys that count; None for all. At least one must be valid in each image.
        bias: additional scores ``(rows, T)`` of some queries; None for none.
        gain: factor of the scores.
    """
    scale = None if gain == 1 else gain / queries.shape[-1] ** 0.5
    if bias is None:
        mask = None if valid is None else valid[:, None, None, :]
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    outputs = []
    for rows in row_blocks(queries.shape[2], queries.shape[0] * queries.shape[1] * keys.shape[2]):
        mask = bias(rows).to(queries.dtype)[None, None]
        if valid is not None:
            mask = mask.masked_fill(~valid[:, None, None, :], torch.finfo(mask.dtype).min)
        outputs.append(F.scaled_dot_product_attention(queries[:, :, rows], keys, values, attn_mask=mask, scale=scale))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def fits(scores: int) -> bool:
    """Whether a matrix of so many scores may be kept."""
    return scores <= MAX_SCORES


def attend_and_add(queries: Tensor, keys: Tensor, values: Tensor, total: Tensor, first: int) -> Tensor:
    """``A v`` with ``A = softmax(q k^T / sqrt(d))`` for each head, ``(B, G, r, d)``; adds A to ``total``.

    Args:
        queries, keys, values: see :func:`attend`.
        total: ``(B, G, r - first, T)``, for the rows of A from ``first`` on.
    """
    queries = queries * queries.shape[-1] ** -0.5
    transposed, values, outputs = keys.transpose(2, 3).contiguous(), values.contiguous(), []
    per_row = queries.shape[0] * queries.shape[1] * keys.shape[2]
    for rows in row_blocks(queries.shape[2], per_row, queries.device):
        weights = (queries[:, :, rows] @ transposed).softmax(dim=-1)
        outputs.append(weights @ values)
        skipped = min(max(first - rows.start, 0), weights.shape[2])
        total[:, :, max(rows.start - first, 0) : max(rows.stop - first, 0)] += weights[:, :, skipped:]
    return torch.cat(outputs, dim=2)


def mix(queries: Tensor, keys: Tensor, values: Tensor, weigh: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """``W v`` with weights ``W = weigh(q k^T)``: ``(B, r, E)``.

    Args:
        queries: ``(B, r, d)``.
        keys: ``(B, T, d)``.
        values: ``(B, T, E)``.
        weigh: maps scores ``(B, rows, T)`` and the slice of their queries to weights of the same shape.
    """
    transposed = keys.transpose(1, 2)
    outputs = []
    for rows in row_blocks(queries.shape[1], keys.shape[0] * keys.shape[1]):
        outputs.append(weigh(queries[:, rows] @ transposed, rows) @ values)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def countable(valid: Tensor | None) -> Tensor | None:
    """``valid`` ``(B, n)``, but all patches of an image that has no valid one, so that soft-maxes stay finite."""
    return None if valid is None else valid | ~valid.any(dim=1, keepdim=True)


def softmax_of_positive(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """Soft-max over the keys with scores of at least 0; others get the weight 0.

    A query without such keys attends to its best key alone, so that the result is always finite (in the papers' code it
    is not).

    Args:
        scores: ``(B, rows, T)``.
        valid: ``(B, T)`` bool, the keys that count; None for all.
    """
    lowest = torch.finfo(scores.dtype).min
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None, :], lowest)
    dropped = (scores < 0) & (scores < scores.amax(dim=-1, keepdim=True))
    return scores.masked_fill(dropped, lowest).softmax(dim=-1)


def mean_similarity(unit: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean of ``f_i . f_j`` over all pairs of valid patches, ``(B, 1, 1)``, without the matrix: ``|sum f|^2 / n^2``.

    Args:
        unit: features ``(B, n, d)`` of length 1.
        valid: ``(B, n)`` bool; None for all.
    """
    if valid is None:
        return unit.mean(dim=1, keepdim=True).square().sum(dim=-1, keepdim=True)
    weights = valid[..., None].to(unit.dtype)
    mean = (unit * weights).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True).clamp(min=1)
    return mean.square().sum(dim=-1, keepdim=True)
