"""A feature store in the memory of a device: its views are read there, without a copy from the host.

Shape letters: P patches of all views, (h, w) patch grid of a view, D width of the joint embedding.
"""

from __future__ import annotations

import logging

import torch

from reclip_d2.features.shards import StoredView
from reclip_d2.features.store import FeatureStore
from reclip_d2.utils.files import format_bytes

logger = logging.getLogger(__name__)


class ResidentFeatures:
    """The features of all views of a complete store as one tensor on a device; any device."""

    def __init__(self, store: FeatureStore, device: torch.device) -> None:
        """
        Args:
            store: read once, view by view.
        """
        grids = grids_of(store)
        self.features = torch.empty(patches_of(grids), store.embed_dim, dtype=torch.float16, device=device)
        """Z ``(P, D)`` float16."""
        self._views = []
        parts = self.features.split([height * width for height, width in grids])
        for number, (grid, part) in enumerate(zip(grids, parts, strict=True)):
            view, features = store.read(number), part.view(*grid, -1)
            features.copy_(view.features)
            self._views.append(StoredView(features, view.size, view.placement))

    def read(self, number: int) -> StoredView:
        """A view by its number; its features are a part of :attr:`features`."""
        return self._views[number]


def resident_features(store: FeatureStore, device: torch.device, fraction: float) -> ResidentFeatures | None:
    """The store in a GPU's memory; None for the CPU, whose page cache has it, or if it does not fit.

    Args:
        store: complete.
        fraction: of the device's free memory that the store may take, ``FEATURE_STORE.DEVICE_MEMORY``.
    """
    if device.type == "cpu" or not fraction:
        return None
    free, size = free_memory(device), patches_of(grids_of(store)) * store.embed_dim * 2
    if size > fraction * free:
        logger.info(
            "feature store: %s are read from disk: more than FEATURE_STORE.DEVICE_MEMORY %g of the %s free on %s",
            format_bytes(size), fraction, format_bytes(free), device,
        )  # fmt: skip
        return None
    logger.info("feature store: %s in the memory of %s", format_bytes(size), device)
    return ResidentFeatures(store, device)


def grids_of(store: FeatureStore) -> list[tuple[int, int]]:
    """(h, w) of all views of a complete store; reads no features."""
    shapes = (store.read(number).features.shape for number in range(len(store.views)))
    return [(int(height), int(width)) for height, width, _ in shapes]


def patches_of(grids: list[tuple[int, int]]) -> int:
    """P of views with the grids (h, w)."""
    return sum(height * width for height, width in grids)


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory that are free, including what torch has reserved and does not use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
