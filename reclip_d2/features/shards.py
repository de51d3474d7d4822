"""Features of views on disk: memory-mapped safetensors files of consecutive views.

Shape letters: (h, w) patch grid of a view, D width of the joint embedding.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from detectron2.data import transforms as T
from torch import Tensor

from reclip_d2.errors import ReclipError
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.tensor_files import save_safetensors

FEWEST_VIEWS = 16  # per shard; a killed run loses at most one shard
MOST_SHARDS = 1000
_OPEN_FILES = 64


@dataclasses.dataclass(frozen=True)
class Placement:
    """Placement of a view in its image, as an affine map: the composition of resizes, crops and flips.

    Attributes:
        image_size: (H, W) of the image.
        matrix: ``((a, b, c), (d, e, f))`` maps a point (x, y) of the image to (ax + by + c, dx + ey + f) in the view.
    """

    image_size: tuple[int, int]
    matrix: tuple[tuple[float, float, float], tuple[float, float, float]]

    @classmethod
    def of(cls, image_size: tuple[int, int], transforms: T.TransformList) -> Placement:
        """The affine map of Detectron2's transforms for an image of size (H, W)."""
        origin, right, down = transforms.apply_coords(np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
        rows = zip((right - origin).tolist(), (down - origin).tolist(), origin.tolist(), strict=True)
        first, second = rows
        return cls((int(image_size[0]), int(image_size[1])), (first, second))

    def apply_coords(self, points: np.ndarray) -> np.ndarray:
        """Map points ``(N, 2)`` (x, y) from the image to the view, like Detectron2's transforms."""
        matrix = np.array(self.matrix)
        return points @ matrix[:, :2].T + matrix[:, 2]


@dataclasses.dataclass(frozen=True)
class StoredView:
    """A view in a store.

    Attributes:
        features: Z ``(h, w, D)`` float16, each patch of length 1 up to rounding.
        size: (H, W) of the view in pixels, without padding.
        placement: placement of the view in its image.
    """

    features: Tensor
    size: tuple[int, int]
    placement: Placement


def shard_ranges(count: int) -> list[range]:
    """The views of each shard, for ``count`` views: at least 16 per shard, and at most 1000 shards."""
    size = max(FEWEST_VIEWS, -(-count // MOST_SHARDS))
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


class Shards:
    """Features of numbered views in a folder. Files are written atomically, so a killed run loses at most one shard."""

    def __init__(self, folder: Path, count: int, embed_dim: int) -> None:
        """
        Args:
            folder: folder of the files; created by the first write.
            count: number of views.
            embed_dim: D.
        """
        self.folder = folder
        self.embed_dim = embed_dim
        self.ranges = shard_ranges(count)
        self._open: collections.OrderedDict[int, _Shard] = collections.OrderedDict()

    def file(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / f"{shard:04d}.safetensors"

    def missing(self) -> list[int]:
        """Shards that are missing or damaged."""
        return [shard for shard, views in enumerate(self.ranges) if not self._is_sound(shard, views)]

    def write(self, shard: int, views: Sequence[StoredView]) -> None:
        """Write a shard.

        Args:
            views: the views ``ranges[shard]``, in order.
        """
        entries = [
            {"size": view.size, "image_size": view.placement.image_size, "matrix": view.placement.matrix}
            for view in views
        ]
        tensors = {str(k): view.features.contiguous() for k, view in zip(self.ranges[shard], views, strict=True)}
        with atomic_write(self.file(shard)) as temporary:
            save_safetensors(tensors, temporary, {"views": json.dumps(entries)})

    def read(self, view: int) -> StoredView:
        """Read a view by its number; its features are memory-mapped.

        Raises:
            ReclipError: the shard is missing or damaged; a damaged one is removed, so that the next run recomputes it.
        """
        shard = view // len(self.ranges[0])
        return self._shard(shard).read(view)

    def _shard(self, shard: int) -> _Shard:
        if shard not in self._open:
            self._open[shard] = _Shard(self.file(shard), self.ranges[shard], self.embed_dim)
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]

    def _is_sound(self, shard: int, views: range) -> bool:
        if not self.file(shard).exists():
            return False
        try:
            _Shard(self.file(shard), views, self.embed_dim)
        except ReclipError:
            return False
        return True


class _Shard:
    """An open file."""

    def __init__(self, path: Path, views: range, embed_dim: int) -> None:
        try:
            self._file: Any = safetensors.safe_open(path, "pt")
            entries = json.loads(self._file.metadata()["views"])
            self._views = {view: _entry(entry) for view, entry in zip(views, entries, strict=True)}
            for view in views:
                part = self._file.get_slice(str(view))
                if part.get_dtype() != "F16" or len(part.get_shape()) != 3 or part.get_shape()[2] != embed_dim:
                    raise ValueError(f"view {view} is {part.get_dtype()} {part.get_shape()}")
        except (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            path.unlink(missing_ok=True)
            raise ReclipError(f"{path} was damaged and has been removed: run again, other parts are kept") from error

    def read(self, view: int) -> StoredView:
        return StoredView(self._file.get_tensor(str(view)), *self._views[view])


def _entry(entry: dict[str, Any]) -> tuple[tuple[int, int], Placement]:
    height, width = map(int, entry["size"])
    image_height, image_width = map(int, entry["image_size"])
    (a, b, c), (d, e, f) = entry["matrix"]
    matrix = ((float(a), float(b), float(c)), (float(d), float(e), float(f)))
    return (height, width), Placement((image_height, image_width), matrix)
