"""Logits on the grid and the mean of overlapping windows, against a brute-force version that holds everything in
memory.

Shape letters: C classes, (h, w) patch grid, (H, W) size in pixels.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from reclip_d2.data.tiling import window_starts
from reclip_d2.inference.grid_logits import GridLogits, bilinear_taps
from reclip_d2.inference.windows import SlidingLogits, Windows, blended_bands, ramp_weights, uniform_weights
from reclip_d2.layers import kernels_available
from reclip_d2.modeling.postprocessing import upsample_logits

CLASSES, PATCH = 3, 4


def random_window(seed: int, grid: tuple, padded: tuple, network: tuple, size: tuple) -> GridLogits:
    logits = torch.randn(CLASSES, *grid, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return GridLogits(logits, padded, network, size)


@pytest.mark.parametrize(
    ("grid", "padded", "network", "size"),
    [
        ((3, 5), (12, 20), (12, 20), (12, 20)),  # one resize, to the network's own size
        ((3, 5), (12, 20), (12, 20), (31, 17)),  # one resize, to another
        ((3, 5), (12, 20), (9, 18), (9, 18)),  # padding cropped
        ((3, 5), (12, 20), (11, 17), (40, 61)),  # padding cropped, then resized
        ((1, 1), (4, 4), (1, 3), (7, 2)),
        ((4, 4), (4, 4), (4, 4), (4, 4)),
    ],
)
def test_rows_of_a_window_are_those_of_the_plain_upsampling(grid, padded, network, size):
    window = random_window(0, grid, padded, network, size)
    expected = upsample_logits(window.logits[None], padded, network, size)[0]
    torch.testing.assert_close(window.rows(0, size[0]), expected, rtol=0, atol=1e-6)  # the matrix is in float32
    middle = size[0] // 2
    torch.testing.assert_close(window.rows(middle, size[0]), expected[:, middle:], rtol=0, atol=1e-6)


def test_ramps_by_hand():
    # Two windows of 8 that overlap by 4.
    first, second = ramp_weights([0, 4], 8)
    assert first.tolist() == [1, 1, 1, 1, 0.875, 0.625, 0.375, 0.125]
    assert second.tolist() == first.flip(0).tolist()
    assert (first[4:] + second[:4]).tolist() == [1, 1, 1, 1]
    assert ramp_weights([0], 5)[0].tolist() == [1] * 5
    assert ramp_weights([0, 5], 5)[1].tolist() == [1] * 5  # no overlap, no ramp


def test_a_window_overlapped_on_both_sides_has_the_lower_ramp():
    weights = ramp_weights([0, 2, 5], 6)  # overlaps of 4 and 3
    assert weights[1].tolist() == pytest.approx([0.125, 0.375, 0.625, 2.5 / 3, 1.5 / 3, 0.5 / 3])


def predictor(seed: int):
    """Windows of random logits; asked for twice, a window is the same. Remembers what it was asked for."""
    calls = []

    def predict(rows: slice, columns: slice) -> GridLogits:
        calls.append((rows.start, columns.start))
        height, width = rows.stop - rows.start, columns.stop - columns.start
        grid = (-(-height // PATCH), -(-width // PATCH))
        window = random_window(
            seed + 1000 * rows.start + columns.start,
            grid,
            (grid[0] * PATCH, grid[1] * PATCH),
            (height, width),
            (height, width),
        )
        return GridLogits(window.logits.float(), *list(vars(window).values())[1:])

    return predict, calls


def brute_force(image_size: tuple, window: tuple, stride: tuple, seed: int) -> np.ndarray:
    """Weighted mean at every pixel, by loops over pixels and windows, in float64."""
    height, width = image_size
    size = (min(window[0], height), min(window[1], width))
    tops, lefts = window_starts(height, size[0], stride[0]), window_starts(width, size[1], stride[1])
    predict, _ = predictor(seed)
    total, weights = np.zeros((CLASSES, height, width)), np.zeros((height, width))

    def ramp(starts: list, index: int, offset: int, length: int) -> float:
        before = starts[index - 1] + length - starts[index] if index else 0
        after = starts[index] + length - starts[index + 1] if index + 1 < len(starts) else 0
        return min(
            1,
            (offset + 0.5) / before if before > 0 else 1,
            (length - offset - 0.5) / after if after > 0 else 1,
        )

    for i, top in enumerate(tops):
        for j, left in enumerate(lefts):
            result = predict(slice(top, top + size[0]), slice(left, left + size[1]))
            padded = F.interpolate(result.logits[None].double(), size=result.padded_size, mode="bilinear")[0].numpy()
            for y in range(size[0]):
                for x in range(size[1]):
                    share = ramp(tops, i, y, size[0]) * ramp(lefts, j, x, size[1])
                    total[:, top + y, left + x] += share * padded[:, y, x]
                    weights[top + y, left + x] += share
    return total / weights


@pytest.mark.parametrize(
    ("image_size", "window", "stride"),
    [
        ((23, 31), (8, 8), (6, 6)),
        ((23, 31), (8, 12), (3, 9)),  # windows of several rows at a time
        ((8, 40), (8, 8), (8, 8)),  # no overlap but at the end
        ((5, 29), (8, 8), (6, 6)),  # lower than a window
        ((16, 16), (8, 8), (4, 4)),
        ((6, 7), (8, 8), (6, 6)),  # one window is enough
    ],
)
@pytest.mark.parametrize("memory", [1, 2000, 10**9])
def test_bands_equal_brute_force(image_size, window, stride, memory):
    predict, calls = predictor(7)
    bands = list(blended_bands(Windows(image_size, window, stride, ramp_weights), predict, memory))
    assert [rows.start for rows, _ in bands] == [0, *(rows.stop for rows, _ in bands[:-1])]
    assert bands[-1][0].stop == image_size[0]
    result = torch.cat([logits for _, logits in bands], dim=1).numpy()
    np.testing.assert_allclose(result, brute_force(image_size, window, stride, 7), atol=1e-5)
    assert len(calls) == len(set(calls))  # a window is predicted once


def test_memory_is_what_bounds_a_band():
    predict, _ = predictor(0)
    for memory in (1, 5_000, 50_000):
        for _, logits in blended_bands(Windows((40, 64), (16, 16), (12, 12), ramp_weights), predict, memory):
            assert logits.shape[1] == 1 or logits.numel() * 4 <= memory


def test_no_more_than_the_windows_of_two_rows_are_kept():
    """A window is predicted when its first row is wanted, not before."""
    predict, calls = predictor(0)
    for rows, _ in blended_bands(Windows((60, 20), (16, 16), (12, 12), ramp_weights), predict, 1):
        assert max(top for top, _ in calls) <= rows.start


def test_equal_windows_give_equal_pixels():
    def predict(rows: slice, columns: slice) -> GridLogits:
        size = (rows.stop - rows.start, columns.stop - columns.start)
        return GridLogits(torch.tensor([1.0, 2.0, -3.0])[:, None, None].expand(3, 2, 2), (8, 8), (8, 8), size)

    for _, logits in blended_bands(Windows((20, 30), (8, 8), (5, 5), ramp_weights), predict, 4000):
        torch.testing.assert_close(logits, torch.tensor([1.0, 2.0, -3.0])[:, None, None].expand_as(logits))


@pytest.mark.parametrize(("size", "window", "stride"), [((37, 53), (16, 20), (9, 20)), ((5, 40), (16, 16), (16, 7))])
def test_windows_cover_everything_and_keep_their_size(size, window, stride):
    windows = Windows(size, window, stride, uniform_weights)
    seen = torch.zeros(size)
    for row in range(len(windows.tops)):
        for rows, columns in windows.slices(row):
            assert rows.stop - rows.start == min(window[0], size[0])
            assert columns.stop - columns.start == min(window[1], size[1])
            seen[rows, columns] += 1
    assert seen.min() >= 1


# ---- sliding windows: a plain mean, then a resize ---------------------------------------------------------------


def sliding(area: tuple, window: tuple, stride: tuple, size: tuple) -> SlidingLogits:
    windows = Windows(area, window, stride, uniform_weights)
    predict, _ = predictor(11)
    logits = {row: [predict(*slices) for slices in windows.slices(row)] for row in range(len(windows.tops))}
    return SlidingLogits(windows, logits, size)


def plain_mean(logits: SlidingLogits, tops: list[int], lefts: list[int]) -> torch.Tensor:
    """At each pixel the mean over the windows that hold it, ``(1, C, *area)`` float64."""
    area, (height, width) = logits.windows.area, logits.windows.size
    result = torch.empty(1, CLASSES, *area, dtype=torch.float64)
    pixels = {
        (top, left): upsample_logits(w.logits[None].double(), w.padded_size, w.network_size, w.network_size)[0]
        for top, row in zip(tops, logits.logits.values(), strict=True)
        for left, w in zip(lefts, row, strict=True)
    }
    for i in range(area[0]):
        for j in range(area[1]):
            here = [
                values[:, i - top, j - left]
                for (top, left), values in pixels.items()
                if top <= i < top + height and left <= j < left + width
            ]
            result[0, :, i, j] = torch.stack(here).mean(0)
    return result


@pytest.mark.parametrize("size", [(11, 14), (29, 23), (7, 40), (1, 3)])
@pytest.mark.parametrize("memory", [1, 10**9])
def test_mean_of_sliding_windows_by_brute_force(size, memory):
    logits = sliding((11, 14), (6, 5), (4, 3), size)
    mean = plain_mean(logits, [0, 4, 5], [0, 3, 6, 9])
    expected = F.interpolate(mean, size, mode="bilinear", align_corners=False)[0]
    middle = size[0] // 2
    got = torch.cat([logits.rows(start, stop) for start, stop in ((0, middle), (middle, size[0])) if stop > start], 1)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)
    labels = logits.labels(memory)
    if memory == 1:
        assert labels is None
    else:
        assert torch.equal(labels, expected.argmax(0))


def test_a_sliding_window_larger_than_the_area_is_the_area():
    logits = sliding((5, 6), (9, 9), (3, 3), (10, 9))
    (only,) = logits.logits[0]
    expected = upsample_logits(only.logits[None], only.padded_size, (5, 6), (10, 9))[0]
    torch.testing.assert_close(logits.rows(0, 10), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("length", "size"), [(5, 5), (5, 12), (12, 5), (1, 4), (7, 1)])
def test_taps_are_those_of_a_bilinear_resize(length, size):
    values = torch.randn(length, generator=torch.Generator().manual_seed(0))
    first, second, share = bilinear_taps(length, size)
    expected = F.interpolate(values[None, None], size, mode="linear", align_corners=False)[0, 0]
    torch.testing.assert_close(values[first] * (1 - share) + values[second] * share, expected, rtol=0, atol=1e-6)


def test_windows_of_windows():
    """Tiles that are predicted in sliding windows: each tile's mean, blended."""
    inner = {}

    def predict(rows: slice, columns: slice) -> SlidingLogits:
        inner[rows.start, columns.start] = sliding((12, 10), (8, 8), (4, 4), (16, 16))
        return inner[rows.start, columns.start]

    tiles = Windows((16, 24), (16, 16), (16, 8), ramp_weights)
    result = torch.cat([band for _, band in blended_bands(tiles, predict, 3000)], 1)
    left, right = (inner[0, start].rows(0, 16) for start in (0, 8))
    torch.testing.assert_close(result[..., :8], left[..., :8])
    torch.testing.assert_close(result[..., 16:], right[..., 8:])
    ramp = (torch.arange(8) + 0.5) / 8
    torch.testing.assert_close(result[..., 8:16], left[..., 8:] * (1 - ramp) + right[..., :8] * ramp)


# ---- labels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("padded", "network", "size", "one_resize"),
    [
        ((12, 20), (12, 20), (31, 17), True),
        ((12, 20), (9, 18), (9, 18), True),
        ((12, 20), (11, 17), (40, 61), False),
    ],
)
def test_labels_from_the_grid(padded, network, size, one_resize, monkeypatch):
    """With the fused operator if one resize is enough, for any memory; otherwise only if the logits fit into memory."""
    logits = random_window(3, (3, 5), padded, network, size)
    expected = upsample_logits(logits.logits[None], padded, network, size)[0].argmax(0)
    assert torch.equal(logits.labels(10**9), expected)
    if one_resize and kernels_available("cpu"):
        monkeypatch.setattr(F, "interpolate", None)  # the (C, H, W) logits are not made
    little = logits.labels(1)
    assert torch.equal(little, expected) if one_resize else little is None
