"""Floating-point operations of the models' parts, two per multiply-add, from the shapes of their modules.

Products, convolutions and attention count; norms, activations and soft-max do not. The tests compare the sums with
PyTorch's own counter, which does not see the layers of oneDNN that frozen towers use on CPUs.

Shape letters: n = h*w patches, T tokens, E width of a transformer, D width of the joint embedding, C classes, B images.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from reclip_d2.modeling.meta_arch.rectified_clip import RectifiedCLIP


def linear_flops(block: nn.Module) -> int:
    """Of the linear layers of a transformer block, per token."""
    width = block.attn.embed_dim
    return 2 * (4 * width**2 + 2 * width * block.mlp.c_fc.out_features)


def attention_flops(block: nn.Module, tokens: int) -> int:
    """Of the two products of self-attention over T tokens."""
    return 4 * tokens**2 * block.attn.embed_dim


def encoder_flops(blocks: Sequence[nn.Module], tokens: int) -> int:
    """Of transformer blocks on a sequence of T tokens."""
    return sum(tokens * linear_flops(block) + attention_flops(block, tokens) for block in blocks)


def _patch_flops(visual: nn.Module, patches: int) -> int:
    return 2 * patches * visual.conv1.weight.numel()


def global_flops(visual: nn.Module, patches: int) -> int:
    """Of an image's global feature, as for a window of Eq. (6); the last block computes the class token only."""
    *blocks, last = visual.transformer.resblocks
    tokens, width = 1 + patches, last.attn.embed_dim
    keys_and_values = tokens * 2 * 2 * width**2
    class_token = linear_flops(last) - 2 * 2 * width**2 + attention_flops(last, tokens) // tokens
    encoder = encoder_flops(blocks, tokens) + keys_and_values + class_token
    return _patch_flops(visual, patches) + encoder + 2 * visual.proj.numel()


def dense_flops(visual: nn.Module, patches: int) -> int:
    """Of an image's features Z by MaskCLIP's value path, with residual and MLP."""
    *blocks, last = visual.transformer.resblocks
    width = last.attn.embed_dim
    value_path = patches * (linear_flops(last) - 2 * 2 * width**2)  # without queries and keys
    encoder = encoder_flops(blocks, 1 + patches)
    return _patch_flops(visual, patches) + encoder + value_path + 2 * patches * visual.proj.numel()


def text_flops(backbone: nn.Module, lengths: Sequence[int]) -> int:
    """Of the features of texts with so many tokens each."""
    text = backbone.text_encoder
    blocks = list(text.transformer.resblocks)
    projection = 2 * text.text_width * text.embed_dim
    return sum(encoder_flops(blocks, length) + projection for length in lengths)


def step_flops(model: RectifiedCLIP, images: int, grid: tuple[int, int]) -> int:
    """Of an iteration of ReCLIP++ from stored features of B views of a grid (h, w), with the folded decoder.

    The texts of the Reference count as one masked sequence, as they are encoded on a GPU if they are short; for longer
    ones this is an upper bound. Frozen weights have no gradient, so a pass backward through the text tower costs as
    much as forward, except for its attention: twice. Z has no gradient either: the decoder's convolution of Z is
    repeated once, for its weight. Products with the few hypothesis rows and of the contrastive loss do not count.
    """
    backbone, decoder = model.backbone, model.mask_decoder
    classes, dim = model.num_classes, backbone.embed_dim
    patches, area = grid[0] * grid[1], decoder.conv.kernel_size[0] ** 2
    text = backbone.text_encoder
    tokens = len(model.bias_head.reference_prompt.layout.positions)
    blocks = list(text.transformer.resblocks)
    reference = sum(2 * tokens * linear_flops(block) + 3 * attention_flops(block, tokens) for block in blocks)
    reference += 2 * 2 * classes * text.text_width * dim
    positions = 2 * 2 * patches * backbone.positional_width * dim
    bias = 3 * 2 * patches * classes * dim
    fold = 2 * 2 * area * classes**2 * dim
    decode = 2 * 2 * images * patches * area * dim * classes
    decode_bias = 3 * 2 * patches * area * classes**2
    return reference + positions + bias + fold + decode + decode_bias
