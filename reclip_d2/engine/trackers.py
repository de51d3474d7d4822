"""Writers for experiment trackers: Weights & Biases and MLflow, next to the log, ``metrics.json`` and TensorBoard.

A tracker gets the config, each scalar of the event storage, and its images. The run's id is kept in ``trackers.json``
in ``OUTPUT_DIR``, so a resumed training continues its run. Where a tracker sends its data is set as the library
documents it (``WANDB_MODE=offline``, ``MLFLOW_TRACKING_URI``).
"""

from __future__ import annotations

import abc
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage, EventWriter, get_event_storage

from reclip_d2.errors import ReclipError
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.json_files import read_json

FILE = "trackers.json"
_SCHEMA = {"type": "object", "additionalProperties": {"type": "string"}}
_WINDOW = 20  # iterations over which Detectron2 smooths the scalars that it smooths


class TrackerWriter(EventWriter, abc.ABC):
    """Base of the writers: sends what is new in the event storage."""

    name: ClassVar[str]
    """In ``TRACKERS.USE``; also the name of the extra."""
    package: ClassVar[str]

    def __init__(self, cfg: CfgNode, settings: Mapping[str, Any]) -> None:
        """
        Args:
            cfg: keys ``TRACKERS`` and ``OUTPUT_DIR``.
            settings: config values by key, for the tracker's page.
        """
        self.library = load_library(self)
        ids = Path(cfg.OUTPUT_DIR) / FILE
        known = dict(read_json(ids, _SCHEMA, "file of run ids", "remove it to begin new runs")) if ids.exists() else {}
        run = cfg.TRACKERS.RUN or Path(cfg.OUTPUT_DIR).name
        try:
            run_id = self.start(cfg.TRACKERS.PROJECT, run, known.get(self.name), settings)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ReclipError(
                f"TRACKERS.USE: {self.name} cannot start a run: {reason}; check its login or server, or remove it from"
                " TRACKERS.USE"
            ) from error
        with atomic_write(ids) as temporary:
            temporary.write_text(json.dumps({**known, self.name: run_id}, indent=1) + "\n")
        self._written = -1

    @abc.abstractmethod
    def start(self, project: str, run: str, run_id: str | None, settings: Mapping[str, Any]) -> str:
        """Begin a run, or continue the one with this id; return its id."""

    @abc.abstractmethod
    def log(self, scalars: Mapping[str, float], iteration: int) -> None:
        """Send scalars of one iteration."""

    @abc.abstractmethod
    def log_image(self, name: str, image: np.ndarray, iteration: int) -> None:
        """Send an image ``(H, W, 3)`` uint8, RGB."""

    def write(self) -> None:
        """Send the scalars and images that have come since the last call."""
        storage = get_event_storage()
        for iteration, scalars in new_scalars(storage, self._written).items():
            self.log(scalars, iteration)
        for name, image, iteration in storage._vis_data:
            if iteration > self._written:  # without TensorBoard's writer, nobody removes those that were sent
                self.log_image(name, as_pixels(image), iteration)
        self._written = storage.iter

    def close(self) -> None:
        """End the run."""


class WandbWriter(TrackerWriter):
    """Weights & Biases."""

    name = package = "wandb"

    def start(self, project: str, run: str, run_id: str | None, settings: Mapping[str, Any]) -> str:
        self._run = self.library.init(
            project=project, name=run, id=run_id, resume="allow" if run_id else None, config=dict(settings)
        )
        self._step = 0  # the library drops what comes with an earlier step than the last
        return self._run.id

    def log(self, scalars: Mapping[str, float], iteration: int) -> None:
        self._step = max(self._step, iteration)
        self._run.log(dict(scalars), step=self._step)

    def log_image(self, name: str, image: np.ndarray, iteration: int) -> None:
        self._run.log({name: self.library.Image(image)}, step=max(self._step, iteration))

    def close(self) -> None:
        self._run.finish()


class MLflowWriter(TrackerWriter):
    """MLflow."""

    name = package = "mlflow"

    def start(self, project: str, run: str, run_id: str | None, settings: Mapping[str, Any]) -> str:
        self.library.set_experiment(project)
        started = self.library.start_run(run_id=run_id, run_name=None if run_id else run)
        if run_id is None:  # parameters of a run cannot be written twice
            texts = {key: str(value)[:500] for key, value in settings.items()}
            for start in range(0, len(texts), 100):  # the server's limit
                self.library.log_params(dict(list(texts.items())[start : start + 100]))
        return started.info.run_id

    def log(self, scalars: Mapping[str, float], iteration: int) -> None:
        self.library.log_metrics({_mlflow_name(key): value for key, value in scalars.items()}, step=iteration)

    def log_image(self, name: str, image: np.ndarray, iteration: int) -> None:
        self.library.log_image(image, artifact_file=f"{_mlflow_name(name)}_{iteration:07d}.png")

    def close(self) -> None:
        self.library.end_run()


WRITERS: dict[str, type[TrackerWriter]] = {writer.name: writer for writer in (WandbWriter, MLflowWriter)}


def load_library(writer: type[TrackerWriter] | TrackerWriter) -> ModuleType:
    """The tracker's package; raise :class:`ReclipError` that names the extra if it is not installed."""
    try:
        return importlib.import_module(writer.package)
    except ImportError as error:
        raise ReclipError(
            f"TRACKERS.USE has {writer.name!r}, whose package is not installed: pip install 'reclip_d2[{writer.name}]'"
        ) from error


def check_trackers(cfg: CfgNode) -> None:
    """Raise :class:`ReclipError` if a package that ``TRACKERS.USE`` needs is not installed."""
    for name in cfg.TRACKERS.USE:
        load_library(WRITERS[name])


def build_trackers(cfg: CfgNode, settings: Mapping[str, Any]) -> list[TrackerWriter]:
    """The writers of ``TRACKERS.USE``."""
    return [WRITERS[name](cfg, settings) for name in cfg.TRACKERS.USE]


def new_scalars(storage: EventStorage, after: int) -> dict[int, dict[str, float]]:
    """Finite scalars by iteration and name that were put after an iteration; smoothed as Detectron2 does."""
    found: dict[int, dict[str, float]] = {}
    for name, (value, iteration) in storage.latest_with_smoothing_hint(_WINDOW).items():
        if iteration > after and np.isfinite(value):
            found.setdefault(iteration, {})[name] = float(value)
    return dict(sorted(found.items()))


def as_pixels(image: Any) -> np.ndarray:  # noqa: ANN401
    """Image of the event storage, ``(3, H, W)`` in [0, 1] or uint8, as ``(H, W, 3)`` uint8."""
    pixels = np.asarray(image).transpose(1, 2, 0)
    return pixels if pixels.dtype == np.uint8 else (pixels * 255 + 0.5).clip(0, 255).astype(np.uint8)


def _mlflow_name(name: str) -> str:
    """A name with the characters that MLflow accepts."""
    return "".join(char if char.isalnum() or char in "_-. /" else "_" for char in name).strip()
