"""The settings that a training started with, for ``--resume`` to check.

``training.json`` in ``OUTPUT_DIR`` records all config values that the weights depend on, and the training images.
``config.yaml`` cannot be used for this: every program that uses the folder overwrites it, even an evaluation.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm

from reclip_d2.backbones.precision import tower_precision
from reclip_d2.config import flatten, load_config
from reclip_d2.errors import ReclipError
from reclip_d2.features.views import WHOLE
from reclip_d2.utils.digest import file_digest
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.json_files import MissingFileError, read_json
from reclip_d2.utils.text import shorten

logger = logging.getLogger(__name__)

FILE = "training.json"
FORMAT = "reclip_d2 training 1"

# Keys (with all keys below them) that may change on resume, since the weights do not depend on them: paths, periods of
# checkpoints and images, how the work is done, and evaluation. Checkpoints themselves record their CLIP and classes;
# images are compared by their ids.
_MAY_CHANGE = (
    "CUDNN_BENCHMARK", "DATALOADER.NUM_WORKERS", "DATASETS.CUSTOM", "DATASETS.TEST", "FEATURE_STORE.DEVICE_MEMORY",
    "FEATURE_STORE.FOLDER", "FEATURE_STORE.MAX_SIZE", "HYPOTHESIS.BATCH_SIZE", "HYPOTHESIS.FILE",
    "LINEAR_PROBE", "MODEL.CLIP.PRETRAINED", "MODEL.DEVICE",
    "MODEL.MASKCLIP", "MODEL.STUDENT.WEIGHTS", "MODEL.TEACHER.WEIGHTS", "MODEL.USE_KERNELS",
    "MODEL.WEIGHTS", "OUTPUT_DIR", "SOLVER.CHECKPOINT_PERIOD", "TEST", "TRACKERS", "VERSION", "VIS_PERIOD",
)  # fmt: skip
# May change, too, where training does not read images at this resolution.
_TEST_RESOLUTION = ("INPUT.MAX_SIZE_TEST", "INPUT.MIN_SIZE_TEST")
# Keys that name a file whose content matters.
_FILES = ("MODEL.TEACHER.WEIGHTS", "HYPOTHESIS.FILE")
# May change on resume, with a warning, since the remaining iterations follow the new learning-rate schedule.
_LENGTH = "SOLVER.MAX_ITER"

_SCHEMA = {
    "type": "object",
    "required": ["format", "settings", "files", "images", "processes"],
    "additionalProperties": False,
    "properties": {
        "format": {"const": FORMAT},
        "settings": {"type": "object"},
        "files": {"type": "object", "additionalProperties": {"type": "string"}},
        "images": {"type": "string"},
        "processes": {"type": "integer", "minimum": 1},
    },
}


class TrainingSettings:
    """What the training of a config depends on, except the images, which are passed later.

    Attributes:
        settings: config values by key.
        files: digests of the files that keys name; "" for missing files.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: config of the command line.
        """
        self._file = Path(cfg.OUTPUT_DIR, FILE)
        values = json.loads(json.dumps(flatten(cfg)))  # tuples become lists, as in the file
        values["MODEL.CLIP.AUTOCAST"] = tower_precision(cfg)
        free = () if _trains_at_test_resolution(cfg) else _TEST_RESOLUTION
        self.settings = {key: value for key, value in values.items() if not _may_change(key) and key not in free}
        named = {key: values[key] for key in _FILES if values[key]}
        if cfg.HYPOTHESIS.METHOD != "imported":  # otherwise the file's header is checked when it is read
            named.pop("HYPOTHESIS.FILE", None)
        self.files = {key: file_digest(path) for key, path in named.items()}

    def check(self) -> None:
        """Before a resume, compare with the settings that the training in ``OUTPUT_DIR`` started with.

        Raises:
            ReclipError: a key that the weights depend on differs, or ``training.json`` is damaged.
        """
        recorded = self._read()
        if recorded is None:
            logger.warning("%s is missing: cannot check the settings that the training started with", self._file)
            return
        then = recorded["settings"]
        if missing := self.settings.keys() - then.keys():  # keys added to the package since then
            defaults = json.loads(json.dumps(flatten(load_config(""))))
            then = {**then, **{key: defaults.get(key) for key in missing}}
        changed = [
            f"{key} {shorten(json.dumps(then[key]))} instead of {shorten(json.dumps(value))}"
            for key, value in self.settings.items()
            if key != _LENGTH and then[key] != value
        ]
        changed += [
            f"another file as {key}"
            for key, digest in self.files.items()
            if recorded["files"].get(key, digest) != digest
        ]
        if changed:
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise ReclipError(
                f"{self._file.parent} was trained with {changed[0]}{more}: resume with the same, or give --overwrite"
                " or another OUTPUT_DIR"
            )
        if then[_LENGTH] != self.settings[_LENGTH]:
            logger.warning(
                "%s is %s and was %s: from now on the learning rate follows the new schedule",
                _LENGTH, self.settings[_LENGTH], then[_LENGTH],
            )  # fmt: skip
        if recorded["processes"] != comm.get_world_size():
            logger.warning(
                "the training started with %d processes and resumes with %d: the masks are sampled with other noise",
                recorded["processes"], comm.get_world_size(),
            )  # fmt: skip

    def check_images(self, image_ids: Sequence[str]) -> None:
        """Compare the training images, as :meth:`check` does the config.

        Raises:
            ReclipError: the images or their order have changed.
        """
        recorded = self._read()
        if recorded is not None and recorded["images"] != _images(image_ids):
            count = recorded["images"].partition(" ")[0]
            raise ReclipError(
                f"{self._file.parent} was trained on {count} images, but DATASETS.TRAIN now has others"
                f" ({len(image_ids)}): resume with the same images, or give --overwrite or another OUTPUT_DIR"
            )

    def write(self, image_ids: Sequence[str]) -> None:
        """Write ``training.json``; called by all processes, written by the main process."""
        if not comm.is_main_process():
            return
        content = {
            "format": FORMAT,
            "settings": self.settings,
            "files": self.files,
            "images": _images(image_ids),
            "processes": comm.get_world_size(),
        }
        with atomic_write(self._file) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def _read(self) -> dict[str, Any] | None:
        remedy = "give --overwrite, or remove it if you are sure that nothing has changed"
        try:
            return read_json(self._file, _SCHEMA, "training record", remedy)
        except MissingFileError:  # as in runs of earlier versions
            return None


def _may_change(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in _MAY_CHANGE)


def _trains_at_test_resolution(cfg: CfgNode) -> bool:
    """Whether training uses a store of whole images, or hypotheses that are made of them."""
    stored = cfg.FEATURE_STORE.VIEWS > 0 and cfg.FEATURE_STORE.KIND == WHOLE
    return stored or cfg.HYPOTHESIS.METHOD in ("dense", "one_pass")


def _images(image_ids: Sequence[str]) -> str:
    """Number and hash of the image ids, in order, since training draws images by their index."""
    digest = hashlib.sha256(json.dumps(list(image_ids)).encode()).hexdigest()
    return f"{len(image_ids)} {digest}"
