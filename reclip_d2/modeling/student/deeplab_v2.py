"""The feature head of DeepLab V2.

Shape letters: B images, (h, w) grid of the backbone's output, D width of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class DeepLabV2Head(nn.Module):
    """Four parallel 3x3 atrous convolutions, summed (ASPP of DeepLab V2).

    The sum is the student's feature: it has as many channels as the joint embedding, since the Query head reads it (512
    for ViT-B/16). No ReLU follows, since CLIP's features, which it is to meet, are of both signs.
    """

    def __init__(self, in_channels: int, channels: int, dilations: Sequence[int] = (6, 12, 18, 24)) -> None:
        """
        Args:
            in_channels: of the backbone's output.
            channels: D.
            dilations: of the branches.
        """
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(in_channels, channels, 3, padding=dilation, dilation=dilation) for dilation in dilations
        )
        for branch in self.branches:
            nn.init.normal_(branch.weight, std=0.01)  # DeepLab's
            nn.init.zeros_(branch.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, h, w)`` to ``(B, D, h, w)``, not normalised."""
        total = self._branch(self.branches[0], x)
        for branch in self.branches[1:]:  # not stacked: at stride 8 each is as large as all of the features
            total = total + self._branch(branch, x)
        return total

    def _branch(self, branch: nn.Conv2d, x: Tensor) -> Tensor:
        # On a grid no larger than the dilation the outer taps meet nothing but padding: the centre alone gives the same
        # output and gradients with a ninth of the work. In training only, so that an export stays open in its sizes.
        if self.training and max(x.shape[-2:]) <= branch.dilation[0]:
            return F.conv2d(x, branch.weight[..., 1:2, 1:2], branch.bias)
        return branch(x)
