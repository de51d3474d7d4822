"""Scores of label maps that need no label, to compare with the judge's (docs/label_free.md). Higher is better.

Shape letters: I images, n patches of all images, (h, w) patch grid, D width of the joint embedding, C classes,
N windows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reclip_d2.backbones.interface import VisionLanguageBackbone
from reclip_d2.backbones.windows import patches_inside
from reclip_d2.data.images import read_image
from reclip_d2.evaluation.label_free import Reference, estimated_miou, expected_iou, fit_reference
from reclip_d2.hypothesis.windows import crop_windows
from reclip_d2.modeling.calibration import mean_probability_offset
from reclip_d2.modeling.class_shares import fit_class_mixture

RIDGE = 0.01  # of the covariances' diagonals, as in the mixture
WINDOW_RATIO = 1 / 6  # r of Eq. (6)


@dataclasses.dataclass(frozen=True)
class Predictions:
    """A model's predictions: label maps ``(I, h, w)`` int64, those of the mirror images (mirrored back), and the mean
    entropy of a patch in nats."""

    labels: Tensor
    flipped: Tensor
    entropy: float


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What the scores compare predictions with; all images have the same grid.

    Attributes:
        features: Z ``(I, h, w, D)``.
        reference: the judge's.
        mixture: posteriors ``(n, C)`` of the mixture of features that are not smoothed.
        shares: estimated class shares ``(C,)``.
        log_probabilities: MaskCLIP's ``(n, C)``, calibrated to the estimated shares.
        inside: patches of each window, ``(N, h * w)`` float.
        windows: log-probabilities of the windows' global features, ``(I, N, C)``, calibrated to the estimated shares.
        windows_uncalibrated: the same without calibration.
        colors: mean RGB of each patch, ``(I, h, w, 3)``.
    """

    features: Tensor
    reference: Reference
    mixture: Tensor
    shares: Tensor
    log_probabilities: Tensor
    inside: Tensor
    windows: Tensor
    windows_uncalibrated: Tensor
    colors: Tensor


@torch.no_grad()
def collect_evidence(
    features: Tensor,
    query_features: Tensor,
    backbone: VisionLanguageBackbone,
    normalize: Callable[[Tensor], Tensor],
    files: Sequence[str | Path],
) -> Evidence:
    """Evidence of images of one size.

    Args:
        features: Z ``(I, h, w, D)``.
        query_features: W_q ``(C, D)``.
        normalize: maps an image ``(3, H, W)`` in [0, 255] to the backbone's input.
        files: the images.
    """
    scale, grid = backbone.logit_scale, (features.shape[1], features.shape[2])
    flat = features.flatten(0, 2)
    logits = flat @ query_features.T
    mixture = fit_class_mixture(flat, scale * logits)
    offset = mean_probability_offset(logits, scale, mixture.shares)
    boxes, found, colors = None, [], []
    for file in files:
        image = torch.from_numpy(np.array(read_image(str(file)))).permute(2, 0, 1).float()
        if boxes is None:
            boxes = crop_windows(image.shape[1], image.shape[2], WINDOW_RATIO)
        found.append(backbone.window_features(normalize(image)[None], boxes)[0])
        colors.append(F.adaptive_avg_pool2d(image, grid).permute(1, 2, 0))
    window_logits = torch.stack(found) @ query_features.T
    window_offset = mean_probability_offset(window_logits.flatten(0, 1), scale, mixture.shares)
    return Evidence(
        features=features,
        reference=fit_reference(list(features), query_features, scale),
        mixture=mixture.log_posteriors(flat, scale * logits).softmax(1),
        shares=mixture.shares,
        log_probabilities=(scale * (logits + offset)).log_softmax(1),
        inside=patches_inside(boxes, grid, backbone.stride).float(),
        windows=(scale * (window_logits + window_offset)).log_softmax(-1),
        windows_uncalibrated=(scale * window_logits).log_softmax(-1),
        colors=torch.stack(colors),
    )


def judge_score(evidence: Evidence, found: Predictions) -> float:
    """The judge's: expected mIoU under the mixture of smoothed features."""
    return estimated_miou(found.labels.flatten(), evidence.reference.posteriors)


def unsmoothed_mixture(evidence: Evidence, found: Predictions) -> float:
    """The same under the mixture of features that are not smoothed."""
    return estimated_miou(found.labels.flatten(), evidence.mixture)


def dense_agreement(evidence: Evidence, found: Predictions) -> float:
    """Expected mIoU under MaskCLIP's probabilities, calibrated to the estimated shares."""
    return estimated_miou(found.labels.flatten(), evidence.log_probabilities.exp())


def dense_log_probability(evidence: Evidence, found: Predictions) -> float:
    """``mean_i log p_i(y_i)`` under the same probabilities."""
    return float(evidence.log_probabilities.gather(1, found.labels.reshape(-1, 1)).mean())


def window_shares(evidence: Evidence, found: Predictions) -> Tensor:
    """Share a_kc of each class among the labels in a window, ``(I, N, C)``."""
    one_hot = F.one_hot(found.labels.flatten(1), len(evidence.shares)).float()
    return torch.einsum("wn,inc->iwc", evidence.inside, one_hot) / evidence.inside.sum(1)[:, None]


def window_log_probability(evidence: Evidence, found: Predictions) -> float:
    """Region verification: ``mean_k sum_c a_kc log p_kc``, p_k from the window's global feature, calibrated."""
    return float((window_shares(evidence, found) * evidence.windows).sum(-1).mean())


def window_log_probability_uncalibrated(evidence: Evidence, found: Predictions) -> float:
    """The same without calibration."""
    return float((window_shares(evidence, found) * evidence.windows_uncalibrated).sum(-1).mean())


def window_iou(evidence: Evidence, found: Predictions) -> float:
    """Region verification as an expected mIoU: ``mean_c sum_k a_kc p_kc / sum_k (a_kc + p_kc - a_kc p_kc)``."""
    shares, probabilities = window_shares(evidence, found).flatten(0, 1), evidence.windows.exp().flatten(0, 1)
    hits = (shares * probabilities).sum(0)
    return 100 * float((hits / (shares.sum(0) + probabilities.sum(0) - hits).clamp(min=1e-9)).mean())


def flip_iou(evidence: Evidence, found: Predictions) -> float:
    """Agreement under flip: mIoU of the labels with those of the mirror image."""
    flipped = F.one_hot(found.flipped.flatten(), len(evidence.shares)).float()
    return 100 * float(expected_iou(found.labels.flatten(), flipped).nan_to_num(0).mean())


def flip_accuracy(evidence: Evidence, found: Predictions) -> float:
    """Share of patches whose label is that of the mirror image."""
    return float((found.labels == found.flipped).float().mean())


def confidence(evidence: Evidence, found: Predictions) -> float:
    """Minus the mean entropy of a patch, at the temperature of the run's masks."""
    return -found.entropy


def share_agreement(evidence: Evidence, found: Predictions) -> float:
    """Minus the distance of the shares of the labels from the estimated ones: ``-1/2 sum_c |s_c - pi_c|``."""
    counts = torch.bincount(found.labels.flatten(), minlength=len(evidence.shares))
    return -float((counts / counts.sum() - evidence.shares).abs().sum() / 2)


def likelihood(evidence: Evidence, found: Predictions) -> float:
    """How well the labels explain the features: ``mean_i log N(z_i; mu_{y_i}, S) - log N(z_i; mu, S_0)``, fitted
    to every second image and measured on the others, both ways."""
    images = torch.arange(len(found.labels)) % 2
    fold = images[:, None, None].expand(found.labels.shape).flatten()
    features, labels = evidence.features.flatten(0, 2), found.labels.flatten()
    total = 0.0
    for part in (0, 1):
        fitted, measured = fold != part, fold == part
        one_hot = F.one_hot(labels[fitted], len(evidence.shares)).float()
        middle = features[fitted].mean(0)
        # One patch of the overall mean in each class, for classes without labels.
        means = (one_hot.T @ features[fitted] + middle) / (one_hot.sum(0) + 1)[:, None]
        with_labels = _log_density(features[fitted] - one_hot @ means, features[measured] - means[labels[measured]])
        without = _log_density(features[fitted] - middle, features[measured] - middle)
        total += float((with_labels - without).sum())
    return total / len(features)


def _log_density(fitted: Tensor, measured: Tensor) -> Tensor:
    """Log-densities of residuals under a normal distribution of mean 0, up to a constant."""
    covariance = fitted.T @ fitted / len(fitted)
    covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
    distances = (measured @ torch.linalg.inv(covariance) * measured).sum(1)
    return -(distances + torch.logdet(covariance)) / 2


def edge_contrast(evidence: Evidence, found: Predictions) -> float:
    """Boundary agreement: mean colour distance of neighbouring patches with different labels, divided by that of
    neighbours with the same label."""
    different, distances = [], []
    for axis in (1, 2):
        count = found.labels.shape[axis] - 1
        first, second = (evidence.colors.narrow(axis, start, count) for start in (0, 1))
        distances.append((first - second).norm(dim=-1).flatten())
        first, second = (found.labels.narrow(axis, start, count) for start in (0, 1))
        different.append((first != second).flatten())
    edge, distance = torch.cat(different), torch.cat(distances)
    return float(distance[edge].mean() / distance[~edge].mean()) if edge.any() else 0.0


SCORES: dict[str, Callable[[Evidence, Predictions], float]] = {
    "expected mIoU, mixture of smoothed features (the judge)": judge_score,
    "expected mIoU, mixture of features": unsmoothed_mixture,
    "expected mIoU, calibrated MaskCLIP": dense_agreement,
    "log-probability, calibrated MaskCLIP": dense_log_probability,
    "region verification, expected mIoU": window_iou,
    "region verification, log-probability": window_log_probability,
    "region verification, not calibrated": window_log_probability_uncalibrated,
    "flip, mIoU": flip_iou,
    "flip, patches": flip_accuracy,
    "entropy": confidence,
    "likelihood of the features": likelihood,
    "class shares": share_agreement,
    "edges of the image": edge_contrast,
}
"""All scores by their name in the table."""

COMBINED = {
    "mean rank: judge, region verification, flip": (
        "expected mIoU, mixture of smoothed features (the judge)",
        "region verification, expected mIoU",
        "flip, mIoU",
    )
}
"""Scores whose value is the mean of other scores' ranks among the runs."""
