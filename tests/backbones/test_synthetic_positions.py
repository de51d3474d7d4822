"""Sines and cosines in place of a learned positional embedding."""

import math

import pytest
import torch

from reclip_d2.backbones.synthetic_positions import sine_positions
from tests.helpers import tiny_dense
from tests.timm_models import timm_dense


def test_by_hand():
    got = sine_positions(8, (2, 3), torch.zeros(()))
    assert got.shape == (8, 2, 3) and got.dtype == torch.float32
    for i in range(2):
        for j in range(3):
            y, x = 16 * (i + 0.5) / 2, 16 * (j + 0.5) / 3
            expected = [f(w * place) for place in (y, x) for f in (math.sin, math.cos) for w in (1, 0.01)]
            assert got[:, i, j].tolist() == pytest.approx([0.1 * 2**0.5 * value for value in expected], abs=1e-6)
    assert sine_positions(64, (20, 30), torch.zeros(())).square().mean() == pytest.approx(0.01)


def test_positions_are_relative_to_the_image():
    """The middle of a cell is the middle of three, and the centre of the image is the same on all odd grids."""
    coarse, fine = (sine_positions(32, grid, torch.zeros(())) for grid in ((3, 5), (9, 15)))
    torch.testing.assert_close(coarse, fine[:, 1::3, 1::3])


def test_for_towers_without_an_embedding_and_by_the_key():
    rotary, own = timm_dense("small_rotary"), timm_dense("small_eva02")
    expected = sine_positions(32, (3, 5), torch.zeros(()))
    assert rotary.positional_width == 32 and rotary.positional_grid is None
    torch.testing.assert_close(rotary.positional_embedding((3, 5)), expected)
    assert not torch.allclose(own.positional_embedding((3, 5)), expected)
    torch.testing.assert_close(timm_dense("small_eva02", positions="sine").positional_embedding((3, 5)), expected)
    clip = tiny_dense(positions="sine")
    assert clip.positional_embedding((2, 2)).shape == (clip.positional_width, 2, 2)
    assert not torch.allclose(clip.positional_embedding((2, 2)), tiny_dense().positional_embedding((2, 2)))
