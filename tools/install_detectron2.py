#!/usr/bin/env python3
"""Install the real Detectron2 where no release of it exists on PyPI under its own name.

A ``detectron2`` that can be imported already (upstream main, a build of your own) is left alone. Otherwise
release 0.5 is taken from the source archive ``detectron2-cdo==0.5``, checked by its SHA-256. Its Python files
are those of the upstream tag v0.5; its C++ sources are missing, so that a plain ``pip install`` of it fails.
This program leaves the C++ extension out, mends what current packages no longer offer
(``detectron2_mends.py``), packs a pure-Python wheel named ``detectron2`` and installs that.

What is lost without the extension: rotated boxes, Detectron2's own deformable convolution, and the fast COCO
evaluation. They raise an error that says so when they are used. Semantic segmentation needs none of them.

    python tools/install_detectron2.py                     # into the environment of this python
    python tools/install_detectron2.py --wheel-dir wheels  # only build the wheel, to carry it elsewhere

It runs before ``reclip_d2`` is installed, hence imports nothing of it. Nothing is written to the environment
before the last step (``pip install``), so it may be interrupted and repeated.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from detectron2_mends import Files, InstallError, mend_all

SDIST = "detectron2-cdo==0.5"
SDIST_ROOT = "detectron2_cdo-0.5"
SDIST_SHA256 = "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"
VERSION = "0.5"
DIST_INFO = f"detectron2-{VERSION}.dist-info"

# Folders of the archive and where the wheel has them: upstream's setup.py packs its projects the same way.
PACKAGES = {
    "detectron2": "detectron2",
    "projects/PointRend/point_rend": "detectron2/projects/point_rend",
    "projects/DeepLab/deeplab": "detectron2/projects/deeplab",
    "projects/Panoptic-DeepLab/panoptic_deeplab": "detectron2/projects/panoptic_deeplab",
}

# Upstream's list without black, future and pydot (code style, Caffe2), and with those that upstream leaves to
# the user: torch, torchvision, and OpenCV for the visualizer (the headless build needs no system libraries).
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

# -----------------------------------------------------------------------------
# From the archive to the wheel


def check_sha256(path: Path, expected: str = SDIST_SHA256) -> None:
    """Raise InstallError unless the file has the expected SHA-256."""
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if actual != expected:
        raise InstallError(f"{path.name} is not the expected archive: SHA-256 {actual}, not {expected}")


def pip_error(output: str) -> str:
    """The line of pip's output that says most: its last ERROR line, else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["pip gave no reason"])[-1]


def download_sdist(folder: Path) -> Path:
    """Download the archive into ``folder`` with pip, which checks its hash before it opens it."""
    # pip asks the archive's setup.py for its metadata, and that imports torch: hence no isolation.
    for module in ("torch", "setuptools"):
        if importlib.util.find_spec(module) is None:
            raise InstallError(f"{module} is not installed for {sys.executable}: install requirements.txt first")
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{SDIST} --hash=sha256:{SDIST_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--dest", str(folder), "--require-hashes"]
    command += [
        "--no-deps",
        "--no-binary",
        ":all:",
        "--no-build-isolation",
        "--requirement",
        str(requirement),
    ]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    archives = list(folder.glob("*.tar.gz"))
    if result.returncode != 0 or len(archives) != 1:
        raise InstallError(f"cannot download {SDIST}: {pip_error(result.stdout)}")
    return archives[0]


def read_sdist(archive: Path) -> Files:
    """Read the wheel's files from the archive into memory, so that no path of it is ever written to disk."""
    files: Files = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
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
                content = tar.extractfile(member) if member.isfile() and ".." not in name.parts else None
                if content is None:
                    raise InstallError(f"{archive.name} holds something that is not a plain file: {member.name}")
                files[target] = content.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InstallError(f"{archive.name} cannot be read: {error}") from error
    for needed in ("detectron2/__init__.py", f"{DIST_INFO}/licenses/LICENSE"):
        if needed not in files:
            raise InstallError(f"{archive.name} holds no {PurePosixPath(needed).name} of Detectron2")
    return files


def metadata() -> str:
    """The wheel's METADATA."""
    lines = ["Metadata-Version: 2.1", "Name: detectron2", f"Version: {VERSION}"]
    lines += ["Summary: Detectron2 0.5 without its C++ extension, mended for current Python packages"]
    lines += ["Home-page: https://github.com/facebookresearch/detectron2", "Author: FAIR"]
    lines += ["License: Apache-2.0", "License-File: LICENSE", "Requires-Python: >=3.10"]
    lines += [f"Requires-Dist: {requirement}" for requirement in REQUIREMENTS]
    body = f"The Python files of {SDIST}; those that tools/install_detectron2.py of reclip_d2 changed say so."
    return "\n".join([*lines, "", body, ""])


def write_wheel(files: Files, folder: Path) -> Path:
    """Write the wheel into ``folder`` under a temporary name, then rename it; returns its path."""
    tag = "Wheel-Version: 1.0\nGenerator: reclip_d2\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = f"{DIST_INFO}/RECORD"
    # Metadata comes last: a copy cut short by an interrupt then has none, and is known for what it is.
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


# -----------------------------------------------------------------------------
# The environment


def importable() -> tuple[bool, str]:
    """Import Detectron2 in a fresh interpreter: (True, "version at folder") or (False, error)."""
    code = (
        "import pathlib, detectron2\n"
        "import detectron2.data, detectron2.engine, detectron2.evaluation, detectron2.modeling\n"
        "print(detectron2.__version__, 'at', pathlib.Path(detectron2.__file__).parent)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    lines = (result.stdout if result.returncode == 0 else result.stderr).strip().splitlines()
    return result.returncode == 0, lines[-1] if lines else f"exit status {result.returncode}"


def is_half_installed(origin: str) -> bool:
    """Whether ``origin`` (detectron2/__init__.py) is what an interrupted ``pip install`` left behind."""
    site_packages = {Path(sysconfig.get_path(key)).resolve() for key in ("purelib", "platlib")}
    if Path(origin).resolve().parent.parent not in site_packages:
        return False
    try:
        files = importlib.metadata.files("detectron2")
    except importlib.metadata.PackageNotFoundError:
        return True
    return files is None


def install(wheel: Path, force: bool) -> None:
    """``pip install`` the wheel and whatever it requires."""
    print("installing it and what it requires with pip", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", str(wheel)]
    if force:
        # First the wheel itself, whatever version is there; of its requirements, those that fit are kept.
        subprocess.run([*command, "--force-reinstall", "--no-deps"], check=True)
    subprocess.run(command, check=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = argparse.ArgumentParser(description="Install Detectron2 0.5 as a pure-Python wheel, if none is there.")
    parser.add_argument("--wheel-dir", type=Path, help="only build the wheel, into this folder")
    parser.add_argument("--force", action="store_true", help="install even if detectron2 is there already")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks; InstallError or CalledProcessError on failure."""
    force = args.force
    spec = importlib.util.find_spec("detectron2")
    if spec is not None and spec.origin is not None and not force and args.wheel_dir is None:
        if is_half_installed(spec.origin):
            print("detectron2 was installed only in part: installing it again", flush=True)
            force = True
        else:
            works, message = importable()
            if not works:
                raise InstallError(
                    f"detectron2 at {Path(spec.origin).parent} cannot be imported ({message}); "
                    "mend or uninstall it, or replace it with --force"
                )
            print(f"detectron2 {message} is left alone")
            return

    with tempfile.TemporaryDirectory(prefix="detectron2-") as scratch:
        print(f"downloading {SDIST}", flush=True)
        archive = download_sdist(Path(scratch))
        check_sha256(archive)
        files = read_sdist(archive)
        changed = mend_all(files)
        print(f"packing detectron2 {VERSION}: {len(files)} files, {len(changed)} of them mended", flush=True)
        wheel = write_wheel(files, args.wheel_dir or Path(scratch))
        if args.wheel_dir is not None:
            print(f"wrote {wheel}")
            return
        install(wheel, force)
    works, message = importable()
    if not works:
        raise InstallError(f"detectron2 was installed but cannot be imported: {message}")
    print(f"installed detectron2 {message}")


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 on success, else one ``error:`` line and a status that is not 0."""
    try:
        run(parse_args(argv))
    except (InstallError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"error: pip install of detectron2 failed with status {error.returncode}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; run it again to finish", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
