"""Inputs of dense attentions on a tiny random CLIP in float64, and literal formulas to compare with.

Shape letters: (h, w) patch grid, n = h*w patches, T = 1 + n tokens, E = 32 width, d = 16 width of one of two heads.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import timm.models.eva
import timm.models.vision_transformer
import torch
from torch import Tensor, nn

from reclip_d2.backbones.dense_attention import AttentionInput, BlockInput, DenseAttention
from reclip_d2.backbones.dense_attention.helper import HelperModel
from reclip_d2.backbones.vision import OpenClipBlock
from tests.backbones.literal import PATCH, literal_layer_norm
from tests.helpers import tiny_clip

HEAD = 16
HEADS = 2
LAYERS = 3


@functools.cache
def tower() -> nn.Module:
    """Attention that is not uniform, as initial weights would give."""
    visual = tiny_clip().visual.double()
    for block in visual.transformer.resblocks:
        block.attn.in_proj_weight.mul_(3)
    return visual


def tiny_helper(kind: str = "class token", patch_size: int = PATCH, **statistics: object) -> HelperModel:
    """A random model of timm for 32 px: a ViT like DINO's, one with registers like DINOv2's, one like DINOv3."""
    sizes = {"img_size": 32, "patch_size": patch_size, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        if kind == "class token":
            model = timm.models.vision_transformer.VisionTransformer(**sizes)
        elif kind == "registers":
            model = timm.models.vision_transformer.VisionTransformer(
                **sizes, reg_tokens=4, no_embed_class=True, init_values=0.5
            )
        else:
            model = timm.models.eva.Eva(
                **sizes, num_reg_tokens=4, use_abs_pos_emb=False, use_rot_pos_emb=True, rope_type="dinov3",
                dynamic_img_size=True, init_values=0.5,
            )  # fmt: skip
        for parameter in model.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    model.pretrained_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    return HelperModel(model.double(), name=f"tiny {kind}", **statistics).double()


def make_input(
    attention: DenseAttention, grid: tuple[int, int] = (3, 5), batch: int = 1, seed: int = 0, dtype=torch.float64
) -> AttentionInput:
    """Random tokens of all blocks that the attention asks for, as if from one pass. Patches of one image are alike, so
    that similarities have both signs after their mean is subtracted."""
    generator = torch.Generator().manual_seed(seed)
    patches = grid[0] * grid[1]

    def tokens() -> Tensor:
        few = torch.randn(batch, 3, 32, generator=generator, dtype=torch.float64)
        kind = torch.randint(3, (batch, 1 + patches), generator=generator)
        noise = torch.randn(batch, 1 + patches, 32, generator=generator, dtype=torch.float64)
        return (torch.stack([row[index] for row, index in zip(few, kind, strict=True)]) + 0.7 * noise).to(dtype)

    visual = tower().to(dtype)
    blocks = visual.transformer.resblocks
    earlier = {index: BlockInput(OpenClipBlock(blocks[index]), tokens()) for index in attention.earlier_blocks(LAYERS)}
    images = torch.randn(batch, 3, grid[0] * PATCH, grid[1] * PATCH, generator=generator, dtype=torch.float64).to(dtype)
    return AttentionInput(images, OpenClipBlock(blocks[-1]), tokens(), grid, earlier=earlier, count=LAYERS)


def padded(inputs: AttentionInput, grid: tuple[int, int], seed: int = 1) -> AttentionInput:
    """The same image in the top left corner of a larger one, the rest of which is noise."""
    generator = torch.Generator().manual_seed(seed)
    height, width = inputs.grid
    inside = torch.zeros(grid, dtype=torch.bool)
    inside[:height, :width] = True

    def surround(tokens: Tensor) -> Tensor:
        out = 3 * torch.randn(len(tokens), 1 + inside.numel(), 32, generator=generator, dtype=torch.float64).to(tokens)
        out[:, 0] = tokens[:, 0]
        out[:, 1:][:, inside.flatten()] = tokens[:, 1:]
        return out

    images = torch.randn(len(inputs.images), 3, *(PATCH * side for side in grid), generator=generator).to(inputs.images)
    images[..., : PATCH * height, : PATCH * width] = inputs.images
    return dataclasses.replace(
        inputs,
        images=images,
        tokens=surround(inputs.tokens),
        grid=grid,
        valid=inside.flatten()[None].expand(len(images), -1),
        earlier={index: BlockInput(one.block, surround(one.tokens)) for index, one in inputs.earlier.items()},
    )


# ---- literal formulas, for one image ------------------------------------------------------------------------------


def literal_projections(tokens: Tensor, block: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``(T, E)`` of a block's input ``(T, E)``."""
    packed = literal_layer_norm(tokens, block.ln_1) @ block.attn.in_proj_weight.T + block.attn.in_proj_bias
    return packed[:, :32], packed[:, 32:64], packed[:, 64:]


def head(x: Tensor, index: int) -> Tensor:
    """Channels of one head ``(T, d)``."""
    return x[:, index * HEAD : (index + 1) * HEAD]


def literal_softmax(scores: Tensor) -> Tensor:
    """Row by row; -inf is left out."""
    rows = []
    for row in scores:
        weights = [math.exp(score) if score > -math.inf else 0.0 for score in row.tolist()]
        rows.append([weight / sum(weights) for weight in weights])
    return torch.tensor(rows, dtype=scores.dtype)


def self_scores(part: Tensor) -> Tensor:
    return part @ part.T / math.sqrt(HEAD)


def literal_output(mixed: Tensor, block: nn.Module) -> Tensor:
    return mixed @ block.attn.out_proj.weight.T + block.attn.out_proj.bias


def cosines(features: Tensor) -> Tensor:
    """``(n, n)``."""
    rows = [[float(a @ b) / float(a.norm() * b.norm()) for b in features] for a in features]
    return torch.tensor(rows, dtype=features.dtype)


def only_positive(scores: Tensor) -> Tensor:
    return torch.where(scores < 0, -math.inf, scores)
