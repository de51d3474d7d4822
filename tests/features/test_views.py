"""Fixed views of training images (``reclip_d2.features.views``)."""

import numpy as np
import pytest
import torch
from PIL import Image

from reclip_d2.config import load_config
from reclip_d2.data.dataset_mapper import UnlabelledDatasetMapper
from reclip_d2.errors import ReclipError
from reclip_d2.features.views import ViewPlan, Views


@pytest.fixture
def records(tmp_path) -> list[dict]:
    found = []
    for number, (height, width) in enumerate([(40, 60), (80, 50)]):
        path = tmp_path / f"{number}.png"
        pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        found.append({"file_name": str(path), "image_id": str(number), "hypothesis": [number]})
    return found


def config(*pairs):
    sizes = "INPUT.MIN_SIZE_TRAIN (32,) INPUT.MIN_SIZE_TEST 32 INPUT.CROP.ENABLED True INPUT.CROP.SIZE [24,24]".split()
    return load_config("", [*sizes, "SEED", "3", *map(str, pairs)])


def views_of(records, *pairs) -> Views:
    cfg = config(*pairs)
    return Views(cfg, records, ViewPlan.from_config(cfg))


def test_whole_images_and_their_mirror_images(records):
    views = views_of(records, "FEATURE_STORE.VIEWS", 2, "FEATURE_STORE.KIND", "whole")
    assert len(views) == 4
    plain, mirrored = views.sample(2), views.sample(3)
    expected = UnlabelledDatasetMapper(config(), is_train=False)(records[1])["image"]
    assert torch.equal(plain["image"], expected) and torch.equal(mirrored["image"], expected.flip(-1))
    assert plain["hypothesis"].tolist() == [1] and plain["image_id"] == "1"
    with pytest.raises(ReclipError, match="FEATURE_STORE.VIEWS is 3, but FEATURE_STORE.KIND whole has two"):
        views_of(records, "FEATURE_STORE.VIEWS", 3, "FEATURE_STORE.KIND", "whole")


def test_crops_are_always_the_same(records):
    pairs = ("FEATURE_STORE.VIEWS", 3)
    views, again = views_of(records, *pairs), views_of(records, *pairs)
    crops = [views.sample(number)["image"] for number in range(6)]
    np.random.seed(5)  # no other chance enters
    for number in (5, 0, 3, 1):
        assert torch.equal(again.sample(number)["image"], crops[number])
    assert all(crop.shape == (3, 24, 24) for crop in crops)
    assert len({crop.numpy().tobytes() for crop in crops}) == 6
    other = views_of(records, *pairs, "SEED", 4)
    assert not torch.equal(other.sample(0)["image"], crops[0])


def test_draws_take_each_view_about_as_often(records):
    views = views_of(records, "FEATURE_STORE.VIEWS", 4)
    drawn = torch.tensor([views.number(1, draw) for draw in range(400)])
    counts = torch.bincount(drawn, minlength=8)
    assert (counts[:4] == 0).all() and (counts[4:] > 70).all()  # 100 each; a spread of 9
    assert drawn[:20].tolist() == [views.number(1, draw) for draw in range(20)]


@pytest.mark.parametrize("kind", ["whole", "crops"])
def test_promised_size_is_the_views(records, kind):
    views = views_of(records, "FEATURE_STORE.VIEWS", 1, "FEATURE_STORE.KIND", kind)
    for image in range(2):
        assert views.largest_size(image) == tuple(views.sample(image)["image"].shape[-2:])


def test_a_record_with_a_label_is_refused(records):
    """Samples from a store do not pass through the mapper: the views themselves refuse the record."""
    with pytest.raises(AssertionError, match="carries a label: .'sem_seg_file_name'"):
        views_of([*records, {**records[0], "sem_seg_file_name": "label.png"}], "FEATURE_STORE.VIEWS", 2)
