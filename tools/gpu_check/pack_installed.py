"""Pack an installed pure-Python distribution as a wheel: ``pack_installed.py NAME FOLDER``."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import sys
import zipfile
from pathlib import Path


def pack(name: str, folder: Path) -> Path:
    """Write the wheel of the installed distribution and return its path.

    Raises:
        SystemExit: it is not installed as plain files, or contains compiled ones.
    """
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"error: {name} is not installed here")
    files = [path for path in distribution.files or () if ".." not in path.parts and "__pycache__" not in path.parts]
    info = f"{distribution.metadata['Name'].replace('-', '_')}-{distribution.version}.dist-info"
    package = [path for path in files if not path.parts[0].endswith(".dist-info")]
    if not package:
        sys.exit(f"error: {name} is an editable install: its files cannot be packed")
    compiled = [str(path) for path in package if path.suffix in (".so", ".pyd")]
    if compiled:
        sys.exit(f"error: {name} contains compiled files, which work with one Python version only: {compiled[0]}")
    contents = {path.as_posix(): Path(path.locate()).read_bytes() for path in package}
    contents[f"{info}/METADATA"] = str(distribution.read_text("METADATA")).encode()
    contents[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: pack_installed\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    record = ""
    for path, data in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(data)}\n"
    contents[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    target = folder / f"{info.removesuffix('.dist-info')}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in contents.items():
            archive.writestr(path, data)
    return target


if __name__ == "__main__":
    print(pack(sys.argv[1], Path(sys.argv[2])))
