"""Detectron2's ResNet with dilated stages, for an output stride of 8.

Detectron2's own builder dilates the last stage at most (output stride 16), and its basic block not at all.
"""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock

from reclip_d2.errors import ReclipError
from reclip_d2.modeling.norm import build_norm

BLOCKS_PER_STAGE = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
# Strides and dilations of the stages res2 to res5: a stride that is left out becomes a dilation.
STRIDES_AND_DILATIONS = {
    8: ((1, 2, 1, 1), (1, 1, 2, 4)),
    16: ((1, 2, 2, 1), (1, 1, 1, 2)),
    32: ((1, 2, 2, 2), (1, 1, 1, 1)),
}


class DilatedBasicBlock(BasicBlock):
    """Detectron2's block of ResNet-18 and -34, with dilated convolutions."""

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int = 1, norm: str = "BN", dilation: int = 1
    ) -> None:
        super().__init__(in_channels, out_channels, stride=stride, norm=norm)
        for conv in (self.conv1, self.conv2):
            conv.dilation = conv.padding = (dilation, dilation)


@BACKBONE_REGISTRY.register()
def build_dilated_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """A ResNet of Detectron2's blocks and stem, output stride ``MODEL.STUDENT.OUTPUT_STRIDE``.

    Reads ``MODEL.RESNETS.{DEPTH, NORM, NUM_GROUPS, WIDTH_PER_GROUP, STRIDE_IN_1X1, STEM_OUT_CHANNELS,
    RES2_OUT_CHANNELS}`` and ``MODEL.BACKBONE.FREEZE_AT``. Depth 18 and 34 take any RES2_OUT_CHANNELS (64 is the usual
    width; less makes a small model for CPUs).

    Returns:
        a backbone with the one output ``res5``.
    """
    keys, stride = cfg.MODEL.RESNETS, cfg.MODEL.STUDENT.OUTPUT_STRIDE
    if keys.DEPTH not in BLOCKS_PER_STAGE:
        raise ReclipError(f"MODEL.RESNETS.DEPTH is {keys.DEPTH}; choose one of {', '.join(map(str, BLOCKS_PER_STAGE))}")
    build_norm(keys.NORM, keys.STEM_OUT_CHANNELS, "MODEL.RESNETS.NORM")  # a name that is none ends here, in one line
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
