"""Cityscapes with its 19 evaluated classes: ``cityscapes19_train``, ``cityscapes19_val`` (fine annotations).

Ids, names and colours are from ``labels.py`` in the data set's scripts; a class's index is its train id there.
"""

from __future__ import annotations

from reclip_d2.data.class_file import IGNORE_LABEL
from reclip_d2.data.datasets.registration import DatasetOnDisk, Split
from reclip_d2.data.index_images import Palette

# Id in gtFine's labelIds, name, colour; the ids in between (and 0 to 6) are not evaluated.
CLASSES = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
LAST_ID = 33
LABEL_MAPPING = dict.fromkeys(range(LAST_ID + 1), IGNORE_LABEL) | {
    label_id: index for index, (label_id, _, _) in enumerate(CLASSES)
}

# Colours of those ids, and of ids that are not evaluated; "polegroup" has the colour of "pole".
LABEL_PALETTE = Palette(
    {0: (0, 0, 0), 18: (153, 153, 153)} | {label_id: color for label_id, _, color in CLASSES}, own=True
)


def _split(name: str, count: int, evaluated: bool = False) -> Split:
    return Split(
        images=f"leftImg8bit/{name}",
        labels=f"annotations_detectron2/{name}",
        count=count,
        suffix=".png",
        evaluated=evaluated,
    )


CITYSCAPES19 = DatasetOnDisk(
    name="cityscapes19",
    folders=("cityscapes",),
    program="datasets/prepare_cityscapes19.py",
    splits={"train": _split("train", 2975), "val": _split("val", 500, evaluated=True)},
    class_names=[name for _, name, _ in CLASSES],
    colors=[color for _, _, color in CLASSES],
    own_colors=True,
    protocol="cityscapes19: 19 classes of Cityscapes (fine), all others ignored; mIoU over the classes that occur",
)

CITYSCAPES19.register()
