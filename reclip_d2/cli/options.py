"""Arguments that subcommands share, and the config of a stage."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode

import reclip_d2.modeling.meta_arch.distillation
import reclip_d2.modeling.meta_arch.student  # noqa: F401  (both register their models)
from reclip_d2.config import load_config
from reclip_d2.errors import ReclipError
from reclip_d2.formats import FORMATS

# Kind of model: its config below configs/custom.
STAGE_CONFIGS = {
    "maskclip": "maskclip.yaml",
    "rectified": "reclippp_rectify.yaml",
    "student": "reclippp_distill.yaml",
}
# What a kind of model is called in messages.
TITLES = {"maskclip": "MaskCLIP", "rectified": "ReCLIP++, rectified", "student": "ReCLIP++, distilled student"}

# Keys that change how a run is done and not what comes out of it.
_HARMLESS = (
    "CUDNN_BENCHMARK", "DATALOADER", "DATASETS.CUSTOM", "HYPOTHESIS.BATCH_SIZE", "HYPOTHESIS.FILE", "MODEL.DEVICE",
    "MODEL.CLIP.PRETRAINED", "MODEL.TEACHER.WEIGHTS", "OUTPUT_DIR", "SOLVER.CHECKPOINT_PERIOD", "TEST.BAND_MEMORY",
    "VIS_PERIOD",
)  # fmt: skip


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """IMAGES and what to do with broken ones."""
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGES",
        help="folders (searched recursively), images, globs, or .txt lists of these",
    )
    parser.add_argument("--skip-broken", action="store_true", help="broken images are no error: list them, exit with 0")


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Where results go, and in which formats."""
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where everything goes")
    parser.add_argument(
        "--formats",
        nargs="+",
        default=[],
        metavar="FORMAT",
        help=f"beside the index masks: {', '.join(name for name in FORMATS if name != 'index')}",
    )
    parser.add_argument("--overwrite", action="store_true", help="remove what an earlier run has left, and start anew")


def add_background_argument(parser: argparse.ArgumentParser) -> None:
    """What becomes of background names."""
    parser.add_argument(
        "--background",
        choices=["ignore", "keep"],
        default="ignore",
        help="the names of the background: line are ignored in masks (default), or kept as one class",
    )


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Device, and any config key."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; by default a GPU if there is one")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE",
        help="any keys of reclip_d2/config/keys.py; must come last",
    )  # fmt: skip


def resolve_device(name: str) -> str:
    """A device of this machine, or raise :class:`ReclipError`."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ReclipError(f"--device {name} is unknown: take cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ReclipError(f"--device {name} is not supported: take cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ReclipError(f"--device {name}: there are {torch.cuda.device_count()} GPUs; see reclip doctor")
    return name


def resolve_pretrained(pretrained: str) -> str:
    """A tag or an address as it is, the path of a file made absolute: the output folder remembers it."""
    path = Path(pretrained).expanduser()
    is_path = path.is_file() or (os.sep in pretrained and "://" not in pretrained)
    return str(path.resolve()) if is_path else pretrained


def configs_folder() -> Path:
    """Folder of the configs: inside the installed package, or at the top of the checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def stage_config(kind: str, clip: str, overrides: Sequence[str]) -> CfgNode:
    """Config of a kind of model, for own images: that of the CLIP's own folder below configs/custom where it has one.

    Args:
        kind: of :data:`STAGE_CONFIGS`.
        clip: open_clip's name of the model.
        overrides: ``KEY VALUE`` pairs.
    """
    folder = configs_folder() / "custom"
    file = folder / clip / STAGE_CONFIGS[kind]
    cfg = load_config(
        str(file if file.is_file() else folder / STAGE_CONFIGS[kind]), ["MODEL.CLIP.NAME", clip, *overrides]
    )
    cfg.DATALOADER.NUM_WORKERS = min(cfg.DATALOADER.NUM_WORKERS, os.cpu_count() or 1)
    return cfg


def settings_of(cfg: CfgNode) -> dict[str, str]:
    """All keys that results depend on, and their values, for comparison with another run's."""

    def flatten(node: CfgNode, prefix: str) -> dict[str, str]:
        flat = {}
        for key, value in node.items():
            name = f"{prefix}{key}"
            flat |= flatten(value, f"{name}.") if isinstance(value, CfgNode) else {name: str(_plain(value))}
        return flat

    return {
        key: value
        for key, value in flatten(cfg, "").items()
        if not any(key == name or key.startswith(f"{name}.") for name in _HARMLESS)
    }


def _plain(value: object) -> object:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
