"""The value path against literal formulas in float64."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from reclip_d2.backbones.dense_attention import AttentionInput, ValueAttention
from reclip_d2.backbones.vision import OpenClipBlock, last_block_input, project_dense
from reclip_d2.config import load_config
from tests.backbones.literal import literal_value_path
from tests.helpers import tiny_clip


def value_path(block: nn.Module, patches: Tensor, residual: bool = True) -> Tensor:
    """Of patches ``(B, n, E)`` in a row; a class token of other numbers comes first."""
    tokens = torch.cat([torch.full_like(patches[:, :1], 7.0), patches], dim=1)
    images = patches.new_zeros(len(patches), 3, 8, 8 * patches.shape[1])
    return ValueAttention(residual)(AttentionInput(images, OpenClipBlock(block), tokens, (1, patches.shape[1])))


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("quick", [True, False])
def test_value_path(residual, quick):
    block = tiny_clip(quick_gelu=quick).visual.transformer.resblocks[-1].double()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    out = value_path(block, x, residual)
    torch.testing.assert_close(out, literal_value_path(x, block, residual, quick), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer_scale", [None, 0.5])
def test_is_attention_with_the_identity_as_its_weights(layer_scale):
    """The block's own attention gives the value path when each token sees only itself."""
    block = tiny_clip(ls_init_value=layer_scale).visual.transformer.resblocks[-1].double()
    x = torch.randn(1, 6, 32, dtype=torch.float64)
    only_itself = torch.full((6, 6), float("-inf"), dtype=torch.float64).fill_diagonal_(0)
    torch.testing.assert_close(value_path(block, x), block(x, attn_mask=only_itself), rtol=0, atol=1e-12)


def test_class_token_takes_part_in_the_earlier_blocks_and_only_there():
    visual, attention = tiny_clip().visual.double(), ValueAttention()
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    inputs = last_block_input(visual, images)
    assert inputs.patches.shape == (1, 16, 32)
    before = project_dense(visual, attention, inputs)
    other_token = torch.cat([torch.randn_like(inputs.tokens[:, :1]), inputs.patches], dim=1)
    assert torch.equal(project_dense(visual, attention, dataclasses.replace(inputs, tokens=other_token)), before)
    visual.class_embedding.add_(torch.randn(32))
    assert not torch.allclose(last_block_input(visual, images).patches, inputs.patches)


def test_the_key_decides_on_the_residual_and_only_a_change_is_recorded():
    cfg = load_config("")
    assert cfg.MODEL.CLIP.DENSE_ATTENTION == "value"
    usual, without = (
        ValueAttention.from_config(load_config("", ["MODEL.CLIP.VALUE_PATH_RESIDUAL", value]))
        for value in (True, False)
    )
    assert usual.residual and usual.uses_mlp and usual.identity() == {}
    assert not without.residual and not without.uses_mlp
    assert without.identity() == {"MODEL.CLIP.VALUE_PATH_RESIDUAL": False}
