"""Orienting labels like their images, for images with an EXIF orientation of 2 to 8.

Images are used upright, so labels must be too. Programs that ignore EXIF draw labels on the stored pixels; those labels
are rotated with their image. For orientations 5 to 8, which swap height and width, the label's size tells which case it
is; for 2 to 4, and for squares, nothing does. All labels of a data set are assumed to be made the same way: the labels
whose size tells decide for the others, and if there are none, the data set's rule applies.
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
"""What labels may be drawn on: the pixels as stored in the image file, or the upright image."""


@dataclass
class OrientationCounts:
    """Counts of labels of images with an EXIF orientation of 2 to 8."""

    stored: int = 0
    """Labels whose size shows that they are drawn on the stored pixels."""
    upright: int = 0
    """Labels whose size shows that they are upright."""
    open: int = 0
    """Labels whose size does not tell."""

    def add(self, other: OrientationCounts) -> None:
        """Add the counts of ``other``."""
        self.stored += other.stored
        self.upright += other.upright
        self.open += other.open

    def count(self, geometry: Geometry, size: tuple[int, int]) -> None:
        """Count a label of size (H, W); a size that does not match the image is left to the label's reader."""
        if geometry.orientation == 1:
            return
        if geometry.stored == geometry.upright:
            self.open += size == geometry.stored
        else:
            self.stored += size == geometry.stored
            self.upright += size == geometry.upright

    @property
    def total(self) -> int:
        """Number of labels."""
        return self.stored + self.upright + self.open

    def drawn_on(self, title: str, rule: str, chosen: str | None, remedy: str) -> str:
        """What labels whose size does not tell are drawn on, ``stored`` or ``upright``.

        Args:
            title: the data set's name, for the error.
            rule: the data set's rule, used if no label's size tells.
            chosen: the user's choice; None to decide from the labels.
            remedy: what the user can do if the labels contradict each other.

        Raises:
            ReclipError: labels whose size tells are of both kinds, others are ambiguous, and the user has not chosen.
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
    """EXIF orientation by which a label of size (H, W) must be rotated; 1 for an upright label.

    Args:
        drawn_on: ``stored`` or ``upright``, used if the size does not tell.
    """
    if geometry.stored != geometry.upright:
        return geometry.orientation if size == geometry.stored else 1
    return geometry.orientation if drawn_on == "stored" else 1


def check_label_size(source: object, size: tuple[int, int], image: Path, geometry: Geometry) -> None:
    """Raise :class:`ReclipError` for a label whose size (H, W) matches neither its image nor the stored pixels."""
    if size not in (geometry.stored, geometry.upright):
        height, width = geometry.upright
        raise ReclipError(
            f"{source} has size {size[1]}x{size[0]}, its image {image} {width}x{height}: they must be the same"
        )


def read_upright(source: LabelSource, image: Path, geometry: Geometry, drawn_on: str) -> tuple[np.ndarray, bool]:
    """Read a label, and rotate it upright if it was drawn on its image's stored pixels.

    Args:
        geometry: of the image.
        drawn_on: ``stored`` or ``upright``, used if the label's size does not tell.

    Returns:
        ``(H, W)`` ids, and whether they were rotated.

    Raises:
        ReclipError: the label cannot be read, or its size differs from its image's.
    """
    size = source.declared_size()
    check_label_size(source, size, image, geometry)
    orientation = label_turn(geometry, size, drawn_on)
    return turn_upright(source.read(size), orientation), orientation != 1


def count_orientations(pairs: Iterable[tuple[LabelSource, Path]]) -> OrientationCounts:
    """Read the headers of images, and of the labels whose images are not upright."""
    counts = OrientationCounts()
    for source, image in pairs:
        geometry = read_geometry(image)
        if geometry.orientation != 1:
            counts.count(geometry, source.declared_size())
    return counts
