"""Resumable, reproducible sampling of training images.

Detectron2's ``TrainingSampler`` starts over after a resume, and its augmentations use random states that depend on
the number of workers. Here every draw is numbered: the d-th draw of a run is the same image with the same
augmentation, whatever the number of workers and however often the run was resumed.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from reclip_d2.errors import ReclipError


class ResumableTrainingSampler(Sampler[tuple[int, int]]):
    """Infinite stream of ``(draw, index)``: shuffled epochs, distributed over the processes.

    Epoch e is a permutation seeded by ``(seed, e)``, so any draw can be computed without the ones before it.
    """

    def __init__(self, size: int, seed: int, start: int = 0, rank: int = 0, world_size: int = 1) -> None:
        """
        Args:
            size: number of images.
            seed: the same in all processes.
            start: first draw of this process (iterations done times images per iteration of this process).
        """
        self.size = size
        self.seed = seed
        self.start = start
        self.rank = rank
        self.world_size = world_size

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.size)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        draw = self.start * self.world_size + self.rank
        epoch, order = -1, np.empty(0, dtype=np.int64)
        while True:
            if draw // self.size != epoch:
                epoch = draw // self.size
                order = self._permutation(epoch)
            yield draw, int(order[draw % self.size])
            draw += self.world_size


@contextlib.contextmanager
def numbered_random_state(*numbers: int) -> Iterator[None]:
    """Context in which NumPy's and Python's random states, which augmentations use, are seeded by the numbers."""
    state = int(np.random.SeedSequence(list(numbers)).generate_state(1)[0])
    numpy_state, python_state = np.random.get_state(), random.getstate()
    np.random.seed(state)
    random.seed(state)
    try:
        yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


class NumberedDataset(Dataset):
    """Apply ``mapper`` to the record of ``(draw, index)``, with NumPy's and Python's random states, which augmentations
    use, seeded by ``(seed, draw)``."""

    def __init__(
        self, records: list[dict[str, Any]], mapper: Callable[[dict[str, Any]], dict[str, Any]], seed: int
    ) -> None:
        self.records = records
        self.mapper = mapper
        self.seed = seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        draw, index = key
        with numbered_random_state(self.seed, draw):
            return self.mapper(self.records[index])


def _one_thread(worker_id: int) -> None:
    torch.set_num_threads(1)


def _as_list(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return batch


def build_train_loader(
    dataset: Dataset, *, total_batch_size: int, num_workers: int, seed: int, start_iter: int = 0
) -> DataLoader:
    """Endless loader of lists of samples, ``total_batch_size`` over all processes.

    Args:
        dataset: maps ``(draw, index)`` to a sample, such as :class:`NumberedDataset`.
        start_iter: iterations already done: the stream continues from there.
    """
    world_size = comm.get_world_size()
    if total_batch_size % world_size:
        raise ReclipError(
            f"SOLVER.IMS_PER_BATCH {total_batch_size} is not a multiple of the {world_size} processes: change it"
        )
    batch_size = total_batch_size // world_size
    sampler = ResumableTrainingSampler(
        len(dataset), seed, start=start_iter * batch_size, rank=comm.get_rank(), world_size=world_size
    )
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=_as_list,
        worker_init_fn=_one_thread,
        persistent_workers=num_workers > 0,
    )
