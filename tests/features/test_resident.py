"""A store in a device's memory (``reclip_d2.features.resident``), on the CPU as the device."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch

from reclip_d2.features import resident as module
from reclip_d2.features.resident import ResidentFeatures, resident_features
from reclip_d2.features.shards import Placement, Shards, StoredView
from reclip_d2.features.training import FixedViews
from reclip_d2.modeling.view_batch import batch_views, stack_on

CPU = torch.device("cpu")


class Store:
    """What a complete feature store is to its readers."""

    embed_dim = 4

    def __init__(self, folder, grids):
        self.views, self.shards = range(len(grids)), Shards(folder, len(grids), 4)
        generator = torch.Generator().manual_seed(0)
        for shard, views in enumerate(self.shards.ranges):
            self.shards.write(
                shard,
                [
                    StoredView(
                        torch.randn(*grids[k], 4, generator=generator).half(),
                        (8 * grids[k][0], 8 * grids[k][1] - 3),
                        Placement((k, k), ((1.0, 0.0, 0.0), (0.0, 1.0, k))),
                    )
                    for k in views
                ],
            )

    def read(self, number):
        return self.shards.read(number)


def test_views_are_those_of_the_disk(tmp_path):
    store = Store(tmp_path, [(2, 3)] * 15 + [(3, 1), (1, 5)] * 3)
    resident = ResidentFeatures(store, CPU)
    assert resident.features.shape == (15 * 6 + 3 * (3 + 5), 4) and resident.features.dtype == torch.float16
    for number in (20, 0, 15, 16):
        found, expected = resident.read(number), store.read(number)
        assert torch.equal(found.features, expected.features)
        assert (found.size, found.placement) == (expected.size, expected.placement)
        assert found.features.untyped_storage().data_ptr() == resident.features.untyped_storage().data_ptr()


def test_a_batch_is_that_of_the_disk(tmp_path):
    store = Store(tmp_path, [(2, 3)] * 20)
    resident = ResidentFeatures(store, CPU)
    numbers = [17, 3, 3, 0]
    stacked = stack_on(CPU, [resident.read(k).features for k in numbers])
    expected = batch_views([store.read(k).features for k in numbers], [(16, 21)] * 4, CPU).features
    assert torch.equal(stacked.float().permute(0, 3, 1, 2), expected)


def test_only_on_a_gpu_and_while_it_fits(tmp_path, monkeypatch, caplog):
    store, device = Store(tmp_path, [(2, 3)] * 20), torch.device("meta")
    monkeypatch.setattr(module, "free_memory", lambda device: 2 * 20 * 6 * 4 * 2)
    assert resident_features(store, CPU, 0.9) is None  # the page cache has it
    assert resident_features(store, device, 0.0) is None
    with caplog.at_level(logging.INFO):
        assert resident_features(store, device, 0.49) is None
        assert "read from disk: more than FEATURE_STORE.DEVICE_MEMORY 0.49" in caplog.text
        assert resident_features(store, device, 0.5).features.device == device
        assert "in the memory of meta" in caplog.text


def test_samples_come_from_the_device_unless_workers_read_pixels(tmp_path, monkeypatch):
    """Nothing is loaded before the first sample: a resumed run builds its loader twice."""
    store, loaded = Store(tmp_path, [(2, 3)] * 4), []

    class Views:
        records = [{"image_id": k} for k in range(4)]
        plan = SimpleNamespace(number=1)

        def number(self, index, draw):
            return index

        def sample(self, number):
            return {"image": torch.zeros(3, 16, 21)}

        def hypothesis(self, index, placement, size):
            return [index]

    def load(store, device, fraction):
        loaded.append(fraction)
        return ResidentFeatures(store, CPU) if fraction else None

    monkeypatch.setattr("reclip_d2.features.training.resident_features", load)
    dataset = FixedViews(Views(), store, False, device=CPU, device_memory=0.5)
    assert not loaded and len(dataset) == 4
    sample, other = dataset[0, 3], dataset[9, 1]
    assert loaded == [0.5] and torch.equal(sample["features"], store.read(3).features)
    assert sample["features"].untyped_storage().data_ptr() == other["features"].untyped_storage().data_ptr()
    pixels = FixedViews(Views(), copy.copy(store), True, device=CPU, device_memory=0.5)
    assert torch.equal(pixels[0, 3]["features"], store.read(3).features) and loaded == [0.5, 0.0]


@pytest.mark.cuda
def test_on_a_gpu(tmp_path):
    store, device = Store(tmp_path, [(2, 3)] * 20), torch.device("cuda")
    resident = resident_features(store, device, 0.5)
    expected = torch.stack([store.read(k).features for k in (17, 3)])
    staged = stack_on(device, [store.read(k).features for k in (17, 3)])
    stacked = stack_on(device, [resident.read(k).features for k in (17, 3)])
    assert stacked.device.type == "cuda" and torch.equal(stacked.cpu(), expected) and torch.equal(staged, stacked)
