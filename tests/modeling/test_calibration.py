"""Mean-probability calibration: its properties on random logits.

Shape letters: M samples, C classes.
"""

import pytest
import torch

from reclip_d2.modeling.calibration import mean_probability_offset


@pytest.mark.parametrize("scale", [1.0, 14.0])
def test_mean_probability_is_uniform_after_the_offset(scale):
    logits = torch.randn(300, 5, dtype=torch.float64) / scale + torch.tensor([0.0, 1.0, -1.0, 0.5, 0.0]) / scale
    before = torch.softmax(logits * scale, dim=1).mean(0)
    assert (before - 0.2).abs().max() > 0.05
    offset = mean_probability_offset(logits, scale)
    assert offset.shape == (5,) and offset.dtype == torch.float32
    after = torch.softmax((logits + offset) * scale, dim=1).mean(0)
    torch.testing.assert_close(after, torch.full((5,), 0.2, dtype=torch.float64), rtol=1e-3, atol=0)
    assert offset.sum().item() == pytest.approx(0, abs=1e-5)


def test_shares_that_are_asked_for():
    logits = torch.randn(300, 4, dtype=torch.float64)
    shares = torch.tensor([0.6, 0.25, 0.1, 0.05], dtype=torch.float64)
    after = torch.softmax((logits + mean_probability_offset(logits, 3.0, shares)) * 3.0, dim=1).mean(0)
    torch.testing.assert_close(after, shares, rtol=1e-3, atol=0)
    uniform = mean_probability_offset(logits, 3.0, torch.full((4,), 0.25))
    torch.testing.assert_close(uniform, mean_probability_offset(logits, 3.0))


def test_each_position_by_itself():
    logits = torch.randn(60, 2, 3, 4)
    offset = mean_probability_offset(logits, 2.0)
    assert offset.shape == (2, 3, 4)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(
                offset[i, j], mean_probability_offset(logits[:, i, j], 2.0), rtol=1e-3, atol=1e-4
            )
    after = torch.softmax((logits + offset) * 2.0, dim=-1).mean(0)
    torch.testing.assert_close(after, torch.full((2, 3, 4), 0.25), rtol=1e-3, atol=0)
    torch.testing.assert_close(offset.mean(-1), torch.zeros(2, 3), rtol=0, atol=1e-6)


def test_a_constant_preference_is_taken_off():
    """Logits that are the same for all images: the offset is their negative, up to a constant."""
    logits = torch.tensor([0.3, -0.1, 0.4]).expand(7, 3)
    torch.testing.assert_close(
        mean_probability_offset(logits, 10.0), torch.tensor([0.2, -0.1, 0.4]).neg() + torch.tensor([0.1, 0.2, 0.2]),
        rtol=0, atol=1e-4,
    )  # fmt: skip


def test_balanced_logits_need_none():
    logits = torch.eye(4)
    torch.testing.assert_close(mean_probability_offset(logits, 5.0), torch.zeros(4), rtol=0, atol=1e-5)


def test_a_class_that_never_wins_is_raised():
    logits = torch.randn(200, 3) * 0.02
    logits[:, 2] -= 1.0
    offset = mean_probability_offset(logits, 100.0)
    after = torch.softmax((logits + offset) * 100, dim=1).mean(0)
    torch.testing.assert_close(after, torch.full((3,), 1 / 3), rtol=5e-3, atol=0)


def test_one_class_and_one_sample():
    assert mean_probability_offset(torch.randn(5, 1), 3.0).item() == pytest.approx(0)
    one = mean_probability_offset(torch.tensor([[1.0, 3.0]]), 1.0)
    torch.testing.assert_close(one, torch.tensor([1.0, -1.0]), rtol=0, atol=1e-4)
