"""One image's prediction, the input of the writers.

Shape letters: C classes, (H, W) size in pixels.
"""

from __future__ import annotations

import dataclasses
import functools
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np

from reclip_d2.errors import ReclipError
from reclip_d2.formats.rle import Segment, segments

# Unicode categories that names must not contain: control characters, surrogates (of names that are not UTF-8), and line
# and paragraph separators. Spaces of all kinds are common: macOS puts U+202F into the names of screenshots.
_REFUSED = ("Cc", "Cs", "Zl", "Zp")


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """One image's prediction.

    Attributes:
        path: path of the source image, relative to the folder that outputs mirror, with its extension:
            ``street/a.jpg``.
        labels: ``(H, W)`` integers in the upright image: class ids or the ignore label (255; 65535 for more than 255
            classes).
        image: ``(H, W, 3)`` uint8 RGB, upright; only ``overlay`` needs it.
        scores: ``(C, H, W)`` float16; only ``scores`` needs them.
        source: the image's file, for formats that link to it; None for no links.
    """

    path: PurePosixPath
    labels: np.ndarray
    image: np.ndarray | None = None
    scores: np.ndarray | None = None
    source: Path | None = None

    def __post_init__(self) -> None:
        check_path(self.path)
        if self.labels.ndim != 2 or self.labels.dtype.kind not in "iu" or self.labels.size == 0:
            raise ValueError(
                f"labels of {self.path} must be (H, W) integers, not {self.labels.dtype} {self.labels.shape}"
            )
        if self.image is not None and (self.image.shape != (*self.labels.shape, 3) or self.image.dtype != np.uint8):
            raise ValueError(
                f"image {self.path} must be {(*self.labels.shape, 3)} uint8, not {self.image.shape} {self.image.dtype}"
            )
        if self.scores is not None and (
            self.scores.ndim != 3 or self.scores.shape[1:] != self.labels.shape or self.scores.dtype != np.float16
        ):
            raise ValueError(
                f"scores of {self.path} must be (C, {self.labels.shape[0]}, {self.labels.shape[1]}) float16, not"
                f" {self.scores.shape} {self.scores.dtype}"
            )

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.labels.shape

    @functools.cached_property
    def segments(self) -> list[Segment]:
        """The regions of the labels that occur, run-length encoded; computed once for all writers."""
        return segments(self.labels)


def check_path(path: PurePosixPath) -> None:
    """Raise :class:`ReclipError` for a path that output files must not have."""
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise ReclipError(f"image path {path} leaves the output folder: give it relative to the images' folder")
    text = str(path)
    if any(unicodedata.category(letter) in _REFUSED for letter in text):
        raise ReclipError(f"image name {text!r} contains control characters or is not UTF-8: rename the file")


class Stems:
    """The images so far by their path without extension, which names the masks.

    ``a.jpg`` and ``a.png`` of one folder would overwrite each other's mask, and most formats match images and masks
    by stem: such pairs are rejected.
    """

    def __init__(self) -> None:
        self._paths: dict[str, str] = {}

    def claim(self, path: PurePosixPath) -> None:
        """Record an image; the same path may be added repeatedly.

        Raises:
            ReclipError: another image has the same stem.
        """
        other = self._paths.setdefault(str(path.with_suffix("")), str(path))
        if other != str(path):
            raise ReclipError(
                f"images {other} and {path} differ only in their extension and would share a mask: rename one"
            )


def check_paths(paths: Iterable[PurePosixPath]) -> None:
    """Raise :class:`ReclipError` if two images would share a mask, or a path cannot be written; see :class:`Stems`."""
    stems = Stems()
    for path in paths:
        check_path(path)
        stems.claim(path)
