"""Folders of index masks that any system has written, one PNG per image.

The mask of an image is the PNG with the image's name: next to each other in one folder, or in the same sub-folders as
the images. Its pixels are class ids, or cluster ids. The largest value of the file's type (255, or 65535 in 16 bits)
means: no class.

Shape letters: (H, W) size in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image

from reclip_d2.data.index_images import PLAIN, Palette, read_index_image
from reclip_d2.errors import ReclipError
from reclip_d2.utils.files import StrPath, display_path

NO_CLASS = -1
"""Id of pixels without a class, in the maps of this module."""
SIZE_RULES = ("same", "nearest")
"""What happens to a mask of another size than its image: an error, or a resize to the nearest pixel."""


class MaskFiles:
    """The masks of one folder, found by the names of images."""

    def __init__(
        self,
        folder: StrPath,
        *,
        ids: Sequence[int] | None = None,
        suffix: str = "",
        size_rule: str = "same",
        palette: Palette = PLAIN,
    ) -> None:
        """
        Args:
            folder: folder of PNGs, with sub-folders or without.
            ids: class of each id in the masks, or :data:`NO_CLASS`; None keeps the ids.
            suffix: what the masks' names have after the images': ``_pred`` for ``a_pred.png`` of ``a.jpg``.
            size_rule: one of :data:`SIZE_RULES`.
            palette: what the colours of palette PNGs mean.

        Raises:
            ReclipError: the folder does not exist or has no PNG.
        """
        self.folder = Path(folder)
        self.ids = None if ids is None else np.asarray(ids, dtype=np.int64)
        self.suffix = suffix
        self.size_rule = size_rule
        self.palette = palette
        if not self.folder.is_dir():
            raise ReclipError(f"folder of masks {display_path(folder)} does not exist: check the path")
        self._by_stem: dict[str, list[Path]] = {}
        for path in sorted(self.folder.rglob("*")):
            if path.suffix.lower() == ".png" and not path.name.startswith("."):
                self._by_stem.setdefault(path.stem, []).append(path)
        if not self._by_stem:
            raise ReclipError(f"folder of masks {display_path(folder)} has no PNG: write one index PNG per image")

    def path(self, image: StrPath) -> Path | None:
        """The mask of an image, None if there is none.

        Among masks of the same name the one counts whose sub-folders are the image's.

        Raises:
            ReclipError: several masks could be the image's.
        """
        image = PurePath(image)
        found = self._by_stem.get(image.stem + self.suffix, [])
        if len(found) < 2:
            return found[0] if found else None
        shared = [_shared_folders(path.relative_to(self.folder).parent, image.parent) for path in found]
        best = [path for path, count in zip(found, shared, strict=True) if count == max(shared)]
        if len(best) > 1:
            raise ReclipError(
                f"image {display_path(image)} has several masks: {display_path(best[0])} and {display_path(best[1])};"
                " give masks the sub-folders of their images"
            )
        return best[0]

    def check(self, images: Iterable[StrPath]) -> None:
        """Raise :class:`ReclipError` if an image has no mask, or two have the same; the message names the first."""
        images = list(images)
        missing = [image for image in images if self.path(image) is None]
        if missing:
            raise ReclipError(
                f"{len(missing)} of {len(images)} images have no mask in {display_path(self.folder)}, for example"
                f" {display_path(missing[0])}, whose mask is {PurePath(missing[0]).stem}{self.suffix}.png: write a"
                " mask for each image"
            )
        owners: dict[Path | None, StrPath] = {}
        for image in images:
            other = owners.setdefault(self.path(image), image)
            if PurePath(other) != PurePath(image):
                raise ReclipError(
                    f"images {display_path(other)} and {display_path(image)} have the same mask,"
                    f" {display_path(self.path(image))}: give masks the sub-folders of their images"
                )

    def read(self, image: StrPath, size: tuple[int, int]) -> np.ndarray:
        """The mask of an image.

        Args:
            image: the image's file, which is not opened.
            size: (H, W) of the upright image.

        Returns:
            ``(H, W)`` int64: class ids, or :data:`NO_CLASS`.

        Raises:
            ReclipError: there is no mask, it cannot be read, has another size (with the rule ``same``), or an id
                that has no class.
        """
        pixels, path = self.pixels(image, size)
        none = 255 if pixels.dtype == np.uint8 else 65535
        mask = pixels.astype(np.int64)
        unlabelled = mask == none
        if self.ids is None:
            return np.where(unlabelled, NO_CLASS, mask)
        highest = int(np.where(unlabelled, 0, mask).max(initial=0))
        if highest >= len(self.ids):
            raise ReclipError(
                f"mask {display_path(path)} has id {highest}, but there are names for 0 to {len(self.ids) - 1} only;"
                f" {none} means no class"
            )
        return np.where(unlabelled, NO_CLASS, self.ids[np.where(unlabelled, 0, mask)])

    def pixels(self, image: StrPath, size: tuple[int, int]) -> tuple[np.ndarray, Path]:
        """The pixels ``(H, W)`` of an image's mask as they are in the file, uint8 or wider, and the file.

        Arguments and errors as for :meth:`read`.
        """
        path = self.path(image)
        if path is None:
            self.check([image])
        assert path is not None
        strict = self.size_rule == "same"
        pixels = read_index_image(
            path,
            size if strict else None,
            "its image",
            what="mask",
            remedy="write it again" if not strict else "write it again, or allow a resize to the nearest pixel",
            palette=self.palette,
            wrong_mode="write a single-channel PNG of ids",
        )
        return (pixels if pixels.shape == tuple(size) else resize_nearest(pixels, size)), path


def resize_nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """``(h, w)`` integer ids resized to (H, W): each pixel takes the id at its centre."""
    resized = Image.fromarray(mask.astype(np.int32)).resize(size[::-1], Image.Resampling.NEAREST)
    return np.asarray(resized).astype(mask.dtype)


def ids_of_names(mask_names: Sequence[Sequence[str]], class_names: Sequence[Sequence[str]]) -> list[int]:
    """The class of each id in masks that number their classes differently.

    Args:
        mask_names: names of the masks' ids, from 0.
        class_names: name and synonyms of each class of the data set.

    Returns:
        For each id the class that shares a name with it, in any case; :data:`NO_CLASS` if none does.

    Raises:
        ReclipError: no id has a class, or one has names of two.
    """
    classes = {name.casefold(): k for k, names in enumerate(class_names) for name in names}
    ids = []
    for names in mask_names:
        found = {classes[name.casefold()] for name in names if name.casefold() in classes}
        if len(found) > 1:
            both = " and ".join(class_names[k][0] for k in sorted(found)[:2])
            raise ReclipError(f"the mask id of {names[0]!r} has names of two classes, {both}: split it")
        ids.append(found.pop() if found else NO_CLASS)
    if set(ids) == {NO_CLASS}:
        raise ReclipError(
            f"none of the masks' names is a class: they are {', '.join(n[0] for n in mask_names[:3])}, ..., the classes"
            f" {', '.join(n[0] for n in class_names[:3])}, ...; check the file of names"
        )
    return ids


def _shared_folders(first: PurePath, second: PurePath) -> int:
    """How many of the last folders two paths have in common."""
    count = 0
    for a, b in zip(reversed(first.parts), reversed(second.parts), strict=False):
        if a != b:
            break
        count += 1
    return count


def images_of(records: Iterable[dict[str, Any]]) -> list[str]:
    """Image files of records."""
    return [record["file_name"] for record in records]
