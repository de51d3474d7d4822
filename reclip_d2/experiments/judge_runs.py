"""Runs that validate the judge without labels: train each, and keep its label maps and its mIoU.

The runs are listed in ``configs/ablations/judge.yaml``. The judge sees the label maps of the training images; the mIoU
is that of a labelled split.

Shape letters: I images, (h, w) patch grid, (H, W) size in pixels, C classes.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase

from reclip_d2.config import load_config, read_yaml
from reclip_d2.engine.trainer import Trainer, build_evaluation_model
from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.class_preference import confusion_matrix
from reclip_d2.evaluation.label_files import DatasetLabels
from reclip_d2.features.shards import StoredView
from reclip_d2.features.store import FeatureStore, build_store, images_digest
from reclip_d2.features.views import ViewPlan
from reclip_d2.hypothesis.file import write_hypothesis_file
from reclip_d2.hypothesis.training_records import hypothesis_header, unlabelled_records
from reclip_d2.layers import upsample_argmax
from reclip_d2.modeling.meta_arch.segmentor import CLIPSegmentor
from reclip_d2.modeling.view_batch import batch_views
from reclip_d2.utils.io import atomic_write

EARLY = 30
"""Iteration whose model is kept besides the last one."""
_PIXELS_OF_A_CLASS = 0.005  # of an image, for its true hypothesis
_BATCH = 50


@dataclasses.dataclass(frozen=True)
class JudgedRun:
    """An entry of the file: config file of the method, overrides, and which hypotheses replace the method's (``true``,
    ``wrong``, ``all``, or "" for none)."""

    config: str
    overrides: Mapping[str, Any]
    hypotheses: str


def read_runs(file: Path) -> dict[str, JudgedRun]:
    """Runs of a file by name, with the common overrides.

    Raises:
        ReclipError: the file is missing or wrong.
    """
    content = read_yaml(file, "file of judged runs")
    if not isinstance(content, dict) or not isinstance(content.get("runs"), dict):
        raise ReclipError(f"{file} lists no runs: see configs/ablations/judge.yaml")
    common, found = content.get("common") or {}, {}
    for name, entry in content["runs"].items():
        unknown = set(entry) - {"config", "overrides", "hypotheses"} if isinstance(entry, dict) else {entry}
        if unknown or "config" not in entry:
            raise ReclipError(f"{file}: runs: {name}: the keys are config, overrides and hypotheses")
        hypotheses = entry.get("hypotheses", "")
        if hypotheses not in ("", "true", "wrong", "all"):
            raise ReclipError(f"{file}: runs: {name}: hypotheses is {hypotheses!r}; choose true, wrong or all")
        found[name] = JudgedRun(entry["config"], {**common, **entry.get("overrides", {})}, hypotheses)
    return found


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A model at one iteration.

    Attributes:
        miou: in percent, by split.
        labels: label maps of the training images ``(I, h, w)`` uint8.
        flipped: the same for their mirror images, mirrored back.
        entropy: mean entropy of the probabilities of a patch, in nats.
    """

    miou: dict[str, float]
    labels: np.ndarray
    flipped: np.ndarray
    entropy: float


class JudgedWorld:
    """A world with a CLIP: stores of its training and labelled images, and its runs.

    Attributes:
        folder: the runs' files.
        store: of the training images and their mirror images.
        query_features: W_q ``(C, D)``.
        normalize: maps an image ``(3, H, W)`` in [0, 255] to the CLIP's input.
    """

    def __init__(self, world: str, pretrained: str, folder: Path, configs: Path, splits: Sequence[str]) -> None:
        """
        Args:
            world: embedded data set.
            pretrained: ``MODEL.CLIP.PRETRAINED``.
            folder: output.
            configs: the folder with ``datasets`` and ``methods``.
            splits: where the mIoU is measured, such as ``dev``.
        """
        self.world, self.pretrained, self.folder, self.configs = world, pretrained, folder, configs
        folder.mkdir(parents=True, exist_ok=True)
        views = {"FEATURE_STORE.VIEWS": 2, "FEATURE_STORE.KIND": "whole"}
        model = build_evaluation_model(self.config("maskclip.yaml", views), resume=False)
        self.backbone = model.backbone
        self.query_features, self.normalize = model.query_features, model.normalize
        self.store = self._store(model, "train", 2)
        self._views = {"labels": _read(self.store, 0), "flipped": _read(self.store, 1)}
        self._truth = {}
        for split in splits:
            self._views[split] = _read(self._store(model, split, 1), 0)
            labels = DatasetLabels(f"{world}_{split}")
            records = DatasetCatalog.get(labels.dataset_name)
            sizes = [view.size for view in self._views[split]]
            self._truth[split] = [labels.read(*pair) for pair in zip(records, sizes, strict=True)]

    def config(self, method: str, overrides: Mapping[str, Any], seed: int = 0) -> CfgNode:
        """Config of a method on the world."""
        pairs = {
            "MODEL.DEVICE": "cpu", "MODEL.CLIP.PRETRAINED": self.pretrained, "SEED": seed, "DATALOADER.NUM_WORKERS": 0,
            **overrides,
        }  # fmt: skip
        files = [str(self.configs / "datasets" / f"{self.world}.yaml"), str(self.configs / "methods" / method)]
        return load_config(files, [str(part) for pair in pairs.items() for part in pair])

    def _store(self, model: CLIPSegmentor, split: str, views: int) -> FeatureStore:
        dataset = f"{self.world}_{split}"
        keys = {"FEATURE_STORE.VIEWS": views, "FEATURE_STORE.KIND": "whole", "DATASETS.TRAIN": (dataset,)}
        cfg, records = self.config("maskclip.yaml", keys), unlabelled_records((dataset,))
        store = build_store(cfg, self.backbone, records, ViewPlan.from_config(cfg), images_digest(records))
        store.make(model.view_encoder)
        return store

    def run(self, name: str, run: JudgedRun, seed: int) -> dict[int, Snapshot]:
        """Train a run, or read its file: its snapshots by iteration, the last one last.

        Raises:
            ReclipError: the training diverged.
        """
        file = self.folder / f"{name}.{seed}.npz"
        if not file.exists():
            found = self._snapshots(run, seed)
            arrays = {
                f"{key}:{iteration}": value
                for iteration, one in found.items()
                for key, value in {
                    "labels": one.labels, "flipped": one.flipped, "entropy": one.entropy,
                    **{f"miou_{split}": value for split, value in one.miou.items()},
                }.items()
            }  # fmt: skip
            with atomic_write(file) as temporary, open(temporary, "wb") as stream:
                np.savez_compressed(stream, **arrays)
        return _read_snapshots(file)

    def _snapshots(self, run: JudgedRun, seed: int) -> dict[int, Snapshot]:
        overrides = dict(run.overrides)
        if run.hypotheses:
            overrides |= {"HYPOTHESIS.METHOD": "imported", "HYPOTHESIS.FILE": self._hypotheses(run.hypotheses)}
        with tempfile.TemporaryDirectory(prefix="reclip-judge-") as output:
            cfg = self.config(run.config, {**overrides, "OUTPUT_DIR": output}, seed)
            if cfg.MODEL.META_ARCHITECTURE == "MaskCLIP":
                return {0: self._snapshot(build_evaluation_model(cfg, resume=False))}
            hook = _Snapshots(self, {EARLY, cfg.SOLVER.MAX_ITER})
            trainer = Trainer(cfg, extra_hooks=[hook], evaluate=False)
            trainer.resume_or_load(resume=False)
            trainer.train()
            return hook.found

    def _snapshot(self, model: CLIPSegmentor) -> Snapshot:
        """Predictions of a model, which is left in its mode."""
        training = model.training
        model.eval()
        logits = self._logits(model, "labels")
        scale = 1 / getattr(model, "gumbel_tau", 1 / self.backbone.logit_scale)
        entropy = torch.distributions.Categorical(logits=(scale * logits).movedim(1, -1)).entropy().mean()
        found = Snapshot(
            miou={split: self._miou(model, split) for split in self._truth},
            labels=logits.argmax(1).numpy().astype(np.uint8),
            flipped=self._logits(model, "flipped").argmax(1).flip(-1).numpy().astype(np.uint8),
            entropy=float(entropy),
        )
        model.train(training)
        return found

    @torch.no_grad()
    def _logits(self, model: CLIPSegmentor, views: str) -> torch.Tensor:
        """Mask logits ``(I, C, h, w)``."""
        parts = []
        for start in range(0, len(self._views[views]), _BATCH):
            part = self._views[views][start : start + _BATCH]
            batch = batch_views([view.features for view in part], [view.size for view in part], model.device)
            parts.append(model.segment_views(batch))
        return torch.cat(parts)

    def _miou(self, model: CLIPSegmentor, split: str) -> float:
        truth = self._truth[split]
        predicted = upsample_argmax(self._logits(model, split), truth[0].shape).numpy()
        confusion = confusion_matrix(predicted, np.stack(truth), len(self.query_features), 255)
        hits, pixels = confusion.diagonal(), confusion.sum(1)
        iou = hits / np.maximum(pixels + confusion.sum(0) - hits, 1)
        return 100 * float(iou[pixels > 0].mean())

    def _hypotheses(self, kind: str) -> Path:
        """File of hypotheses from the labels of the training images: see ``configs/ablations/judge.yaml``."""
        file = self.folder / f"hypotheses_{kind}_from_labels.jsonl"
        if file.exists():
            return file
        labels = DatasetLabels(f"{self.world}_train_labelled")
        classes = range(labels.num_classes)
        found = []
        for record, view in zip(DatasetCatalog.get(labels.dataset_name), self._views["labels"], strict=True):
            ids = labels.read(record, view.size)
            found.append([k for k in classes if (ids == k).mean() > _PIXELS_OF_A_CLASS])
        if kind == "wrong":
            found = [found[other] for other in np.random.default_rng(0).permutation(len(found))]
        if kind == "all":
            found = [list(classes)] * len(found)
        cfg = self.config("reclippp_rectify.yaml", {"HYPOTHESIS.METHOD": "imported", "HYPOTHESIS.FILE": file})
        ids = [record["image_id"] for record in unlabelled_records((f"{self.world}_train",))]
        lines = [{"image_id": name, "classes": sets} for name, sets in zip(ids, found, strict=True)]
        write_hypothesis_file(file, hypothesis_header(cfg, self.backbone), lines)
        return file


class _Snapshots(HookBase):
    """Takes a model's snapshots after some iterations."""

    def __init__(self, world: JudgedWorld, iterations: set[int]) -> None:
        self.world, self.iterations = world, iterations
        self.found: dict[int, Snapshot] = {}

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done in self.iterations:
            self.found[done] = self.world._snapshot(self.trainer.checkpointer.model)


def _read(store: FeatureStore, view: int) -> list[StoredView]:
    """The views with this index of all images."""
    return [store.read(number) for number in range(view, len(store.views), store.views.plan.number)]


def _read_snapshots(file: Path) -> dict[int, Snapshot]:
    with np.load(file, allow_pickle=False) as arrays:
        found: dict[int, dict[str, Any]] = {}
        for key in arrays.files:
            name, _, iteration = key.rpartition(":")
            found.setdefault(int(iteration), {})[name] = arrays[key]
    return {
        iteration: Snapshot(
            {name.removeprefix("miou_"): float(value) for name, value in one.items() if name.startswith("miou_")},
            one["labels"],
            one["flipped"],
            float(one["entropy"]),
        )
        for iteration, one in sorted(found.items())
    }
