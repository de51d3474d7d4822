"""The networks of a session: MaskCLIP for any class list, and trained models."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from reclip_d2.app.tasks import Task
from reclip_d2.backbones.query import check_names_fit
from reclip_d2.data.class_file import ClassList
from reclip_d2.inference import Band, ImagePredictor, Turn
from reclip_d2.workspace.stage_config import ClipChoice
from reclip_d2.workspace.trained_model import TrainedModel, load_predictor

# Trained models that stay in memory.
_KEPT = 2
_ANY_CLASSES = ClassList((("object",), ("background",)))


class InTurns:
    """A predictor for one request: others can use the networks between two forward passes."""

    def __init__(self, predictor: ImagePredictor, task: Task) -> None:
        self.predictor = predictor
        self.task = task

    def bands(self, image: np.ndarray) -> Iterator[Band]:
        """See :meth:`ImagePredictor.bands`."""
        for band in self.predictor.bands(image, self.task.turn):
            self.task.check()
            yield band


def class_places(known: ClassList, wanted: ClassList) -> list[int] | None:
    """Index of each wanted class in a model's class list; None if one is missing.

    Two classes are the same if their first names are equal and their synonyms are, in any order.
    """
    places = {(names[0], frozenset(names)): place for place, names in enumerate(known.model_classes)}
    found = [places.get((names[0], frozenset(names))) for names in wanted.model_classes]
    return None if None in found else found


class Models:
    """Builds networks when they are first needed. Threads may ask for them concurrently, and use them in turns."""

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
        """MaskCLIP for these classes. All class lists share one CLIP.

        Args:
            turn: entered for the encoding of each class.
        """
        with self._lock:
            if self._maskclip is None:
                # Built for two names: encoding all of them here would block others.
                self._maskclip = load_predictor(self._maskclip_config, "maskclip", _ANY_CLASSES)
        predictor = copy.copy(self._maskclip)
        predictor.model = predictor.model.with_classes(classes.model_classes, turn)
        return predictor

    def trained(self, trained: TrainedModel) -> ImagePredictor:
        """A trained model; the most recently used ones stay in memory."""
        key = (trained.folder.path, trained.kind)
        with self._lock:
            if key not in self._trained:
                while len(self._trained) >= _KEPT:
                    self._trained.popitem(last=False)
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()
                self._trained[key] = trained.predictor(self.clip.overrides)
            self._trained.move_to_end(key)
            return self._trained[key]
