"""Features on disk (``reclip_d2.features.shards``)."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from detectron2.data import transforms as T
from detectron2.data.transforms import ResizeTransform
from fvcore.transforms.transform import CropTransform, HFlipTransform

from reclip_d2.errors import ReclipError
from reclip_d2.features.shards import Placement, Shards, StoredView, shard_ranges

WHOLE = Placement((100, 200), ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)))


def view(number: int, height: int = 2, width: int = 3, placement: Placement = WHOLE) -> StoredView:
    features = torch.full((height, width, 4), float(number), dtype=torch.float16)
    return StoredView(features, (16 * height, 16 * width - 5), placement)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, [range(0, 1)]),
        (16, [range(0, 16)]),
        (17, [range(0, 16), range(16, 17)]),
        (40, [range(0, 16), range(16, 32), range(32, 40)]),
    ],
)
def test_ranges_by_hand(count, expected):
    assert shard_ranges(count) == expected


def test_no_more_than_a_thousand_files():
    ranges = shard_ranges(100_001)
    assert len(ranges) <= 1000
    assert [k for views in ranges for k in views] == list(range(100_001))


def test_views_come_back_as_they_were(tmp_path):
    shards = Shards(tmp_path / "store", 18, 4)
    assert shards.missing() == [0, 1]
    shards.write(0, [view(k, height=1 + k % 3) for k in range(16)])
    assert shards.missing() == [1]
    flipped = Placement((7, 9), ((-0.1, 0.0, 1 / 3), (0.0, 2.0, -5.0)))
    shards.write(1, [view(16, placement=flipped), view(17)])
    assert shards.missing() == []
    again = Shards(tmp_path / "store", 18, 4)
    for number in (17, 3, 16, 0):
        found = again.read(number)
        assert found.features.dtype == torch.float16 and (found.features == number).all()
    assert again.read(4).features.shape == (2, 3, 4) and again.read(4).size == (32, 43)
    assert again.read(16).placement == flipped and again.read(17).placement == WHOLE
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["0000.safetensors", "0001.safetensors"]


def test_many_files_are_not_open_at_once(tmp_path):
    shards = Shards(tmp_path, 16 * 70, 4)
    for number, views in enumerate(shards.ranges):
        shards.write(number, [view(k % 100, 1, 1) for k in views])
    for number in range(0, 16 * 70, 16):
        assert (shards.read(number).features == number % 100).all()
    assert len(shards._open) == 64


def _cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def _rubbish(path):
    path.write_bytes(b"no tensors")


def _of_another_width(path):
    Shards(path.parent, 1, 5).write(0, [StoredView(torch.zeros(2, 2, 5, dtype=torch.float16), (32, 32), WHOLE)])


def _without_entries(path):
    safetensors.torch.save_file({"0": torch.zeros(2, 2, 4, dtype=torch.float16)}, path)


ENTRIES = '[{"size": [32, 32], "image_size": [32, 32], "matrix": [[1, 0, 0], [0, 1, 0]]}]'


def _of_float32(path):
    safetensors.torch.save_file({"0": torch.zeros(2, 2, 4)}, path, {"views": ENTRIES})


@pytest.mark.parametrize("damage", [_cut, _rubbish, _of_another_width, _without_entries, _of_float32])
def test_damaged_files_are_named_and_made_again(tmp_path, damage):
    shards = Shards(tmp_path, 1, 4)
    shards.write(0, [view(0)])
    damage(shards.file(0))
    with pytest.raises(ReclipError, match="0000.safetensors was damaged and has been removed: run again"):
        Shards(tmp_path, 1, 4).read(0)
    assert shards.missing() == [0]


def test_placement_is_what_the_transforms_do():
    transforms = T.TransformList([ResizeTransform(40, 60, 80, 90), CropTransform(7, 5, 50, 60), HFlipTransform(50)])
    placement = Placement.of((40, 60), transforms)
    points = np.array([[0.0, 0.0], [59.5, 12.25], [30.0, 40.0]])
    expected = np.array([[50 - (1.5 * x - 7), 2 * y - 5] for x, y in points])
    np.testing.assert_allclose(placement.apply_coords(points), expected, atol=1e-12)
    assert placement.image_size == (40, 60)


def mapped_bytes(name: str) -> int:
    """Resident bytes of this process's mappings of a file."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            ours = line.endswith(name)
        elif ours and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="counts the pages of Linux's memory maps")
def test_reading_a_view_reads_its_pages_only(tmp_path):
    """A shard of 32 views of 1 MiB: opening it reads no features, and a view its own megabyte, up to whole pages, which
    can be 2 MiB large at both ends."""
    shards = Shards(tmp_path / "pages", 32, 512)
    shards.ranges = [range(32)]
    one = torch.zeros(32, 32, 512, dtype=torch.float16)
    shards.write(0, [StoredView(one + k, (512, 512), WHOLE) for k in range(32)])
    again = Shards(tmp_path / "pages", 32, 512)
    again.ranges = [range(32)]
    name, mib = str(again.file(0)), 1 << 20
    assert again.missing() == [] and mapped_bytes(name) < mib / 4
    for count, number in enumerate((3, 19), start=1):
        features = again.read(number).features
        assert (features == number).all() and features.untyped_storage().nbytes() >= mib
        assert count * mib * 0.9 <= mapped_bytes(name) <= count * 5 * mib
