"""Pack the source archive as a pure-Python wheel named ``detectron2``."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from reclip_d2.errors import ReclipError
from reclip_d2.install_detectron2.patches import Files

SDIST_ROOT = "detectron2_cdo-0.5"
VERSION = "0.5"
DIST_INFO = f"detectron2-{VERSION}.dist-info"

# Folders of the archive and their places in the wheel, as in upstream's setup.py.
PACKAGES = {
    "detectron2": "detectron2",
    "projects/PointRend/point_rend": "detectron2/projects/point_rend",
    "projects/DeepLab/deeplab": "detectron2/projects/deeplab",
    "projects/Panoptic-DeepLab/panoptic_deeplab": "detectron2/projects/panoptic_deeplab",
}

# Upstream's list without black, future and pydot (code style, Caffe2), plus what upstream leaves to the user: torch,
# torchvision, and OpenCV for the visualizer (the headless build needs no system libraries).
REQUIREMENTS = (
    "torch",
    "torchvision",
    "numpy",
    "Pillow>=7.1",
    "matplotlib",
    "opencv-python-headless",
    "pycocotools>=2.0.2",
    "termcolor>=1.1",
    "yacs>=0.1.8",
    "tabulate",
    "cloudpickle",
    "tqdm>4.29.0",
    "tensorboard",
    "fvcore>=0.1.5,<0.1.6",
    "iopath>=0.1.7",
    "omegaconf>=2.1",
    "hydra-core>=1.1",
)


def read_sdist(content: bytes) -> Files:
    """The wheel's files, from the content of the source archive, none of whose paths are written to disk."""
    files: Files = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if member.isdir() or name.parts[:1] != (SDIST_ROOT,):
                    continue
                inner = name.relative_to(SDIST_ROOT)
                if inner == PurePosixPath("LICENSE"):
                    target = f"{DIST_INFO}/licenses/LICENSE"
                else:
                    source = next((s for s in PACKAGES if inner.is_relative_to(s)), None)
                    if source is None:
                        continue
                    target = str(PurePosixPath(PACKAGES[source]) / inner.relative_to(source))
                data = tar.extractfile(member) if member.isfile() and ".." not in name.parts else None
                if data is None:
                    raise ReclipError(f"the source archive contains something that is not a plain file: {member.name}")
                files[target] = data.read()
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise ReclipError(f"the source archive cannot be read: {error}") from error
    for needed in ("detectron2/__init__.py", f"{DIST_INFO}/licenses/LICENSE"):
        if needed not in files:
            raise ReclipError(f"the source archive does not contain Detectron2's {PurePosixPath(needed).name}")
    return files


def metadata() -> str:
    """The wheel's METADATA."""
    lines = ["Metadata-Version: 2.1", "Name: detectron2", f"Version: {VERSION}"]
    lines += ["Summary: Detectron2 0.5 without its C++ extension, changed for current Python packages"]
    lines += ["Home-page: https://github.com/facebookresearch/detectron2", "Author: FAIR"]
    lines += ["License: Apache-2.0", "License-File: LICENSE", "Requires-Python: >=3.10"]
    lines += [f"Requires-Dist: {requirement}" for requirement in REQUIREMENTS]
    body = f"The Python files of {SDIST_ROOT}; files changed by reclip_d2 are marked."
    return "\n".join([*lines, "", body, ""])


def write_wheel(files: Files, folder: Path) -> Path:
    """Write the wheel into ``folder`` under a temporary name, then rename it; returns its path."""
    tag = "Wheel-Version: 1.0\nGenerator: reclip_d2\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = f"{DIST_INFO}/RECORD"
    # Metadata comes last, so a copy truncated by an interrupt has none and is recognised as broken.
    content = dict(sorted(files.items(), key=lambda item: (item[0].startswith(DIST_INFO), item[0])))
    content |= {f"{DIST_INFO}/WHEEL": tag.encode(), f"{DIST_INFO}/METADATA": metadata().encode()}
    rows = []
    for path, data in content.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        rows.append(f"{path},sha256={digest},{len(data)}")
    content[record] = ("\n".join([*rows, f"{record},,"]) + "\n").encode()

    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"detectron2-{VERSION}-py3-none-any.whl"
    with tempfile.TemporaryDirectory(dir=folder, prefix=".wheel-") as scratch:
        unfinished = Path(scratch) / wheel.name
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, data in content.items():
                archive.writestr(zipfile.ZipInfo(path, (2021, 7, 23, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)
        os.replace(unfinished, wheel)
    return wheel
