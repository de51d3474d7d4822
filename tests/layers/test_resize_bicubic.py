"""Bicubic resizing by matrix products against PyTorch's operator."""

import pytest
import torch
import torch.nn.functional as F

from reclip_d2.layers import resize_bicubic
from reclip_d2.layers.resize_bicubic import bicubic_matrix, resize_by_products

SIZES = [
    ((14, 14), (32, 32)),
    ((14, 14), (32, 43)),
    ((7, 9), (3, 4)),
    ((1, 1), (4, 2)),
    ((4, 5), (4, 5)),
    ((2, 3), (1, 1)),
]


@pytest.mark.parametrize(("grid", "size"), SIZES)
def test_products_are_the_operator(grid, size):
    maps = torch.randn(2, 3, *grid, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = F.interpolate(maps, size=size, mode="bicubic", align_corners=False)
    found = resize_by_products(maps, size)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad((result * weights).sum(), maps)[0] for result in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_full_precision_under_autocast():
    maps = torch.randn(1, 4, 14, 14)
    expected = F.interpolate(maps, size=(32, 43), mode="bicubic", align_corners=False)
    with torch.autocast("cpu", torch.bfloat16):
        found = resize_by_products(maps, (32, 43))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_on_a_cpu_it_is_the_operator():
    maps = torch.randn(1, 2, 3, 4)
    assert torch.equal(resize_bicubic(maps, (5, 6)), F.interpolate(maps, size=(5, 6), mode="bicubic"))


def test_the_matrix_is_made_once_and_autograd_can_use_it():
    bicubic_matrix.cache_clear()
    with torch.inference_mode():
        matrix = bicubic_matrix(3, 5, torch.device("cpu"), torch.float32)
    assert not matrix.is_inference() and bicubic_matrix(3, 5, torch.device("cpu"), torch.float32) is matrix
    torch.testing.assert_close(matrix.sum(1), torch.ones(5))


@pytest.mark.cuda
@pytest.mark.parametrize(("grid", "size"), SIZES)
def test_on_a_gpu(grid, size):
    maps = torch.randn(1, 64, *grid)
    expected = F.interpolate(maps, size=size, mode="bicubic", align_corners=False)
    torch.testing.assert_close(resize_bicubic(maps.cuda(), size).cpu(), expected, rtol=1e-4, atol=1e-5)
