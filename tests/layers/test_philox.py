"""Philox4x32-10 against published vectors, and the noise made from it."""

import math

import pytest
import torch
from scipy import stats

from reclip_d2.layers import draw_seed, gumbel_noise, philox4x32

# Known-answer vectors of the generator's authors (Random123, tests/kat_vectors, "philox4x32 10").
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_vectors(counter, key, expected):
    words = philox4x32([torch.tensor([word]) for word in counter], key)
    assert tuple(int(word) for word in words) == expected


def test_noise_follows_the_documented_addressing():
    seed = torch.tensor([0x299F31D0_A4093822, 0x03707344_13198A2E])
    noise = gumbel_noise((2, 3, 5), seed, dtype=torch.float64).flatten()
    for element in (0, 1, 6, 29):
        counter = [torch.tensor([word]) for word in (element >> 2, 0, 0x13198A2E, 0x03707344)]
        word = int(philox4x32(counter, (0xA4093822, 0x299F31D0))[element & 3])
        expected = -math.log(-math.log(((word >> 9) + 0.5) / 2**23))
        assert noise[element].item() == pytest.approx(expected, rel=1e-14)


def test_noise_of_negative_seeds_and_of_nothing():
    assert gumbel_noise((7,), torch.tensor([-1, -(2**63)])).isfinite().all()
    assert gumbel_noise((0, 3, 5), torch.tensor([1, 2])).shape == (0, 3, 5)


def test_noise_has_the_gumbel_distribution():
    noise = gumbel_noise((100_000,), torch.tensor([5, 6]), dtype=torch.float64)
    assert stats.kstest(noise.numpy(), stats.gumbel_r.cdf).pvalue > 0.001


def test_float32_noise_equals_float64_noise_to_rounding():
    seed = torch.tensor([7, 8])
    precise = gumbel_noise((100_000,), seed, dtype=torch.float64)
    torch.testing.assert_close(gumbel_noise((100_000,), seed).double(), precise, rtol=2e-6, atol=2e-7)


def test_manual_seed_governs_the_drawn_seeds():
    torch.manual_seed(3)
    first, second = draw_seed(), draw_seed()
    torch.manual_seed(3)
    assert torch.equal(first, draw_seed())
    assert not torch.equal(first, second)


@pytest.mark.parametrize("seed", [torch.tensor([1, 2, 3]), torch.tensor([1.0, 2.0])])
def test_wrong_seed_is_an_error(seed):
    with pytest.raises(ValueError, match="`seed` must be int64"):
        gumbel_noise((3,), seed)


def test_integer_noise_is_an_error():
    with pytest.raises(TypeError, match="`dtype` must be a floating dtype"):
        gumbel_noise((3,), torch.tensor([1, 2]), dtype=torch.int32)
