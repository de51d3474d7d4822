"""Formats with one picture per image: index masks, palette masks, overlays; and the scores.

Shape letters: C classes, (H, W) size in pixels.
"""

from __future__ import annotations

import io
from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np
from PIL import Image

from reclip_d2.data.index_images import Palette, read_index_image
from reclip_d2.errors import ReclipError
from reclip_d2.formats.classes import MAX_8BIT_CLASSES, MaskClasses
from reclip_d2.formats.prediction import Prediction
from reclip_d2.formats.writer import Writer
from reclip_d2.utils.files import MissingFileError
from reclip_d2.utils.io import atomic_write

JPEG_QUALITY = 90
JPEG_MAX_SIDE = 65500  # limit of libjpeg
_STRIP = 256  # rows that are blended together


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write ``(H, W)`` uint8 or uint16 (8 or 16 bits, grey), or ``(H, W, 3)`` uint8 (RGB)."""
    with atomic_write(path) as temporary:
        Image.fromarray(pixels).save(temporary, "PNG")


def png_bytes(pixels: np.ndarray) -> bytes:
    """The bytes that :func:`write_png` writes."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


class IndexWriter(Writer):
    """``index``: one single-channel PNG per image, with the image's stem, and ``classes.json``.

    A pixel's value is its class id; 255 is ignored. More than 255 classes take 16 bits, and 65535 is ignored. All other
    formats except ``scores`` can be made from this one.
    """

    def __init__(self, output: Path, classes: MaskClasses) -> None:
        super().__init__(output, classes)
        classes.write(self.output)

    def files(self, path: PurePosixPath) -> list[Path]:
        """The mask."""
        return [self.output / path.with_suffix(".png")]

    def _add(self, prediction: Prediction) -> None:
        write_png(self.files(prediction.path)[0], prediction.labels)


def read_index(path: Path, classes: MaskClasses) -> np.ndarray:
    """Read an index mask.

    Returns:
        ``(H, W)`` of the classes' dtype.

    Raises:
        ReclipError: the file is missing, damaged, or not an index mask of these classes: a palette must match the
            classes.
    """
    modes = ("L", "P") if classes.dtype == np.uint8 else ("I;16", "I;16B", "I")
    palette = Palette(dict(enumerate(classes.colors)), own=True, ignore_label=classes.ignore_label)
    try:
        labels = read_index_image(
            path,
            None,
            what="mask",
            remedy="remove it and predict again",
            palette=palette,
            modes=modes,
            wrong_mode="not an index mask: remove it and predict again",
        )
    except MissingFileError:
        raise ReclipError(f"mask {path} is missing: predict again, finished masks are kept") from None
    return classes.checked(labels, str(path))


class PaletteWriter(Writer):
    """``palette``: one PNG per image with the classes' colours as its palette; ignored pixels are black.

    The pixels' values are the class ids, as in ``index``. More than 255 classes do not fit into a palette: then it is
    an RGB PNG, for viewing only.
    """

    def files(self, path: PurePosixPath) -> list[Path]:
        """The mask."""
        return [self.output / path.with_suffix(".png")]

    def _add(self, prediction: Prediction) -> None:
        path, table = self.files(prediction.path)[0], self.classes.table()
        if len(self.classes.names) > MAX_8BIT_CLASSES:
            write_png(path, table[prediction.labels])
            return
        mask = Image.fromarray(prediction.labels)
        mask.putpalette(table.tobytes())
        with atomic_write(path) as temporary:
            mask.save(temporary, "PNG")


class OverlayWriter(Writer):
    """``overlay``: the image overlaid with the classes' colours, as a JPEG by default.

    Ignored pixels and the background are unchanged.
    """

    needs_image: ClassVar[bool] = True

    def __init__(self, output: Path, classes: MaskClasses, *, opacity: float = 0.5, suffix: str = ".jpg") -> None:
        """
        Args:
            opacity: opacity of the colours, 0 to 1.
            suffix: ``.jpg`` or ``.png``.
        """
        super().__init__(output, classes)
        _check_opacity(opacity)
        if suffix not in (".jpg", ".png"):
            raise ReclipError(f"the overlay's suffix is {suffix!r}: choose .jpg or .png")
        self._opacity, self._suffix = opacity, suffix

    def files(self, path: PurePosixPath) -> list[Path]:
        """The overlay."""
        return [self.output / path.with_suffix(self._suffix)]

    def _add(self, prediction: Prediction) -> None:
        path = self.files(prediction.path)[0]
        if self._suffix == ".jpg":
            check_jpeg_size(prediction.path, prediction.size)
        picture = Image.fromarray(blend_colors(prediction.image, prediction.labels, self.classes, self._opacity))
        with atomic_write(path) as temporary:
            if self._suffix == ".jpg":
                picture.save(temporary, "JPEG", quality=JPEG_QUALITY)
            else:
                picture.save(temporary, "PNG")


def blend_colors(image: np.ndarray, labels: np.ndarray, classes: MaskClasses, opacity: float = 0.5) -> np.ndarray:
    """An image ``(H, W, 3)`` uint8 overlaid with the classes' colours; ignored pixels and the background are unchanged.

    Args:
        labels: ``(H, W)``.
        opacity: opacity of the colours, 0 to 1.
    """
    _check_opacity(opacity)
    weight = round(opacity * 256)
    table = classes.table().astype(np.uint16)
    painted = np.zeros(len(table), dtype=bool)
    painted[classes.annotated] = True
    blended = np.empty_like(image)
    for top in range(0, len(labels), _STRIP):
        rows = slice(top, top + _STRIP)
        colors, pixels = table[labels[rows]], image[rows].astype(np.uint16)
        mixed = (pixels * (256 - weight) + colors * weight + 128) >> 8
        blended[rows] = np.where(painted[labels[rows]][..., None], mixed, pixels)
    return blended


def _check_opacity(opacity: float) -> None:
    if not 0 <= opacity <= 1:
        raise ReclipError(f"the overlay's opacity is {opacity}: give 0 to 1")


def check_jpeg_size(path: PurePosixPath, size: tuple[int, int]) -> None:
    """Raise :class:`ReclipError` for an image whose overlay is too large for JPEG.

    Args:
        path: path of the image.
        size: (H, W).
    """
    if max(size) > JPEG_MAX_SIDE:
        raise ReclipError(
            f"the overlay of {path}, {size[1]} x {size[0]} pixels, is too large for JPEG ({JPEG_MAX_SIDE} per side):"
            " omit the format overlay, or write it from Python, as .png"
        )


class ScoresWriter(Writer):
    """``scores``: one NPZ per image: ``scores`` ``(C, H, W)`` float16 as predicted, and ``class_names`` ``(C,)``.

    Read it with ``numpy.load(path)``. About ``2 * C * H * W`` bytes before compression.
    """

    needs_scores: ClassVar[bool] = True

    def files(self, path: PurePosixPath) -> list[Path]:
        """The scores."""
        return [self.output / path.with_suffix(".npz")]

    def _add(self, prediction: Prediction) -> None:
        if len(prediction.scores) != len(self.classes.names):
            raise ValueError(f"scores of {prediction.path} have {len(prediction.scores)} classes")
        with atomic_write(self.files(prediction.path)[0]) as temporary, open(temporary, "wb") as stream:
            np.savez_compressed(stream, scores=prediction.scores, class_names=np.array(self.classes.names))
