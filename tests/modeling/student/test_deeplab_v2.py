"""DeepLab V2's feature head: four atrous branches, summed.

Shape letters: B images, (h, w) grid, D width of the joint embedding.
"""

import pytest
import torch
import torch.nn.functional as F

from reclip_d2.modeling.student.deeplab_v2 import DeepLabV2Head


@torch.no_grad()
def test_sum_of_the_four_branches():
    head = DeepLabV2Head(6, 10)
    assert [branch.dilation[0] for branch in head.branches] == [6, 12, 18, 24]
    assert all(branch.bias.eq(0).all() and 0.005 < branch.weight.std() < 0.02 for branch in head.branches)
    for branch in head.branches:
        branch.bias.normal_()
    x = torch.randn(2, 6, 30, 25)
    expected = 0
    for branch, dilation in zip(head.branches, (6, 12, 18, 24), strict=True):
        padded = F.pad(x, [dilation] * 4)
        # Nine shifted 1x1 convolutions, one for each weight of the kernel.
        for row in range(3):
            for column in range(3):
                shifted = padded[..., row * dilation :, column * dilation :][..., :30, :25]
                expected = expected + torch.einsum("bihw,oi->bohw", shifted, branch.weight[:, :, row, column])
        expected = expected + branch.bias[:, None, None]
    torch.testing.assert_close(head(x), expected, rtol=1e-4, atol=1e-5)


def test_other_dilations_and_a_gradient_for_every_branch():
    head = DeepLabV2Head(4, 5, dilations=(1, 2))
    out = head(torch.randn(1, 4, 7, 9))
    assert out.shape == (1, 5, 7, 9) and out.min() < 0 < out.max()  # of both signs, as CLIP's features
    out.square().sum().backward()
    assert all(branch.weight.grad.abs().max() > 0 for branch in head.branches)


@pytest.mark.parametrize("size", [(6, 6), (7, 3), (1, 1), (12, 5), (13, 13)])  # dilations 6 and 12 on and off the edge
def test_small_grids_train_as_by_the_whole_kernels(size):
    head = DeepLabV2Head(3, 4).double().train()
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 4, *size, dtype=torch.float64)
    parameters = [x, *head.parameters()]
    whole = sum(F.conv2d(x, b.weight, b.bias, padding=b.dilation, dilation=b.dilation) for b in head.branches)
    torch.testing.assert_close(head(x), whole)
    found = torch.autograd.grad(head(x), parameters, upstream)
    expected = torch.autograd.grad(whole, parameters, upstream)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(head.eval()(x), whole)
