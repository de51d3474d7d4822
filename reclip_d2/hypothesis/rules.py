"""From window classes or image scores to the hypothesis H of an image, Eq. (6)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def hypothesis_from_windows(top1: Sequence[int], threshold: float) -> list[int]:
    """Eq. (6): ``H = {k : f(k) > t}``, with f(k) the share of windows whose best class is k.

    Never empty: if no class passes, H is the most frequent class (the lowest id on a tie).

    Args:
        top1: best class of each window.
        threshold: t, in [0, 1).

    Returns:
        class ids, ascending.
    """
    frequency = window_frequencies(top1)
    chosen = torch.nonzero(frequency > threshold).flatten().tolist()
    return chosen or [int(frequency.argmax())]


def window_frequencies(top1: Sequence[int], num_classes: int = 0) -> torch.Tensor:
    """f of Eq. (6): the share of windows whose best class is k, float32 ``(num_classes,)``, or longer if ids are."""
    return torch.bincount(torch.as_tensor(top1, dtype=torch.int64), minlength=num_classes) / len(top1)


def hypothesis_from_scores(scores: Sequence[float], threshold: float) -> list[int]:
    """ReCLIP's rule: the classes whose whole-image score (cosine similarity of global image feature and text feature)
    is above the threshold (0.23 for VOC). Never empty: falls back to the best class."""
    chosen = [k for k, score in enumerate(scores) if score > threshold]
    return chosen or [max(range(len(scores)), key=lambda k: scores[k])]


def threshold_for_mean(scores: np.ndarray, mean: float, lowest: float) -> float:
    """The threshold at which images have ``mean`` classes on average, or as close to that as possible.

    Not in the papers: their t is a frequency or a cosine, whose scale depends on the CLIP, while the number of classes
    per image is easier to know. On a tie, the threshold with fewer classes wins; the result depends on the scores only.

    Args:
        scores: ``(n, C)`` for n images, window frequencies or whole-image scores.
        mean: target mean of ``|H|``; at least 1, since no hypothesis is empty.
        lowest: lower bound of the threshold: 0 for frequencies, -1 for cosine similarities.
    """
    scores = np.asarray(scores)
    rest = np.sort(scores, axis=1)[:, :-1].ravel()  # the best class is always in the hypothesis
    rest = np.sort(rest[rest > lowest])[::-1]
    ends = np.flatnonzero(np.diff(rest) != 0) + 1  # no threshold separates equal scores
    counts = np.concatenate([[0], ends, [len(rest)]]) if len(rest) else np.array([0])
    wanted = (mean - 1) * len(scores)
    count = int(counts[np.argmin(np.abs(counts - wanted))])
    return float(rest[count]) if count < len(rest) else lowest
