"""Windows of an image in one pass, against separate windows in float64."""

import pytest
import torch
from torch import Tensor, nn

from reclip_d2.backbones.vision import embed_patches
from reclip_d2.backbones.windows import patches_inside, window_image_features
from tests.backbones.literal import PATCH, literal_attention, literal_layer_norm, literal_mlp
from tests.helpers import EMBED_DIM, tiny_clip


def literal_block(x: Tensor, block: nn.Module, quick: bool = False) -> Tensor:
    x = x + literal_attention(literal_layer_norm(x, block.ln_1), block.attn)
    return x + literal_mlp(literal_layer_norm(x, block.ln_2), block, quick)


def literal_window_feature(visual: nn.Module, image: Tensor, inside: Tensor, split: int) -> Tensor:
    """One window by itself: a sequence of its token and its patches, whose states are those of the whole image."""
    tokens = embed_patches(visual, image[None])[0][0]
    own = tokens[:1]
    for index, block in enumerate(visual.transformer.resblocks):
        if index < split:
            own = literal_block(tokens, block)[:1]
        else:
            own = literal_block(torch.cat([own, tokens[1:][inside]]), block)[:1]
        tokens = literal_block(tokens, block)
    return literal_layer_norm(own[0], visual.ln_post) @ visual.proj


@pytest.mark.parametrize("split", [0, 1, 2])
def test_windows_equal_each_by_itself(split):
    visual = tiny_clip().double().visual
    images = torch.randn(2, 3, 5 * PATCH, 3 * PATCH, dtype=torch.float64)
    inside = torch.zeros(4, 15, dtype=torch.bool)
    inside[0, 3], inside[1, :7], inside[2, 14], inside[3] = True, True, True, True
    got = window_image_features(visual, images, inside, split)
    assert got.shape == (2, 4, EMBED_DIM)
    for image, features in zip(images, got, strict=True):
        for window, feature in zip(inside, features, strict=True):
            wanted = literal_window_feature(visual, image, window, split)
            torch.testing.assert_close(feature, wanted, rtol=1e-10, atol=1e-10)


def test_a_window_of_the_whole_image_has_its_global_feature():
    clip = tiny_clip().double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for split in range(3):
        got = window_image_features(clip.visual, images, torch.ones(1, 16, dtype=torch.bool), split)
        torch.testing.assert_close(got[:, 0], clip.encode_image(images), rtol=1e-10, atol=1e-10)


def test_patches_inside_go_by_their_centres():
    # A grid of 2 x 3 patches of 8 px: centres at x = 4, 12, 20 and y = 4, 12.
    boxes = [[0, 0, 24, 16], [4, 0, 12, 8], [5, 5, 24, 16], [0, 12, 13, 16], [5, 5, 7, 7], [23, 15, 24, 16]]
    wanted = ["111 111", "100 000", "000 011", "000 110", "100 000", "000 001"]
    got = patches_inside(torch.tensor(boxes), (2, 3), 8)
    assert got.tolist() == [[mark == "1" for mark in row.replace(" ", "")] for row in wanted]
