"""From window classes or image scores to the hypothesis H of an image, Eq. (6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def hypothesis_from_windows(top1: Sequence[int], threshold: float) -> list[int]:
    """Eq. (6): ``H = {k : f(k) > t}``, f(k) the share of windows whose best class is k.

    Never empty: when no class passes, the most frequent one is kept (the lowest id of several).

    Args:
        top1: best class of each window.
        threshold: t, in [0, 1).

    Returns:
        class ids, ascending.
    """
    frequency = torch.bincount(torch.as_tensor(top1, dtype=torch.int64)) / len(top1)
    chosen = torch.nonzero(frequency > threshold).flatten().tolist()
    return chosen or [int(frequency.argmax())]


def hypothesis_from_scores(scores: Sequence[float], threshold: float) -> list[int]:
    """ReCLIP's rule: the classes whose whole-image score (cosine similarity of the global feature and the
    text feature) is above the threshold (0.23 for VOC). Never empty: the best class is the fallback."""
    chosen = [k for k, score in enumerate(scores) if score > threshold]
    return chosen or [max(range(len(scores)), key=lambda k: scores[k])]
