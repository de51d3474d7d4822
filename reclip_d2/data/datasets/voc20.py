"""PASCAL VOC 2012 with its 20 object classes: ``voc20_train``, ``voc20_trainaug``, ``voc20_val``.

Background is not a class: it is ignored, as in MaskCLIP and ReCLIP. Order, names (written as words) and colour map are
from VOC's development kit.
"""

from __future__ import annotations

from reclip_d2.data.class_file import IGNORE_LABEL
from reclip_d2.data.datasets.registration import DatasetOnDisk, Split, pascal_colors
from reclip_d2.data.index_images import VOID_COLOR, Palette, pascal_color

CLASS_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table", "dog",
    "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip

# Ids of SegmentationClass (0 background, 255 the border around objects) to classes.
LABEL_MAPPING = {0: IGNORE_LABEL, 255: IGNORE_LABEL} | {index + 1: index for index in range(len(CLASS_NAMES))}

# Colours of those ids: the palette of VOC's labels.
LABEL_PALETTE = Palette(
    {0: (0, 0, 0), 255: VOID_COLOR} | {k: pascal_color(k) for k in range(1, len(CLASS_NAMES) + 1)}, own=True
)


def _split(image_list: str, count: int, **options: object) -> Split:
    return Split(
        images="JPEGImages",
        labels="annotations_detectron2",
        count=count,
        image_list=f"ImageSets/Segmentation/{image_list}.txt",
        **options,
    )


VOC20 = DatasetOnDisk(
    name="voc20",
    folders=("VOC2012", "VOCdevkit/VOC2012"),
    program="datasets/prepare_voc20.py",
    splits={
        "train": _split("train", 1464),
        # train, and the images that the Semantic Boundaries Dataset (SBD) annotates, without val: only the images are
        # used.
        "trainaug": _split("trainaug", 10582, prepare_options="--sbd FOLDER"),
        "val": _split("val", 1449, evaluated=True),
    },
    class_names=CLASS_NAMES,
    colors=pascal_colors(len(CLASS_NAMES)),
    own_colors=True,
    protocol="voc20: 20 object classes of PASCAL VOC 2012, background ignored; mIoU over the classes that occur",
)

VOC20.register()
