"""What a training was begun with, and whether ``--resume`` goes on with the same.

``training.json`` in ``OUTPUT_DIR`` keeps all config values that the weights depend on, and which images there were.
``config.yaml`` cannot serve: every program that uses the folder writes it, an evaluation, too.
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

from reclip_d2.config import flatten, load_config
from reclip_d2.errors import ReclipError
from reclip_d2.utils.digest import file_digest
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.json_files import MissingFileError, read_json
from reclip_d2.utils.text import shorten

logger = logging.getLogger(__name__)

FILE = "training.json"
FORMAT = "reclip_d2 training 1"

# Keys (with all below them) that may change on the way, for the weights do not depend on them: where things are, when
# checkpoints and pictures are written, how the work is done, and what is tested. A checkpoint knows by itself to which
# CLIP and classes it belongs; the images are compared by their ids.
_FREE = (
    "CUDNN_BENCHMARK", "DATALOADER.NUM_WORKERS", "DATASETS.CUSTOM", "DATASETS.TEST", "HYPOTHESIS.BATCH_SIZE",
    "HYPOTHESIS.FILE", "INPUT.MAX_SIZE_TEST", "INPUT.MIN_SIZE_TEST", "LINEAR_PROBE", "MODEL.CLIP.PRETRAINED",
    "MODEL.DEVICE", "MODEL.MASKCLIP", "MODEL.STUDENT.WEIGHTS", "MODEL.TEACHER.WEIGHTS", "MODEL.USE_KERNELS",
    "MODEL.WEIGHTS", "OUTPUT_DIR", "SOLVER.CHECKPOINT_PERIOD", "TEST", "VERSION", "VIS_PERIOD",
)  # fmt: skip
# Keys that name a file whose content matters.
_FILES = ("MODEL.TEACHER.WEIGHTS", "HYPOTHESIS.FILE")
# A training may be made longer: said, since the learning rate of what is left follows the new schedule.
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
    """What the training of a config depends on, apart from the images, which are known later.

    Attributes:
        settings: config values by their key.
        files: digests of the files that keys name; "" for a file that is missing.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: of the command line.
        """
        self._file = Path(cfg.OUTPUT_DIR, FILE)
        values = json.loads(json.dumps(flatten(cfg)))  # tuples become lists, as in the file
        self.settings = {key: value for key, value in values.items() if not _is_free(key)}
        named = {key: values[key] for key in _FILES if values[key]}
        if cfg.HYPOTHESIS.METHOD != "imported":  # then the file is made by the training, or says what it was made with
            named.pop("HYPOTHESIS.FILE", None)
        self.files = {key: file_digest(path) for key, path in named.items()}

    def check(self) -> None:
        """Compare with what the training in ``OUTPUT_DIR`` was begun with, before a resume.

        Raises:
            ReclipError: a key differs on which the weights depend, or ``training.json`` is damaged.
        """
        begun = self._read()
        if begun is None:
            logger.warning("%s is missing: what the training was begun with is not compared", self._file)
            return
        then = begun["settings"]
        if missing := self.settings.keys() - then.keys():  # keys that the package has got since then
            defaults = json.loads(json.dumps(flatten(load_config(""))))
            then = {**then, **{key: defaults.get(key) for key in missing}}
        changed = [
            f"{key} {shorten(json.dumps(then[key]))} instead of {shorten(json.dumps(value))}"
            for key, value in self.settings.items()
            if key != _LENGTH and then[key] != value
        ]
        changed += [
            f"another file as {key}" for key, digest in self.files.items() if begun["files"].get(key, digest) != digest
        ]
        if changed:
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise ReclipError(
                f"{self._file.parent} was trained with {changed[0]}{more}: resume with the same, or give --overwrite"
                " or another OUTPUT_DIR"
            )
        if then[_LENGTH] != self.settings[_LENGTH]:
            logger.warning(
                "%s is %s and was %s: from here on the learning rate follows the new schedule",
                _LENGTH, self.settings[_LENGTH], then[_LENGTH],
            )  # fmt: skip
        if begun["processes"] != comm.get_world_size():
            logger.warning(
                "the training was begun by %d processes and goes on with %d: the noise of the masks is another",
                begun["processes"], comm.get_world_size(),
            )  # fmt: skip

    def check_images(self, image_ids: Sequence[str]) -> None:
        """Compare the training images, as :meth:`check` does the config.

        Raises:
            ReclipError: there are other images, or they are in another order.
        """
        begun = self._read()
        if begun is not None and begun["images"] != _images(image_ids):
            raise ReclipError(
                f"{self._file.parent} was trained on {begun['images'].partition(' ')[0]} images, and those of"
                f" DATASETS.TRAIN ({len(image_ids)}) are others: resume with the same, or give --overwrite or another"
                " OUTPUT_DIR"
            )

    def write(self, image_ids: Sequence[str]) -> None:
        """Remember this training; called by all processes, the main one writes."""
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
        remedy = "give --overwrite, or remove it if you know that nothing was changed"
        try:
            return read_json(self._file, _SCHEMA, "training record", remedy)
        except MissingFileError:  # of an earlier version
            return None


def _is_free(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in _FREE)


def _images(image_ids: Sequence[str]) -> str:
    """Number and hash of the images' ids, in order: the draws of a training are by their number."""
    digest = hashlib.sha256(json.dumps(list(image_ids)).encode()).hexdigest()
    return f"{len(image_ids)} {digest}"
