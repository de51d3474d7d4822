"""Refined predictions: views whose probabilities are averaged, and refinements in the predictor."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from reclip_d2.config import load_config
from reclip_d2.inference import ImagePredictor
from reclip_d2.inference.views import ViewPlan
from tests.helpers import make_maskclip, make_rectified, make_student, random_image


def image_of(height: int, width: int) -> np.ndarray:
    return random_image(0, height, width).permute(1, 2, 0).contiguous().numpy()


def predictor(model, *opts: str) -> ImagePredictor:
    return ImagePredictor.from_config(model.eval(), load_config("", ["INPUT.MIN_SIZE_TEST", "0", *opts]))


def logits_of(predictor: ImagePredictor, image: np.ndarray) -> torch.Tensor:
    return torch.cat([band.logits for band in predictor.bands(image)], dim=1)


def test_plans():
    assert ViewPlan.from_config(load_config("")) is None
    flip = load_config("", ["TEST.REFINE", "['flip']"])
    assert ViewPlan.from_config(flip) == ViewPlan((1.0,), True)
    scales = load_config("", ["TEST.REFINE", "['scales']", "TEST.SCALES", "[0.5, 2.0]"])
    assert ViewPlan.from_config(scales) == ViewPlan((0.5, 2.0), False)


@pytest.mark.parametrize("size", [(32, 40), (27, 35)])
@pytest.mark.parametrize("window", [False, True])
def test_mean_of_the_mirrored_and_scaled_views(size, window):
    """Against predictions of images that were mirrored and resized by hand."""
    model, image = make_rectified(), image_of(*size)
    opts = ["TEST.SLIDING_WINDOW.ENABLED", str(window), "TEST.SLIDING_WINDOW.SIZE", "[24, 24]"]
    opts += ["TEST.SLIDING_WINDOW.STRIDE", "[16, 16]"]
    plain = predictor(model, *opts)
    found = logits_of(predictor(model, *opts, "TEST.REFINE", "['flip', 'scales']", "TEST.SCALES", "[1.0, 1.5]"), image)
    total = torch.zeros_like(found)
    for scale in (1.0, 1.5):
        tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        if scale != 1:
            tensor = F.interpolate(tensor, [round(side * scale) for side in size], mode="bilinear")
        for mirrored in (False, True):
            view = tensor[0].flip(-1) if mirrored else tensor[0]
            logits = torch.cat([band.logits for band in plain.image_bands(view, size)], dim=1)
            total += (10 * logits).softmax(0).flip(-1) if mirrored else (10 * logits).softmax(0)
    torch.testing.assert_close(found.exp(), total / 4, rtol=0, atol=1e-5)


@pytest.mark.parametrize("memory", ["1", "256"])
def test_labels_are_those_of_the_logits(memory):
    for model in (make_maskclip(), make_student(make_maskclip())):
        refined = predictor(model, "TEST.REFINE", "['flip']", "TEST.BAND_MEMORY", memory)
        image = image_of(64, 70)
        assert np.array_equal(refined.labels(image), logits_of(refined, image).argmax(0).numpy())


@pytest.mark.parametrize(
    "refine", ["['denoise']", "['region_vote']", "['lposs', 'pamr']", "['denoise', 'lposs', 'pamr', 'flip']"]
)
@pytest.mark.parametrize("make", [make_maskclip, make_rectified])
def test_refinements_in_the_predictor(make, refine):
    model, image = make(), image_of(37, 45)
    refined = predictor(model, "TEST.REFINE", refine, "TEST.DENOISE.THRESHOLD", "0.9")
    logits = logits_of(refined, image)
    assert logits.shape == (model.num_classes, 37, 45) and torch.isfinite(logits).all()
    assert np.array_equal(refined.labels(image), logits.argmax(0).numpy())
    assert refined.refines and not predictor(model).refines
    few = refined.for_classes([2, 0])
    assert set(np.unique(few.labels(image))) <= {0, 1}


def test_a_mirrored_image_gives_the_mirrored_labels():
    """With both views, a prediction does not depend on the side."""
    model, image = make_maskclip(), image_of(32, 40)
    refined = predictor(model, "TEST.REFINE", "['flip']")
    mirrored = logits_of(refined, np.ascontiguousarray(image[:, ::-1]))
    torch.testing.assert_close(mirrored.flip(-1), logits_of(refined, image), rtol=0, atol=1e-4)
