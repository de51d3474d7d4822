"""The networks of a session: CLIP with any class list, and trained models.

Shape letters: C classes, (H, W) size in pixels.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor

from reclip_d2.cli import options
from reclip_d2.cli.results import load_predictor
from reclip_d2.cli.trained_model import TrainedModel
from reclip_d2.clip.prompts import get_templates
from reclip_d2.clip.text import cached_query_features, check_class_names
from reclip_d2.data.class_file import ClassList
from reclip_d2.data.datasets.custom import check_names_fit, register_images
from reclip_d2.inference import ImagePredictor

# Trained models that stay in memory.
_KEPT = 2


@dataclasses.dataclass(frozen=True)
class ClipChoice:
    """Which CLIP, and where it runs.

    Attributes:
        name: open_clip's name.
        pretrained: its weights, a file or a tag.
        device: of the networks.
        opts: ``KEY VALUE`` overrides of all configs.
    """

    name: str
    pretrained: str
    device: str
    opts: tuple[str, ...] = ()

    @property
    def overrides(self) -> list[str]:
        """``KEY VALUE`` pairs of this choice."""
        return ["MODEL.DEVICE", self.device, "MODEL.CLIP.PRETRAINED", self.pretrained, *self.opts]

    def config(self, kind: str) -> CfgNode:
        """Config of a kind of model, as ``reclip segment`` has it."""
        return options.stage_config(kind, self.name, self.overrides)


class SomeClasses:
    """A predictor without the logits of the other classes: their pixels go to the best of those that are left."""

    def __init__(self, predictor: ImagePredictor, class_ids: Sequence[int]) -> None:
        """
        Args:
            class_ids: places of the wanted classes among the model's.
        """
        self.predictor = predictor
        self.class_ids = list(class_ids)

    def bands(self, image: np.ndarray) -> Iterator[tuple[slice, Tensor]]:
        """As :meth:`ImagePredictor.bands`, with logits ``(C, rows, W)`` of the wanted classes, in their order."""
        for rows, logits in self.predictor.bands(image):
            yield rows, logits[self.class_ids]


def class_places(known: ClassList, wanted: ClassList) -> list[int] | None:
    """Place of each wanted class among those of a model; None if one is not there.

    A class is the same if its first name is and its synonyms are, in any order.
    """
    places = {(names[0], frozenset(names)): place for place, names in enumerate(known.model_classes)}
    found = [places.get((names[0], frozenset(names))) for names in wanted.model_classes]
    return None if None in found else found


class Models:
    """Builds networks when they are needed. Not for several threads at once: the session has a lock."""

    def __init__(self, clip: ClipChoice) -> None:
        self.clip = clip
        self._maskclip_config = clip.config("maskclip")
        self._maskclip: ImagePredictor | None = None
        self._trained: OrderedDict[tuple[Path, str], ImagePredictor] = OrderedDict()

    def check(self, classes: ClassList) -> None:
        """Raise :class:`~reclip_d2.errors.ReclipError`, with the line, for a name that CLIP cannot take."""
        keys = self._maskclip_config.MODEL.CLIP
        check_names_fit(classes, keys.NAME, keys.TEMPLATES)

    def maskclip(self, classes: ClassList) -> ImagePredictor:
        """MaskCLIP with these classes. The CLIP is built once, and gets the Query features of other names."""
        if self._maskclip is None:
            register_images([], classes)
            self._maskclip = load_predictor(self._maskclip_config, "maskclip", Path())
        model, names = self._maskclip.model, classes.model_classes
        if model.class_names != names:
            check_class_names(names)
            backbone = model.backbone
            features = cached_query_features(backbone.text_encoder, names, get_templates(model.templates), backbone.key)
            model.template_query_features = features.to(model.device)
            model.class_names = names
        return self._maskclip

    def config(self, trained: TrainedModel) -> CfgNode:
        """Config of a trained model."""
        return trained.config(["MODEL.DEVICE", self.clip.device, *self.clip.opts])

    def trained(self, trained: TrainedModel) -> ImagePredictor:
        """A trained model; the last ones stay in memory."""
        key = (trained.folder.path, trained.kind)
        if key not in self._trained:
            while len(self._trained) >= _KEPT:
                self._trained.popitem(last=False)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            register_images([], trained.state.classes)
            self._trained[key] = load_predictor(self.config(trained), trained.kind, trained.weights)
        self._trained.move_to_end(key)
        return self._trained[key]
