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

The writers' docstrings say the rest. All masks are of the upright image (EXIF orientation applied). More than 255
classes take 16 bits, and then 65535 is ignored. Two images of one folder that differ in their extension alone
(``a.jpg`` and ``a.png``) are refused: most formats match images and masks by that stem.

Predict with ``index`` (and ``scores``, if they are wanted), the index mask last, for it says that an image is finished;
then make all other formats from the masks::

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
"""

from reclip_d2.formats.classes import MaskClasses
from reclip_d2.formats.pictures import IndexWriter, ScoresWriter, check_jpeg_size
from reclip_d2.formats.png import read_index
from reclip_d2.formats.prediction import Prediction, check_paths
from reclip_d2.formats.rebuild import write_formats
from reclip_d2.formats.registry import FORMATS, check_formats, check_names
from reclip_d2.formats.writer import Writer

__all__ = [
    "FORMATS",
    "IndexWriter",
    "MaskClasses",
    "Prediction",
    "ScoresWriter",
    "Writer",
    "check_formats",
    "check_jpeg_size",
    "check_names",
    "check_paths",
    "read_index",
    "write_formats",
]
