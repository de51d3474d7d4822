"""The dilated ResNet, against Detectron2's own and undilated convolutions, and DeepLab V2's feature head.

Shape letters: B images, (h, w) grid, D width of the joint embedding.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling.backbone.resnet import BasicBlock, build_resnet_backbone
from torch import nn

from reclip_d2.config import load_config
from reclip_d2.errors import ReclipError
from reclip_d2.modeling.student.network import DeepLabV2Head, DilatedBasicBlock, build_dilated_resnet_backbone
from tests.helpers import tiny_resnet

# Dilation of the 3x3 convolutions of res2 to res5.
DILATIONS = {8: (1, 1, 2, 4), 16: (1, 1, 1, 2), 32: (1, 1, 1, 1)}


def undilated(backbone: nn.Module) -> nn.Module:
    """The same network with every dilated kernel written out as a large one with zeros between the weights."""
    backbone = copy.deepcopy(backbone)
    for conv in backbone.modules():
        dilation = getattr(conv, "dilation", (1, 1))[0]
        if isinstance(conv, nn.Conv2d) and dilation > 1:
            weight = conv.weight.new_zeros(*conv.weight.shape[:2], 2 * dilation + 1, 2 * dilation + 1)
            weight[:, :, ::dilation, ::dilation] = conv.weight.detach()
            conv.weight, conv.dilation, conv.padding = nn.Parameter(weight), (1, 1), (dilation, dilation)
    return backbone


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("stride", [8, 16, 32])
@torch.no_grad()
def test_output_stride_and_dilations(depth, stride):
    backbone = tiny_resnet("MODEL.RESNETS.WIDTH_PER_GROUP", 4, depth=depth, stride=stride).eval()
    for number, expected in enumerate(DILATIONS[stride], start=2):
        convs = [m for m in getattr(backbone, f"res{number}").modules() if isinstance(m, nn.Conv2d)]
        assert {conv.dilation for conv in convs if conv.kernel_size == (3, 3)} == {(expected, expected)}
        assert {conv.dilation for conv in convs if conv.kernel_size == (1, 1)} <= {(1, 1)}
    (shape,) = backbone.output_shape().values()
    assert (shape.stride, shape.channels) == (stride, 64)
    images = torch.randn(2, 3, 96, 160)
    output = backbone(images)
    assert set(output) == {"res5"}
    assert output["res5"].shape == (2, 64, 96 // stride, 160 // stride)
    torch.testing.assert_close(output["res5"], undilated(backbone)(images)["res5"], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_dilation_looks_at_the_places_it_should():
    """An impulse comes out of the block's first convolution ``dilation`` places away, and nowhere else."""
    block = DilatedBasicBlock(1, 1, norm="", dilation=3).eval()
    nn.init.ones_(block.conv1.weight)
    impulse = torch.zeros(1, 1, 9, 9)
    impulse[..., 4, 4] = 1
    places = block.conv1(impulse)[0, 0].nonzero().tolist()
    assert places == [[y, x] for y in (1, 4, 7) for x in (1, 4, 7)]


@torch.no_grad()
def test_without_dilation_the_block_is_detectron2s():
    ours, theirs = DilatedBasicBlock(4, 8, stride=2).eval(), BasicBlock(4, 8, stride=2).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(1, 4, 12, 10)
    assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_names_and_shapes_are_detectron2s(depth):
    options = ["MODEL.RESNETS.DEPTH", str(depth), "MODEL.RESNETS.OUT_FEATURES", "['res5']"]
    cfg = load_config("", [*options, "MODEL.RESNETS.RES2_OUT_CHANNELS", "64" if depth < 50 else "256"])
    with torch.device("meta"):
        ours = build_dilated_resnet_backbone(cfg, ShapeSpec(channels=3)).state_dict()
        theirs = build_resnet_backbone(cfg, ShapeSpec(channels=3)).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_defaults_suit_torchvisions_weights_and_train_all_of_it():
    with torch.device("meta"):
        backbone = build_dilated_resnet_backbone(load_config(""), ShapeSpec(channels=3))
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert backbone.res3[0].conv1.stride == (1, 1) and backbone.res3[0].conv2.stride == (2, 2)
    assert isinstance(backbone.stem.conv1.norm, nn.BatchNorm2d)
    assert len(backbone.res4) == 23  # ResNet-101


def test_freezing():
    backbone = tiny_resnet("MODEL.BACKBONE.FREEZE_AT", 2)
    assert not any(p.requires_grad for part in (backbone.stem, backbone.res2) for p in part.parameters())
    assert isinstance(backbone.stem.conv1.norm, FrozenBatchNorm2d)
    assert all(p.requires_grad for part in (backbone.res3, backbone.res5) for p in part.parameters())


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("MODEL.RESNETS.DEPTH", 20, "MODEL.RESNETS.DEPTH is 20; choose one of 18, 34, 50, 101, 152"),
        ("MODEL.RESNETS.NORM", "Nothing", "MODEL.RESNETS.NORM is 'Nothing'; choose one of"),
    ],
)
def test_mistakes(key, value, expected):
    with pytest.raises(ReclipError, match=expected):
        tiny_resnet(key, value)


# ---- the feature head -----------------------------------------------------------------------------------------------


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
