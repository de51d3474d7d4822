"""A trained model in an output folder of ``reclip segment``, or in the folder of a saved model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.modeling import build_model

from reclip_d2.config import load_config
from reclip_d2.data.class_file import ClassList
from reclip_d2.data.datasets.custom import register_images
from reclip_d2.errors import ReclipError
from reclip_d2.inference import ImagePredictor
from reclip_d2.modeling.checkpoint import ReclipCheckpointer
from reclip_d2.utils.digest import current_digest, file_digest
from reclip_d2.workspace.decision import Decision
from reclip_d2.workspace.run_folder import RunFolder
from reclip_d2.workspace.run_state import RunState
from reclip_d2.workspace.saved_model import SavedModelFolder, neutral_paths
from reclip_d2.workspace.stage_config import resolve_pretrained, stage_config


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """One of a run's models, or a saved one.

    Attributes:
        folder: folder of the run or of the saved model.
        state: recorded state of the folder.
        kind: kind of model, a key of :data:`~reclip_d2.workspace.options.TITLES`.
        pretrained: CLIP's weights.
    """

    folder: RunFolder
    state: RunState
    kind: str
    pretrained: str

    @classmethod
    def find(cls, model: str, use: str | None, pretrained: str | None) -> TrainedModel:
        """Find the model that a command's arguments name.

        Args:
            model: ``--model``, an output folder, or the folder of a saved model.
            use: ``--use``, a kind; None for the one whose masks the run kept.
            pretrained: ``--pretrained``, CLIP's weights; None for those of the training.

            Raises:
                ReclipError: the folder contains no run, the model is not finished, or CLIP's weights differ from the
                    training's.
        """
        folder = RunFolder(model)
        if SavedModelFolder.is_one(folder.path):
            folder = SavedModelFolder(folder.path)
        state = folder.read() if folder.marker.is_file() else None
        if state is None:
            raise ReclipError(f"--model {model} is neither an output folder of reclip segment nor a saved model")
        kind = use or state.kept or _last(folder)
        if kind != "maskclip" and not folder.weights(kind).exists():
            raise ReclipError(f"--model {model} has no finished model ({kind}): run its reclip segment to the end")
        pretrained = state.pretrained if pretrained is None else resolve_pretrained(pretrained)
        state.weights = current_digest(state.weights, pretrained)
        _check_weights(state, pretrained, kind)
        return cls(folder, state, kind, pretrained)

    @property
    def weights(self) -> Path:
        """Its checkpoint; MaskCLIP has none."""
        return self.folder.weights(self.kind)

    @property
    def decision(self) -> Decision | None:
        """Whose masks its run kept, and why; None for a run without training, and a saved model."""
        return Decision.read(self.folder.decision)

    def to_compare(self) -> TrainedModel:
        """The model to compare with CLIP's own masks: the one that was trained, even where a run kept other masks."""
        decision = self.decision
        if decision is None or self.kind != decision.kept:
            return self
        return dataclasses.replace(self, kind=decision.trained)

    def config(self, overrides: Sequence[str]) -> CfgNode:
        """Its config, with ``KEY VALUE`` overrides."""
        pairs = ["MODEL.CLIP.PRETRAINED", self.pretrained, *overrides]
        # Every run can predict with MaskCLIP.
        if self.kind == "maskclip" and not self.folder.config(self.kind).exists():
            return stage_config(self.kind, self.state.clip, pairs)
        if isinstance(self.folder, SavedModelFolder):  # from anywhere: its config may not name files
            pairs = [*neutral_paths(), "MODEL.CLIP.NAME", self.state.clip, *pairs]
        elif self.folder.hypotheses.exists():  # the folder may have moved
            pairs = ["HYPOTHESIS.FILE", str(self.folder.hypotheses), *pairs]
        evidence = self.folder.evidence
        pairs = ["TEST.CLASS_EVIDENCE", str(evidence) if evidence.exists() else "", *pairs]
        if self.folder.bank(self.kind).exists():
            pairs = ["TEST.BANK.FILE", str(self.folder.bank(self.kind)), *pairs]
        return load_config(str(self.folder.config(self.kind)), pairs, bases=False)

    def predictor(self, overrides: Sequence[str]) -> ImagePredictor:
        """Its predictor, with ``KEY VALUE`` overrides of the config."""
        return load_predictor(self.config(overrides), self.kind, self.state.classes, self.weights)


def _last(folder: RunFolder) -> str:
    """The last kind of model that an unfinished run, or one of an earlier version, has trained."""
    for kind in ("student", "rectified"):
        if folder.weights(kind).exists():
            return kind
    return "rectified" if folder.config("rectified").exists() else "maskclip"


def _check_weights(trained: RunState, pretrained: str, kind: str) -> None:
    """Raise :class:`ReclipError` if CLIP's weights differ from the training's; a student needs none."""
    if kind == "student":
        return
    digest = file_digest(pretrained)
    if (digest or pretrained) != trained.weights:
        found = "is another file than" if digest else "is not found;"
        raise ReclipError(
            f"--pretrained {pretrained} {found} the CLIP weights of the training ({trained.pretrained}): give these"
        )


def load_predictor(cfg: CfgNode, kind: str, classes: ClassList, weights: Path | None = None) -> ImagePredictor:
    """Build a model of these classes and load its checkpoint. Registers ``custom`` with the classes, without images.

    Args:
        weights: the checkpoint; not needed for MaskCLIP.
    """
    register_images([], classes)
    cfg = cfg.clone()
    cfg.defrost()
    if kind == "student":  # without its teacher
        cfg.MODEL.META_ARCHITECTURE = "Student"
    model = build_model(cfg).eval()
    if kind != "maskclip":
        ReclipCheckpointer(model).load(str(weights))
    return ImagePredictor.from_config(model, cfg).without_unsupported_classes(cfg)
