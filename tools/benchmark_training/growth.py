"""Part c: growth of memory with the side of an image, and of the feature store with the number of images.

Growth of the step with classes is in :mod:`tools.benchmark_training.steps`.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reclip_d2.config import load_config
from reclip_d2.config.files import configs_folder
from reclip_d2.features.store import FeatureStore, images_digest
from reclip_d2.features.training import FixedViews
from reclip_d2.features.views import ViewPlan, Views
from reclip_d2.modeling.view_batch import batch_views
from reclip_d2.utils.measuring import status_bytes
from tools.benchmark_training.child import measure
from tools.benchmark_training.inputs import Settings, photograph, write_photographs
from tools.benchmark_training.runs import write_classes

# A view of the store's growth: at 512 px and more, ten thousand need 10 GiB.
_SIDE, _PATCH, _WIDTH, _BATCH = 128, 16, 512, 12
# Larger photographs are enlarged ones.
_DRAWN = 2048


def image_sides(settings: Settings, sides: Sequence[int], classes: int = 20) -> dict[str, Any]:
    """``reclip predict`` on one square image per side, each in a fresh process: seconds and peak resident set.

    The model is ReCLIP++ after two iterations: its size does not depend on the training.
    """
    folder = settings.folder / "sides"
    shutil.rmtree(folder, ignore_errors=True)
    environment = {"RECLIP_CACHE": str(folder / "cache")}
    result = {}
    try:
        images = folder / "images"
        write_photographs(images, 2, 96, 128)
        opts = ["MODEL.CLIP.TEMPLATES", "photo"]
        options = {**settings.clip_options, "device": settings.device.type, "iterations": 2, "opts": opts}
        run = {"images": str(images), "classes": str(write_classes(folder, classes)), "output": str(folder / "model")}
        measure("segment", {**run, "options": options}, folder, environment)
        for side in sides:
            path = folder / f"{side}.jpg"
            drawn = min(side, _DRAWN)
            photograph(side, drawn, drawn).resize((side, side)).save(path, "JPEG", quality=90)
            request = {"images": str(path), "model": str(folder / "model"), "output": str(folder / f"masks{side}")}
            figures = measure("predict", {**request, "options": {"device": settings.device.type}}, folder, environment)
            result[str(side)] = {key: figures[key] for key in ("seconds", "peak_bytes")}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"classes": classes, "sides": result}


def store_sizes(settings: Settings, counts: Sequence[int], draws: int = 200) -> dict[str, Any]:
    """The feature store for numbers of images: seconds to make, to open and to read a batch; bytes on disk and in
    memory.

    The encoder draws random features, so that only the store is measured. The images are one file under many names.
    """
    folder = settings.folder / "images"
    result = {}
    for count in counts:
        shutil.rmtree(folder, ignore_errors=True)
        try:
            result[str(count)] = _store_size(folder, count, draws)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return {"side": _SIDE, "width": _WIDTH, "batch": _BATCH, "counts": result}


def _store_size(folder: Path, count: int, draws: int) -> dict[str, Any]:
    file = write_photographs(folder / "images", 1, 3 * _SIDE // 4, _SIDE)[0]
    records = []
    for number in range(count):
        link = folder / "images" / f"link{number}.jpg"
        os.link(file, link)
        records.append({"file_name": str(link), "image_id": str(number), "hypothesis": [0]})
    keys = ["INPUT.MIN_SIZE_TEST", str(_SIDE), "FEATURE_STORE.VIEWS", "1", "FEATURE_STORE.KIND", "whole"]
    cfg = load_config([str(configs_folder() / "datasets" / "custom.yaml")], keys)
    plan = ViewPlan.from_config(cfg)

    def open_store() -> FeatureStore:
        images_digest(records)  # names the store's folder
        return FeatureStore(folder / "store", Views(cfg, records, plan), _WIDTH, _PATCH)

    make, store = _timed(lambda: open_store().make(random_features)), None
    before = status_bytes("RssAnon")

    def open_again() -> None:
        nonlocal store
        store = open_store()
        assert not store.shards.missing()

    opening = _timed(open_again)
    views = FixedViews(store.views, store, pixels=False)
    order = torch.randint(count, (draws * _BATCH,), generator=torch.Generator().manual_seed(0)).tolist()

    def read() -> None:
        for start in range(0, len(order), _BATCH):
            samples = [views[draw, order[draw]] for draw in range(start, start + _BATCH)]
            batch_views([s["features"] for s in samples], [s["view_size"] for s in samples], torch.device("cpu"))

    reading = _timed(read)
    disk = sum(path.stat().st_size for path in (folder / "store").rglob("*") if path.is_file())
    return {
        "make_seconds": make,
        "open_seconds": opening,
        "batch_seconds": reading / draws,
        "bytes_on_disk": disk,
        "bytes_said": store.bytes(),
        "memory_bytes": max(0, status_bytes("RssAnon") - before),
    }


def random_features(image: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """In place of a :class:`~reclip_d2.modeling.view_batch.ViewEncoder`: features Z ``(h, w, D)`` of the right size."""
    height, width = image.shape[-2:]
    return torch.randn(-(-height // _PATCH), -(-width // _PATCH), _WIDTH), (height, width)


def _timed(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin
