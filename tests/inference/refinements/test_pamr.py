"""Pixel-adaptive refinement against loops over pixels."""

import pytest
import torch
import torch.nn.functional as F

from reclip_d2.config import load_config
from reclip_d2.inference.refinements import PAMR, Grid
from reclip_d2.inference.refinements.pamr import affinities, refine


def literal(pixels: torch.Tensor, probabilities: torch.Tensor, dilations: list[int], iterations: int) -> torch.Tensor:
    """Each pixel by itself, float64; neighbours beyond the border are the nearest pixel inside."""
    pixels, current = pixels.double(), probabilities.double()
    height, width = pixels.shape[1:]
    for _ in range(iterations):
        following = torch.zeros_like(current)
        for y in range(height):
            for x in range(width):
                places = [
                    (min(max(y + d * dy, 0), height - 1), min(max(x + d * dx, 0), width - 1))
                    for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)
                ]  # fmt: skip
                near = torch.stack([pixels[:, v, u] for v, u in places])
                distance = (near - pixels[:, y, x]).abs() / (1e-8 + 0.1 * near.std(0))
                weights = (-distance.mean(1)).softmax(0)
                following[:, y, x] = sum(w * current[:, v, u] for w, (v, u) in zip(weights, places, strict=True))
        current = following
    return current


@pytest.mark.parametrize("dilations", [[1], [1, 3]])
def test_against_loops(dilations):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(3, 6, 7, generator=generator)
    probabilities = torch.rand(4, 6, 7, generator=generator).softmax(0)
    found = refine(probabilities, affinities(pixels, dilations), dilations, 3)
    torch.testing.assert_close(found.double(), literal(pixels, probabilities, dilations, 3), rtol=0, atol=1e-5)


def test_weights_are_a_distribution_also_on_a_plain_image():
    weights = affinities(torch.ones(3, 5, 4), [1, 2])
    assert weights.shape == (16, 5, 4)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 16))


def test_the_result_is_at_the_size_of_the_pixels():
    """More classes than a chunk; padding is cropped before neighbours are mixed."""
    generator = torch.Generator().manual_seed(1)
    logits, pixels = torch.randn(11, 3, 4, generator=generator), torch.randn(3, 20, 29, generator=generator)
    pamr = PAMR(load_config("", ["TEST.PAMR.ITERATIONS", "2", "TEST.PAMR.DILATIONS", "[1, 2]"]))
    refined = pamr(Grid(logits, pixels, (24, 32)))
    assert refined.padded_size == (20, 29) == refined.valid
    low = F.interpolate(logits.log_softmax(0)[None], (24, 32), mode="bilinear")[0, :, :20, :29].exp()
    expected = refine(low, affinities(pixels, [1, 2]), [1, 2], 2)
    torch.testing.assert_close(refined.logits.exp(), expected, rtol=0, atol=1e-6)
