"""The configs that the package brings, and where the name of one leads."""

from __future__ import annotations

from pathlib import Path


def configs_folder() -> Path:
    """Folder of the configs: inside the installed package, or at the top of the checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find_config_file(path: str) -> str:
    """The path of a config: as it is, or of the package's own where the working folder has no such ``configs/...``."""
    parts = Path(path).parts
    if parts[:1] == ("configs",) and ".." not in parts and not Path(path).exists():
        own = configs_folder().joinpath(*parts[1:])
        if own.is_file():
            return str(own)
    return path
