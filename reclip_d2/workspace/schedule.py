"""The stages of a run on a user's images, and how long it trains."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from detectron2.config import CfgNode

from reclip_d2.data.image_folder import ImageFile
from reclip_d2.data.scene_windows import WindowPlan

EPOCHS = 200
"""The papers' on VOC, their smallest data set."""
FEWEST_ITERATIONS = 200
"""As on the embedded worlds: fewer leave the learnt bias close to its start, however few the images are."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage before the masks.

    Attributes:
        name: name in messages.
        is_done: whether an earlier run has finished it.
        run: does the remaining work.
        tidy: removes files left by a run that was killed at the end of the stage.
    """

    name: str
    is_done: Callable[[], bool]
    run: Callable[[], None]
    tidy: Callable[[], None]


def suggested_iterations(images: int, cfg: CfgNode) -> int:
    """Iterations for a number of images: the papers' epochs, but not under :data:`FEWEST_ITERATIONS`, and at most the
    config's ``SOLVER.MAX_ITER``."""
    epochs = math.ceil(EPOCHS * images / cfg.SOLVER.IMS_PER_BATCH)
    return min(cfg.SOLVER.MAX_ITER, max(FEWEST_ITERATIONS, epochs))


def count_training_images(images: Sequence[ImageFile], cfg: CfgNode) -> int:
    """Number of images, with the windows of GeoTIFFs, as if all had data."""
    windows = WindowPlan.from_config(cfg)
    return sum(windows.count(image.scene_size) if image.is_scene else 1 for image in images)
