"""Predicted masks in the formats that annotation tools and trainers read.

=================  ==================================================  ===============  ==================
format             files, below the format's folder                    ignored pixels   background class
=================  ==================================================  ===============  ==================
``index``          ``a/b.png`` (class ids), ``classes.json``           255              its id
``palette``        ``a/b.png`` (the same with colours)                 255, black       its id
``overlay``        ``a/b.jpg``                                         image as it is   image as it is
``scores``         ``a/b.npz``                                         scored as well   its scores
``cvat``           ``segmentation_mask_1.1.zip``                       unannotated      unannotated
``labelstudio``    ``tasks.json``, ``labeling_config.xml``             unannotated      unannotated
``coco``           ``annotations/instances_default.json`` (RLE)        unannotated      unannotated
``coco_panoptic``  ``annotations/panoptic_default.json``,              0 (VOID)         a stuff class
                   ``annotations/panoptic_default/a/b.png``
``yolo``           ``labels/a/b.txt``, ``images/``, ``data.yaml``      unannotated      unannotated
``fiftyone``       ``labels/a/b.png``, ``data/``,                      0                its id + 1
                   ``mask_targets.json``
``datumaro``       ``annotations/default.json`` (RLE)                  unannotated      a label
=================  ==================================================  ===============  ==================

Details are in the writers' docstrings. All masks are of the upright image (EXIF orientation applied). More than 255
classes take 16 bits, and then 65535 is ignored. Two images of one folder that differ in their extension alone
(``a.jpg`` and ``a.png``) are rejected: most formats match images and masks by stem.

When predicting, write ``index`` (and optionally ``scores``), the index mask last: it marks an image as finished. Then
make all other formats from the masks::

    classes = MaskClasses.make(["road", "tree", "background"], background=2)
    check_formats(["index", "scores", "cvat", "yolo"], classes)
    check_names(["cvat", "yolo"], images)  # {PurePosixPath("street/a.jpg"): Path("/photos/street/a.jpg"), ...}
    with IndexWriter(out / "index", classes) as index, ScoresWriter(out / "scores", classes) as scores:
        for path in images:
            if index.is_done(path) and scores.is_done(path):
                continue  # of an earlier run
            prediction = Prediction(path, labels, scores=...)
            scores.add(prediction)
            index.add(prediction)
    write_formats(out / "index", images, out, ["index", "scores", "cvat", "yolo"])

To add a format:

1. write a :class:`~reclip_d2.formats.writer.Writer` in a file here: ``files`` and ``_add`` for an image, ``finish``
   for a file of the whole set;
2. register it in ``FORMATS`` of ``registry.py``, as ``"name": "module:Class"``;
3. add a row to the table above and to the one of ``docs/formats.md``.

``tests/formats/test_every_format.py`` tests every registered format.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "FORMATS": "registry",
    "IndexWriter": "pictures",
    "MaskClasses": "classes",
    "Prediction": "prediction",
    "ScoresWriter": "pictures",
    "Writer": "writer",
    "check_formats": "rebuild",
    "check_jpeg_size": "pictures",
    "check_names": "rebuild",
    "check_paths": "prediction",
    "read_index": "pictures",
    "write_formats": "rebuild",
}
"""Names by the module that defines them, which is loaded on first use: ``reclip --help`` needs only the registry."""

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
