"""SC-CLIP (Bai et al., "Self-Calibrated CLIP for Training-Free Open-Vocabulary Segmentation", 2024).

Shape letters: B images, n patches, E width of the transformer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reclip_d2.backbones.dense_attention.base import DENSE_ATTENTION_REGISTRY, AttentionInput
from reclip_d2.backbones.dense_attention.rows import (
    attend,
    countable,
    mean_similarity,
    mix,
    row_blocks,
    softmax_of_positive,
)
from reclip_d2.backbones.dense_attention.self_calibration import (
    MIDDLE,
    SCALE,
    SelfCalibratedAttention,
    block_output,
    neighbour_means,
    patches_of,
    scaled,
)


@DENSE_ATTENTION_REGISTRY.register()
class SCCLIPAttention(SelfCalibratedAttention):
    """:class:`SelfCalibratedAttention` with anomalous patches of x and m replaced by the mean of their neighbours, and
    the attention ``A = (softmax(3 (S - mean S)) + softmax(k k^T / sqrt(d))) / 2``, its first soft-max over S >= mean S.

    Patches of the last block's input are anomalous if their local outlier factor is among the largest.
    """

    name = "scclip"
    options = {
        "threshold": "MODEL.CLIP.CALIBRATED_THRESHOLD",
        "class_token": "MODEL.CLIP.CALIBRATED_CLASS_TOKEN",
        "neighbours": "MODEL.CLIP.SCCLIP_NEIGHBOURS",
        "anomalies": "MODEL.CLIP.SCCLIP_ANOMALIES",
    }

    def __init__(
        self, threshold: float = 0.4, class_token: float = 0.3, neighbours: int = 30, anomalies: float = 0.05
    ) -> None:
        """
        Args:
            threshold, class_token: see :class:`SelfCalibratedAttention`.
            neighbours: of the local outlier factor.
            anomalies: fraction of the patches.
        """
        super().__init__(threshold, class_token)
        self.neighbours = neighbours
        self.anomalies = anomalies

    def calibrated(self, inputs: AttentionInput) -> tuple[Tensor, Tensor]:
        valid = countable(inputs.valid)
        middle = patches_of(block_output(inputs, scaled(MIDDLE, inputs.count)), inputs)
        with torch.no_grad(), torch.autocast(inputs.tokens.device.type, enabled=False):
            factors = local_outlier_factors(inputs.patches, self.neighbours, valid)
            anomalous = largest(factors, self.anomalies, valid)
        return (
            neighbour_means(inputs.patches, anomalous, valid, inputs.grid),
            neighbour_means(middle, anomalous, valid, inputs.grid),
        )

    def mixed_values(self, inputs: AttentionInput, patches: Sequence[Tensor], unit: Tensor) -> list[Tensor]:
        block, valid = inputs.block, countable(inputs.valid)
        mean = mean_similarity(unit, valid)
        normed = [block.norm(one) for one in patches]
        values = [block.values(one) for one in normed]
        similar = mix(
            unit,
            unit,
            torch.cat(values, dim=-1),
            lambda scores, rows: softmax_of_positive(SCALE * (scores - mean), valid),
        ).chunk(len(patches), dim=-1)
        mixed = []
        for one, value, part in zip(normed, values, similar, strict=True):
            keys = block.split_heads(block.keys(one))
            own = block.merge_heads(attend(keys, keys, block.split_heads(value), valid))
            mixed.append((part + own) / 2)
        return mixed


def local_outlier_factors(features: Tensor, neighbours: int, valid: Tensor | None = None) -> Tensor:
    """Local outlier factors ``(B, n)`` (Breunig et al., 2000) by Euclidean distance; 0 for patches that are not valid.

    With N(i) the k nearest neighbours of i, and d_k(j) the distance of j to its k-th neighbour: the local reachability
    density is ``lrd(i) = 1 / mean_{j in N(i)} max(d_k(j), |f_i - f_j|)``, the factor the mean of ``lrd(j) / lrd(i)``.

    Args:
        features: ``(B, n, E)``.
        neighbours: k, or all others if there are fewer.
        valid: ``(B, n)`` bool; None for all.
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    batch, count = features.shape[:2]
    squares = features.square().sum(dim=-1)
    index = torch.arange(count, device=features.device)
    nearest, indices = [], []
    for rows in row_blocks(count, batch * count):
        products = features[:, rows] @ features.transpose(1, 2)
        distances = (squares[:, rows, None] + squares[:, None, :] - 2 * products).clamp(min=0).sqrt()
        distances = distances.masked_fill(index[rows][:, None] == index, -1.0)  # a patch itself comes first
        if valid is not None:
            distances = distances.masked_fill(~valid[:, None, :] & (index[rows][:, None] != index), torch.inf)
        if torch.jit.is_tracing():  # the number of patches is not known: a slice may be shorter, a top k not
            some, order = (part[..., : neighbours + 1] for part in distances.sort(dim=-1))
        else:
            some, order = distances.topk(min(neighbours + 1, count), dim=-1, largest=False)
        nearest.append(some)
        indices.append(order)
    distances, order = torch.cat(nearest, dim=1), torch.cat(indices, dim=1)  # (B, n, k + 1)
    others = torch.ones_like(squares) if valid is None else valid.to(squares.dtype)
    last = (others.sum(dim=1, keepdim=True) - 1).clamp(min=0, max=neighbours).long()  # (B, 1): k
    rank = torch.arange(distances.shape[-1], device=features.device)
    counted = (rank >= 1) & (rank <= last[..., None])  # (B, 1, k + 1)
    of_kth = distances.gather(2, last[..., None].expand(-1, distances.shape[1], -1))[..., 0].clamp(min=0)

    def at_neighbours(values: Tensor) -> Tensor:
        return values.gather(1, order.flatten(1)).unflatten(1, (order.shape[1], order.shape[2]))

    reach = torch.maximum(at_neighbours(of_kth), distances).masked_fill(~counted, 0)
    density = last / reach.sum(dim=-1).clamp(min=1e-6)
    factors = at_neighbours(density).masked_fill(~counted, 0).sum(dim=-1) / (last * density).clamp(min=1e-6)
    return factors if valid is None else factors.masked_fill(~valid, 0)


def largest(values: Tensor, fraction: float, valid: Tensor | None = None) -> Tensor:
    """The valid values ``(B, n)`` above their quantile ``1 - fraction``, as bool."""
    ordered = (values if valid is None else values.masked_fill(~valid, torch.inf)).sort(dim=1).values
    others = torch.ones_like(values) if valid is None else valid.to(values.dtype)
    position = ((1 - fraction) * (others.sum(dim=1, keepdim=True) - 1)).floor().clamp(min=0).long()
    above = values > ordered.gather(1, position)
    return above if valid is None else above & valid
