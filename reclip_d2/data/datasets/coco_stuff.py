"""COCO-Stuff (COCO 2017 with its pixel maps): ``coco_stuff171_{train,val}`` and ``coco_stuff27_{train,val}``.

The pixel maps hold 182 leaf labels as 0 to 181 (the data set's ``labels.txt`` less one), of which 11 never occur: 171
remain, 80 things and 91 stuff classes. COCO-Stuff's hierarchy groups the leaves into 27 mid-level classes, 12 things
and 15 stuff, numbered as in IIC, PiCIE and STEGO (their "fine to coarse" table). Both sets are trained on all
118,287 images and evaluated on all 5,000 (PiCIE and its successors evaluate on a selection of 2,175). The data set
defines no colours; PASCAL's are used.
"""

from __future__ import annotations

from reclip_d2.data.class_file import IGNORE_LABEL
from reclip_d2.data.datasets.registration import DatasetOnDisk, Split, pascal_colors

UNUSED = ("hat", "shoe", "eye glasses", "street sign", "plate", "hair brush", "blender")
"""Leaves that never occur. Four more share their name with a stuff label; they are empty below."""

# The 182 leaves by id of the pixel map. Names as words: "wall-brick" is "brick wall", "sky-other" is "sky".
LEAF_NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "street sign", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep",
    "cow", "elephant", "bear", "zebra", "giraffe", "hat", "backpack", "umbrella", "shoe", "eye glasses", "handbag",
    "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove",
    "skateboard", "surfboard", "tennis racket", "bottle", "plate", "wine glass", "cup", "fork", "knife", "spoon",
    "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake",
    "chair", "couch", "potted plant", "bed", "", "dining table", "", "", "toilet", "", "tv", "laptop", "mouse",
    "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "blender", "book",
    "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush", "hair brush", "banner", "blanket", "branch",
    "bridge", "building", "bush", "cabinet", "cage", "cardboard", "carpet", "ceiling", "ceiling tile", "cloth",
    "clothes", "clouds", "counter", "cupboard", "curtain", "desk", "dirt", "door", "fence", "marble floor", "floor",
    "stone floor", "tile floor", "wood floor", "flower", "fog", "food", "fruit", "furniture", "grass", "gravel",
    "ground", "hill", "house", "leaves", "light", "mat", "metal", "mirror", "moss", "mountain", "mud", "napkin", "net",
    "paper", "pavement", "pillow", "plant", "plastic", "platform", "playing field", "railing", "railroad", "river",
    "road", "rock", "roof", "rug", "salad", "sand", "sea", "shelf", "sky", "skyscraper", "snow", "solid", "stairs",
    "stone", "straw", "structure", "table", "tent", "textile", "towel", "tree", "vegetable", "brick wall",
    "concrete wall", "wall", "wall panel", "stone wall", "tile wall", "wood wall", "water", "waterdrops",
    "window blind", "window", "wood",
)  # fmt: skip

# The mid-level classes, and the leaves of each by id of the pixel map. "food" and "furniture" exist as things and as
# stuff; names must differ, so the latter are called "food stuff" and "furniture stuff".
MID_LEVEL = {
    "electronic": (*range(71, 77),),
    "appliance": (*range(77, 83),),
    "food": (*range(51, 61),),
    "furniture": (*range(61, 71),),
    "indoor": (*range(83, 91),),
    "kitchen": (*range(43, 51),),
    "accessory": (*range(25, 33),),
    "animal": (*range(15, 25),),
    "outdoor": (*range(9, 15),),
    "person": (0,),
    "sports": (*range(33, 43),),
    "vehicle": (*range(1, 9),),
    "ceiling": (101, 102),
    "floor": (100, 113, 114, 115, 116, 117),
    "food stuff": (120, 121, 152, 169),
    "furniture stuff": (97, 106, 107, 109, 111, 122, 129, 132, 155, 160, 164),
    "raw material": (99, 131, 138, 142),
    "textile": (91, 92, 103, 104, 108, 130, 136, 140, 151, 166, 167),
    "wall": (*range(170, 177),),
    "window": (179, 180),
    "building": (94, 95, 127, 150, 157, 165),
    "ground": (110, 124, 125, 135, 139, 143, 144, 146, 148, 153, 158),
    "plant": (93, 96, 118, 123, 128, 133, 141, 162, 168),
    "sky": (105, 156),
    "solid": (126, 134, 149, 159, 161, 181),
    "structural": (98, 112, 137, 145, 163),
    "water": (119, 147, 154, 177, 178),
}

_OCCURRING = [leaf for leaf, name in enumerate(LEAF_NAMES) if name and name not in UNUSED]
CLASS_NAMES_171 = tuple(LEAF_NAMES[leaf] for leaf in _OCCURRING)
CLASS_NAMES_27 = tuple(MID_LEVEL)

# Ids of the pixel maps to classes. Leaves that never occur are not among the 171 classes: their ids are rejected.
MAPPING_171 = {IGNORE_LABEL: IGNORE_LABEL} | {leaf: index for index, leaf in enumerate(_OCCURRING)}
MAPPING_27 = {IGNORE_LABEL: IGNORE_LABEL} | {
    leaf: index for index, leaves in enumerate(MID_LEVEL.values()) for leaf in leaves if leaf in set(_OCCURRING)
}

# "electronic", "solid" or "outdoor" say little alone: mid-level classes are described by their own and their leaves'
# names.
SYNONYMS_27 = {
    name: [LEAF_NAMES[leaf] for leaf in leaves if leaf in _OCCURRING and LEAF_NAMES[leaf] not in MID_LEVEL]
    for name, leaves in MID_LEVEL.items()
}


def _splits(name: str) -> dict[str, Split]:
    return {
        split: Split(
            images=f"{split}2017",
            labels=f"annotations_detectron2/{name}/{split}2017",
            count=count,
            evaluated=split == "val",
            prepare_options=f"--classes {name.removeprefix('coco_stuff')}",
        )
        for split, count in (("train", 118287), ("val", 5000))
    }


COCO_STUFF171 = DatasetOnDisk(
    name="coco_stuff171",
    folders=("coco",),
    program="datasets/prepare_coco_stuff.py",
    splits=_splits("coco_stuff171"),
    class_names=CLASS_NAMES_171,
    colors=pascal_colors(len(CLASS_NAMES_171)),
    protocol="coco_stuff171: 171 leaf classes of COCO-Stuff, unlabelled pixels ignored;"
    " mIoU over the classes that occur in all 5,000 images of val2017",
)
COCO_STUFF27 = DatasetOnDisk(
    name="coco_stuff27",
    folders=("coco",),
    program="datasets/prepare_coco_stuff.py",
    splits=_splits("coco_stuff27"),
    class_names=CLASS_NAMES_27,
    synonyms=SYNONYMS_27,
    colors=pascal_colors(len(CLASS_NAMES_27)),
    protocol="coco_stuff27: 27 mid-level classes of COCO-Stuff, unlabelled pixels ignored;"
    " mIoU over the classes that occur in all 5,000 images of val2017",
)

COCO_STUFF171.register()
COCO_STUFF27.register()
