"""Label propagation against dense linear algebra in float64."""

import pytest
import torch
import torch.nn.functional as F

from reclip_d2.config import load_config
from reclip_d2.inference.refinements import LPOSS, Grid
from reclip_d2.inference.refinements.lposs import affinity_matrix, propagate


def dense_weights(features: torch.Tensor, places: torch.Tensor, count: int) -> torch.Tensor:
    """The normalised weights ``(n, n)``, entry by entry."""
    unit, n = F.normalize(features.double(), dim=1), len(features)
    weights = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        row = torch.zeros(n, dtype=torch.float64)
        for j in range(n):
            if i != j:
                distance = (places[i] - places[j]).double().norm()
                row[j] = max(float(unit[i] @ unit[j]), 0) ** 3 * torch.exp(-0.01 * distance)
        kept = row.topk(min(count, n - 1)).indices
        weights[i, kept] = row[kept]
    weights = (weights + weights.T) / 2
    roots = weights.sum(1).clamp(min=1e-12).rsqrt()
    return roots[:, None] * weights * roots


def example(rows: int = 4, columns: int = 5, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(rows * columns, width, generator=generator) + 0.5
    return features, torch.cartesian_prod(torch.arange(rows), torch.arange(columns))


@pytest.mark.parametrize("count", [1, 3, 19, 400])
def test_weights(count):
    features, places = example()
    found = affinity_matrix(features, places, count).to_dense()
    torch.testing.assert_close(found.double(), dense_weights(features, places, count), rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.95])
def test_solution(alpha):
    features, places = example()
    weights = affinity_matrix(features, places, 6)
    labels = torch.rand(20, 3, generator=torch.Generator().manual_seed(1))
    found = propagate(weights, labels, alpha)
    expected = torch.linalg.solve(
        torch.eye(20, dtype=torch.float64) - alpha * weights.to_dense().double(), labels.double()
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_similar_patches_agree_after_it():
    """Two kinds of patches; one patch has the label of the other kind, with little confidence."""
    kinds = torch.tensor([0, 0, 0, 1, 1, 1, 0, 1])
    features = F.one_hot(kinds, 2).float()
    probabilities = torch.where(F.one_hot(kinds, 2).bool(), 0.9, 0.1)
    probabilities[6] = torch.tensor([0.4, 0.6])
    grid = Grid(
        probabilities.log().T.unflatten(1, (2, 4)), torch.zeros(3, 16, 32), (16, 32), features.T.unflatten(1, (2, 4))
    )
    refined = LPOSS(load_config(""))(grid).logits
    assert torch.equal(refined.argmax(0).flatten(), kinds)
    torch.testing.assert_close(refined.exp().sum(0), torch.ones(2, 4))


def test_padding_takes_no_part():
    generator = torch.Generator().manual_seed(2)
    logits, features = torch.randn(3, 3, 4, generator=generator), torch.randn(5, 3, 4, generator=generator)
    lposs = LPOSS(load_config(""))
    padded = lposs(Grid(logits, torch.zeros(3, 16, 24), (24, 32), features)).logits
    alone = lposs(Grid(logits[:, :2, :3], torch.zeros(3, 16, 24), (16, 24), features[:, :2, :3])).logits
    torch.testing.assert_close(padded[:, :2, :3], alone)
    assert torch.isfinite(padded).all()


def test_one_patch_is_left_alone():
    grid = Grid(torch.randn(3, 1, 1), torch.zeros(3, 8, 8), (8, 8), torch.randn(5, 1, 1))
    assert LPOSS(load_config(""))(grid) is grid


def test_memory_does_not_grow_with_the_square_of_the_patches():
    """64 x 64 patches: 4,096 squared would be 16.8 million weights."""
    features = torch.randn(64 * 64, 4, generator=torch.Generator().manual_seed(3))
    places = torch.cartesian_prod(torch.arange(64), torch.arange(64))
    assert affinity_matrix(features, places, 8)._nnz() <= 2 * 8 * 64 * 64
