"""Resumable sampling: every draw has a number."""

import random
from itertools import islice

import numpy as np
import pytest
import torch
from detectron2.utils import comm

from reclip_d2.data.sampling import NumberedDataset, ResumableTrainingSampler, build_train_loader
from reclip_d2.errors import ReclipError


def draws(number: int, **arguments) -> list[tuple[int, int]]:
    return list(islice(ResumableTrainingSampler(**{"size": 7, "seed": 3, **arguments}), number))


def random_mapper(record: dict) -> dict:
    """Draws from the three random states that augmentations may use."""
    return {**record, "numpy": np.random.rand(), "python": random.random()}


RECORDS = [{"index": index} for index in range(7)]


def test_every_epoch_is_a_permutation_and_no_two_are_the_same():
    stream = draws(28)
    assert [draw for draw, _ in stream] == list(range(28))
    epochs = [tuple(index for _, index in stream[start : start + 7]) for start in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) > 1


def test_the_seed_decides():
    assert draws(14) == draws(14)
    assert draws(14) != draws(14, seed=4)


@pytest.mark.parametrize("start", [1, 6, 7, 20])
def test_a_later_start_goes_on_exactly(start):
    assert draws(10, start=start) == draws(start + 10)[start:]


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_processes_share_the_draws_out(world_size):
    whole = draws(24 * world_size)
    parts = [draws(24, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [parts[i % world_size][i // world_size] for i in range(24 * world_size)] == whole
    late = draws(5, start=19, rank=1, world_size=world_size)
    assert late == parts[1][19:]


def test_one_image():
    assert [index for _, index in draws(4, size=1)] == [0, 0, 0, 0]


def test_a_draw_has_its_own_random_state_and_leaves_the_callers_alone():
    dataset = NumberedDataset(RECORDS, random_mapper, seed=5)
    np.random.seed(1)
    random.seed(1)
    expected = np.random.rand(), random.random()
    np.random.seed(1)
    random.seed(1)
    first = dataset[9, 2]
    assert (np.random.rand(), random.random()) == expected
    assert dataset[9, 2] == first
    assert first["index"] == 2
    assert dataset[10, 2]["numpy"] != first["numpy"]
    assert NumberedDataset(RECORDS, random_mapper, seed=6)[9, 2]["numpy"] != first["numpy"]
    assert len(dataset) == 7


def test_random_states_are_restored_after_an_error():
    def fail(record):
        raise ReclipError("no")

    state = np.random.get_state()[1].tolist()
    with pytest.raises(ReclipError):
        NumberedDataset(RECORDS, fail, seed=0)[0, 0]
    assert np.random.get_state()[1].tolist() == state


def batches(number: int, *, num_workers: int = 0, start_iter: int = 0, batch: int = 3) -> list[list[dict]]:
    dataset = NumberedDataset(RECORDS, random_mapper, seed=2)
    loader = build_train_loader(dataset, total_batch_size=batch, num_workers=num_workers, seed=2, start_iter=start_iter)
    return list(islice(loader, number))


def test_batches_are_lists_of_records():
    got = batches(4)
    assert [len(batch) for batch in got] == [3, 3, 3, 3]
    assert sorted(record["index"] for batch in got for record in batch)[:2] == [0, 0]


def test_workers_do_not_change_the_samples():
    assert batches(5, num_workers=2) == batches(5)


def test_a_resumed_loader_goes_on_with_the_same_samples():
    assert batches(3, start_iter=4) == batches(7)[4:]


def test_images_of_a_batch_come_from_all_processes(monkeypatch):
    whole = batches(3, batch=4)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_world_size", lambda: 2)
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        parts.append(batches(3, batch=4))
    for step in range(3):
        assert [len(part[step]) for part in parts] == [2, 2]
        together = sorted(record["numpy"] for part in parts for record in part[step])
        assert together == sorted(record["numpy"] for record in whole[step])


def test_a_batch_that_cannot_be_shared_out(monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    with pytest.raises(ReclipError, match=r"SOLVER\.IMS_PER_BATCH 3 is not a multiple of the 2"):
        batches(1, batch=3)


def test_the_default_generator_of_torch_is_left_alone_by_a_draw():
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    NumberedDataset(RECORDS, random_mapper, seed=0)[0, 0]
    assert torch.equal(torch.rand(2), expected)
