"""Bringing labels into line with images that have an EXIF orientation of 2 to 8.

Images are used upright, and so must labels be. Some were drawn on the stored pixels, as by programs that know nothing
of EXIF; those are turned with their image. For an image on its side (5 to 8) the label's size tells which it is; for
the others (2 to 4, and squares) nothing does. A data set's labels were made in one way, so the first kind decides for
the second, and where there is none the data set's rule.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reclip_d2.data.datasets.label_sources import LabelSource
from reclip_d2.data.images import read_geometry
from reclip_d2.data.orientation import Geometry, turn_upright
from reclip_d2.errors import ReclipError

DRAWN_ON = ("stored", "upright")
"""What labels may be drawn on: the pixels as an image file stores them, or the upright image."""


@dataclass
class OrientationCounts:
    """Labels of images with an EXIF orientation of 2 to 8."""

    stored: int = 0
    """By their size drawn on the stored pixels."""
    upright: int = 0
    """By their size upright."""
    open: int = 0
    """Of those the size does not tell."""

    def add(self, other: OrientationCounts) -> None:
        """Add the counts of other labels."""
        self.stored += other.stored
        self.upright += other.upright
        self.open += other.open

    def count(self, geometry: Geometry, size: tuple[int, int]) -> None:
        """Count a label of a size (H, W); one of another size than its image's is left to its reader."""
        if geometry.orientation == 1:
            return
        if geometry.stored == geometry.upright:
            self.open += size == geometry.stored
        else:
            self.stored += size == geometry.stored
            self.upright += size == geometry.upright

    @property
    def total(self) -> int:
        """All of them."""
        return self.stored + self.upright + self.open

    def drawn_on(self, title: str, rule: str, chosen: str | None, remedy: str) -> str:
        """What the labels whose size does not tell were drawn on, ``stored`` or ``upright``.

        Args:
            title: of the data set, for the error.
            rule: the data set's, where no label's size tells.
            chosen: by the user; None for the labels' own evidence.
            remedy: what the user can do where nothing decides.

        Raises:
            ReclipError: the labels whose size tells are of both kinds, some tell nothing, and the user has not chosen.
        """
        if chosen:
            return chosen
        if self.open and self.stored and self.upright:
            raise ReclipError(
                f"{title}: of the labels of images with an EXIF rotation {self.stored} are drawn on the stored pixels"
                f" and {self.upright} are upright, and of {self.open} the size does not tell: {remedy}"
            )
        if self.stored or self.upright:
            return "stored" if self.stored else "upright"
        return rule

    def describe(self, drawn_on: str) -> str:
        """One line for the log: what was found and decided."""
        turned = self.stored + (self.open if drawn_on == "stored" else 0)
        return (
            f"{self.total} images have an EXIF orientation of 2 to 8; by their size {self.stored} of their labels are"
            f" drawn on the stored pixels and {self.upright} are upright, the other {self.open} are taken as"
            f" {'drawn on the stored pixels' if drawn_on == 'stored' else 'upright'}: {turned} are turned with their"
            " image"
        )


def label_turn(geometry: Geometry, size: tuple[int, int], drawn_on: str) -> int:
    """EXIF orientation by which a label of a size (H, W) must be turned, 1 for an upright one.

    Args:
        drawn_on: where the size does not tell.
    """
    if geometry.stored != geometry.upright:
        return geometry.orientation if size == geometry.stored else 1
    return geometry.orientation if drawn_on == "stored" else 1


def check_label_size(source: object, size: tuple[int, int], image: Path, geometry: Geometry) -> None:
    """Raise :class:`ReclipError` for a label whose size (H, W) is neither its image's nor that of the stored pixels."""
    if size not in (geometry.stored, geometry.upright):
        height, width = geometry.upright
        raise ReclipError(
            f"{source} has size {size[1]}x{size[0]}, its image {image} {width}x{height}: they must be the same"
        )


def read_upright(source: LabelSource, image: Path, geometry: Geometry, drawn_on: str) -> tuple[np.ndarray, bool]:
    """Read a label, and turn it upright if it was drawn on its image's stored pixels.

    Args:
        geometry: of the image.
        drawn_on: ``stored`` or ``upright``, where the label's size does not tell.

    Returns:
        ``(H, W)`` ids, and whether they were turned.

    Raises:
        ReclipError: the label cannot be read, or is not of its image's size.
    """
    size = source.declared_size()
    check_label_size(source, size, image, geometry)
    orientation = label_turn(geometry, size, drawn_on)
    return turn_upright(source.read(size), orientation), orientation != 1


def count_orientations(pairs: Iterable[tuple[LabelSource, Path]]) -> OrientationCounts:
    """Look at the headers of images, and at those of the labels whose images are not upright."""
    counts = OrientationCounts()
    for source, image in pairs:
        geometry = read_geometry(image)
        if geometry.orientation != 1:
            counts.count(geometry, source.declared_size())
    return counts
