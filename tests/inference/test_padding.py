"""Padding has no say where a dense attention mixes patches: everything that pads an image passes its size on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reclip_d2.backbones.dense_attention import AttentionInput, DenseAttention
from reclip_d2.data.tiling import SlidingWindow, Tiling
from reclip_d2.engine.calibration import calibrate
from reclip_d2.evaluation.linear_probe import LinearProbe
from reclip_d2.evaluation.logit_parts import logit_parts
from reclip_d2.evaluation.preferences import mean_probability
from reclip_d2.inference import ImagePredictor
from reclip_d2.modeling.meta_arch.base import LanguageSegmentor
from tests.backbones.literal import PATCH, literal_layer_norm, literal_tokens
from tests.helpers import make_maskclip, make_rectified, random_image

NO_TILES = Tiling(10_000, 1024, 0.25)
HEIGHT, WIDTH = 27, 34  # padded to 32 x 40; the centres of 3 x 4 of the 4 x 5 patches are in the image
VALID = torch.zeros(4, 5, dtype=torch.bool)
VALID[:3, :4] = True


class MeanAttention(DenseAttention):
    """Adds the mean value of the image's patches to the value of each patch."""

    name = "mean"

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor | None] = []

    def forward(self, inputs: AttentionInput) -> Tensor:
        self.seen.append(inputs.valid)
        values = inputs.block.values(inputs.block.norm(inputs.patches))
        weights = values.new_ones(values.shape[:2]) if inputs.valid is None else inputs.valid.to(values.dtype)
        mean = torch.einsum("bn,bne->be", weights, values) / weights.sum(1, keepdim=True)
        return inputs.block.output(values + mean[:, None])


def mixing(model: LanguageSegmentor) -> LanguageSegmentor:
    model.backbone.attention = MeanAttention()
    return model.eval()


def literal_features(model: LanguageSegmentor, image: Tensor) -> Tensor:
    """Z ``(D, h, w)`` of a padded, normalised image, with the mean over :data:`VALID`."""
    visual = model.backbone.clip.visual
    tokens = literal_tokens(visual, image)[None]
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        tokens = block(tokens)
    width = last.attn.embed_dim
    values = literal_layer_norm(tokens[0, 1:], last.ln_1) @ last.attn.in_proj_weight[2 * width :].T
    values = values + last.attn.in_proj_bias[2 * width :]
    values = values + values[VALID.flatten()].mean(0)
    out = values @ last.attn.out_proj.weight.T + last.attn.out_proj.bias
    features = literal_layer_norm(out, visual.ln_post) @ visual.proj
    return (features / features.norm(dim=1, keepdim=True)).T.unflatten(1, (4, 5))


@torch.no_grad()
def test_the_prediction_of_a_padded_image_is_the_masked_literal():
    model, image = mixing(make_maskclip()), random_image(3, HEIGHT, WIDTH)
    padded = F.pad(model.normalize(image), (0, -WIDTH % PATCH, 0, -HEIGHT % PATCH))
    logits = torch.einsum("dhw,cd->chw", literal_features(model, padded), model.query_features)
    expected = F.interpolate(logits[None], (32, 40), mode="bilinear")[0, :, :HEIGHT, :WIDTH]
    predictor = ImagePredictor(model, [], NO_TILES, 10**6)
    found = torch.cat([band.logits for band in predictor.bands(image.permute(1, 2, 0).numpy())], dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model([{"image": image}])[0]["sem_seg"], expected, rtol=0, atol=1e-5)
    without = F.interpolate(model.mask_logits(padded[None]), (32, 40), mode="bilinear")[0, :, :HEIGHT, :WIDTH]
    assert (without - expected).abs().max() > 1e-3  # the mask matters


def predict(model: LanguageSegmentor, record: dict) -> None:
    ImagePredictor(model, [], NO_TILES, 10**6).labels(record["image"].permute(1, 2, 0).numpy())


def calibrated(model: LanguageSegmentor, record: dict) -> None:
    model.calibration = "class"
    calibrate(model, [model.view_encoder(record["image"])[0]])


def probe(model: LanguageSegmentor, record: dict) -> None:
    probe = LinearProbe(model)
    model.backbone.attention.seen.clear()  # of zeros, for the width
    probe.train()([{**record, "sem_seg": torch.zeros(HEIGHT, WIDTH, dtype=torch.int64)}])
    probe.eval()([record])


USES = {
    "forward": (make_maskclip, lambda model, record: model([record])),
    "rectified": (make_rectified, predict),
    "maskclip": (make_maskclip, predict),
    "key smoothing": (lambda: make_maskclip(key_smoothing=0.9), predict),
    "parts": (make_rectified, lambda model, record: logit_parts(model, lambda record: record, record)),
    "preferences": (make_maskclip, lambda model, record: mean_probability(model, lambda record: record, [record])),
    "calibration": (make_maskclip, calibrated),
    "probe": (make_rectified, probe),
}


@pytest.mark.parametrize(("make", "use"), USES.values(), ids=USES)
def test_all_uses_of_a_padded_image_tell_the_padding_apart(make: Callable, use: Callable):
    model = mixing(make())
    use(model, {"image": random_image(3, HEIGHT, WIDTH)})
    assert model.backbone.attention.seen
    for valid in model.backbone.attention.seen:
        assert torch.equal(valid, VALID.flatten()[None])


def test_windows_that_are_padded():
    model = mixing(make_maskclip())
    predictor = ImagePredictor(model, [], NO_TILES, 10**6, SlidingWindow((HEIGHT, WIDTH), (HEIGHT, WIDTH)))
    predictor.labels(random_image(3, HEIGHT, 2 * WIDTH).permute(1, 2, 0).numpy())
    assert [valid.sum() for valid in model.backbone.attention.seen] == [12, 12]
