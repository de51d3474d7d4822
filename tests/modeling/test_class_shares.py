"""Class shares from a mixture of the features (``reclip_d2.modeling.class_shares``)."""

import math

import pytest
import torch

from reclip_d2.modeling.class_shares import ClassMixture, estimate_class_shares, fit_class_mixture


def blobs(shares: list[float], centres: torch.Tensor, n: int = 4000, noise: float = 0.15, seed: int = 0):
    """Points around the centres, and the class of each."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.multinomial(torch.tensor(shares), n, replacement=True, generator=generator)
    points = centres[classes] + noise * torch.randn(n, centres.shape[1], generator=generator)
    return points, classes


def test_posteriors_by_hand():
    """Two classes on a line: at 0 and 2, variance 1, shares 1/4 and 3/4; at z = 1 only the shares speak."""
    mixture = ClassMixture(torch.tensor([0.25, 0.75]), torch.tensor([[0.0], [2.0]]), torch.eye(1), anchor=0.5)
    none = torch.zeros(1, 2)
    posterior = mixture.log_posteriors(torch.tensor([[1.0]]), none).softmax(1)
    torch.testing.assert_close(posterior, torch.tensor([[0.25, 0.75]]))
    posterior = mixture.log_posteriors(torch.tensor([[0.0]]), none).softmax(1)  # densities 1 : exp(-2)
    torch.testing.assert_close(posterior[0, 1], torch.tensor(3 * math.exp(-2) / (1 + 3 * math.exp(-2))))
    anchored = mixture.log_posteriors(torch.tensor([[1.0]]), torch.tensor([[2.0, 0.0]])).softmax(1)
    torch.testing.assert_close(anchored[0, 0], torch.tensor(math.e / (math.e + 3)))


def test_one_step_against_a_literal_transcription():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    logits = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    mixture = fit_class_mixture(features, logits, iterations=1, ridge=0.1)
    q = torch.softmax(logits, 1)
    shares = torch.stack([q[:, c].sum() / 50 for c in range(4)])
    means = torch.stack([sum(q[i, c] * features[i] for i in range(50)) / q[:, c].sum() for c in range(4)])
    covariance = sum(
        q[i, c] * torch.outer(features[i] - means[c], features[i] - means[c]) for i in range(50) for c in range(4)
    )
    covariance = covariance / 50
    covariance = covariance + 0.1 * covariance.diagonal().mean() * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(mixture.shares.double(), shares, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mixture.means.double(), means, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mixture.precision.double(), torch.linalg.inv(covariance), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shares", [[0.25, 0.25, 0.25, 0.25], [0.7, 0.2, 0.08, 0.02]])
def test_a_preference_for_a_name_is_undone(shares):
    """Logits that prefer class 1 by nearly as much as the classes are apart: labels are far off, the shares are not."""
    centres = torch.eye(4, 6)
    features, classes = blobs(shares, centres)
    true = torch.bincount(classes, minlength=4) / len(classes)
    logits = 6 * features @ centres.T + torch.tensor([0.0, 5.0, 0.0, 0.0])
    labels = torch.bincount(logits.argmax(1), minlength=4) / len(classes)
    found = fit_class_mixture(features, logits).shares
    assert (labels - true).abs().sum() > 0.2
    assert (found - true).abs().sum() < 0.05
    assert abs(found.sum().item() - 1) < 1e-5


def test_an_absent_class_stays_small():
    centres = torch.eye(4, 6)
    features, _ = blobs([0.5, 0.3, 0.2, 0.0], centres)
    assert fit_class_mixture(features, 10 * features @ centres.T).shares[3] < 0.02


def test_selection_of_many_patches(monkeypatch):
    features, _ = blobs([0.6, 0.4], torch.eye(2, 3), n=1000)
    every_fourth = estimate_class_shares(features[::4], torch.eye(2, 3), 10.0)
    monkeypatch.setattr("reclip_d2.modeling.class_shares.MAX_SAMPLES", 250)
    torch.testing.assert_close(estimate_class_shares(features, torch.eye(2, 3), 10.0), every_fourth)


def test_one_patch_and_one_class():
    assert estimate_class_shares(torch.ones(1, 3), torch.ones(1, 3), 10.0).tolist() == [1.0]
