"""The program ``python -m reclip_d2.fetch``."""

from __future__ import annotations

import argparse
import importlib.resources
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

from reclip_d2.errors import ReclipError, exit_on_error
from reclip_d2.fetch.archives import Archive, fetch_archive, is_offline, unpack
from reclip_d2.utils.progress import count_steps

_CITYSCAPES = (
    "Cityscapes needs a login and cannot be fetched: register at https://www.cityscapes-dataset.com, get"
    " leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip, unpack both into {folder}/cityscapes, then run"
    " python datasets/prepare_cityscapes19.py"
)


def read_registry(path: Path | None = None) -> tuple[dict[str, Archive], dict[str, dict]]:
    """Archives by file name, and for each data set its ``archives`` and the command ``prepare``.

    Args:
        path: a file like ``registry.yaml``; None for that.
    """
    text = (path or importlib.resources.files("reclip_d2.fetch") / "registry.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    archives = {
        name: Archive(name, **{**fields, "only": tuple(fields.get("only", ()))})
        for name, fields in content["archives"].items()
    }
    return archives, content["datasets"]


def fetch_dataset(name: str, folder: Path, registry: Path | None = None) -> str:
    """Download and unpack a data set below ``folder``; returns the command that prepares it.

    Raises:
        ReclipError: see :func:`~reclip_d2.fetch.archives.fetch_archive`; or the disk is too full.
    """
    archives, datasets = read_registry(registry)
    wanted = [archives[archive] for archive in datasets[name]["archives"]]
    downloads = folder / "downloads"
    missing = [archive for archive in wanted if not (downloads / archive.name).exists()]
    _check_space(folder, missing)
    for archive in wanted:
        file = fetch_archive(archive, downloads)
        checked = (
            "the published hash" if archive.hash else f"no published hash: recorded in {downloads / 'hashes.json'}"
        )
        print(f"{archive.name}: {checked}", flush=True)
        unpack(archive, file, folder)
    return datasets[name]["prepare"]


def _check_space(folder: Path, missing: Sequence[Archive]) -> None:
    """Raise :class:`ReclipError` if the archives and what they contain do not fit on the disk."""
    needed = 2 * sum(archive.gigabytes for archive in missing)
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free / 1e9
    if needed > free:
        raise ReclipError(
            f"{folder} has {free:.1f} GB free, and archives and files need about {needed:.1f} GB: set"
            " DETECTRON2_DATASETS to another disk"
        )


def fetch_clip(name: str, tag: str) -> Path:
    """The weights of an open_clip tag, from its cache or the network.

    Raises:
        ReclipError: they are not there and cannot be downloaded.
    """
    if is_offline():
        os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's client is imported
    from reclip_d2.backbones.download import fetch_weights

    with count_steps(f"{name} {tag}", 1, unit="file") as steps:
        path = fetch_weights(name, tag)
        steps.advance()
    return path


def build_parser(registry: Path | None = None) -> argparse.ArgumentParser:
    """The parser of the arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m reclip_d2.fetch",
        description="Download data sets, with checksums, and unpack them where the programs of datasets/ expect them;"
        " or CLIP's weights. Interrupted downloads resume when you repeat the command.",
    )
    names = [*read_registry(registry)[1], "cityscapes19", "clip"]
    parser.add_argument("names", nargs="+", metavar="NAME", choices=names, help=f"what to fetch: {', '.join(names)}")
    parser.add_argument(
        "--folder", help="folder of the data sets (default: $DETECTRON2_DATASETS, or datasets in this folder)"
    )
    parser.add_argument("--clip", default="ViT-B-16-quickgelu", metavar="NAME", help="CLIP's name (%(default)s)")
    parser.add_argument("--pretrained", default="openai", metavar="TAG", help="open_clip's tag (%(default)s)")
    return parser


@exit_on_error(interrupted="interrupted: repeat the command to resume")
def main(arguments: Sequence[str] | None = None, registry: Path | None = None) -> None:
    """Run the program."""
    args = build_parser(registry).parse_args(arguments)
    folder = Path(args.folder or os.environ.get("DETECTRON2_DATASETS") or "datasets").expanduser()
    for name in args.names:
        if name == "cityscapes19":
            raise ReclipError(_CITYSCAPES.format(folder=folder))
    for name in args.names:
        if name == "clip":
            print(f"weights: {fetch_clip(args.clip, args.pretrained)}")
            continue
        prepare = fetch_dataset(name, folder, registry)
        place = folder.resolve()
        print(f"{name} is in {place}; next:\n\n    export DETECTRON2_DATASETS={place}\n    {prepare}\n")
