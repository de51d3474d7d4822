"""Prompt denoising by hand."""

import torch

from reclip_d2.config import load_config
from reclip_d2.inference.refinements import Denoise, Grid


def denoise(threshold: float) -> Denoise:
    return Denoise(load_config("", ["TEST.DENOISE.THRESHOLD", str(threshold)]))


def grid(probabilities, **arguments) -> Grid:
    """One row of patches of 8 x 8 pixels, from probabilities ``(patches, C)``."""
    logits = torch.tensor(probabilities).log().T[:, None]
    return Grid(logits, torch.zeros(3, 8, 8 * logits.shape[2]), (8, 8 * logits.shape[2]), **arguments)


def test_a_class_needs_one_confident_patch():
    before = grid([[0.6, 0.3, 0.1], [0.2, 0.35, 0.45]])
    after = denoise(0.4)(before).logits
    assert torch.equal(after[[0, 2]], before.logits[[0, 2]]) and (after[1] == -100).all()


def test_the_best_class_stays():
    after = denoise(0.99)(grid([[0.6, 0.3, 0.1]])).logits
    assert after[:, 0, 0].argmax() == 0 and (after[1:] == -100).all()


def test_patches_of_padding_do_not_count():
    logits = torch.tensor([[0.6, 0.4], [0.1, 0.9]]).log().T[:, None]
    padded = Grid(logits, torch.zeros(3, 8, 8), (8, 16))
    assert (denoise(0.5)(padded).logits[1] == -100).all()
    counted = Grid(logits, torch.zeros(3, 8, 8), (8, 16), padding_counts=True)
    assert torch.equal(denoise(0.5)(counted).logits, logits)
