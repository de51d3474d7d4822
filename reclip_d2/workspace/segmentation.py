"""The segmentation of one image, returned by :class:`~reclip_d2.workspace.segmenter.Segmenter`.

Shape letters: C classes of the masks, (H, W) size of the image in pixels.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps

from reclip_d2.data.images import read_image
from reclip_d2.data.samples import declares_alpha
from reclip_d2.errors import ReclipError
from reclip_d2.formats import IndexWriter, Prediction, ScoresWriter, check_formats, write_formats
from reclip_d2.formats.pictures import blend_colors, write_png
from reclip_d2.inference import ImagePredictor
from reclip_d2.utils.files import StrPath
from reclip_d2.utils.output_paths import check_output_folder, check_output_path
from reclip_d2.workspace.masks import MaskClassTable

ImageLike = StrPath | Image.Image | np.ndarray
"""An image's path, a PIL image, or ``(H, W, 3)`` uint8, RGB."""

# PIL modes that convert to RGB without loss of brightness; others have deeper samples with unknown white.
_MODES = ("RGB", "L", "1", "P", "RGBA", "LA", "PA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


def pixels_of(image: ImageLike) -> np.ndarray:
    """An image as ``(H, W, 3)`` uint8, RGB and upright, with transparent regions on white.

    Raises:
        ReclipError: it cannot be read, or is not :data:`ImageLike`.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    if isinstance(image, Image.Image):
        return _pixels_of_pil(image)
    if not isinstance(image, np.ndarray):
        raise ReclipError(
            f"image is of type {type(image).__name__}: give a path, a PIL image, or an array (H, W, 3) of uint8"
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ReclipError(
            f"image is an array {image.shape} of {image.dtype}: give one (H, W, 3) of uint8, RGB from 0 to 255"
        )
    return np.ascontiguousarray(image)


def _pixels_of_pil(image: Image.Image) -> np.ndarray:
    if image.mode not in _MODES:
        raise ReclipError(f"image has the PIL mode {image.mode}: convert it to RGB")
    has_alpha = declares_alpha(image)
    image = ImageOps.exif_transpose(image)
    if has_alpha:
        colors = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", colors.size, "white"), colors)
    return np.array(image.convert("RGB"))


@dataclasses.dataclass(frozen=True, eq=False)
class Segmentation:
    """A model's segmentation of an image.

    Attributes:
        image: ``(H, W, 3)`` uint8.
        labels: ``(H, W)`` uint8: indices into :attr:`classes`; 255 is ignored.
        path: path of the image; None for an image in memory.
    """

    image: np.ndarray
    labels: np.ndarray
    path: Path | None
    _predictor: ImagePredictor = dataclasses.field(repr=False)
    _table: MaskClassTable = dataclasses.field(repr=False)

    def __repr__(self) -> str:
        height, width = self.labels.shape
        name = "" if self.path is None else f", {self.path.name!r}"
        return f"Segmentation({width} x {height}, {len(self.classes)} classes{name})"

    @property
    def classes(self) -> list[str]:
        """Names of the C classes: ``classes[k]`` has the label ``k``."""
        return list(self._table.mask_classes.names)

    @property
    def colors(self) -> np.ndarray:
        """Colours of the classes in :meth:`overlay`, ``(C, 3)`` uint8."""
        return np.array(self._table.mask_classes.colors, np.uint8)

    def logit_bands(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Logits in bands of rows, for images whose :meth:`logits` do not fit into memory.

        Yields:
            The rows of a band, and its logits ``(C, rows, W)`` float32.
        """
        for band in self._predictor.bands(self.image, file=self.path):
            yield band.rows, self._table.class_logits(band.logits).cpu().numpy()

    def logits(self) -> np.ndarray:
        """Mask logits ``(C, H, W)`` float32 at the image's size, computed on each call.

        Their argmax is the label, except at ignored pixels, where a background name has a higher logit. A class with
        several queries, and a kept background, has the maximum over them.
        """
        result = np.empty((len(self.classes), *self.labels.shape), np.float32)
        for rows, logits in self.logit_bands():
            result[:, rows] = logits
        return result

    def overlay(self, opacity: float = 0.5) -> Image.Image:
        """The image overlaid with the classes' colours; ignored pixels and the background are unchanged.

        Args:
            opacity: opacity of the colours, 0 to 1.
        """
        return Image.fromarray(blend_colors(self.image, self.labels, self._table.mask_classes, opacity))

    def save(self, path: StrPath, formats: Sequence[str] | None = None) -> Path:
        """Write the labels as an index PNG, or in other formats.

        Args:
            path: path of the PNG; with ``formats``, a folder, with one subfolder per format.
            formats: names of :data:`reclip_d2.formats.FORMATS`; None for the PNG.

        Returns:
            The path.

            Raises:
                ReclipError: it cannot be written, or a format is unknown or cannot represent the classes.
        """
        if formats is None:
            file = check_output_path(path, "path")
            if file.suffix.lower() != ".png":
                raise ReclipError(f"path {file} does not end in .png: name a PNG, or give formats and a folder")
            write_png(file, self.labels)
            return file
        names = [formats] if isinstance(formats, str) else list(formats)
        classes = self._table.mask_classes
        check_formats(names, classes)
        folder = check_output_folder(path, "path")
        name = PurePosixPath("image.png" if self.path is None else self.path.name)
        with tempfile.TemporaryDirectory(prefix="reclip-") as temporary:
            # Other formats are made from the index mask and the image file.
            index = folder / "index" if "index" in names else Path(temporary)
            source = self.path or Path(temporary) / "source" / name
            if self.path is None:
                write_png(source, self.image)
            prediction = Prediction(name, self.labels, scores=self._scores() if "scores" in names else None)
            if prediction.scores is not None:
                with ScoresWriter(folder / "scores", classes) as writer:
                    writer.add(prediction)
            with IndexWriter(index, classes) as writer:
                writer.add(prediction)
            in_memory = {"yolo", "fiftyone"} & set(names) if self.path is None else ()
            write_formats(index, {name: source}, folder, names, options={key: {"images": "copy"} for key in in_memory})
        return folder

    def _scores(self) -> np.ndarray:
        """:meth:`logits` for the format ``scores``: ``(C, H, W)`` float16."""
        return self.logits().astype(np.float16)
