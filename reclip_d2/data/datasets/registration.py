"""Data sets on disk: their layout, their records, and their registration with Detectron2.

A data set is one :class:`DatasetOnDisk`: folders below ``$DETECTRON2_DATASETS``, class names and protocol. All is
lazy: no folder is read before ``DatasetCatalog.get`` asks for a split. An image's id is its path below the split's
image folder, without the extension, and its label is the file with that id below the label folder.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from reclip_d2.data.class_file import IGNORE_LABEL
from reclip_d2.data.index_images import Palette, pascal_color
from reclip_d2.errors import ReclipError
from reclip_d2.utils.files import MIB, display_path, read_text

README = "datasets/README.md"
# Largest image list in bytes; COCO's has 1.5 MiB.
_LONGEST_LIST = 256 * MIB
# Longest file name in bytes, minus the longest extension and what atomic_write adds.
_LONGEST_NAME = 200
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def datasets_root() -> Path:
    """``$DETECTRON2_DATASETS``, with ``~`` expanded; by default ``datasets``.

    Raises:
        ReclipError: ``~name`` is not a user.
    """
    root = os.environ.get("DETECTRON2_DATASETS") or "datasets"
    try:
        return Path(root).expanduser()
    except RuntimeError as error:
        raise ReclipError(f"DETECTRON2_DATASETS is {root!r}, but there is no such user: write the full path") from error


def pascal_colors(count: int) -> list[list[int]]:
    """The first ``count`` colours of PASCAL VOC's colour map after black. All distinct, for up to 255 classes."""
    return [list(pascal_color(index)) for index in range(1, count + 1)]


def scan_ids(folder: Path, suffix: str) -> list[str]:
    """Sorted paths of the files below ``folder`` whose names end with ``suffix``, relative and without the suffix.
    Hidden files are left out."""
    ids = []
    for parent, _, names in os.walk(folder):
        relative = Path(parent).relative_to(folder)
        ids += [
            (relative / name.removesuffix(suffix)).as_posix()
            for name in names
            if name.endswith(suffix) and not name.startswith(".")
        ]
    return sorted(ids)


def read_image_list(path: Path) -> list[str]:
    """Image ids of a text file, one per line (a second column, as in VOC's lists of one class, is ignored).

    Raises:
        ReclipError: the file is not text, has no ids, has paths instead, has an id twice, or an id that points outside
            the data set's folders.
    """
    text = read_text(path, "image list", limit=_LONGEST_LIST, remedy=f"get it again, see {README}")
    ids = [line.split()[0] for line in text.splitlines() if line.strip()]
    if not ids:
        raise ReclipError(f"image list {path} is empty: get it again, see {README}")
    paths = [name for name in ids if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    if paths:  # such as the trainaug list that some networks come with
        example = Path(paths[0]).stem
        raise ReclipError(
            f"image list {path} names the file {display_path(paths[0])}: write image ids, one per line, such as"
            f" {display_path(example)}"
        )
    for name in ids:
        check_image_id(name, f"image list {path}")
    name, count = Counter(ids).most_common(1)[0]
    if count > 1:
        raise ReclipError(f"image list {path} names {name} twice: get it again, see {README}")
    return ids


def check_image_id(name: str, source: str) -> None:
    """Raise :class:`ReclipError` for an image id that is not a plain path below the data set's folders.

    Ids become file names, and lists come from elsewhere: ``../x`` or ``/x`` would point outside.

    Args:
        source: where the id comes from, for errors.
    """
    path = PurePosixPath(name)
    plain = name.isprintable() and "\\" not in name and ":" not in path.parts[0] if path.parts else False
    if not plain or path.is_absolute() or ".." in path.parts or len(os.fsencode(path.name)) > _LONGEST_NAME:
        raise ReclipError(
            f"{source} names {display_path(name)[:80]!r}, which is not an image id: ids are relative paths below the"
            f" image folder; get it again, see {README}"
        )


def check_inside(folder: Path, files: Iterable[Path]) -> None:
    """Raise :class:`ReclipError` if a link would place a file that is written below ``folder`` outside it.

    ``folder`` itself may be a link.
    """
    root = os.path.realpath(folder)
    for parent in {file.parent for file in files}:
        real = os.path.realpath(parent)
        if real != root and not real.startswith(root.rstrip(os.sep) + os.sep):
            raise ReclipError(f"{parent} is a link that leads out of {folder}, to {real}: remove the link")


@dataclass(frozen=True)
class Split:
    """One split of a data set. Folders and files are relative to the data set's folder."""

    images: str
    """Folder of the images."""
    labels: str
    """Folder of the index PNGs that the preparation program writes."""
    count: int
    """Images of the complete split."""
    image_list: str = ""
    """Text file of image ids; "" for all images of the folder."""
    suffix: str = ".jpg"
    """Extension of the images."""
    evaluated: bool = False
    """Whether records carry labels. Training splits never do (``train_labelled`` is a separate split)."""
    prepare_options: str = ""
    """Options of the preparation program that make this split."""


@dataclass(frozen=True)
class DatasetOnDisk:
    """A data set below ``$DETECTRON2_DATASETS``."""

    name: str
    """Registered as ``<name>_<split>``."""
    folders: tuple[str, ...]
    """Names that the data set's folder may have; the first that exists is taken."""
    program: str
    """Preparation program, relative to the repository."""
    splits: Mapping[str, Split]
    class_names: Sequence[str]
    colors: Sequence[Sequence[int]]
    protocol: str
    """One line: classes, background, what the mean is taken over."""
    own_colors: bool = False
    """Whether the data set defines the colours, so that a label's colours identify its classes."""
    synonyms: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Synonyms of some classes."""

    @property
    def root(self) -> Path:
        """The data set's folder."""
        candidates = [datasets_root() / folder for folder in self.folders]
        return next((folder for folder in candidates if folder.is_dir()), candidates[0])

    def prepare_command(self, split: str) -> str:
        """What to type to prepare a split."""
        return f"python {self.program} {self.splits[split].prepare_options}".strip()

    def image_ids(self, split: str) -> list[str]:
        """Ids of a split's images, in the order of its list, or sorted.

        Raises:
            ReclipError: the folder or the list is missing or empty.
        """
        layout = self.splits[split]
        images, command = self.root / layout.images, self.prepare_command(split)
        if not images.is_dir():
            raise ReclipError(f"folder {images} does not exist: put {self.name} there ({README}), then run {command}")
        if layout.image_list:
            path = self.root / layout.image_list
            if not path.is_file():
                raise ReclipError(f"image list {path} does not exist: see {README}, then run {command}")
            return read_image_list(path)
        ids = scan_ids(images, layout.suffix)
        if not ids:
            names = [name for _, _, names in os.walk(images) for name in names if not name.startswith(".")]
            others = sorted({Path(name).suffix or name for name in names})
            found = f", only {', '.join(others[:4])}" if others else ""
            raise ReclipError(
                f"folder {images} has no {layout.suffix} files{found}: put {self.name} there, see {README}"
            )
        return ids

    def image_path(self, split: str, image_id: str) -> Path:
        """File of an image."""
        layout = self.splits[split]
        return self.root / layout.images / f"{image_id}{layout.suffix}"

    def label_path(self, split: str, image_id: str) -> Path:
        """File of an image's index PNG."""
        return self.root / self.splits[split].labels / f"{image_id}.png"

    def records(self, split: str, labelled: bool = False) -> list[dict[str, Any]]:
        """Detectron2's records: ``file_name``, ``image_id`` and, in splits for evaluation, ``sem_seg_file_name``.

        Args:
            labelled: add ``sem_seg_file_name`` in a training split too.

        Raises:
            ReclipError: as :meth:`image_ids`, or labels are missing.
        """
        ids = self.image_ids(split)
        records = [{"file_name": str(self.image_path(split, name)), "image_id": name} for name in ids]
        evaluated = self.splits[split].evaluated
        if not (evaluated or labelled):
            return records
        folder = self.root / self.splits[split].labels
        command = self.prepare_command(split) if evaluated else f"python {self.program} --splits {split}"
        if not folder.is_dir():
            raise ReclipError(f"folder {folder} does not exist: run {command}")
        for record in records:
            record["sem_seg_file_name"] = str(self.label_path(split, record["image_id"]))
        missing = [record for record in records if not os.path.exists(record["sem_seg_file_name"])]
        if missing:
            first = missing[0]["sem_seg_file_name"]
            raise ReclipError(f"{len(missing)} of {len(ids)} labels are missing, first {first}: run {command}")
        return records

    def register(self) -> None:
        """Register all splits with their metadata; ``train`` also as ``train_labelled``, for linear probing."""
        for split, labelled in [*((split, False) for split in self.splits), ("train", True)]:
            name = f"{self.name}_{split}{'_labelled' if labelled else ''}"
            DatasetCatalog.register(name, lambda split=split, labelled=labelled: self.records(split, labelled))
            metadata = MetadataCatalog.get(name)
            metadata.set(
                stuff_classes=list(self.class_names),
                stuff_colors=[list(color) for color in self.colors],
                ignore_label=IGNORE_LABEL,
                evaluator_type="sem_seg",
                reclip_protocol=self.protocol,
                reclip_label_palette=Palette(
                    {k: (color[0], color[1], color[2]) for k, color in enumerate(self.colors)}, own=self.own_colors
                ),
            )
            if self.synonyms:
                names = [[name, *self.synonyms.get(name, ())] for name in self.class_names]
                metadata.set(stuff_class_synonyms=names)
