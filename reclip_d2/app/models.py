"""The networks of a session: CLIP with any class list, and trained models.

Shape letters: C classes, (H, W) size in pixels.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode

from reclip_d2.app.tasks import Task
from reclip_d2.backbones.query import check_class_names, check_names_fit, get_templates
from reclip_d2.data.class_file import ClassList
from reclip_d2.data.datasets.custom import register_images
from reclip_d2.inference import Band, ImagePredictor, Turn
from reclip_d2.workspace.stage_config import stage_config
from reclip_d2.workspace.trained_model import TrainedModel, load_predictor

# Trained models that stay in memory.
_KEPT = 2
_ANY_CLASSES = (("object",), ("background",))


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
        return stage_config(kind, self.name, self.overrides)


class InTurns:
    """A predictor for a visitor's request: it lets others use the networks between two forward passes."""

    def __init__(self, predictor: ImagePredictor, task: Task) -> None:
        self.predictor = predictor
        self.task = task

    def bands(self, image: np.ndarray) -> Iterator[Band]:
        """As :meth:`ImagePredictor.bands`."""
        for band in self.predictor.bands(image, self.task.turn):
            self.task.check()
            yield band


def class_places(known: ClassList, wanted: ClassList) -> list[int] | None:
    """Place of each wanted class among those of a model; None if one is not there.

    A class is the same if its first name is and its synonyms are, in any order.
    """
    places = {(names[0], frozenset(names)): place for place, names in enumerate(known.model_classes)}
    found = [places.get((names[0], frozenset(names))) for names in wanted.model_classes]
    return None if None in found else found


class Models:
    """Builds networks when they are needed. Several threads may ask for them at once, and take turns in using them."""

    def __init__(self, clip: ClipChoice) -> None:
        self.clip = clip
        self._maskclip_config = clip.config("maskclip")
        self._maskclip: ImagePredictor | None = None
        self._trained: OrderedDict[tuple[Path, str], ImagePredictor] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, classes: ClassList) -> None:
        """Raise :class:`~reclip_d2.errors.ReclipError`, with the line, for a name that CLIP cannot take."""
        keys = self._maskclip_config.MODEL.CLIP
        check_names_fit(classes, keys.NAME, keys.TEMPLATES)

    def maskclip(self, classes: ClassList, turn: Turn = contextlib.nullcontext) -> ImagePredictor:
        """MaskCLIP with these classes. The CLIP is built once, and shared; each has Query features of its own.

        Args:
            turn: entered for the encoding of each class.
        """
        with self._lock:
            if self._maskclip is None:
                # Built for two names: the encoding of all of them could keep others waiting.
                register_images([], ClassList(_ANY_CLASSES))
                self._maskclip = load_predictor(self._maskclip_config, "maskclip", Path())
        built, names = self._maskclip, classes.model_classes
        backbone, templates = built.model.backbone, get_templates(built.model.templates)
        check_class_names(names, backbone.name_tokens)
        features = backbone.query_features(names, templates, turn)
        model = copy.copy(built.model)
        model._buffers = dict(built.model._buffers)  # a copy of a module shares them
        model.template_query_features = features.to(built.model.device)
        model.class_names = names
        predictor = copy.copy(built)
        predictor.model = model
        return predictor

    def config(self, trained: TrainedModel) -> CfgNode:
        """Config of a trained model."""
        return trained.config(["MODEL.DEVICE", self.clip.device, *self.clip.opts])

    def trained(self, trained: TrainedModel) -> ImagePredictor:
        """A trained model; the last ones stay in memory."""
        key = (trained.folder.path, trained.kind)
        with self._lock:
            if key not in self._trained:
                while len(self._trained) >= _KEPT:
                    self._trained.popitem(last=False)
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()
                register_images([], trained.state.classes)
                self._trained[key] = load_predictor(self.config(trained), trained.kind, trained.weights)
            self._trained.move_to_end(key)
            return self._trained[key]
