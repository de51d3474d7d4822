"""Which windows of a GeoTIFF are trained on."""

import numpy as np
import pytest

from reclip_d2.config import load_config
from reclip_d2.data.scene_windows import WindowPlan, draw_windows
from reclip_d2.errors import ReclipError


class FakeScene:
    """A scene whose pixels (r, c) have data where ``valid``, and the colour (r, c, 0)."""

    def __init__(self, valid: np.ndarray) -> None:
        self.valid, self.read = valid, []
        self.shape = (*valid.shape, 3)

    def window_and_share(self, rows, columns):
        self.read.append((rows.start, columns.start))
        share = self.valid[rows, columns].mean()
        r, c = np.mgrid[rows, columns]
        return (np.stack([r, c, 0 * r], -1).astype(np.uint8) if share else None), float(share)

    def window(self, rows, columns):
        return self.window_and_share(rows, columns)[0]


def plan(**keys) -> WindowPlan:
    return WindowPlan(**{"size": 10, "stride": 10, "most": 100, "min_valid": 0.5, "seed": 0, **keys})


def places(scene, name="a", **keys) -> list[tuple[int, int]]:
    """Places of the windows, whose pixels are checked."""
    found = []
    for top, left, pixels in draw_windows(scene, plan(**keys), name):
        assert pixels.shape[:2] == (min(10, scene.shape[0]), min(10, scene.shape[1]))
        assert pixels[0, 0].tolist() == [top, left, 0] and pixels[-1, -1, 0] == top + pixels.shape[0] - 1
        found.append((top, left))
    return found


def test_all_windows_cover_the_scene():
    scene = FakeScene(np.ones((25, 31), bool))
    expected = [(top, left) for top in (0, 10, 15) for left in (0, 10, 20, 21)]
    assert places(scene) == expected and plan().count((25, 31)) == 12
    assert places(scene, stride=5)[:3] == [(0, 0), (0, 5), (0, 10)]
    assert places(FakeScene(np.ones((7, 10), bool))) == [(0, 0)] and plan().count((7, 10)) == 1


def test_a_bounded_number_is_drawn_by_seed_and_name():
    scene = FakeScene(np.ones((100, 100), bool))
    first = places(scene, most=12)
    assert len(set(first)) == 12 and first == sorted(first) and plan(most=12).count((100, 100)) == 12
    assert len(scene.read) == 12  # no other is read
    assert places(scene, most=12) == first
    assert places(scene, most=12, seed=1) != first and places(scene, "b", most=12) != first
    drawn = [place for seed in range(40) for place in places(scene, most=12, seed=seed)]
    assert len(set(drawn)) > 95  # of 100: any may be drawn


def test_windows_with_too_little_data_are_passed_over():
    valid = np.zeros((50, 50), bool)
    valid[:, 20:] = True  # columns 2 to 4 of windows
    valid[20:30, 20:26] = False  # 40 % of window (20, 20) have data
    expected = {(top, left) for top in range(0, 50, 10) for left in (20, 30, 40)} - {(20, 20)}
    assert set(places(FakeScene(valid))) == expected
    assert set(places(FakeScene(valid), min_valid=0.4)) == expected | {(20, 20)}
    # The bound counts windows that are taken.
    for seed in range(5):
        found = places(FakeScene(valid), most=14, seed=seed)
        assert set(found) == expected and len(found) == 14
    assert len(places(FakeScene(valid), most=9)) == 9


def test_a_scene_with_little_data_has_its_fullest_window():
    valid = np.zeros((30, 30), bool)
    valid[12:14, 21:24] = valid[0, 0] = True
    assert places(FakeScene(valid)) == [(10, 20)]
    assert places(FakeScene(valid), most=1) == [(10, 20)]
    assert places(FakeScene(valid), min_valid=0) == [(0, 0), (10, 20)]
    assert places(FakeScene(valid & False)) == [] == places(FakeScene(valid & False), min_valid=0)


@pytest.mark.parametrize("stride", [1, 3, 10])
def test_the_number_is_that_of_the_places(stride):
    for side in range(1, 45):
        assert plan(stride=stride, most=10**6).count((side, 23)) == len(plan(stride=stride).places((side, 23)))


def test_too_many_places():
    assert plan().count((1 << 31, 1 << 31)) == 100
    with pytest.raises(ReclipError, match=r"of 1000000 x 1000000 pixels has 10,000,000,000 windows of 10 pixels"):
        plan().places((1_000_000, 1_000_000))


def test_keys():
    opts = ["INPUT.TILES.SIZE", "200", "INPUT.GEO.WINDOWS.OVERLAP", "0.25", "INPUT.GEO.WINDOWS.PER_SCENE", "7"]
    cfg = load_config([], opts)
    assert WindowPlan.from_config(cfg) == WindowPlan(size=200, stride=150, most=7, min_valid=0.5, seed=0)
    with pytest.raises(ReclipError, match=r"INPUT.GEO.WINDOWS.MIN_VALID is 1.5"):
        load_config([], ["INPUT.GEO.WINDOWS.MIN_VALID", "1.5"])
