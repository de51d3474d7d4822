"""The config of each kind of model for a user's images, and its options: devices, weights, sizes."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode

import reclip_d2.modeling.meta_arch.distillation
import reclip_d2.modeling.meta_arch.student  # noqa: F401  (both register their models)
from reclip_d2.backbones.architectures import USUAL_SIDE, suits_resolution
from reclip_d2.config import flatten, load_config
from reclip_d2.config.files import configs_folder
from reclip_d2.errors import ReclipError
from reclip_d2.modeling.build import backbone_class
from reclip_d2.workspace.clip_weights import find_weights
from reclip_d2.workspace.options import DEFAULT_METHOD, METHODS

# Keys that do not affect a run's results.
_HARMLESS = (
    "CUDNN_BENCHMARK", "DATALOADER", "DATASETS.CUSTOM", "FEATURE_STORE.DEVICE_MEMORY",
    "FEATURE_STORE.FOLDER", "FEATURE_STORE.MAX_SIZE",
    "HYPOTHESIS.BATCH_SIZE", "HYPOTHESIS.FILE", "MODEL.DEVICE", "MODEL.CLIP.PRETRAINED", "MODEL.TEACHER.WEIGHTS",
    "OUTPUT_DIR", "SOLVER.CHECKPOINT_PERIOD", "TEST.BAND_MEMORY", "TEST.BANK.FILE", "TEST.CLASS_EVIDENCE",
    "VIS_PERIOD",
)  # fmt: skip
# Keys of the training, which MaskCLIP's masks do not depend on.
_TRAINING = (
    "FEATURE_STORE", "HYPOTHESIS", "INPUT.CROP", "INPUT.GEO.WINDOWS", "MODEL.BIAS_HEAD", "MODEL.DISTILLATION",
    "MODEL.GUMBEL", "MODEL.LOSS", "MODEL.MASK_DECODER", "MODEL.STUDENT", "SEED", "SOLVER",
)  # fmt: skip
# Sizes in configs/datasets/custom.yaml, for a CLIP of the usual input size.
_SIZES = (
    "INPUT.MIN_SIZE_TRAIN", "INPUT.MAX_SIZE_TRAIN", "INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST", "INPUT.CROP.SIZE",
    "INPUT.COPIES.SHORT_SIDE",
)  # fmt: skip


def resolve_device(name: str) -> str:
    """A device of this machine, or raise :class:`ReclipError`."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ReclipError(f"--device {name} is unknown: use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ReclipError(f"--device {name} is not supported: use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ReclipError(f"--device {name}: there are {torch.cuda.device_count()} GPUs; see reclip doctor")
    return name


def resolve_pretrained(pretrained: str) -> str:
    """A tag or URL unchanged, a file's path made absolute, since the output folder records it."""
    path = Path(pretrained).expanduser()
    is_path = path.is_file() or (os.sep in pretrained and "://" not in pretrained)
    return str(path.resolve()) if is_path else pretrained


def method_file(kind: str, method: str) -> str:
    """Name of a kind of model's file in ``configs/methods``.

    Args:
        method: a key of :data:`~reclip_d2.workspace.options.METHODS`.

    Raises:
        ReclipError: the method is unknown.
    """
    if method not in METHODS:
        raise ReclipError(f"--method {method} is unknown: use one of {', '.join(METHODS)}")
    return {"maskclip": "maskclip", "calibrated": "maskclip", "rectified": method, "student": METHODS[method]}[
        kind
    ] + ".yaml"


def stage_config(kind: str, clip: str, overrides: Sequence[str], method: str = DEFAULT_METHOD) -> CfgNode:
    """Config of a kind of model on a user's images: ``configs/datasets/custom-<clip>.yaml`` if it exists for the CLIP,
    otherwise ``custom.yaml`` with sizes that fit the CLIP.

    Args:
        kind: a key of :data:`~reclip_d2.workspace.options.TITLES`.
        clip: open_clip's name of the model.
        overrides: ``KEY VALUE`` pairs.
        method: see :func:`method_file`.
    """
    folder = configs_folder()
    dataset = folder / "datasets" / f"custom-{clip}.yaml"
    fitted = dataset.is_file()
    files = [dataset if fitted else folder / "datasets" / "custom.yaml", folder / "methods" / method_file(kind, method)]
    cfg = load_config([str(file) for file in files], ["MODEL.CLIP.NAME", clip, *overrides])
    if kind == "calibrated":
        cfg.MODEL.MASKCLIP.CALIBRATION = "estimated"
    cfg.DATALOADER.NUM_WORKERS = min(cfg.DATALOADER.NUM_WORKERS, os.cpu_count() or 1)
    if not fitted:
        _fit_sizes(cfg, set(overrides[::2]))
    return cfg


@dataclasses.dataclass(frozen=True)
class ClipChoice:
    """A CLIP, and where it runs.

    Attributes:
        name: open_clip's name, or the JSON file of an architecture.
        pretrained: its weights, a file or a tag.
        device: of the networks.
        opts: ``KEY VALUE`` overrides of all configs.
    """

    name: str
    pretrained: str
    device: str
    opts: tuple[str, ...] = ()

    @classmethod
    def find(cls, name: str, pretrained: str, device: str = "auto", opts: Sequence[str] = ()) -> ClipChoice:
        """A choice with absolute paths and a device of this machine.

        Raises:
            ReclipError: the device or the CLIP is unknown, or its weights cannot be found.
        """
        choice = cls(resolve_pretrained(name), resolve_pretrained(pretrained), resolve_device(device), tuple(opts))
        find_weights(choice.name, pretrained)
        return choice

    def config(self, kind: str) -> CfgNode:
        """Config of a kind of model; see :func:`stage_config`."""
        return stage_config(kind, self.name, ["MODEL.CLIP.PRETRAINED", self.pretrained, *self.overrides])

    @property
    def overrides(self) -> list[str]:
        """``KEY VALUE`` overrides for a trained model's config, which names the CLIP itself."""
        return ["MODEL.DEVICE", self.device, *self.opts]


def _fit_sizes(cfg: CfgNode, given: set[str]) -> None:
    """Scale the sizes of ``configs/datasets/custom.yaml`` to a CLIP that was trained on far smaller or larger images.

    Args:
        given: keys that the user has set and that are not changed.
    """
    try:
        clip = backbone_class(cfg).summary(cfg)
    except ReclipError:  # reported when the model is built
        return
    if suits_resolution(cfg.INPUT.MIN_SIZE_TEST, clip.image_side):
        return

    def fit(size: int) -> int:
        return max(1, round(size * clip.image_side / USUAL_SIDE / clip.patch_size)) * clip.patch_size

    for key in _SIZES:
        if key in given:
            continue
        *names, leaf = key.split(".")
        node = functools.reduce(getattr, names, cfg)
        value = node[leaf]
        node[leaf] = type(value)(map(fit, value)) if isinstance(value, list | tuple) else fit(value)


def settings_of(cfg: CfgNode) -> dict[str, str]:
    """All keys that results depend on, with their values, to compare with another run's."""
    harmless = _HARMLESS + (_TRAINING if cfg.MODEL.META_ARCHITECTURE == "MaskCLIP" else ())
    return {
        key: str(_plain(value))
        for key, value in flatten(cfg).items()
        if not any(key == name or key.startswith(f"{name}.") for name in harmless)
    }


def _plain(value: object) -> object:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
