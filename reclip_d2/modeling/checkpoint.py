"""Checkpoints with the trained weights only, and the identity of the model that they belong to."""

from __future__ import annotations

import json
import logging
import os
import re
import urllib.error
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode

from reclip_d2.config.keys import KEYS
from reclip_d2.errors import ReclipError, is_user_error
from reclip_d2.utils.files import MissingFileError, check_regular, read_text
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.tensor_files import check_tensors, dtype_mismatches, read_tensor_file, save_archive, state_dict_of
from reclip_d2.utils.text import shorten

logger = logging.getLogger(__name__)

# Version 2: the identity contains all that the features depend on. Earlier checkpoints have no version.
IDENTITY_VERSION = "2"

FINAL_CHECKPOINT = "model_final.pth"
# A file with the name of the last checkpoint.
LAST_CHECKPOINT = "last_checkpoint"


class ReclipCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, with four differences.

    - A checkpoint contains the model's ``identity()`` (CLIP, hash of its weights, class list, templates); checkpoints
      with another identity are rejected.
    - It contains the training resolution, if given, for distillation to check.
    - Files are written to a temporary name and renamed.
    - Only tensors and plain values are loaded, and they are checked: nothing in a file is executed.
    """

    def __init__(self, model: Any, save_dir: str = "", *, resolution: str = "", **kwargs: Any) -> None:
        """
        Args:
            resolution: training resolution, see :func:`training_resolution`.
            kwargs: arguments of Detectron2's ``DetectionCheckpointer``.
        """
        super().__init__(model, save_dir, **kwargs)
        self.resolution = resolution

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<save_dir>/<name>.pth`` and mark it as the last checkpoint; see fvcore's ``Checkpointer``."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {
            "model": self.model.state_dict(),
            "identity": json.dumps(self.model.identity()),
            "identity_version": IDENTITY_VERSION,
            **kwargs,
        }
        if self.resolution:
            data["resolution"] = self.resolution
        for key, checkpointable in self.checkpointables.items():
            data[key] = checkpointable.state_dict()
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        with atomic_write(path) as temporary:
            save_archive(data, temporary)
        point_to(Path(path))

    def get_checkpoint_file(self) -> str:
        """Path of the last checkpoint, as named in the file ``last_checkpoint``; "" if that does not exist.

        Raises:
            ReclipError: the file does not name a checkpoint of the folder.
        """
        pointer = os.path.join(self.save_dir, LAST_CHECKPOINT)
        remedy = "write the name of a checkpoint of this folder into it, or give --overwrite"
        try:
            name = read_text(pointer, "file", limit=4096, remedy=remedy).strip()
        except MissingFileError:
            return ""
        if not re.fullmatch(r"[\w.-]+\.(pth|safetensors)", name) or name.startswith("."):
            raise ReclipError(f"file {pointer} names {name[:60]!r}, which is not a checkpoint: {remedy}")
        return os.path.join(self.save_dir, name)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint; see fvcore's ``Checkpointer``.

        Raises:
            ReclipError: the file does not exist, cannot be fetched, is damaged, or does not fit the model or training.
        """
        if path and not path.startswith(("http://", "https://", "detectron2://")):
            try:
                check_regular(path, "checkpoint", "check MODEL.WEIGHTS")
            except MissingFileError:
                if self.save_dir and self.has_checkpoint() and path == self.get_checkpoint_file():
                    raise ReclipError(
                        f"checkpoint {path}, the last of the run, does not exist: put it back, or give --overwrite"
                    ) from None
                raise
        self._path = path
        try:
            return super().load(path, *args, **kwargs)
        except urllib.error.URLError as error:
            raise ReclipError(
                f"checkpoint {path} cannot be fetched ({error.reason}): check the network, or name a local file"
            ) from error
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
            if is_user_error(error):  # out of memory
                raise
            # Optimizer, scheduler and others reject a state that does not fit with various exceptions.
            cause = " ".join(str(error).split())[:120] or type(error).__name__
            raise ReclipError(
                f"checkpoint {path} does not fit this training ({cause}): use the config that it was trained with"
            ) from error

    def _load_file(self, filename: str) -> dict[str, Any]:
        file = read_tensor_file(filename, "checkpoint")
        if not isinstance(file.content, dict):
            raise ReclipError(f"checkpoint {filename} contains no weights")
        check_tensors(file.content, f"checkpoint {filename}")
        content = dict(file.content) if "model" in file.content else {"model": file.content}
        iteration = content.get("iteration", 0)
        if type(iteration) is not int or iteration < 0:
            raise ReclipError(f"checkpoint {filename} is damaged: its iteration is {shorten(iteration, 24)}")
        metadata = {key: file.metadata[key] for key in ("identity", "identity_version") if key in file.metadata}
        return {**metadata, **content}

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        recorded = str(checkpoint.pop("identity_version", "1")) == IDENTITY_VERSION
        former = {} if recorded else self.model.former_identity()
        check_identity(checkpoint.pop("identity", None), self.model.identity(), self._path, former)
        weights = checkpoint["model"] = state_dict_of(checkpoint["model"], f"checkpoint {self._path}", wrappers=())
        # Check shapes before fvcore does: for a mismatch it looks up modules by the key, which need not be their path.
        own = {key: tuple(value.shape) for key, value in self.model.state_dict().items()}
        self._reject(
            f"{key} has shape {tuple(value.shape)} instead of {own[key]}"
            for key, value in weights.items()
            if key in own and tuple(value.shape) != own[key]
        )
        self._reject(dtype_mismatches(weights, self.model.state_dict()))
        incompatible = super()._load_model(checkpoint)
        self._reject(
            [f"{key} is missing" for key in incompatible.missing_keys]
            + [f"{key} is unknown" for key in incompatible.unexpected_keys]
        )
        return incompatible

    def _reject(self, problems: Iterable[str]) -> None:
        """Raise :class:`ReclipError` if there are any problems."""
        found = list(problems)
        if found:
            raise ReclipError(
                f"checkpoint {self._path} does not fit this model: {found[0]}"
                f"{f' (and {len(found) - 1} more)' if len(found) > 1 else ''}; use the config that it was trained with"
            )


def point_to(path: Path) -> None:
    """Mark a checkpoint as the last of its folder."""
    with atomic_write(path.with_name(LAST_CHECKPOINT)) as temporary:
        temporary.write_text(path.name)


def training_resolution(cfg: CfgNode) -> str:
    """Description of the size of the training images."""
    short_sides = "/".join(map(str, cfg.INPUT.MIN_SIZE_TRAIN))
    crop = f", {cfg.INPUT.CROP.TYPE} crop {'x'.join(map(str, cfg.INPUT.CROP.SIZE))}" if cfg.INPUT.CROP.ENABLED else ""
    return f"short side {short_sides} px{crop}"


# What sets the fields of an identity that are not named by a key.
_SET_BY = {
    "class_names": "class list",
    "clip": "MODEL.CLIP.NAME",
    "fingerprint": "MODEL.CLIP.PRETRAINED",
    "templates": "MODEL.CLIP.TEMPLATES",
    "reference": "MODEL.BIAS_HEAD keys",
    "rectification": "MODEL.BIAS_HEAD.RECTIFICATION",
    "student_head": "MODEL.STUDENT.HEAD",
    "bias_grid": "INPUT keys",
}


def check_identity(
    found: str | None, expected: dict[str, Any], path: str, former: Mapping[str, Any] | None = None
) -> None:
    """Raise :class:`ReclipError` if a checkpoint belongs to another CLIP, class list or template set.

    Args:
        found: identity in the file, JSON; None if it has none.
        expected: identity of the model.
        path: path of the checkpoint, for messages.
        former: values of the fields that checkpoints of earlier versions do not record.
    """
    if found is None:
        raise ReclipError(f"checkpoint {path} has no identity: it was not written by reclip_d2")
    try:
        identity = {**(former or {}), **dict(json.loads(found))}
    except (ValueError, TypeError, RecursionError) as error:
        raise ReclipError(f"checkpoint {path} has a damaged identity: it was not written by reclip_d2") from error
    if "student_head" in identity and "student_head" not in expected:
        raise ReclipError(f"checkpoint {path} is a distilled student's: use one of the rectification stage")
    if "student_head" in expected and "student_head" not in identity:
        raise ReclipError(
            f"checkpoint {path} is a rectified CLIP's, not a student's: for a teacher, set MODEL.TEACHER.WEIGHTS"
        )
    # The fingerprint last: a hash explains least.
    for key in sorted({**expected, **identity}, key="fingerprint".__eq__):
        value, other = expected.get(key), identity.get(key)
        if other == value:
            continue
        remedy = f"use the {_SET_BY.get(key, key)} that it was trained with, or another checkpoint"
        if key == "class_names":
            raise ReclipError(f"checkpoint {path} is of another class list: {_difference(other, value)}; {remedy}")
        usual = KEYS[key].default if key in KEYS else None  # keys with their defaults are not recorded
        words = [shorten(usual if entry is None else entry, 24) for entry in (other, value)]
        raise ReclipError(f"checkpoint {path} is of another {key}: {words[0]} instead of {words[1]}; {remedy}")


def _difference(theirs: Any, ours: list[list[str]]) -> str:
    if not isinstance(theirs, list) or len(theirs) != len(ours):
        count = len(theirs) if isinstance(theirs, list) else 0
        return f"{count} classes instead of {len(ours)}"
    index = next(i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)
    names = "/".join(map(str, theirs[index])) if isinstance(theirs[index], list) else str(theirs[index])
    return f"class {index} is {shorten(names, 24)!r} instead of {'/'.join(ours[index])!r}"
