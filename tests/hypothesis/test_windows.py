"""Windows of Eq. (6) and their crops.

Shape letters: N windows, (H, W) image size in pixels.
"""

import pytest
import torch
import torch.nn.functional as F

from reclip_d2.errors import ReclipError
from reclip_d2.hypothesis.windows import _grid_of, crop_windows, crops_by_products, cut_crops


def test_sixth_of_an_image_of_96_pixels_by_hand():
    """Windows of 16 pixels at a stride of 8: 0, 8, ..., 80 along each axis."""
    windows = crop_windows(96, 96, 1 / 6)
    starts = list(range(0, 81, 8))
    assert len(starts) == 11
    assert windows.tolist() == [[x, y, x + 16, y + 16] for y in starts for x in starts]
    assert windows.dtype == torch.int64 and len(windows) == 121


def test_half_of_a_wide_image_by_hand():
    """r = 1/2: windows of 5 x 10 at a stride of 2.5 (to even) and 5."""
    assert crop_windows(10, 20, 0.5).tolist() == [
        [0, 0, 10, 5], [5, 0, 15, 5], [10, 0, 20, 5],
        [0, 2, 10, 7], [5, 2, 15, 7], [10, 2, 20, 7],
        [0, 5, 10, 10], [5, 5, 15, 10], [10, 5, 20, 10],
    ]  # fmt: skip


def test_the_whole_image():
    assert crop_windows(37, 53, 1).tolist() == [[0, 0, 53, 37]]
    assert crop_windows(37, 53, 1.0).tolist() == [[0, 0, 53, 37]]


@pytest.mark.parametrize("size", [(375, 500), (97, 131), (1024, 2048), (7, 300), (5, 5), (1, 1)])
@pytest.mark.parametrize(("ratio", "number"), [(1 / 6, 121), (1 / 4, 49), (1 / 3, 25), (0.5, 9)])
def test_any_size_has_as_many_windows_of_one_size_that_reach_every_border(size, ratio, number):
    height, width = size
    windows = crop_windows(height, width, ratio)
    assert len(windows) == number
    x0, y0, x1, y1 = windows.unbind(1)
    assert (x1 - x0).unique().tolist() == [max(1, round(width * ratio))]
    assert (y1 - y0).unique().tolist() == [max(1, round(height * ratio))]
    assert x0.min() == y0.min() == 0 and x1.max() == width and y1.max() == height
    steps = x0.unique().diff()
    assert len(steps) == 0 or steps.max() - steps.min() <= 1  # evenly, up to rounding


def test_every_pixel_is_seen():
    seen = torch.zeros(97, 131)
    for x0, y0, x1, y1 in crop_windows(97, 131, 1 / 6).tolist():
        seen[y0:y1, x0:x1] += 1
    assert seen.min() >= 1


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, 6])
def test_bad_ratio(ratio):
    with pytest.raises(ReclipError, match=r"HYPOTHESIS\.WINDOW_RATIO is .* above 0 and at most 1"):
        crop_windows(96, 96, ratio)


def test_crops_are_slices_when_nothing_is_resized():
    image = torch.randint(0, 256, (3, 20, 30)).float()
    windows = torch.tensor([[0, 0, 8, 6], [22, 14, 30, 20], [5, 3, 13, 9]])
    crops = cut_crops(image, windows, (6, 8))
    assert crops.shape == (3, 3, 6, 8)
    for crop, (x0, y0, x1, y1) in zip(crops, windows.tolist(), strict=True):
        torch.testing.assert_close(crop, image[:, y0:y1, x0:x1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [(5, 4), (24, 32)])
def test_crops_are_resized_bicubically_and_stay_in_range(size):
    image = (torch.rand(3, 24, 24) > 0.5).float() * 255  # overshoots when it is enlarged
    windows = torch.tensor([[0, 0, 12, 12], [12, 12, 24, 24]])
    crops = cut_crops(image, windows, size)
    assert crops.min() >= 0 and crops.max() <= 255
    for crop, (x0, y0, x1, y1) in zip(crops, windows.tolist(), strict=True):
        expected = F.interpolate(image[None, :, y0:y1, x0:x1], size=size, mode="bicubic", antialias=True)[0]
        torch.testing.assert_close(crop, expected.clamp(0, 255), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("height", "width", "ratio"), [(50, 70, 1 / 6), (33, 21, 0.5), (20, 20, 1.0), (300, 400, 1 / 3)]
)
def test_crops_of_a_grid_by_products(height, width, ratio):
    """As on a GPU: equal to the resized slices, when they are enlarged and when they are made smaller."""
    image, windows = torch.randint(0, 256, (3, height, width)).float(), crop_windows(height, width, ratio)
    expected = cut_crops(image, windows, (32, 24))
    found = crops_by_products(image, *_grid_of(windows), (32, 24))
    assert found.min() >= 0 and found.max() <= 255
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_windows_that_are_no_grid():
    assert _grid_of(torch.tensor([[0, 0, 8, 6], [22, 14, 30, 20], [5, 3, 13, 9]])) is None
    assert _grid_of(torch.tensor([[0, 0, 8, 6], [4, 0, 13, 6]])) is None  # other widths
    rows, columns = _grid_of(torch.tensor([[2, 1, 4, 9], [3, 1, 5, 9]]))
    assert (rows.starts, rows.length, columns.starts, columns.length) == ((1,), 8, (2, 3), 2)
