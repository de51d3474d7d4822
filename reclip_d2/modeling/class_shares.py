"""Shares of the classes in unlabelled images, estimated without labels (not in the papers).

CLIP prefers some class names, so the shares of its own labels are wrong. But patches of one class are close in feature
space, whatever their name. A Gaussian mixture with one component per class starts at CLIP's posteriors and is fitted to
the features, so that the preference for a name matters at the start only. Its weights are the estimated shares.

Shape letters: n patches, D width of the joint embedding, C classes.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

MAX_SAMPLES = 100_000
"""Maximum number of patches in a fit, to bound its time and memory."""


@dataclasses.dataclass(frozen=True)
class ClassMixture:
    """A Gaussian mixture of patch features, one component per class, with a shared covariance.

    Attributes:
        shares: weights of the components, ``(C,)``, of sum 1.
        means: ``(C, D)``.
        precision: inverse of the covariance, ``(D, D)``.
        anchor: weight of CLIP's own log-probabilities in the posteriors.
    """

    shares: Tensor
    means: Tensor
    precision: Tensor
    anchor: float

    def log_posteriors(self, features: Tensor, logits: Tensor) -> Tensor:
        """Log-probabilities of the classes up to a constant per patch: ``log pi_c + log N(z; mu_c, S) + a l_c``.

        Args:
            features: Z ``(n, D)``.
            logits: CLIP's ``(n, C)``, times its logit scale.
        """
        projected = self.means @ self.precision
        distance = features @ projected.T - (projected * self.means).sum(1) / 2
        return distance + self.shares.log() + self.anchor * logits


@torch.no_grad()
def fit_class_mixture(
    features: Tensor, logits: Tensor, *, anchor: float = 0.1, iterations: int = 20, ridge: float = 0.01
) -> ClassMixture:
    """Fit the mixture by expectation maximisation, from CLIP's posteriors.

    Args:
        features: Z ``(n, D)``.
        logits: CLIP's own logits ``(n, C)``, times its logit scale.
        anchor: weight of ``logits`` in the posteriors. It ties each component to its name, so that an absent class is
            less likely to take over patches of another.
        iterations: number of expectation-maximisation steps.
        ridge: added to the covariance's diagonal, as a fraction of the diagonal's mean.

    Returns:
        The mixture, in float32.
    """
    features, logits = features.double(), logits.double()
    posteriors = logits.softmax(1)
    second_moment = features.T @ features / len(features)
    mixture = None
    for _ in range(iterations):
        counts = posteriors.sum(0) + 1e-6
        shares = counts / counts.sum()
        means = posteriors.T @ features / counts[:, None]
        covariance = second_moment - (means.T * shares) @ means
        covariance.diagonal().add_(ridge * covariance.diagonal().mean())
        mixture = ClassMixture(shares, means, torch.linalg.inv(covariance), anchor)
        posteriors = mixture.log_posteriors(features, logits).softmax(1)
    assert mixture is not None
    return ClassMixture(mixture.shares.float(), mixture.means.float(), mixture.precision.float(), anchor)


def estimate_class_shares(features: Tensor, query_features: Tensor, logit_scale: float) -> Tensor:
    """Shares ``(C,)`` of the classes among patches.

    Args:
        features: Z ``(n, D)`` of unlabelled images; an even selection if there are more than :data:`MAX_SAMPLES`.
        query_features: W_q ``(C, D)``.
        logit_scale: CLIP's.
    """
    step = -(-len(features) // MAX_SAMPLES)
    features = features[::step]
    return fit_class_mixture(features, logit_scale * (features @ query_features.T)).shares
