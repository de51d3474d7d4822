"""DeepLab V2: Detectron2's ResNet with dilated stages, for an output stride of 8, and the feature head.

Detectron2's builder can only dilate the last stage (output stride 16), and not its basic block.

Shape letters: B images, (h, w) grid of the backbone's output, D width of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn

from reclip_d2.errors import ReclipError
from reclip_d2.modeling.build import build_norm

BLOCKS_PER_STAGE = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
# Strides and dilations of the stages res2 to res5: dilation replaces stride.
STRIDES_AND_DILATIONS = {
    8: ((1, 2, 1, 1), (1, 1, 2, 4)),
    16: ((1, 2, 2, 1), (1, 1, 1, 2)),
    32: ((1, 2, 2, 2), (1, 1, 1, 1)),
}


class DilatedBasicBlock(BasicBlock):
    """Detectron2's block for ResNet-18 and -34, with dilated convolutions."""

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int = 1, norm: str = "BN", dilation: int = 1
    ) -> None:
        super().__init__(in_channels, out_channels, stride=stride, norm=norm)
        for conv in (self.conv1, self.conv2):
            conv.dilation = conv.padding = (dilation, dilation)


@BACKBONE_REGISTRY.register()
def build_dilated_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """A ResNet with Detectron2's blocks and stem, output stride ``MODEL.STUDENT.OUTPUT_STRIDE``.

    Reads ``MODEL.RESNETS.{DEPTH, NORM, NUM_GROUPS, WIDTH_PER_GROUP, STRIDE_IN_1X1, STEM_OUT_CHANNELS,
    RES2_OUT_CHANNELS}`` and ``MODEL.BACKBONE.FREEZE_AT``. Depths 18 and 34 accept any RES2_OUT_CHANNELS (usually 64;
    fewer for a small model on CPUs).

    Returns:
        a backbone with the single output ``res5``.
    """
    keys, stride = cfg.MODEL.RESNETS, cfg.MODEL.STUDENT.OUTPUT_STRIDE
    if keys.DEPTH not in BLOCKS_PER_STAGE:
        raise ReclipError(f"MODEL.RESNETS.DEPTH is {keys.DEPTH}; choose one of {', '.join(map(str, BLOCKS_PER_STAGE))}")
    build_norm(keys.NORM, keys.STEM_OUT_CHANNELS, "MODEL.RESNETS.NORM")  # rejects an unknown name in one line
    strides, dilations = STRIDES_AND_DILATIONS[stride]
    in_channels, out_channels = keys.STEM_OUT_CHANNELS, keys.RES2_OUT_CHANNELS
    bottleneck_channels = keys.NUM_GROUPS * keys.WIDTH_PER_GROUP
    stages = []
    for count, first_stride, dilation in zip(BLOCKS_PER_STAGE[keys.DEPTH], strides, dilations, strict=True):
        block: dict[str, Any] = {"block_class": DilatedBasicBlock}
        if keys.DEPTH >= 50:
            block = {
                "block_class": BottleneckBlock,
                "bottleneck_channels": bottleneck_channels,
                "num_groups": keys.NUM_GROUPS,
                "stride_in_1x1": keys.STRIDE_IN_1X1,
            }
        stages.append(
            ResNet.make_stage(
                num_blocks=count,
                stride_per_block=[first_stride] + [1] * (count - 1),
                in_channels=in_channels,
                out_channels=out_channels,
                norm=keys.NORM,
                dilation=dilation,
                **block,
            )
        )
        in_channels, out_channels, bottleneck_channels = out_channels, out_channels * 2, bottleneck_channels * 2
    stem = BasicStem(in_channels=input_shape.channels, out_channels=keys.STEM_OUT_CHANNELS, norm=keys.NORM)
    return ResNet(stem, stages, out_features=["res5"]).freeze(cfg.MODEL.BACKBONE.FREEZE_AT)


class DeepLabV2Head(nn.Module):
    """Four parallel 3x3 atrous convolutions, summed (ASPP of DeepLab V2).

    The sum is the student's feature, in the joint embedding space of the Query head (512 channels for ViT-B/16). No
    ReLU follows, since CLIP's features, which it approximates, have both signs.
    """

    def __init__(self, in_channels: int, channels: int, dilations: Sequence[int] = (6, 12, 18, 24)) -> None:
        """
        Args:
            in_channels: channels of the backbone's output.
            channels: D.
            dilations: dilation of each branch.
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
        for branch in self.branches[1:]:  # not stacked, to save memory: each output is large at stride 8
            total = total + self._branch(branch, x)
        return total

    def _branch(self, branch: nn.Conv2d, x: Tensor) -> Tensor:
        # On a grid no larger than the dilation, the outer taps see only padding: the centre tap gives the same output
        # and gradients at a ninth of the cost. In training only, so that exports keep dynamic sizes.
        if self.training and max(x.shape[-2:]) <= branch.dilation[0]:
            return F.conv2d(x, branch.weight[..., 1:2, 1:2], branch.bias)
        return branch(x)
