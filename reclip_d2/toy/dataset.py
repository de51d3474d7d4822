"""The embedded data sets on disk: JPEGs and index PNGs, made on first use.

Layout below the data set's folder, that of the other data sets of the project::

    images/{train,dev,val}/00000.jpg
    annotations_detectron2/{train,dev,val}/00000.png    material of each pixel, 0..11, mode L
    dataset.json                                        version, seed, counts, class names

``dev`` is for model selection (hyper-parameters, world, CLIP); ``val`` is for reporting only.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from PIL import Image

from reclip_d2.errors import ReclipError
from reclip_d2.toy.noise import SIZE
from reclip_d2.toy.scenes import render_scene
from reclip_d2.toy.worlds import EMBEDDED, EMBEDDED_CLASSES, World
from reclip_d2.utils.json_files import read_json
from reclip_d2.utils.locks import lock_path, waiting

DATASET_VERSION = 2
"""Increase it whenever the generator's output changes: folders of another version are rendered again."""

IMAGES, LABELS, DESCRIPTION = "images", "annotations_detectron2", "dataset.json"
# First scene number of each split, so that splits share no scenes and enlarging one does not change the others.
_FIRST_INDEX = {"train": 0, "dev": 100_000, "val": 200_000}


def _description(world: World) -> dict:
    return {
        "name": world.name,
        "version": DATASET_VERSION,
        "seed": world.dataset_seed,
        "size": [SIZE, SIZE],
        "counts": dict(world.split_counts),
        "classes": list(EMBEDDED_CLASSES),
    }


def _file_stems(world: World, split: str) -> list[str]:
    return [f"{number:05d}" for number in range(world.split_counts[split])]


def _nonempty_files(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file() and entry.stat().st_size > 0}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _is_complete(root: Path, world: World) -> bool:
    """Whether ``root`` contains this version's data set.

    Labels of ``train`` are not required: training never opens them, and a user may delete them to verify that.
    """
    try:
        if read_json(root / DESCRIPTION, {"type": "object"}, "description", "remove it") != _description(world):
            return False
    except ReclipError:
        return False
    for split in world.split_counts:
        stems = _file_stems(world, split)
        if not {f"{stem}.jpg" for stem in stems} <= _nonempty_files(root / IMAGES / split):
            return False
        if split != "train" and not {f"{stem}.png" for stem in stems} <= _nonempty_files(root / LABELS / split):
            return False
    return True


def _check_replaceable(root: Path) -> None:
    """Raise unless ``root`` is missing or contains only our files, so that no file of a user is lost."""
    if not root.exists():
        return
    foreign = [] if root.is_dir() else [root.name]
    if root.is_dir():
        foreign = sorted(entry.name for entry in root.iterdir() if entry.name not in (IMAGES, LABELS, DESCRIPTION))
    if foreign:
        raise ReclipError(
            f"{root}: contains {foreign[0]!r}, which is not part of the embedded data set; "
            "move it away or choose another folder"
        )
    if not (root / DESCRIPTION).is_file() and any(root.iterdir()):
        raise ReclipError(
            f"{root}: has no {DESCRIPTION}, so it may not be the embedded data set; "
            "move it away or choose another folder"
        )


def _remove_leftovers(root: Path) -> None:
    """Remove temporary folders of killed processes; the lock guarantees that no other process is using them."""
    for folder in root.parent.glob(f".{root.name}.*.tmp"):
        if folder.is_dir() and {path.name for path in folder.iterdir()} <= {"fresh", "replaced"}:
            shutil.rmtree(folder, ignore_errors=True)


def _write(root: Path, world: World) -> None:
    """Render all splits into the empty folder ``root``; the description comes last."""
    for split in world.split_counts:
        images, labels = root / IMAGES / split, root / LABELS / split
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for number, stem in enumerate(_file_stems(world, split)):
            scene = render_scene(world.dataset_seed, _FIRST_INDEX[split] + number, world)
            Image.fromarray(scene.image).save(images / f"{stem}.jpg", quality=95)
            Image.fromarray(scene.labels).save(labels / f"{stem}.png")
    (root / DESCRIPTION).write_text(json.dumps(_description(world), indent=1) + "\n")


def ensure_dataset(root: str | os.PathLike[str], world: World = EMBEDDED) -> Path:
    """Make the data set of a world in the folder ``root`` unless it exists; takes seconds, only on first use.

    The data set is rendered into a temporary folder next to ``root`` and renamed, so readers never see a partial
    one; of several processes, one makes it and the others wait. Incomplete folders and other versions are replaced.

    Args:
        root: the data set's folder, such as ``datasets/embedded``.

    Returns:
        ``root`` as an absolute path.

    Raises:
        ReclipError: ``root`` contains something else, or cannot be written.
    """
    root = Path(root).absolute()
    if _is_complete(root, world):
        return root
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with waiting(lock_path(root), f"another process to make {root}"):
            if _is_complete(root, world):
                return root
            _check_replaceable(root)
            _remove_leftovers(root)
            with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}.", suffix=".tmp") as scratch:
                fresh = Path(scratch) / "fresh"
                _write(fresh, world)
                if root.exists():
                    root.rename(Path(scratch) / "replaced")
                fresh.rename(root)
    except OSError as error:
        if _is_complete(root, world):  # another process was first, on a file system without locks
            return root
        raise ReclipError(f"{root}: cannot make the embedded data set: {error.strerror or error}") from error
    return root


def list_split(root: str | os.PathLike[str], split: str, world: World = EMBEDDED) -> list[dict]:
    """The pictures of a split, in order.

    Args:
        root: the data set's folder, see :func:`ensure_dataset`.
        split: ``train``, ``dev`` or ``val``.

    Returns:
        One dictionary per picture: ``file_name`` (JPEG) and ``sem_seg_file_name`` (index PNG) as strings,
        ``height`` and ``width`` in pixels, ``image_id``. Nothing is opened: the label files need not exist.
    """
    if split not in world.split_counts:
        raise ReclipError(f"{world.name} has no split {split!r}; choose one of {', '.join(world.split_counts)}")
    root = Path(root).absolute()
    return [
        {
            "file_name": str(root / IMAGES / split / f"{stem}.jpg"),
            "sem_seg_file_name": str(root / LABELS / split / f"{stem}.png"),
            "height": SIZE,
            "width": SIZE,
            "image_id": f"{split}_{stem}",
        }
        for stem in _file_stems(world, split)
    ]
