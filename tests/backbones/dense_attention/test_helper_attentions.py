"""proxy and regions, their helper models and superpixels, against literal formulas in float64."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from reclip_d2.backbones.dense_attention import build_dense_attention
from reclip_d2.backbones.dense_attention.proxy import ProxyAttention, upsample_values
from reclip_d2.backbones.dense_attention.regions import RegionAttention
from reclip_d2.backbones.dense_attention.slic import patch_superpixels, superpixels
from reclip_d2.config import load_config
from reclip_d2.errors import ReclipError
from tests.backbones.dense_attention.inputs import (
    cosines,
    literal_output,
    literal_projections,
    literal_softmax,
    make_input,
    only_positive,
    tiny_helper,
    tower,
)
from tests.backbones.literal import PATCH
from tests.helpers import isolated_cache

__all__ = ["isolated_cache"]

KEY = "MODEL.CLIP.DENSE_ATTENTION"


def values_of(inputs) -> Tensor:
    return literal_projections(inputs.tokens[0, 1:], tower().transformer.resblocks[-1])[2]


def test_proxy():
    attention = ProxyAttention(tiny_helper(), shift=0.8, scale=2.0)
    inputs = make_input(attention)
    similarities = cosines(attention.helper(inputs.images, inputs.grid)[0])
    scores = only_positive(2.0 * (similarities - 0.8 * similarities.mean()))
    assert (scores == -math.inf).any() and (scores.diagonal() > 0).all()
    expected = literal_output(literal_softmax(scores) @ values_of(inputs), tower().transformer.resblocks[-1])
    torch.testing.assert_close(attention(inputs)[0], expected, rtol=0, atol=1e-11)


def test_proxy_on_the_finer_grid_of_the_helper():
    attention = ProxyAttention(tiny_helper(), upsampling=2)
    inputs = make_input(attention, (2, 3))
    similarities = cosines(attention.helper(inputs.images, (4, 6))[0])
    values = values_of(inputs).T.unflatten(1, (2, 3))[None]
    values = F.interpolate(values, scale_factor=2, mode="bilinear")[0].flatten(1).T
    scores = only_positive(3.0 * (similarities - 1.2 * similarities.mean()))
    expected = literal_output(literal_softmax(scores) @ values, tower().transformer.resblocks[-1])
    torch.testing.assert_close(attention(inputs)[0], expected, rtol=0, atol=1e-11)
    assert attention.identity()["MODEL.CLIP.PROXY_UPSAMPLING"] == 2


def test_finer_values_do_not_read_padding():
    values, valid = torch.tensor([[[1.0], [2.0], [99.0]]]), torch.tensor([[True, True, False]])
    finer = upsample_values(values, valid, (1, 3), 2)[0, :, 0].unflatten(0, (2, 6))
    assert finer[0, :4].tolist() == pytest.approx([1, 1.25, 1.75, 2])


def test_an_image_of_one_colour_attends_to_itself():
    """The mean similarity is 1: no score is positive, and the paper's formula divides by zero."""
    attention = ProxyAttention(tiny_helper())
    inputs = make_input(attention)
    same = F.normalize(torch.ones(1, 15, 4, dtype=torch.float64), dim=-1)
    attention.helper.forward = lambda images, grid, valid: same
    assert attention(inputs).isfinite().all()


@pytest.mark.parametrize("helped", [True, False])
def test_regions(helped):
    attention = RegionAttention(PATCH, tiny_helper() if helped else None, scale=3.0, size=2)
    inputs = make_input(attention, (4, 5))
    regions = patch_superpixels(inputs.images, PATCH, 2, 1.0)[0]
    assert 1 < len(regions.unique()) < 20
    if helped:
        unit = attention.helper(inputs.images, inputs.grid)[0]
    else:
        unit = literal_projections(inputs.tokens[0, 1:], tower().transformer.resblocks[-1])[1]
    scores = torch.where(regions[:, None] == regions, 3.0 * cosines(unit), -math.inf)
    expected = literal_output(literal_softmax(scores) @ values_of(inputs), tower().transformer.resblocks[-1])
    torch.testing.assert_close(attention(inputs)[0], expected, rtol=0, atol=1e-11)


# ---- superpixels -------------------------------------------------------------------------------------------------


def literal_superpixels(colours: Tensor, spacing: int, compactness: float, iterations: int) -> list[int]:
    """Cell by cell. ``colours``: ``(K, H, W)``."""
    _, height, width = colours.shape
    across, down = -(-width // spacing), -(-height // spacing)
    cells = [(y, x) for y in range(height) for x in range(width)]
    labels = {cell: cell[0] // spacing * across + cell[1] // spacing for cell in cells}
    centres: dict[int, tuple[Tensor, float, float]] = {}
    for _ in range(iterations):
        for label in set(labels.values()):
            own = [cell for cell in cells if labels[cell] == label]
            colour = torch.stack([colours[:, y, x] for y, x in own]).mean(0)
            centres[label] = (colour, sum(y for y, _ in own) / len(own), sum(x for _, x in own) / len(own))
        for y, x in cells:
            near = [
                (y // spacing + dy) * across + x // spacing + dx
                for dy in (-1, 0, 1)
                for dx in (-1, 0, 1)
                if 0 <= y // spacing + dy < down and 0 <= x // spacing + dx < across
            ]

            def distance(label: int, y: int = y, x: int = x) -> float:
                colour, row, column = centres[label]
                place = ((y - row) ** 2 + (x - column) ** 2) * (compactness / spacing) ** 2
                return float((colours[:, y, x] - colour).square().sum()) + place

            labels[y, x] = min(near, key=distance)
    return [labels[cell] for cell in cells]


@pytest.mark.parametrize("shape, spacing", [((7, 9), 3), ((4, 4), 4), ((1, 5), 2), ((6, 3), 5)])
def test_superpixels(shape, spacing):
    maps = torch.randn(2, 3, *shape, dtype=torch.float64)
    labels = superpixels(maps, spacing, 0.7, iterations=3)
    assert labels.tolist() == [literal_superpixels(one, spacing, 0.7, 3) for one in maps]


def test_superpixels_follow_an_edge_that_is_not_on_the_grid():
    maps = torch.zeros(1, 1, 8, 16)
    maps[..., 6:] = 10
    labels = superpixels(maps, 4, 0.1)[0].unflatten(0, (8, 16))
    assert not set(labels[:, :6].flatten().tolist()) & set(labels[:, 6:].flatten().tolist())


# ---- helper models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["class token", "registers", "rotary"])
def test_helper_is_timms_model(kind):
    """At its own size, where no positional embedding is resized: timm's ``forward_features`` of the denormalised image,
    normalised for the helper."""
    helper = tiny_helper(kind, mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.4))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    own = helper.model.pretrained_cfg
    mean, std, own_mean, own_std = (
        torch.tensor(values, dtype=torch.float64).view(3, 1, 1)
        for values in ((0.3, 0.4, 0.5), (0.2, 0.3, 0.4), own["mean"], own["std"])
    )
    pixels = (images * std + mean - own_mean) / own_std
    expected = helper.model.forward_features(pixels)[:, helper.model.num_prefix_tokens :]
    torch.testing.assert_close(helper(images, (4, 4)), F.normalize(expected, dim=-1), rtol=0, atol=1e-6)
    assert helper(images, (2, 7)).shape == (2, 14, 16)  # any grid


NAMES = ["test_vit", "test_vit2"]


def config(*options: object):
    return load_config("", [KEY, "proxy", "MODEL.CLIP.HELPER_WEIGHTS", "random", *options])


def test_helper_by_keys(tmp_path):
    name = ("MODEL.CLIP.HELPER_NAME", "test_vit")
    random = build_dense_attention(config(*name))
    assert random.upsampling == 1 and random.helper.patch_size == 16
    state = {key: value + 0.01 for key, value in random.helper.model.state_dict().items()}
    save_file(state, str(tmp_path / "helper.safetensors"))
    other = build_dense_attention(config(*name, "MODEL.CLIP.HELPER_WEIGHTS", str(tmp_path / "helper.safetensors")))
    assert torch.equal(other.helper.model.pos_embed, random.helper.model.pos_embed + 0.01)
    mine, theirs = random.identity(), other.identity()
    assert mine["MODEL.CLIP.HELPER_NAME"] == theirs["MODEL.CLIP.HELPER_NAME"] == "test_vit"
    assert mine["helper_fingerprint"] != theirs["helper_fingerprint"]
    assert str(tmp_path) not in str(theirs)


def test_mistakes_are_one_line(tmp_path):
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    del state["norm.bias"]
    save_file(state, str(tmp_path / "part.safetensors"))
    for options, message in (
        ((), "HELPER_NAME is empty: set it to a model of timm"),
        (("HELPER_NAME", "no_such"), "'no_such' is not known to timm"),
        (("HELPER_NAME", "test_resnet"), "'test_resnet' is not a Vision Transformer of timm"),
        (("HELPER_NAME", "test_vit", "HELPER_WEIGHTS", "nowhere"), "'nowhere' is neither a file, nor pretrained"),
        (
            ("HELPER_NAME", "test_vit", "HELPER_WEIGHTS", str(tmp_path / "part.safetensors")),
            "is not of MODEL.CLIP.HELPER_NAME test_vit: norm.bias is missing",
        ),
    ):
        keys = [f"MODEL.CLIP.{one}" if index % 2 == 0 else one for index, one in enumerate(options)]
        with pytest.raises(ReclipError, match=message):
            build_dense_attention(config(*keys))
    with pytest.raises(ReclipError, match="HELPER_NAME test_vit is for .* proxy, regions, not naclip"):
        build_dense_attention(load_config("", [KEY, "naclip", "MODEL.CLIP.HELPER_NAME", "test_vit"]))


def test_weights_that_cannot_be_reached(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name = "vit_tiny_patch16_dinov3_qkvb" if timm.is_model_pretrained("vit_tiny_patch16_dinov3_qkvb") else "test_vit"
    with pytest.raises(ReclipError, match=f"weights of MODEL.CLIP.HELPER_NAME {name} are not on this machine"):
        build_dense_attention(config("MODEL.CLIP.HELPER_NAME", name, "MODEL.CLIP.HELPER_WEIGHTS", "pretrained"))
