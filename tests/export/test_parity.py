"""The comparison of a file's output with the model's."""

import math

import pytest
import torch

from reclip_d2.export.parity import agreement, check_image, reference_logits
from reclip_d2.layers import use_kernels
from tests.export.conftest import MODELS, build, logits_of
from tests.helpers import random_image

# Three classes, two pixels: the labels are 0 and 2.
LOGITS = torch.tensor([[[3.0, 1.0]], [[2.0, -4.0]], [[-1.0, 1.5]]])


def test_logits():
    result = agreement(LOGITS, LOGITS + torch.tensor([[[0.0, 0.75]], [[0.0, 0.0]], [[-0.5, 0.0]]]))
    assert (result.size, result.difference, result.span, result.equal) == ((1, 2), 0.75, 7.0, 0.5)
    assert result.within(0.75 / 7) and not result.within(0.74 / 7)
    assert str(result) == "1 x 2: largest difference 0.75 of logits that span 7, labels equal 50.000 %"
    assert agreement(LOGITS, LOGITS).difference == 0 and agreement(LOGITS, LOGITS).within(1e-9)


def test_labels():
    def of(labels, ids=None):
        result = agreement(LOGITS, torch.tensor([labels], dtype=torch.uint8), ids)
        return result.difference, result.equal

    assert of([0, 2]) == (0.0, 1.0)
    assert of([1, 2]) == (1.0, 0.5)  # 3 instead of 2
    assert of([0, 0]) == (0.5, 0.5)
    assert of([0, 3]) == (math.inf, 0.5)  # no class
    # Classes 1 and 2 share the id 255.
    assert of([7, 255], [7, 255, 255]) == (0.0, 1.0)
    assert of([255, 255], [7, 255, 255]) == (1.0, 0.5)
    assert "logit below the largest" in str(agreement(LOGITS, torch.zeros(1, 2, dtype=torch.uint8)))


@pytest.mark.parametrize(
    "output",
    [LOGITS * float("nan"), LOGITS[:1], LOGITS[:, :, :1], LOGITS[None], torch.zeros(2, dtype=torch.uint8)],
)
def test_other_shapes_and_nan_never_agree(output):
    result = agreement(LOGITS, output)
    assert math.isnan(result.difference) and not result.within(1e9)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [(32, 40), (45, 61)])
def test_the_reference_is_what_the_model_predicts(name, size):
    model = build(name)
    image = random_image(3, *size)
    with use_kernels(False):
        expected = logits_of(model, image[None])[0]
    torch.testing.assert_close(reference_logits(model, image), expected)


def test_images():
    image = check_image(0, (31, 50))
    assert image.shape == (3, 31, 50) and image.dtype == torch.uint8
    assert image.float().std() > 20
    assert torch.equal(image, check_image(0, (31, 50))) and not torch.equal(image, check_image(1, (31, 50)))
