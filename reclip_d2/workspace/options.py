"""Options of a run on a user's images, with their defaults. Imports nothing heavy, so that the command line's help is
fast."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from reclip_d2.errors import ReclipError

DEFAULT_CLIP, DEFAULT_PRETRAINED = "ViT-B-16-quickgelu", "openai"

# Rectification methods, files of configs/methods, with the file of their distillation stage.
METHODS = {
    "reclippp_shares": "reclippp_shares_distill",
    "reclippp_ext": "reclippp_ext_distill",
    "reclippp_rectify": "reclippp_distill",
}
DEFAULT_METHOD = "reclippp_shares"

# Names of the kinds of model in messages.
TITLES = {
    "maskclip": "MaskCLIP",
    "calibrated": "MaskCLIP, calibrated to estimated class shares",
    "rectified": "ReCLIP++, rectified",
    "student": "ReCLIP++, distilled student",
}
ENGINES = ("local", "ray")
# Whose masks a run with training keeps.
KEEP = ("best", "rectified", "maskclip")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of both training and prediction.

    Error messages name options as on the command line: ``--student-iterations`` for ``student_iterations``.

    Attributes:
        background: how masks show background names: ``ignore`` (255), or ``keep`` (one class).
        formats: formats in addition to the index masks: names of :data:`~reclip_d2.formats.registry.FORMATS`, which may
            be joined by commas.
        overwrite: remove the results of earlier runs in the output folder.
        device: ``cpu``, ``cuda``, ``cuda:1``, ...; ``auto`` uses a GPU if there is one.
        opts: ``KEY VALUE`` overrides of configs.
        shard: ``I/N``, one of N parts of the work; None for all of it.
        engine: ``local``, this process, or ``ray``, worker processes of this machine or a cluster.
        workers: number of worker processes of ``ray``; None for one per GPU or CPU.
    """

    background: str = "ignore"
    formats: tuple[str, ...] = ()
    overwrite: bool = False
    device: str = "auto"
    opts: tuple[str, ...] = ()
    shard: str | None = None
    engine: str = "local"
    workers: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentOptions(RunOptions):
    """Options of :func:`reclip_d2.workspace.segment.segment`.

    Attributes:
        fast: no training: CLIP's own masks (MaskCLIP).
        student: distil a student after the rectification, and predict with it.
        keep: whose masks to keep after training: the ``best`` by a judgement without labels
            (:mod:`reclip_d2.evaluation.label_free`), those of the trained model (``rectified``, the student if there is
            one), or CLIP's own (``maskclip``).
        method: rectification method, a key of :data:`METHODS`; ``reclippp_rectify`` is ReCLIP++ as published.
        clip: open_clip's name, the JSON file of an architecture, or ``reclip-embedded``.
        pretrained: CLIP's weights: a file, or a tag of open_clip's.
        iterations: iterations of the rectification; None for a number that suits the images.
        student_iterations: iterations of the distillation; None for a number that suits the images.
        student_weights: initial weights of the student's backbone; None for the config's.
        tile: cut images with a longer side than this into tiles of this size in pixels; None for the config's.
        bank: make a bank of features from the images, and refine the masks with it (``TEST.REFINE bank``).
    """

    fast: bool = False
    student: bool = False
    keep: str = "best"
    method: str = DEFAULT_METHOD
    clip: str = DEFAULT_CLIP
    pretrained: str = DEFAULT_PRETRAINED
    iterations: int | None = None
    student_iterations: int | None = None
    student_weights: str | None = None
    tile: int | None = None
    bank: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictOptions(RunOptions):
    """Options of :func:`reclip_d2.workspace.predict.predict`.

    Attributes:
        use: kind of model, a key of :data:`TITLES`; None for the last one trained.
        pretrained: CLIP's weights, if the file has moved since the training.
    """

    use: str | None = None
    pretrained: str | None = None


def geo_keys(bands: Sequence[int] | None, stretch: Sequence[str] | None) -> tuple[str, ...]:
    """``--bands`` and ``--stretch`` as ``KEY VALUE`` overrides.

    Raises:
        ReclipError: the stretch is neither two percentiles nor one of ``minmax``, ``none`` and ``auto``.
    """
    keys = [] if bands is None else ["INPUT.GEO.BANDS", str(list(bands))]
    if stretch is None:
        return tuple(keys)
    if len(stretch) == 1 and stretch[0] in ("minmax", "none", "auto"):
        return (*keys, "INPUT.GEO.STRETCH", stretch[0])
    try:
        low, high = (float(value) for value in stretch)
        if not 0 <= low < high <= 100:
            raise ValueError
    except ValueError:
        raise ReclipError(
            f"--stretch {' '.join(stretch)}: give two percentiles from 0 to 100, such as 2 98, or minmax or none"
        ) from None
    return (*keys, "INPUT.GEO.STRETCH", "percentiles", "INPUT.GEO.PERCENTILES", str([low, high]))


def check_geo_options(bands: Sequence[int] | None, stretch: Sequence[str] | None, any_scene: bool) -> None:
    """Raise :class:`ReclipError` for ``--bands`` or ``--stretch`` without a GeoTIFF."""
    if (bands is not None or stretch is not None) and not any_scene:
        raise ReclipError("--bands and --stretch are for GeoTIFFs, and IMAGES names none: leave them out")


# Messages of the library name config keys; users of the command line know its options.
_OPTIONS = {
    "MODEL.CLIP.PRETRAINED": "--pretrained",
    "MODEL.CLIP.NAME": "--clip",
    "MODEL.STUDENT.WEIGHTS": "--student-weights",
    "MODEL.DEVICE": "--device",
    "SOLVER.MAX_ITER": "--iterations",
    "INPUT.TILES.FROM_SIDE": "--tile",
    "INPUT.TILES.SIZE": "--tile",
    "INPUT.GEO.BANDS": "--bands",
    "INPUT.GEO.PERCENTILES": "--stretch",
    "OUTPUT_DIR": "--output",
    "DATASETS.CUSTOM.IMAGES": "IMAGES",
    "DATASETS.CUSTOM.CLASSES": "--classes",
}


def in_options(message: str) -> str:
    """A message of the library, with command-line options in place of the keys that they set."""
    for key, option in _OPTIONS.items():
        message = re.sub(rf"(?<![\w.]){re.escape(key)}(?!\.?\w)", option, message)
    return message
