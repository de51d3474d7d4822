#!/usr/bin/env python3
"""Pretrain the tiny CLIP of the embedded world and write its checkpoint.

Two losses on rendered pictures and their captions (the task's scenes are never used):

- image loss: CLIP's loss between the global features of compositions and close-ups and their captions, with equal
  captions in a batch counted once;
- region loss: the feature of boxes that show one material, classified among *all* names of the world, with the
  names' frequencies in captions as targets. It creates dense features (captions of whole images alone leave a
  model of this size at chance), and unlike the image loss it keeps the prior of the names: the class-preference
  bias that rectification removes. ``--region-features`` says what a box's feature is: the mean of the value path,
  or what the class token becomes when the last block lets it see the box alone.

Training starts easy: close-ups count as regions and both names of a material are equally frequent; later only
compositions count, and finally the rare names become rare.

Shape letters: B images, n = 144 patches, D = 96 joint width, C = 12 materials, N = 24 names, K kept tokens,
R regions.
"""

from __future__ import annotations

import reclip_d2.utils.program_start  # noqa: F401  isort: skip  (first: see there)
import argparse
import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclip_d2.backbones.dense_attention import AttentionInput, ValueAttention
from reclip_d2.backbones.embedded import (
    EMBEDDED_CHECKPOINT,
    EMBEDDED_MODEL_NAME,
    build_embedded_clip,
    create_embedded_clip,
    save_embedded_checkpoint,
)
from reclip_d2.backbones.query import get_templates, query_features
from reclip_d2.backbones.text import TextEncoder
from reclip_d2.backbones.vision import dense_image_features, last_block_input, project_dense
from reclip_d2.errors import ReclipError, exit_on_error
from reclip_d2.toy.pretraining import CaptionTokens, draw_regions, name_frequencies, render_pictures
from reclip_d2.toy.scenes import render_close_up, render_scene
from reclip_d2.toy.worlds import (
    EMBEDDED,
    EMBEDDED_CLASSES,
    NUM_MATERIALS,
    RARE_NAME_SHARE,
    WORLDS,
    World,
    name_vocabulary,
)
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.output_paths import check_output_path

COMPOSITIONS_PER_STEP, CLOSE_UPS_PER_STEP = 32, 16
PEAK_LR, WEIGHT_DECAY, WARMUP_SHARE, GRADIENT_CLIP = 2e-3, 0.05, 0.06, 1.0
# Fractions of all steps: until the first, close-ups count as regions too; from the second, rare names are rare.
EASY_UNTIL, PRIOR_FROM = 0.3, 0.55
PROGRAM = "python tools/pretrain_embedded_clip.py"
STEPS, POOL, EVAL_SCENES = 1000, 4000, 150
EVALUATION_SEED_OFFSET = 7919  # pictures for evaluation have another seed than those for training


def normalize_images(images: Tensor) -> Tensor:
    """uint8 (B, 3, S, S) to float32 with CLIP's mean and standard deviation."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    return (images.float() / 255 - mean) / std


def global_features(visual: nn.Module, tokens: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Global features, computed efficiently: the last block's attention has one query, that of the class token.

    Args:
        tokens: input of the last block, float32 (B, 1 + n, W), the class token first.
        hidden: bool (B, 1 + n), tokens that the class token does not see there.

    Returns:
        float32 (B, D), rows of unit length; without ``hidden`` as from ``encode_image``.
    """
    last = visual.transformer.resblocks[-1]
    keys = last.ln_1(tokens)
    attended = last.attn(keys[:, :1], keys, keys, key_padding_mask=hidden, need_weights=False)[0]
    pooled = tokens[:, :1] + last.ls_1(attended)
    pooled = (pooled + last.ls_2(last.mlp(last.ln_2(pooled))))[:, 0]
    return F.normalize(visual.ln_post(pooled) @ visual.proj, dim=-1)


def value_regions(visual: nn.Module, inputs: AttentionInput, owners: Tensor, weights: Tensor) -> Tensor:
    """Features of regions: weighted means of the value path's features.

    Args:
        inputs: of the last block, for the images that have regions.
        owners: int64 (R,), the image of each region.
        weights: float32 (R, n), 0 outside of the region; rows sum to 1.

    Returns:
        float32 (R, D), rows of unit length.
    """
    dense = project_dense(visual, ValueAttention(), inputs)
    return F.normalize(torch.einsum("rn,rnd->rd", weights, dense.index_select(0, owners)), dim=-1)


def class_token_regions(visual: nn.Module, inputs: AttentionInput, owners: Tensor, weights: Tensor) -> Tensor:
    """Features of regions: the global feature, when the class token sees only the region in the last block.

    Shapes as in :func:`value_regions`. No dense attention is trained by it, so that none is favoured.
    """
    hidden = torch.cat([torch.ones_like(weights[:, :1], dtype=torch.bool), weights == 0], dim=1)
    return global_features(visual, inputs.tokens.index_select(0, owners), hidden)


REGION_FEATURES = {"value": value_regions, "class_token": class_token_regions}


def image_loss(logits: Tensor, names: Tensor) -> Tensor:
    """CLIP's symmetric loss, with equal captions counted once.

    Args:
        logits: (B, N), image by name.
        names: int64 (B,), the name in each image's caption.
    """
    unique, target = torch.unique(names, return_inverse=True)
    logits = logits[:, unique]
    positives = F.one_hot(target, len(unique)).float()
    to_images = -(positives / positives.sum(dim=0) * logits.log_softmax(dim=0)).sum(dim=0).mean()
    return (F.cross_entropy(logits, target) + to_images) / 2


def train(
    world: World, seed: int, steps: int, pool_size: int, threads: int, region_features: str = "value"
) -> tuple[open_clip.CLIP, Tensor, list[dict]]:
    """Pretrain; returns the model (its token embedding has K rows), the kept token ids (K,) and the log."""
    model = create_embedded_clip(seed).train()
    captions = CaptionTokens(open_clip.get_tokenizer(EMBEDDED_MODEL_NAME), get_templates("imagenet_scene"))
    model.token_embedding = nn.Embedding.from_pretrained(
        model.token_embedding.weight.detach()[captions.token_ids].clone(), freeze=False
    )
    patch = model.visual.conv1.kernel_size[0]
    compositions = render_pictures(world, seed, pool_size, False, patch, threads)
    close_ups = render_pictures(world, seed, pool_size, True, patch, threads)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.98))
    warmup = max(1, round(WARMUP_SHARE * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warmup, 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1, s / steps)))),
    )
    rng = np.random.default_rng([seed, steps])
    rows, start = [], time.time()
    for step in range(steps):
        easy, rare_share = step < EASY_UNTIL * steps, RARE_NAME_SHARE if step >= PRIOR_FROM * steps else 0.5
        chosen = [rng.integers(0, pool_size, n) for n in (COMPOSITIONS_PER_STEP, CLOSE_UPS_PER_STEP)]
        images = torch.cat([compositions.images[chosen[0]], close_ups.images[chosen[1]]])
        fractions = np.concatenate([compositions.fractions[chosen[0]], close_ups.fractions[chosen[1]]])
        flipped = rng.random(len(images)) < 0.5
        images[flipped] = images[flipped].flip(-1)
        fractions[flipped] = fractions[flipped][:, :, ::-1]
        salient = np.concatenate([compositions.salient[chosen[0]], close_ups.salient[chosen[1]]])
        salient = salient[np.arange(len(salient)), rng.integers(0, salient.shape[1], len(salient))]
        names = torch.from_numpy(2 * salient + (rng.random(len(salient)) < rare_share))
        dense_count = len(images) if easy else COMPOSITIONS_PER_STEP
        owners, weights, materials = draw_regions(rng, fractions[:dense_count])

        inputs = last_block_input(model.visual, normalize_images(images))
        pooled = global_features(model.visual, inputs.tokens)
        inputs = dataclasses.replace(inputs, images=inputs.images[:dense_count], tokens=inputs.tokens[:dense_count])
        regions = REGION_FEATURES[region_features](model.visual, inputs, owners, weights)
        texts = torch.cat([captions.draw(rng, long=False), captions.draw(rng, long=True)])
        short, long = model.encode_text(texts, normalize=True).chunk(2)
        scale = model.logit_scale.exp()
        target = torch.from_numpy(name_frequencies(rare_share))[materials]
        region = sum(F.cross_entropy(scale * regions @ text.T, target) for text in (short, long)) / 2
        image = image_loss(scale * pooled @ short.T, names)
        optimizer.zero_grad()
        (region + image).backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        if step % 50 == 0 or step == steps - 1:
            accuracy = ((regions @ short.T).argmax(dim=1) // 2 == materials).float().mean()
            rows.append(
                {
                    "step": step,
                    "region_loss": round(region.item(), 4),
                    "image_loss": round(image.item(), 4),
                    "region_accuracy": round(accuracy.item(), 4),
                    "logit_scale": round(scale.item(), 3),
                    "seconds": round(time.time() - start, 1),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return model.eval(), captions.token_ids, rows


@torch.no_grad()
def evaluate(checkpoint: Path, world: World, seed: int, close_ups: int, scenes: int) -> dict[str, float]:
    """Zero-shot accuracy on unseen close-ups and MaskCLIP's accuracy and mIoU on unseen task scenes.

    All in percent; the mean is over the classes that occur. Query features are as in the package: the task's class
    names in all 85 templates.
    """
    model = build_embedded_clip(checkpoint)
    encoder = TextEncoder(model, open_clip.get_tokenizer(EMBEDDED_MODEL_NAME))
    templates = get_templates("imagenet_scene")
    queries = query_features(encoder, [[name] for name in EMBEDDED_CLASSES], templates)
    common = query_features(encoder, [[name] for name in name_vocabulary()[::2]], templates)
    seed += EVALUATION_SEED_OFFSET
    images, materials = zip(*(render_close_up(seed, index) for index in range(close_ups)), strict=True)
    images = normalize_images(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    pooled, materials = model.encode_image(images), torch.tensor(materials)
    confusion = torch.zeros(NUM_MATERIALS, NUM_MATERIALS, dtype=torch.float64)
    for index in range(scenes):
        scene = render_scene(seed, index, world)
        image = normalize_images(torch.from_numpy(scene.image).permute(2, 0, 1)[None])
        dense, inputs = dense_image_features(model.visual, image, ValueAttention())
        logits = (dense @ queries.T).transpose(1, 2).unflatten(2, inputs.grid)
        guess = F.interpolate(logits, size=scene.labels.shape, mode="bilinear", align_corners=False).argmax(dim=1)
        cells = torch.from_numpy(scene.labels).long().flatten() * NUM_MATERIALS + guess.flatten()
        confusion += torch.bincount(cells, minlength=NUM_MATERIALS**2).view(NUM_MATERIALS, NUM_MATERIALS)
    hits = confusion.diagonal()
    iou = hits / (confusion.sum(dim=0) + confusion.sum(dim=1) - hits)

    def percent(value: Tensor) -> float:
        return round(100 * float(value), 2)

    return {
        "close_up_accuracy_task_names": percent(((pooled @ queries.T).argmax(dim=1) == materials).float().mean()),
        "close_up_accuracy_common_names": percent(((pooled @ common.T).argmax(dim=1) == materials).float().mean()),
        "maskclip_pixel_accuracy": percent(hits.sum() / confusion.sum()),
        "maskclip_mIoU": percent(iou[confusion.sum(dim=1) > 0].mean()),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=EMBEDDED_CHECKPOINT, help="checkpoint to write (default: the package's)")
    parser.add_argument("--world", choices=sorted(WORLDS), default=EMBEDDED.name, help="world of the pictures")
    parser.add_argument("--log", help="JSON log to write (default: pretrain_log.json next to the checkpoint)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the world, the weights and the batches")
    parser.add_argument(
        "--region-features",
        choices=sorted(REGION_FEATURES),
        default="value",
        help="what the region loss is computed on: the value path, or the class token within the region",
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps")
    parser.add_argument(
        "--pool", type=int, default=POOL, help="compositions, and as many close-ups, to render and draw from"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--eval-scenes", type=int, default=EVAL_SCENES, help="unseen pictures for the log's accuracies")
    return parser


def pretrain(
    out: Path,
    world: World,
    seed: int,
    *,
    steps: int = STEPS,
    pool: int = POOL,
    threads: int = 1,
    eval_scenes: int = EVAL_SCENES,
    region_features: str = "value",
) -> dict[str, Any]:
    """Pretrain, and write the checkpoint to ``out``, atomically.

    Args:
        threads: CPU threads for rendering.
        region_features: a key of :data:`REGION_FEATURES`.

    Returns:
        The log: the settings, the seconds, the accuracies and the losses.
    """
    torch.set_flush_denormal(True)  # denormals of saturated probabilities slow down the CPU many times
    start = time.time()
    model, token_ids, rows = train(world, seed, steps, pool, threads, region_features)
    seconds = round(time.time() - start, 1)
    metadata = {
        "format": "pt",
        "model": EMBEDDED_MODEL_NAME,
        "world": world.name,
        "seed": str(seed),
        "steps": str(steps),
        "region_features": region_features,
    }
    save_embedded_checkpoint(out, model, token_ids, metadata)
    return {
        "command": f"{PROGRAM} --world {world.name} --seed {seed} --steps {steps} --pool {pool}"
        f" --region-features {region_features}",
        "world": world.name,
        "seed": seed,
        "steps": steps,
        "seconds": seconds,
        "threads": threads,
        "torch": torch.__version__,
        "tokens_kept": len(token_ids),
        "bytes": out.stat().st_size,
        **evaluate(out, world, seed, max(eval_scenes, 12), eval_scenes),
        "training": rows,
    }


@exit_on_error
def main() -> None:
    args = _parser().parse_args()
    args.out = check_output_path(args.out, "--out")
    if args.log is not None:
        args.log = check_output_path(args.log, "--log")
    for key in ("steps", "pool", "threads", "eval_scenes"):
        if getattr(args, key) < 1:
            raise ReclipError(f"--{key.replace('_', '-')} is {getattr(args, key)}; it must be at least 1")
    if args.out.suffix != ".safetensors":
        raise ReclipError(f"--out {args.out}: the file name must end in .safetensors")
    torch.set_num_threads(args.threads)
    report = pretrain(
        args.out,
        WORLDS[args.world],
        args.seed,
        steps=args.steps,
        pool=args.pool,
        threads=args.threads,
        eval_scenes=args.eval_scenes,
        region_features=args.region_features,
    )
    log = args.log or args.out.with_name("pretrain_log.json")
    with atomic_write(log) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "training"}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
