"""PASCAL Context with its 59 most frequent classes: ``context59_train``, ``context59_val``.

Pixels of the other classes (id 0, "background", of the 60-class labels) are ignored. Classes are in the order of the
60-class labels: sorted by their ids among the 459 original labels (``trainval_merged.json`` of the Detail API), as in
MMSegmentation's converter. Names are the converter's, written as words. The data set defines no colours; PASCAL's are
used.
"""

from __future__ import annotations

from reclip_d2.data.class_file import IGNORE_LABEL
from reclip_d2.data.datasets.registration import DatasetOnDisk, Split, pascal_colors

# Id among the 459 original labels, which trainval_merged.json uses, and name.
CATEGORIES = (
    (2, "aeroplane"), (9, "bag"), (18, "bed"), (19, "bedclothes"), (22, "bench"), (23, "bicycle"), (25, "bird"),
    (31, "boat"), (33, "book"), (34, "bottle"), (44, "building"), (45, "bus"), (46, "cabinet"), (59, "car"),
    (65, "cat"), (68, "ceiling"), (72, "chair"), (80, "cloth"), (85, "computer"), (98, "cow"), (104, "cup"),
    (105, "curtain"), (113, "dog"), (115, "door"), (144, "fence"), (158, "floor"), (159, "flower"), (162, "food"),
    (187, "grass"), (189, "ground"), (207, "horse"), (220, "keyboard"), (232, "light"), (258, "motorbike"),
    (259, "mountain"), (260, "mouse"), (284, "person"), (295, "plate"), (296, "platform"), (308, "potted plant"),
    (324, "road"), (326, "rock"), (347, "sheep"), (349, "shelves"), (354, "sidewalk"), (355, "sign"), (360, "sky"),
    (366, "snow"), (368, "sofa"), (397, "table"), (415, "track"), (416, "train"), (420, "tree"), (424, "truck"),
    (427, "tv monitor"), (440, "wall"), (445, "water"), (454, "window"), (458, "wood"),
)  # fmt: skip
CLASS_NAMES = tuple(name for _, name in CATEGORIES)

# Three encodings of the same labels: original ids; 60 classes (0: background); 59 classes (255: background).
JSON_MAPPING = {0: IGNORE_LABEL} | {category: index for index, (category, _) in enumerate(CATEGORIES)}
MAPPING_60 = {0: IGNORE_LABEL} | {index + 1: index for index in range(len(CLASS_NAMES))}
MAPPING_59 = {IGNORE_LABEL: IGNORE_LABEL} | {index: index for index in range(len(CLASS_NAMES))}


def _split(name: str, count: int, evaluated: bool = False) -> Split:
    return Split(
        images="JPEGImages",
        labels="annotations_detectron2",
        count=count,
        image_list=f"ImageSets/SegmentationContext/{name}.txt",
        evaluated=evaluated,
    )


CONTEXT59 = DatasetOnDisk(
    name="context59",
    folders=("VOC2010", "VOCdevkit/VOC2010"),
    program="datasets/prepare_context59.py",
    splits={"train": _split("train", 4998), "val": _split("val", 5105, evaluated=True)},
    class_names=CLASS_NAMES,
    colors=pascal_colors(len(CLASS_NAMES)),
    protocol="context59: 59 classes of PASCAL Context, all others ignored; mIoU over the classes that occur",
)

CONTEXT59.register()
