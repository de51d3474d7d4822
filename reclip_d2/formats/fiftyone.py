"""FiftyOne's ``ImageSegmentationDirectory``: https://docs.voxel51.com/user_guide/import_datasets.html."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

import numpy as np

from reclip_d2.formats.classes import MaskClasses
from reclip_d2.formats.pictures import write_png
from reclip_d2.formats.prediction import Prediction
from reclip_d2.formats.writer import Writer, check_placing, place_image
from reclip_d2.utils.io import atomic_write


class FiftyOneWriter(Writer):
    """``fiftyone``: one PNG per image in ``labels/``, links to the images in ``data/``, and ``mask_targets.json``.

    The value of class ``k`` is ``k + 1``, since FiftyOne keeps 0 for "nothing" and does not show it: 0 is ignored here.
    The names of the values are not part of the format; set them when you import::

        dataset = fiftyone.Dataset.from_dir(
            dataset_dir="fiftyone", dataset_type=fiftyone.types.ImageSegmentationDirectory
        )
        targets = json.load(open("fiftyone/mask_targets.json"))
        dataset.default_mask_targets = {int(value): name for value, name in targets.items()}
        dataset.save()
    """

    def __init__(self, output: Path, classes: MaskClasses, *, images: str = "link") -> None:
        """
        Args:
            images: how images are placed in ``data/``: ``link`` (symbolic links), ``copy`` or ``none``; then import
                with ``data_path`` set to the images' folder.
        """
        super().__init__(output, classes)
        check_placing("fiftyone", images)
        self._images = images
        self._table = np.arange(1, classes.ignore_label + 2).astype(classes.dtype)
        self._table[len(classes.names) :] = 0

    def files(self, path: PurePosixPath) -> list[Path]:
        """The mask."""
        return [self.output / "labels" / path.with_suffix(".png")]

    def _add(self, prediction: Prediction) -> None:
        if prediction.source is not None:
            place_image(prediction.source, self.output / "data" / prediction.path, self._images)
        write_png(self.files(prediction.path)[0], self._table[prediction.labels])

    def finish(self) -> None:
        """Write the names of the values."""
        targets = {str(k + 1): name for k, name in enumerate(self.classes.names)}
        with atomic_write(self.output / "mask_targets.json") as temporary:
            temporary.write_text(json.dumps(targets, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
