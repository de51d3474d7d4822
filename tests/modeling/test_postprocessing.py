"""From the patch grid to the requested size.

Shape letters: B images, C classes, (h, w) patch grid, (H, W) size in pixels.
"""

import pytest
import torch
import torch.nn.functional as F

from reclip_d2.layers import use_kernels
from reclip_d2.modeling.postprocessing import (
    upsample_labels,
    upsample_logits,
)


def bilinear(values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Half-pixel bilinear resize of ``(h, w)``, value by value, in float64."""
    h, w = values.shape
    out = torch.empty(size, dtype=torch.float64)
    for i in range(size[0]):
        for j in range(size[1]):
            y = min(max((i + 0.5) * h / size[0] - 0.5, 0), h - 1)
            x = min(max((j + 0.5) * w / size[1] - 0.5, 0), w - 1)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            top = values[y0, x0] * (1 - (x - x0)) + values[y0, x1] * (x - x0)
            bottom = values[y1, x0] * (1 - (x - x0)) + values[y1, x1] * (x - x0)
            out[i, j] = top * (1 - (y - y0)) + bottom * (y - y0)
    return out


CASES = {
    "no padding": ((16, 24), (16, 24), (10, 30)),
    "padding, output of the image's size": ((16, 24), (13, 20), (13, 20)),
    "padding and another output": ((16, 24), (13, 20), (26, 41)),
    "nothing to do": ((4, 6), (4, 6), (4, 6)),
    "smaller": ((16, 24), (9, 17), (5, 7)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_logits_against_a_loop(case):
    padded, image, output = case
    logits = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    got = upsample_logits(logits, padded, image, output)
    assert got.shape == (2, 3, *output)
    large = bilinear(logits[1, 2], padded)[: image[0], : image[1]] if padded != image else logits[1, 2]
    expected = bilinear(large, output)
    torch.testing.assert_close(got[1, 2], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_labels_are_the_argmax_of_the_logits(case, kernels):
    logits = torch.randn(2, 5, 4, 6)
    with use_kernels(kernels):
        labels = upsample_labels(logits, *case)
    assert labels.dtype == torch.int64
    assert torch.equal(labels, upsample_logits(logits, *case).argmax(1))


def test_padding_is_cropped_before_the_resize():
    """Class 1 fills the padding, class 0 the image: no pixel of the output may be of class 1, though a resize of the
    whole grid would spread it over a quarter of the width."""
    logits = torch.zeros(1, 2, 1, 4)
    logits[0, 1, :, 3] = 1.0
    logits[0, 0, :, :3] = 1.0
    padded, image, output = (8, 32), (8, 24), (8, 24)
    wrong = F.interpolate(logits, size=output, mode="bilinear", align_corners=False).argmax(1)
    assert (wrong == 1).any()
    assert (upsample_labels(logits, padded, image, output) == 0).all()
    assert (upsample_logits(logits, padded, image, (16, 48)).argmax(1) == 0).all()


# ---- valid patches --------------------------------------------------------------------------------------------
