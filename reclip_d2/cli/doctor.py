"""``reclip doctor``: what is installed, what is missing, and where CLIP's weights go."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from reclip_d2 import __version__
from reclip_d2.backbones.build import build_clip
from reclip_d2.backbones.embedded import EMBEDDED_MODEL_NAME
from reclip_d2.cli.main import INSTALL_DETECTRON2, missing_package
from reclip_d2.errors import ReclipError
from reclip_d2.install_detectron2.program import install_detectron2
from reclip_d2.layers import kernels_available
from reclip_d2.utils.io import atomic_write, cache_dir
from reclip_d2.workspace.clip_weights import find_weights

# Optional packages: what needs them, and the extra that brings them.
_OPTIONAL = {
    "gradio": ("reclip app", "app"),
    "pillow_heif": ("reading HEIC images", "heif"),
    "onnx": ("reclip export --format onnx", "export"),
    "onnxruntime": ("reclip export --format onnx", "export"),
}
_PACKAGES = ("torch", "torchvision", "open_clip_torch", "numpy", "Pillow", "safetensors", "fvcore")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    checks: tuple[tuple[str, Callable[[], Iterator[str]]], ...] = (
        ("reclip_d2", _own),
        ("packages", _packages),
        ("optional", _optional),
        ("detectron2", _detectron2),
        ("extension", _extension),
        ("devices", _devices),
        ("cache", _cache),
        ("CLIP", lambda: _clip(args.clip, args.pretrained)),
    )
    if args.install_detectron2:
        try:
            install_detectron2()
        except subprocess.CalledProcessError as error:
            raise ReclipError(f"pip install of detectron2 failed with status {error.returncode}") from error
    problems = []
    for title, check in checks:
        lines = []
        try:
            lines += check()
        except ReclipError as error:
            lines.append(f"PROBLEM: {error}")
            problems.append(title)
        for number, line in enumerate(lines):
            print(f"{title if number == 0 else '':<11}{line}")
    if problems:
        raise ReclipError(f"reclip segment cannot run yet: see {', '.join(problems)} above")
    print("ready      reclip segment IMAGES --classes FILE --output FOLDER")
    return 0


def _own() -> Iterator[str]:
    yield f"{__version__}, {Path(__file__).resolve().parents[1]}"
    yield f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"


def _packages() -> Iterator[str]:
    missing = []
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    yield ", ".join(found)
    if missing:
        raise ReclipError(f"{', '.join(missing)} not installed: pip install {' '.join(missing)}")


def _optional() -> Iterator[str]:
    for name, (command, extra) in _OPTIONAL.items():
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f'no {name}: {command} needs it (pip install "reclip_d2[{extra}]")'


def _detectron2() -> Iterator[str]:
    try:
        module = importlib.import_module("detectron2")
        compiled = importlib.import_module("detectron2._C").__file__ or ""
    except ModuleNotFoundError as error:
        raise missing_package(error) from error
    except ImportError as error:
        raise ReclipError(
            f"it cannot be imported ({error}): build it again for this torch, or uninstall it and run"
            f" {INSTALL_DETECTRON2}"
        ) from error
    path = Path(module.__file__).resolve().parent
    kind = "changed for this project by reclip_d2.install_detectron2" if compiled.endswith(".py") else "as it was built"
    yield f"{module.__version__}, {kind}, {path}"


def _extension() -> Iterator[str]:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    served = [device for device in devices if kernels_available(device)]
    if served:
        yield f"kernels for {' and '.join(served)}"
    if served != devices:
        lacking = " and ".join(device for device in devices if device not in served)
        yield f"none for {lacking}: plain PyTorch serves, slower (pip install -e . --no-build-isolation builds them)"


def _devices() -> Iterator[str]:
    yield f"cpu: {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    if not torch.cuda.is_available():
        why = "this torch is a build without CUDA" if torch.version.cuda is None else "no GPU, or no driver for it"
        yield f"cuda: none ({why}); training with a real CLIP takes hours to days on a CPU, --fast does not"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def _cache() -> Iterator[str]:
    folder = cache_dir()
    try:
        with atomic_write(folder / ".probe") as temporary:
            temporary.write_text("")
        (folder / ".probe").unlink()
    except (OSError, ReclipError) as error:
        why = getattr(error, "strerror", None) or getattr(error.__cause__, "strerror", None) or error
        raise ReclipError(f"{folder} cannot be written ({why}): set RECLIP_CACHE to another") from error
    yield f"{folder} (text features; RECLIP_CACHE sets another folder)"


def _clip(name: str, pretrained: str) -> Iterator[str]:
    """The weights, read as a run would read them; those that are not here must be to be had."""
    if name == EMBEDDED_MODEL_NAME:
        build_clip(name, pretrained)
        yield f"{name}: ships with the package; a toy that knows 12 materials"
        return
    found = find_weights(name, pretrained)
    if isinstance(found, Path):
        build_clip(name, str(found))
        yield f"{name}: {found.resolve()}"
    else:
        yield f"{name}, weights {pretrained}: not here yet; the first run fetches {found}"
        yield "without a network: get that file elsewhere, and name it with --pretrained FILE"
