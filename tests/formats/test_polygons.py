"""Exact polygons, against some drawn by hand and an independent filling rule."""

import numpy as np
import pytest
from scipy import ndimage

from reclip_d2.formats import polygons as module


def winding(polygon: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """How often a polygon winds around the centre of each pixel, and how many edges lie to its left."""
    signed, count = np.zeros(shape, dtype=int), np.zeros(shape, dtype=int)
    for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        assert x0 == x1 or y0 == y1
        top, bottom = min(y0, y1), max(y0, y1)
        if x0 == x1:
            signed[top:bottom, x0:] += 1 if y1 < y0 else -1
            count[top:bottom, x0:] += 1
    return signed, count


def polygons(mask: np.ndarray) -> list[np.ndarray]:
    """The polygons of a mask; the rest is of two other labels."""
    rest = np.where(np.indices(mask.shape).sum(0) % 3 == 0, 9, 0)
    return dict(module.polygons(np.where(mask, 1, rest).astype(np.uint16), [1, 5])).get(1, [])


def mask_of(*rows: str) -> np.ndarray:
    return np.array([[c == "#" for c in row] for row in rows])


def test_one_pixel_is_a_square():
    assert [p.tolist() for p in polygons(mask_of("..", ".#"))] == [[[1, 1], [2, 1], [2, 2], [1, 2]]]


def test_an_l_has_six_corners():
    assert [p.tolist() for p in polygons(mask_of("#.", "##"))] == [[[0, 0], [1, 0], [1, 1], [2, 1], [2, 2], [0, 2]]]


def test_pixels_that_touch_at_a_corner_are_two_regions():
    found = polygons(mask_of("#.", ".#"))
    assert [p.tolist() for p in found] == [[[0, 0], [1, 0], [1, 1], [0, 1]], [[1, 1], [2, 1], [2, 2], [1, 2]]]
    assert len(polygons(mask_of(".#", "#."))) == 2


def test_a_hole_is_cut_out_through_a_slit():
    (polygon,) = polygons(mask_of("###", "#.#", "###"))
    # Around the outside, from the left side at y = 1 to the hole, around it the other way, and back.
    outside = [[0, 0], [3, 0], [3, 3], [0, 3]]
    assert polygon.tolist() == [*outside, [0, 1], [1, 1], [1, 2], [2, 2], [2, 1], [1, 1], [0, 1]]


def test_an_empty_and_a_full_mask():
    assert polygons(np.zeros((3, 4), dtype=bool)) == []
    assert [p.tolist() for p in polygons(np.ones((3, 4), dtype=bool))] == [[[0, 0], [4, 0], [4, 3], [0, 3]]]


@pytest.mark.parametrize(
    "rows",
    [
        ("#######", "#.#.#.#", "#######"),  # holes whose slits end at other holes
        ("#####", "#.#.#", "##.##", "#.#.#", "#####"),  # holes that touch at corners
        ("#####", "#...#", "#.#.#", "#...#", "#####"),  # an island in a hole
        ("#####", "#...#", "#.#.#", "#.###", "#####"),  # a peninsula in a hole
        (".###.", "##.##", "#...#", "##.##", ".###."),
        ("####", "#.##", "##.#", "###."),  # a hole that is open only at a corner
    ],
)
def test_shapes_of_holes(rows):
    check(mask_of(*rows))


def test_random_masks():
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width = rng.integers(1, 12, 2)
        check(rng.random((height, width)) < rng.choice([0.3, 0.6, 0.9]))


def check(mask: np.ndarray) -> None:
    """Each region has one polygon, which by both fill rules encloses the centres of its pixels and no others."""
    regions, count = ndimage.label(mask)  # joined by sides, numbered in the order of their first pixel
    found = polygons(mask)
    assert len(found) == count
    for number, polygon in enumerate(found, start=1):
        signed, crossings = winding(polygon, mask.shape)
        assert np.array_equal(signed, regions == number)
        assert np.array_equal(crossings % 2, regions == number)
        assert (polygon != np.roll(polygon, -1, axis=0)).any(axis=1).all()


@pytest.mark.parametrize("block", [1, 20, 1 << 24])
def test_all_labels_at_once(monkeypatch, block):
    monkeypatch.setattr(module, "_BLOCK", block)  # larger label maps are compared in parts
    labels = np.random.default_rng(0).integers(0, 4, (9, 7)).astype(np.uint8)
    found = dict(module.polygons(labels, [3, 0, 1, 200]))
    assert list(found) == [0, 1, 3]
    for label, regions in found.items():
        assert [p.tolist() for p in regions] == [p.tolist() for p in polygons(labels == label)]
