"""Checkpoints of trained parts only, which know what they belong to."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.utils import comm

from reclip_d2.errors import ReclipError, is_user_error
from reclip_d2.io import atomic_write
from reclip_d2.utils.files import MissingFileError, check_regular
from reclip_d2.utils.tensor_files import check_tensors, dtype_mismatches, read_tensor_file, state_dict_of

logger = logging.getLogger(__name__)


class ReclipCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, with four differences.

    - A checkpoint carries the model's ``identity()`` (CLIP, hash of its weights, class list, templates), and one of
      another identity is refused.
    - It carries the resolution of the training, where that was given, for whoever learns from the model.
    - Files are written to a temporary name and renamed.
    - Only tensors and plain values are loaded, and they are checked: nothing in a file executes.
    """

    def __init__(self, model: Any, save_dir: str = "", *, resolution: str = "", **kwargs: Any) -> None:
        """
        Args:
            resolution: of the training images, see :func:`training_resolution`.
            kwargs: of Detectron2's ``DetectionCheckpointer``.
        """
        super().__init__(model, save_dir, **kwargs)
        self.resolution = resolution

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<save_dir>/<name>.pth`` and tag it as the last checkpoint; see fvcore's ``Checkpointer``."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict(), "identity": json.dumps(self.model.identity()), **kwargs}
        if self.resolution:
            data["resolution"] = self.resolution
        for key, checkpointable in self.checkpointables.items():
            data[key] = checkpointable.state_dict()
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        with atomic_write(path) as temporary:
            torch.save(data, temporary)
        with atomic_write(os.path.join(self.save_dir, "last_checkpoint")) as temporary:
            temporary.write_text(os.path.basename(path))

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint; see fvcore's ``Checkpointer``. The file must exist and fit the model."""
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
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
            if is_user_error(error):  # memory ran out
                raise
            # Of the optimizer, the scheduler and such: each has its own way to refuse another's state.
            cause = " ".join(str(error).split())[:120] or type(error).__name__
            raise ReclipError(
                f"checkpoint {path} does not fit this training ({cause}): use the config that it was trained with"
            ) from error

    def _load_file(self, filename: str) -> dict[str, Any]:
        file = read_tensor_file(filename, "checkpoint")
        if not isinstance(file.content, dict):
            raise ReclipError(f"checkpoint {filename} holds no weights")
        check_tensors(file.content, f"checkpoint {filename}")
        content = dict(file.content) if "model" in file.content else {"model": file.content}
        iteration = content.get("iteration", 0)
        if type(iteration) is not int or iteration < 0:
            raise ReclipError(f"checkpoint {filename} is damaged: its iteration is {_short(iteration)}")
        return {"identity": file.metadata.get("identity"), **content}

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        check_identity(checkpoint.pop("identity", None), self.model.identity(), self._path)
        weights = checkpoint["model"] = state_dict_of(checkpoint["model"], f"checkpoint {self._path}", wrappers=())
        # fvcore would look a tensor of another shape up in the model by its name, which need not be its place.
        own = {key: tuple(value.shape) for key, value in self.model.state_dict().items()}
        self._refuse(
            f"{key} has shape {tuple(value.shape)} instead of {own[key]}"
            for key, value in weights.items()
            if key in own and tuple(value.shape) != own[key]
        )
        self._refuse(dtype_mismatches(weights, self.model.state_dict()))
        incompatible = super()._load_model(checkpoint)
        self._refuse(
            [f"{key} is missing" for key in incompatible.missing_keys]
            + [f"{key} is unknown" for key in incompatible.unexpected_keys]
        )
        return incompatible

    def _refuse(self, mistakes: Iterable[str]) -> None:
        wrong = list(mistakes)
        if wrong:
            raise ReclipError(
                f"checkpoint {self._path} does not fit this model: {wrong[0]}"
                f"{f' (and {len(wrong) - 1} more)' if len(wrong) > 1 else ''}; use the config that it was trained with"
            )


def forget_run(folder: str) -> None:
    """Remove checkpoints and metrics of an earlier run, so that ``--resume`` cannot go on with it.

    Called by all processes, when the new run is about to begin and has read what it starts from.
    """
    comm.synchronize()
    if not comm.is_main_process():
        return
    for path in [*Path(folder).glob("model_*.pth"), Path(folder, "last_checkpoint")]:
        path.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.truncate(Path(folder, "metrics.json"), 0)  # the new run's writer has it open already, to append to it


def training_resolution(cfg: CfgNode) -> str:
    """The size of the training images in words."""
    short_sides = "/".join(map(str, cfg.INPUT.MIN_SIZE_TRAIN))
    crop = f", {cfg.INPUT.CROP.TYPE} crop {'x'.join(map(str, cfg.INPUT.CROP.SIZE))}" if cfg.INPUT.CROP.ENABLED else ""
    return f"short side {short_sides} px{crop}"


def check_identity(found: str | None, expected: dict[str, Any], path: str) -> None:
    """Raise :class:`ReclipError` if a checkpoint belongs to another CLIP, class list or template set.

    Args:
        found: the identity in the file, JSON; None if it has none.
        expected: the model's.
    """
    if found is None:
        raise ReclipError(f"checkpoint {path} does not say which CLIP and classes it belongs to: it is not one of ours")
    try:
        identity = dict(json.loads(found))
    except (ValueError, TypeError, RecursionError) as error:
        raise ReclipError(f"checkpoint {path} has a damaged identity: it is not one of ours") from error
    if "student_head" in identity and "student_head" not in expected:
        raise ReclipError(f"checkpoint {path} is a distilled student's: give one of the rectification stage")
    if "student_head" in expected and "student_head" not in identity:
        raise ReclipError(
            f"checkpoint {path} is a rectified CLIP's, not a student's: a teacher is named in MODEL.TEACHER.WEIGHTS"
        )
    # A hash says least about what differs: it comes last.
    for key in sorted({**expected, **identity}, key="fingerprint".__eq__):
        value, other = expected.get(key), identity.get(key)
        if other == value:
            continue
        if key == "class_names":
            raise ReclipError(f"checkpoint {path} is of another class list: {_difference(other, value)}")
        raise ReclipError(f"checkpoint {path} is of another {key}: {_short(other)} instead of {_short(value)}")


def _difference(theirs: Any, ours: list[list[str]]) -> str:
    if not isinstance(theirs, list) or len(theirs) != len(ours):
        count = len(theirs) if isinstance(theirs, list) else 0
        return f"{count} classes instead of {len(ours)}"
    index = next(i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)
    names = "/".join(map(str, theirs[index])) if isinstance(theirs[index], list) else str(theirs[index])
    return f"class {index} is {_short(names)!r} instead of {'/'.join(ours[index])!r}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:16] + "..."
