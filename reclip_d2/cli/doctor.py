"""``reclip doctor``: list what is installed, what is missing, and where CLIP's weights go."""

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
from reclip_d2.backbones.families import families
from reclip_d2.cli.main import INSTALL_DETECTRON2, missing_package
from reclip_d2.errors import ReclipError
from reclip_d2.install_detectron2.program import install_detectron2
from reclip_d2.layers import kernels_available
from reclip_d2.utils.io import atomic_write, cache_dir
from reclip_d2.workspace.clip_weights import find_weights

# Optional packages: what they are for, and the extra that installs them.
_OPTIONAL = {
    "gradio": ("reclip app", "app"),
    "pillow_heif": ("reading HEIC images", "heif"),
    "av": ("reclip predict on videos", "video"),
    "onnx": ("reclip export --format onnx", "export"),
    "onnxruntime": ("reclip export --format onnx", "export"),
    "transformers": ("SigLIP, CLIPA and multilingual CLIPs", "text"),
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
        ("models", _models),
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
        raise ReclipError(f"reclip segment cannot run: see {', '.join(problems)} above")
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
            yield f'{name} is missing, for {command}: pip install "reclip_d2[{extra}]"'


def _detectron2() -> Iterator[str]:
    try:
        module = importlib.import_module("detectron2")
        compiled = importlib.import_module("detectron2._C").__file__ or ""
    except ModuleNotFoundError as error:
        raise missing_package(error) from error
    except ImportError as error:
        raise ReclipError(
            f"it cannot be imported ({error}): rebuild it for this torch, or uninstall it and run {INSTALL_DETECTRON2}"
        ) from error
    path = Path(module.__file__).resolve().parent
    kind = "patched by reclip_d2.install_detectron2" if compiled.endswith(".py") else "unchanged"
    yield f"{module.__version__}, {kind}, {path}"


def _extension() -> Iterator[str]:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    served = [device for device in devices if kernels_available(device)]
    if served:
        yield f"kernels for {' and '.join(served)}"
    if served != devices:
        lacking = " and ".join(device for device in devices if device not in served)
        yield f"none for {lacking}: plain PyTorch is used, slower (build them: pip install -e . --no-build-isolation)"


def _devices() -> Iterator[str]:
    yield f"cpu: {torch.get_num_threads()} threads, {os.cpu_count()} cores"
    if not torch.cuda.is_available():
        why = "this torch was built without CUDA" if torch.version.cuda is None else "no GPU or no driver"
        yield f"cuda: none ({why}); the CPU takes minutes for a dozen photographs"
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
        raise ReclipError(f"{folder} cannot be written ({why}): set RECLIP_CACHE to another folder") from error
    yield f"{folder} (text features; set RECLIP_CACHE to use another folder)"


def _models() -> Iterator[str]:
    """The families of models that ``--clip`` takes, with their weights; nothing is loaded."""
    others = []
    for family in families():
        if not family.works:
            others.append(f"{family.tower} ({len(family.models)})")
            continue
        weights = f"{family.weights} weights, such as {family.example}" if family.example else "no weights"
        needs = "; needs transformers" if family.needs_transformers else ""
        yield f"{family.name:<17}{len(family.models):>3}  {family.tower:<14}{weights}{needs}"
    yield f"not supported: {', '.join(others)}"
    try:
        attentions = importlib.import_module("reclip_d2.backbones.dense_attention").DENSE_ATTENTION_REGISTRY
    except ImportError:  # without Detectron2, which has its own line
        return
    yield f"MODEL.CLIP.DENSE_ATTENTION for each: {', '.join(sorted(name for name, _ in attentions))}"


def _clip(name: str, pretrained: str) -> Iterator[str]:
    """Load the weights as a run would, or check that they can be downloaded."""
    if name == EMBEDDED_MODEL_NAME:
        build_clip(name, pretrained)
        yield f"{name}: ships with the package; a toy model for 12 materials"
        return
    found = find_weights(name, pretrained)
    if isinstance(found, Path):
        build_clip(name, str(found))
        yield f"{name}: {found.resolve()}"
    else:
        yield f"{name}, weights {pretrained}: not on this machine; the first run downloads {found}"
        yield "without network access, copy that file here and give --pretrained FILE"
