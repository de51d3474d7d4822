"""A saved model: a folder of four files, for keeping, sharing and predicting.

::

    config.json        classes, CLIP and kind of model
    config.yaml        the keys of the config, without paths
    model.safetensors  trained weights, without CLIP's own; missing for MaskCLIP
    README.md          the model card

and, if open_clip does not know the CLIP, its architecture. Nothing in such a folder is executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from reclip_d2.backbones.architectures import is_architecture_file
from reclip_d2.config import KEYS
from reclip_d2.config.keys import PATH_KEYS
from reclip_d2.errors import ReclipError
from reclip_d2.modeling.checkpoint import IDENTITY_VERSION
from reclip_d2.modeling.meta_arch.base import LanguageSegmentor
from reclip_d2.utils.json_files import read_json
from reclip_d2.utils.tensor_files import save_safetensors
from reclip_d2.workspace.model_card import model_card
from reclip_d2.workspace.run_folder import RunFolder
from reclip_d2.workspace.run_state import CLASSES_SCHEMA, KINDS, RunState, classes_from_json, classes_to_json

FORMAT = "reclip_d2 model 1"
CONFIG_JSON, CONFIG_YAML, WEIGHTS, CARD = "config.json", "config.yaml", "model.safetensors", "README.md"
_REMEDY = "save the model again"
_TEXT = {"type": "string", "maxLength": 100_000}
_SCHEMA = {
    "type": "object",
    "required": ["format", "kind", "classes", "clip", "pretrained", "weights"],
    "properties": {
        "format": {"const": FORMAT},
        "kind": {"enum": list(KINDS)},
        "classes": CLASSES_SCHEMA,
        "clip": {"type": "string", "pattern": r"^[^/\\]+$", "maxLength": 200},
        "pretrained": _TEXT,
        "weights": _TEXT,
    },
}


class SavedModelFolder(RunFolder):
    """A saved model used like a run's folder by :class:`~reclip_d2.workspace.trained_model.TrainedModel`."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.marker = self.path / CONFIG_JSON

    @staticmethod
    def is_one(path: Path) -> bool:
        """Whether a folder looks like a saved model, not like a run's folder."""
        return (path / CONFIG_JSON).is_file() and not (path / "reclip.json").exists()

    @property
    def kind(self) -> str:
        """Kind of the model."""
        return self._content()["kind"]

    def config(self, kind: str) -> Path:
        """Config of its kind of model; for other kinds a path that does not exist."""
        return self.path / (CONFIG_YAML if kind == self.kind else f"no-{kind}.yaml")

    def weights(self, kind: str) -> Path:
        """Weights of its kind of model; for other kinds a path that does not exist."""
        return self.path / (WEIGHTS if kind == self.kind else f"no-{kind}.safetensors")

    def read(self) -> RunState:
        """Classes and CLIP, in the form of a run folder's state.

        Raises:
            ReclipError: ``config.json`` is damaged.
        """
        content = self._content()
        clip = content["clip"]
        if is_architecture_file(clip):
            clip = str(self.path / clip)
        classes = classes_from_json(content["classes"], str(self.marker))
        return RunState(classes, clip, content["pretrained"], content["weights"])

    def _content(self) -> dict[str, Any]:
        return read_json(self.marker, _SCHEMA, "model file", _REMEDY)


@dataclasses.dataclass(frozen=True)
class ModelToSave:
    """A model with its config and state.

    Attributes:
        model: the model with its weights.
        kind: a key of :data:`~reclip_d2.workspace.options.TITLES`.
        cfg: its config.
        state: its classes and its CLIP.
    """

    model: LanguageSegmentor
    kind: str
    cfg: CfgNode
    state: RunState

    def save(self, folder: Path, *, overwrite: bool = False, portable: bool = False) -> None:
        """Write the folder atomically.

        Args:
            overwrite: replace an existing saved model.
            portable: for other machines: a path of CLIP's weights is reduced to the file name.

        Raises:
            ReclipError: the folder contains other files or, without ``overwrite``, a saved model; or the config names
                a file that the model requires.
        """
        if self.cfg.MODEL.CLIP.CLASS_TOKEN:
            raise ReclipError("a model with MODEL.CLIP.CLASS_TOKEN, a file, cannot be saved: omit the key")
        with _new_folder(folder, overwrite) as new:
            self._write(new, portable)

    def _write(self, folder: Path, portable: bool) -> None:
        state, clip = self.state, self.state.clip
        if is_architecture_file(clip):
            clip = Path(clip).name
            shutil.copyfile(state.clip, folder / clip)
        pretrained = Path(state.pretrained).name if portable and os.sep in state.pretrained else state.pretrained
        content = {
            "format": FORMAT,
            "kind": self.kind,
            "classes": classes_to_json(state.classes),
            "clip": clip,
            "pretrained": pretrained,
            "weights": state.weights,
        }
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        (folder / CONFIG_JSON).write_text(text, encoding="utf-8")
        cfg = _without_paths(self.cfg, clip, self.kind)
        (folder / CONFIG_YAML).write_text(cfg.dump(), encoding="utf-8")
        (folder / CARD).write_text(model_card(self.kind, state.classes, clip, pretrained, cfg), encoding="utf-8")
        if self.kind != "maskclip":
            tensors = {name: value.detach().cpu().contiguous() for name, value in self.model.state_dict().items()}
            metadata = {"identity": json.dumps(self.model.identity()), "identity_version": IDENTITY_VERSION}
            save_safetensors(tensors, folder / WEIGHTS, {**metadata, "format": "pt"})


def _without_paths(cfg: CfgNode, clip: str, kind: str) -> CfgNode:
    """The config of the model only, without anything specific to the machine that trained it."""
    cfg = cfg.clone()
    cfg.defrost()
    pairs = [*neutral_paths(), "MODEL.DEVICE", "cpu", "MODEL.CLIP.NAME", clip]
    if kind == "student":  # without its teacher
        pairs += ["MODEL.META_ARCHITECTURE", "Student"]
    cfg.merge_from_list(pairs)
    cfg.TEST.REFINE = [name for name in cfg.TEST.REFINE if name != "bank"]  # it belongs to the run's folder
    return cfg


def neutral_paths() -> list[str]:
    """``KEY VALUE`` pairs that set all keys of paths to their defaults."""
    defaults = {key: KEYS[key].default if key in KEYS else "" for key in PATH_KEYS} | {"OUTPUT_DIR": "./output"}
    return [part for pair in defaults.items() for part in pair]


@contextlib.contextmanager
def _new_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder, which replaces ``target`` when the block ends without an error."""
    if target.exists() and any(target.iterdir()):
        if not SavedModelFolder.is_one(target) or not _holds_only_a_model(target):
            raise ReclipError(f"folder {target} contains other files: name a new or empty one")
        if not overwrite:
            raise ReclipError(f"folder {target} contains a saved model: give overwrite=True, or another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    new, old = (target.with_name(f".{target.name[:100]}.{secrets.token_hex(4)}.tmp") for _ in range(2))
    new.mkdir()
    try:
        yield new
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        for folder in (new, old):
            shutil.rmtree(folder, ignore_errors=True)


def _holds_only_a_model(folder: Path) -> bool:
    known = {CONFIG_JSON, CONFIG_YAML, WEIGHTS, CARD}
    return all(path.name in known or path.suffix == ".json" for path in folder.iterdir() if path.is_file()) and not any(
        path.is_dir() for path in folder.iterdir()
    )
