"""From window classes or image scores to the hypothesis H of an image, Eq. (6)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
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
    frequency = window_frequencies(top1)
    chosen = torch.nonzero(frequency > threshold).flatten().tolist()
    return chosen or [int(frequency.argmax())]


def window_frequencies(top1: Sequence[int], num_classes: int = 0) -> torch.Tensor:
    """f of Eq. (6): the share of windows whose best class is k, float32, ``(num_classes,)`` or as many as occur."""
    return torch.bincount(torch.as_tensor(top1, dtype=torch.int64), minlength=num_classes) / len(top1)


def hypothesis_from_scores(scores: Sequence[float], threshold: float) -> list[int]:
    """ReCLIP's rule: the classes whose whole-image score (cosine similarity of the global feature and the
    text feature) is above the threshold (0.23 for VOC). Never empty: the best class is the fallback."""
    chosen = [k for k, score in enumerate(scores) if score > threshold]
    return chosen or [max(range(len(scores)), key=lambda k: scores[k])]


def threshold_for_mean(scores: np.ndarray, mean: float, lowest: float) -> float:
    """The threshold that gives images ``mean`` classes on average, or as near to that as any does.

    Not in the papers: their t is a frequency or a cosine, whose scale depends on the CLIP, while the number of classes
    in an image is something that one knows. Of two thresholds that are equally near the one with fewer classes is
    taken; the result depends on the scores alone.

    Args:
        scores: ``(n, C)`` of n images, frequencies of windows or whole-image scores.
        mean: wanted mean of ``|H|``; at least 1, since no hypothesis is empty.
        lowest: the lowest threshold that makes sense: 0 for frequencies, -1 for cosine similarities.
    """
    scores = np.asarray(scores)
    rest = np.sort(scores, axis=1)[:, :-1].ravel()  # an image's best class is in its hypothesis at any threshold
    rest = np.sort(rest[rest > lowest])[::-1]
    ends = np.flatnonzero(np.diff(rest) != 0) + 1  # thresholds do not part equal scores
    counts = np.concatenate([[0], ends, [len(rest)]]) if len(rest) else np.array([0])
    wanted = (mean - 1) * len(scores)
    count = int(counts[np.argmin(np.abs(counts - wanted))])
    return float(rest[count]) if count < len(rest) else lowest
