"""The fixed views of training images, and their pixels.

View ``v`` of image ``i`` has the number ``i * V + v``. Its pixels depend only on the image, the config keys and the
seed, so every process gets the same view at any time.

Shape letters: (H, W) size of a view in pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T

from reclip_d2.data.dataset_mapper import (
    UnlabelledDatasetMapper,
    build_test_augmentations,
    build_train_augmentations,
    check_unlabelled,
)
from reclip_d2.data.images import read_geometry
from reclip_d2.data.pseudo_labels import PseudoLabels
from reclip_d2.data.sampling import numbered_random_state
from reclip_d2.errors import ReclipError
from reclip_d2.features.shards import Placement

WHOLE, CROPS = "whole", "crops"


@dataclasses.dataclass(frozen=True)
class ViewPlan:
    """``FEATURE_STORE``: the views of each image.

    Attributes:
        number: V.
        kind: ``whole`` (the image at the test resolution; the second view is its mirror image) or ``crops`` (V draws of
            the training augmentation).
        seed: seed of the draws.
        augmentation: the keys that the pixels depend on, for the store's key.
    """

    number: int
    kind: str
    seed: int
    augmentation: dict[str, Any]

    @classmethod
    def from_config(cls, cfg: CfgNode) -> ViewPlan:
        """The views for the keys ``FEATURE_STORE``, ``INPUT`` and ``SEED``.

        Raises:
            ReclipError: more than two views of kind ``whole``.
        """
        keys = cfg.FEATURE_STORE
        inputs = cfg.INPUT
        if keys.KIND == WHOLE and keys.VIEWS > 2:
            raise ReclipError(
                f"FEATURE_STORE.VIEWS is {keys.VIEWS}, but FEATURE_STORE.KIND whole has two views, the image and its"
                " mirror image: set KIND crops, or VIEWS 2"
            )
        if keys.KIND == WHOLE:
            return dataclasses.replace(cls.whole_images(cfg), number=keys.VIEWS)
        augmentation = {
            "sides": [list(inputs.MIN_SIZE_TRAIN), inputs.MAX_SIZE_TRAIN, inputs.MIN_SIZE_TRAIN_SAMPLING],
            "crop": [inputs.CROP.TYPE, list(inputs.CROP.SIZE)] if inputs.CROP.ENABLED else None,
            "jitter": inputs.COLOR_JITTER,
            "flip": inputs.RANDOM_FLIP,
        }
        return cls(keys.VIEWS, CROPS, max(cfg.SEED, 0), augmentation)

    @classmethod
    def whole_images(cls, cfg: CfgNode) -> ViewPlan:
        """One view per image: the whole image at the test resolution."""
        sides = [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST]
        vertical = {"flip": "vertical"} if cfg.INPUT.RANDOM_FLIP == "vertical" else {}
        resize = {"resize": cfg.INPUT.RESIZE_TEST} if cfg.INPUT.RESIZE_TEST != "pillow" else {}
        return cls(1, WHOLE, 0, {"sides": sides, **resize, **vertical})


class Views:
    """Samples of the views: records mapped by :class:`UnlabelledDatasetMapper`, deterministically.

    Attributes:
        augmentations: for each of the V views of an image, what its pixels go through.
    """

    def __init__(self, cfg: CfgNode, records: Sequence[dict[str, Any]], plan: ViewPlan) -> None:
        """
        Args:
            records: unlabelled, with ``file_name``, ``image_id`` and, if training needs them, hypotheses.
            plan: the views of each image.
        """
        for record in records:  # samples from a store do not pass through the mapper, which checks this too
            check_unlabelled(record)
        self.records = records
        self.plan = plan
        masks = PseudoLabels.from_config(cfg)
        if plan.kind == WHOLE:
            flip = T.RandomFlip(prob=1.0, horizontal=cfg.INPUT.RANDOM_FLIP != "vertical",
                                vertical=cfg.INPUT.RANDOM_FLIP == "vertical")  # fmt: skip
            plain = build_test_augmentations(cfg)
            self.augmentations = [plain, [*plain, flip]][: plan.number]
        else:
            self.augmentations = [build_train_augmentations(cfg)] * plan.number
        self._mappers = [
            UnlabelledDatasetMapper(augmentations=augmentations, pseudo_labels=masks)
            for augmentations in self.augmentations
        ]

    def __len__(self) -> int:
        """Number of views of all images."""
        return len(self.records) * self.plan.number

    def number(self, image: int, draw: int) -> int:
        """Number of the image's view that the ``draw``-th draw of training selects."""
        generator = torch.Generator().manual_seed((self.plan.seed << 32) + draw)
        return image * self.plan.number + int(torch.randint(self.plan.number, (), generator=generator))

    def sample(self, number: int) -> dict[str, Any]:
        """The mapped record of a view: ``image`` ``(3, H, W)`` uint8, ``hypothesis`` if the record has one,
        ``placement``, and the record's other entries."""
        image, view = divmod(number, self.plan.number)
        record = self.records[image]
        placements: list[Placement] = []

        def hypothesis(image_size: tuple[int, int], transforms: T.TransformList, size: tuple[int, int]) -> list[int]:
            placements.append(Placement.of(image_size, transforms))
            return self.hypothesis(image, placements[0], size) or []

        with numbered_random_state(self.plan.seed, image, view):
            sample = self._mappers[view]({**record, "crop_hypothesis": hypothesis})
        if not self.has_hypotheses:
            del sample["hypothesis"]
        return {**sample, "placement": placements[0]}

    @property
    def has_hypotheses(self) -> bool:
        """Whether the records have hypotheses."""
        return "hypothesis" in self.records[0]

    def hypothesis(self, image: int, placement: Placement, size: tuple[int, int]) -> list[int] | None:
        """H of a view of an image; None if the records have no hypotheses.

        Args:
            size: (H, W) of the view.
        """
        record = self.records[image]
        if "crop_hypothesis" in record:
            return record["crop_hypothesis"](placement.image_size, placement, size)
        return record.get("hypothesis")

    def largest_size(self, image: int) -> tuple[int, int]:
        """Maximum (H, W) of an image's views, from the image's header."""
        record = self.records[image]
        height, width = read_geometry(record["file_name"]).upright
        augmentation = self.plan.augmentation
        if self.plan.kind == WHOLE:
            short, longest = augmentation["sides"]
        else:
            short, longest = max(augmentation["sides"][0]), augmentation["sides"][1]
        if short:
            pixels = np.broadcast_to(np.uint8(0), (height, width, 3))  # takes no memory
            with numbered_random_state(0):  # ResizeShortestEdge draws, though there is a single size
                resize = T.ResizeShortestEdge([short], longest, "choice").get_transform(pixels)
            height, width = resize.new_h, resize.new_w
        crop = augmentation.get("crop")
        if crop is not None and crop[0] == "absolute":
            height, width = min(height, crop[1][0]), min(width, crop[1][1])
        return height, width
