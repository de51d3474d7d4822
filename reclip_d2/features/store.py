"""The feature store of a data set: computed once, resumable, shared by runs, read view by view.

Shape letters: B views of a batch, (h, w) patch grid, D width of the joint embedding, (H, W) size in pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from reclip_d2.backbones.interface import VisionLanguageBackbone
from reclip_d2.backbones.precision import tower_precision
from reclip_d2.errors import ReclipError
from reclip_d2.features.shards import Shards, StoredView
from reclip_d2.features.views import ViewPlan, Views
from reclip_d2.modeling.view_batch import ViewEncoder
from reclip_d2.utils.digest import file_digests
from reclip_d2.utils.files import format_bytes
from reclip_d2.utils.io import atomic_write, cache_dir
from reclip_d2.utils.one_maker import one_maker
from reclip_d2.utils.progress import count_steps
from reclip_d2.utils.work_shard import WorkShard

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class StoreKey:
    """All that stored features depend on.

    Attributes:
        dataset: names of the data sets.
        images: digest of the images' ids and contents, in order.
        backbone: identity of the backbone, including its dense attention, and its precision.
        pixel_statistics: mean and standard deviation.
        views: V, kind, seed and augmentation.
    """

    dataset: str
    images: str
    backbone: dict[str, Any]
    pixel_statistics: list[list[float]]
    views: ViewPlan

    @property
    def digest(self) -> str:
        """Hash that names the store's folder."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class FeatureStore:
    """Features of the views of a data set, in half precision.

    Training from the store is bit-identical to training that encodes the same views in each iteration, since both
    encode views one by one and round features to half precision.
    """

    def __init__(self, folder: Path, views: Views, embed_dim: int, patch_size: int) -> None:
        """
        Args:
            folder: folder of the shards.
            views: the views of the data set.
            embed_dim: D.
            patch_size: pixels per patch of the features, for :meth:`bytes`.
        """
        self.folder = folder
        self.views = views
        self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.shards = Shards(folder, len(views), embed_dim)

    def bytes(self) -> int:
        """Estimated size of the features of the complete store, from the images' headers or as recorded."""
        recorded = self._recorded_bytes()
        return self._estimate_bytes() if recorded is None else recorded

    def record_bytes(self, size: int) -> None:
        """Keep :meth:`bytes` in the folder, which is named after the images' content: the headers are read once."""
        if self._recorded_bytes() == size:
            return
        # A store can be read-only.
        with contextlib.suppress(OSError, ReclipError), atomic_write(self._size_file) as temporary:
            temporary.write_text(json.dumps({"bytes": size}))

    @property
    def _size_file(self) -> Path:
        return self.folder / "size.json"

    def _recorded_bytes(self) -> int | None:
        try:
            recorded = json.loads(self._size_file.read_text())["bytes"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return recorded if type(recorded) is int and recorded > 0 else None

    def _estimate_bytes(self) -> int:
        patches = 0
        for image in range(len(self.views.records)):
            height, width = self.views.largest_size(image)
            patches += math.ceil(height / self.patch_size) * math.ceil(width / self.patch_size)
        return patches * self.views.plan.number * self.embed_dim * 2

    @torch.no_grad()
    def make(self, encode: ViewEncoder, part: WorkShard | None = None) -> None:
        """Compute missing shards; called by all processes, which share the work. After an interruption, the next call
        continues with the shards that are still missing.

        Args:
            part: compute only this part of the shards; other runs may compute others meanwhile.
        """
        missing = self.missing()
        if part is not None:
            self._write([shard for shard in missing if part.holds(shard)], encode)
        elif missing:
            with one_maker(self.folder, "feature store"):
                self._write(self.missing(), encode)

    def _write(self, shards: Sequence[int], encode: ViewEncoder) -> None:
        """Compute shards; called by all processes."""
        mine = shards[comm.get_rank() :: comm.get_world_size()]
        total = sum(len(self.shards.ranges[shard]) for shard in mine)
        with count_steps("features", total, unit="view", silent=not comm.is_main_process()) as steps:
            for shard in mine:
                self.shards.write(shard, [self._encode(encode, k, steps) for k in self.shards.ranges[shard]])
        comm.synchronize()

    def is_complete(self) -> bool:
        """Whether no shard is missing, as the main process sees them."""
        return not self.missing()

    def missing(self) -> list[int]:
        """Missing shards, as the main process sees them."""
        return comm.all_gather(self.shards.missing() if comm.is_main_process() else [])[0]

    def _encode(self, encode: ViewEncoder, number: int, steps: count_steps) -> StoredView:
        sample = self.views.sample(number)
        features, size = encode(sample["image"])
        steps.advance()
        return StoredView(features.cpu().to(torch.float16), size, sample["placement"])

    def read(self, number: int) -> StoredView:
        """Read a view by its number; its features are memory-mapped."""
        return self.shards.read(number)


def images_digest(records: Sequence[dict[str, Any]]) -> str:
    """Hash of the ids and contents of all images, in order; independent of the files' location.

    A missing file counts as empty: reading it later reports the error.
    """
    digests = file_digests([record["file_name"] for record in records])
    ids = [record["image_id"] for record in records]
    return hashlib.sha256(json.dumps([ids, digests]).encode()).hexdigest()


def store_folder(cfg: CfgNode, key: StoreKey) -> Path:
    """Folder of a store, below ``FEATURE_STORE.FOLDER`` or the cache, named by the hash of its key."""
    return _root(cfg) / f"{key.dataset}-{key.digest}"


def stores_exist(cfg: CfgNode) -> bool:
    """Whether ``FEATURE_STORE.FOLDER`` or the cache has any store of ``DATASETS.TRAIN``, for the main process."""
    found = comm.is_main_process() and any(_root(cfg).glob(f"{_dataset(cfg)}-*/"))
    return comm.all_gather(found)[0]


def _root(cfg: CfgNode) -> Path:
    return Path(cfg.FEATURE_STORE.FOLDER) if cfg.FEATURE_STORE.FOLDER else cache_dir() / "features"


def _dataset(cfg: CfgNode) -> str:
    return "+".join(cfg.DATASETS.TRAIN)


def build_store(
    cfg: CfgNode, backbone: VisionLanguageBackbone, records: Sequence[dict[str, Any]], plan: ViewPlan, images: str
) -> FeatureStore:
    """The store of ``DATASETS.TRAIN``, complete or not.

    Args:
        backbone: the frozen backbone of the features.
        images: :func:`images_digest` of the records.
    """
    statistics = backbone.pixel_statistics
    key = StoreKey(
        dataset=_dataset(cfg),
        images=images,
        backbone={**backbone.identity(), "precision": tower_precision(cfg)},
        pixel_statistics=[[float(x) for x in values] for values in (statistics.mean, statistics.std)],
        views=plan,
    )
    return FeatureStore(store_folder(cfg, key), Views(cfg, records, plan), backbone.embed_dim, backbone.stride)


def budget_problem(store: FeatureStore, limit: float) -> str:
    """Why the store cannot be made, "" if it can; logs its size then. Called by all processes, for the main one's view.

    Args:
        limit: ``FEATURE_STORE.MAX_SIZE`` in GiB; 0 for no limit.
    """
    return comm.all_gather(_budget_problem(store, limit) if comm.is_main_process() else "")[0]


def _budget_problem(store: FeatureStore, limit: float) -> str:
    size, free = store.bytes(), _free_space(store.folder)
    needs = f"{len(store.views.records):,} images x {store.views.plan.number} views need {format_bytes(size)}"
    if limit and size > limit * 2**30:
        return f"{needs}, more than FEATURE_STORE.MAX_SIZE ({limit:g} GiB)"
    if size > free and store.shards.missing():
        return f"{needs}, but {store.folder.parent} has {format_bytes(free)} left"
    store.record_bytes(size)  # not before: a store that is not made leaves no folder
    logger.info("feature store: %s, in %s", needs, store.folder)
    return ""


def _free_space(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
