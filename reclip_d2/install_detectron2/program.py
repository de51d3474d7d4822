"""The program: check the environment, build the wheel, install it."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from reclip_d2.errors import ReclipError
from reclip_d2.install_detectron2.package_index import fetch_file
from reclip_d2.install_detectron2.patches import patch_all
from reclip_d2.install_detectron2.pip_settings import PipSettings
from reclip_d2.install_detectron2.wheel import VERSION, read_sdist, write_wheel

PROJECT = "detectron2-cdo"
SDIST = "detectron2_cdo-0.5.tar.gz"
SDIST_SHA256 = "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"


def get_sdist(path: Path | None) -> bytes:
    """The archive's content, from ``path`` or from pip's package indexes; the hash is verified.

    Raises:
        ReclipError: it cannot be read or downloaded.
    """
    if path is None:
        print(f"downloading {SDIST}", flush=True)
        return fetch_file(PipSettings.read(), PROJECT, SDIST, SDIST_SHA256)
    if not path.is_file():
        raise ReclipError(f"--sdist {path}: there is no such file")
    content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != SDIST_SHA256:
        raise ReclipError(f"--sdist {path} is not {SDIST}: SHA-256 {found}, not {SDIST_SHA256}")
    return content


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
    """Whether ``origin`` (detectron2/__init__.py) was left behind by an interrupted ``pip install``."""
    site_packages = {Path(sysconfig.get_path(key)).resolve() for key in ("purelib", "platlib")}
    if Path(origin).resolve().parent.parent not in site_packages:
        return False
    try:
        files = importlib.metadata.files("detectron2")
    except importlib.metadata.PackageNotFoundError:
        return True
    return files is None


def install(wheel: Path, force: bool) -> None:
    """``pip install`` the wheel and its requirements."""
    print("installing it and its requirements with pip", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", str(wheel)]
    if force:
        # First the wheel itself, whatever version is installed; then its requirements, which keep versions that fit.
        subprocess.run([*command, "--force-reinstall", "--no-deps"], check=True)
    subprocess.run(command, check=True)


def install_detectron2(force: bool = False, sdist: Path | None = None) -> None:
    """Install Detectron2 0.5, unless a Detectron2 can be imported.

    Args:
        force: replace the installed one.
        sdist: the source archive; None to download it.

    Raises:
        ReclipError: the archive cannot be read or downloaded, or the installed Detectron2 is broken.
        subprocess.CalledProcessError: pip failed, and has printed why.
    """
    spec = importlib.util.find_spec("detectron2")
    if spec is not None and spec.origin is not None and not force:
        if is_half_installed(spec.origin):
            print("detectron2 was only partly installed: installing it again", flush=True)
            force = True
        else:
            works, message = importable()
            if not works:
                raise ReclipError(
                    f"detectron2 at {Path(spec.origin).parent} cannot be imported ({message}); "
                    "repair or uninstall it, or replace it with --force"
                )
            print(f"detectron2 {message} is already installed")
            return
    with tempfile.TemporaryDirectory(prefix="detectron2-") as scratch:
        install(build_wheel(Path(scratch), sdist), force)
    importlib.invalidate_caches()
    works, message = importable()
    if not works:
        raise ReclipError(f"detectron2 was installed but cannot be imported: {message}")
    print(f"installed detectron2 {message}", flush=True)


def build_wheel(folder: Path, sdist: Path | None) -> Path:
    """Write the wheel into ``folder``; returns its path."""
    files = read_sdist(get_sdist(sdist))
    changed = patch_all(files)
    print(f"packing detectron2 {VERSION}: {len(files)} files, {len(changed)} of them changed", flush=True)
    return write_wheel(files, folder)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m reclip_d2.install_detectron2",
        description="Install Detectron2 0.5 as a pure-Python wheel, unless a detectron2 is installed.",
    )
    parser.add_argument("--sdist", type=Path, metavar="FILE", help=f"{SDIST}, already downloaded")
    parser.add_argument("--wheel-dir", type=Path, metavar="FOLDER", help="only build the wheel, into this folder")
    parser.add_argument("--force", action="store_true", help="install even if detectron2 is already installed")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 on success, otherwise one ``error:`` line and a non-zero status."""
    args = parse_args(argv)
    try:
        if args.wheel_dir is None:
            install_detectron2(args.force, args.sdist)
        else:
            print(f"wrote {build_wheel(args.wheel_dir, args.sdist)}")
    except (ReclipError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"error: pip install of detectron2 failed with status {error.returncode}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; run it again to finish", file=sys.stderr)
        return 130
    return 0
