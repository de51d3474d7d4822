"""Miniatures of the data sets, with each one's true layout, file names, modes and encodings.

Every label is four quadrants of an odd-sized image. A case says what the quadrants are as shipped and as they must come
out; images are colour or grey JPEGs, upright or with an EXIF rotation.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from reclip_d2.data.datasets.registration import pascal_colors

ROOT = Path(__file__).resolve().parents[2]
SIDEWAYS = (5, 6, 7, 8)


def load_program(name: str) -> ModuleType:
    """``datasets/prepare_<name>.py`` as a module (the folder is not a package: PyPI has one of that name)."""
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", ROOT / "datasets" / f"prepare_{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def quadrants(ids: Sequence[Sequence[int]], size: tuple[int, int]) -> np.ndarray:
    """``(H, W)`` with the four ids in its quarters."""
    height, width = size
    label = np.empty(size, dtype=np.int64)
    for row, rows in enumerate((slice(0, height // 2), slice(height // 2, height))):
        for column, columns in enumerate((slice(0, width // 2), slice(width // 2, width))):
            label[rows, columns] = ids[row][column]
    return label


@dataclass
class Case:
    """One image: its id, upright size, quadrants as shipped and as expected."""

    name: str
    size: tuple[int, int]
    shipped: Sequence[Sequence[int]]
    expected: Sequence[Sequence[int]]
    grey: bool = False
    orientation: int = 1
    lying: bool = False
    """The label is drawn on the stored pixels of an image with orientation 3 (half a turn) or 8 (a quarter turn
    anticlockwise)."""

    @property
    def stored_size(self) -> tuple[int, int]:
        return self.size[::-1] if self.orientation in SIDEWAYS else self.size

    def shipped_label(self) -> np.ndarray:
        return quadrants(self.shipped, self.stored_size if self.lying else self.size).astype(np.uint8)

    def expected_label(self) -> np.ndarray:
        if self.lying:
            return np.rot90(quadrants(self.expected, self.stored_size), {3: 2, 8: 1}[self.orientation])
        return quadrants(self.expected, self.size)


def write_image(path: Path, case: Case) -> None:
    """A noisy JPEG or PNG, by the path's extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = case.stored_size if case.grey else (*case.stored_size, 3)
    pixels = np.random.default_rng(len(case.name)).integers(0, 256, shape, dtype=np.uint8)
    options = {}
    if case.orientation != 1:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = case.orientation
    Image.fromarray(pixels).save(path, **options)


def write_png(path: Path, label: np.ndarray, palette: bool = False) -> None:
    """An index PNG; with ``palette`` of mode P, in PASCAL VOC's colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(label)
    if palette:
        image.putpalette([value for color in [[0, 0, 0], *pascal_colors(255)] for value in color])
    image.save(path)


def write_list(path: Path, names: Sequence[str]) -> None:
    """An image list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def _train_cases(names: Sequence[str], exif: bool = True) -> list[Case]:
    """Images of odd sizes, the first grey and, with ``exif``, the second on its side; their labels are all 0."""
    zeros = [[0, 0], [0, 0]]
    sizes = ((21, 27), (26, 19), (17, 33), (23, 23))
    return [
        Case(name, sizes[index % 4], zeros, zeros, grey=index == 0, orientation=6 if exif and index == 1 else 1)
        for index, name in enumerate(names)
    ]


VOC20 = [
    Case("2007_000033", (23, 31), [[0, 1], [20, 255]], [[255, 0], [19, 255]]),
    Case("2007_000042", (40, 17), [[15, 15], [0, 5]], [[14, 14], [255, 4]], grey=True),
    Case("2007_000061", (19, 37), [[3, 0], [255, 12]], [[2, 255], [255, 11]], orientation=6),
    Case("2007_000123", (25, 33), [[9, 10], [11, 255]], [[8, 9], [10, 255]], orientation=8, lying=True),
]
VOC20_TRAIN = ["2007_000032", "2007_000039", "2007_000063", "2007_000068"]


def make_voc20(root: Path, folder: str = "VOCdevkit/VOC2012") -> list[Case]:
    """VOC 2012: val with labels, train with images only."""
    base = root / folder
    for case in [*VOC20, *_train_cases(VOC20_TRAIN)]:
        write_image(base / "JPEGImages" / f"{case.name}.jpg", case)
    for case in VOC20:
        write_png(base / "SegmentationClass" / f"{case.name}.png", case.shipped_label(), palette=True)
    write_list(base / "ImageSets/Segmentation/val.txt", [case.name for case in VOC20])
    write_list(base / "ImageSets/Segmentation/train.txt", VOC20_TRAIN)
    return VOC20


# In the ids of trainval_merged.json: 2 aeroplane (0), 284 person (36), 458 wood (58), 187 grass (28), 360 sky (46).
CONTEXT59 = [
    Case("2008_000002", (23, 31), [[2, 0], [284, 458]], [[0, 255], [36, 58]]),
    Case("2008_000015", (18, 45), [[187, 187], [0, 360]], [[28, 28], [255, 46]], orientation=3, lying=True),
]
CONTEXT59_TRAIN = ["2008_000003", "2008_000007", "2008_000008"]
CONTEXT_PNG_60 = {0: 0, 2: 1, 284: 37, 458: 59, 187: 29, 360: 47}


def context_json(cases: Sequence[Case], train: Sequence[Case]) -> dict:
    """``trainval_merged.json``: compressed run lengths, an uncompressed one, and a mask that a later one covers."""
    images, annotations = [], []
    for phase, members in (("val", cases), ("train", train)):
        for case in members:
            height, width = case.size
            image_id = int(case.name.replace("_", ""))
            images.append(
                {
                    "file_name": f"{case.name}.jpg",
                    "image_id": image_id,
                    "phase": phase,
                    "height": height,
                    "width": width,
                    "date_captured": "31-Oct-2017 00:00:00",
                }
            )
            label = quadrants(case.shipped, case.size)
            masks = [(9, label > 0)]  # a bag below everything that has a class: covered, and so not to be seen
            masks += [(category, label == category) for category in np.unique(label).tolist() if category]
            for index, (category, mask) in enumerate(masks):
                code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
                segmentation = {"size": [height, width], "counts": code["counts"].decode()}
                if index == 1:  # run lengths in the open: zeros first, column by column
                    flat = mask.flatten(order="F")
                    edges = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), flat.size]
                    runs = np.diff(edges).tolist()
                    segmentation["counts"] = [0, *runs] if flat[0] else runs
                annotations.append(
                    {
                        "id": len(annotations),
                        "image_id": image_id,
                        "category_id": category,
                        "segmentation": segmentation,
                        "iscrowd": 0,
                        "parts": [],
                    }
                )
    images.append({"file_name": "2008_000001.jpg", "image_id": 2008000001, "phase": "test", "height": 9, "width": 9})
    return {
        "info": {},
        "images": images,
        "annos_segmentation": annotations,
        "annos_occlusion": [],
        "annos_boundary": [],
        "categories": [],
        "parts": [],
    }


def make_context59(root: Path, labels: str = "json") -> list[Case]:
    """PASCAL Context with ``labels`` json, png60 or png59."""
    base, train = root / "VOC2010", _train_cases(CONTEXT59_TRAIN)
    for case in [*CONTEXT59, *train]:
        write_image(base / "JPEGImages" / f"{case.name}.jpg", case)
    if labels == "json":
        (base / "trainval_merged.json").write_text(json.dumps(context_json(CONTEXT59, train)))
        return CONTEXT59
    for case in CONTEXT59:
        label = np.vectorize(CONTEXT_PNG_60.get)(quadrants(case.shipped, case.size))
        if labels == "png59":
            label = np.where(label == 0, 255, label - 1)
        write_png(base / "SegmentationClassContext" / f"{case.name}.png", label.astype(np.uint8))
    for split, names in (("val", [case.name for case in CONTEXT59]), ("train", CONTEXT59_TRAIN)):
        write_list(base / f"ImageSets/SegmentationContext/{split}.txt", names)
    return CONTEXT59


ADE150 = [
    Case("ADE_val_00000001", (23, 31), [[0, 1], [150, 2]], [[255, 0], [149, 1]]),
    Case("ADE_val_00000002", (31, 21), [[76, 76], [13, 0]], [[75, 75], [12, 255]], grey=True),
    Case("ADE_val_00000003", (17, 29), [[5, 6], [7, 8]], [[4, 5], [6, 7]], orientation=5),
]


def make_ade150(root: Path) -> list[Case]:
    """ADE20K: val, and train with images only."""
    base = root / "ADEChallengeData2016"
    for case in ADE150:
        write_image(base / "images/validation" / f"{case.name}.jpg", case)
        write_png(base / "annotations/validation" / f"{case.name}.png", case.shipped_label())
    for case in _train_cases([f"ADE_train_0000000{index}" for index in (1, 2, 3)]):
        write_image(base / "images/training" / f"{case.name}.jpg", case)
    return ADE150


CITYSCAPES19 = [
    Case("frankfurt/frankfurt_000000_000294", (33, 65), [[7, 8], [33, 0]], [[0, 1], [18, 255]]),
    Case("frankfurt/frankfurt_000000_000576", (33, 65), [[29, 31], [32, 26]], [[255, 16], [17, 13]]),
    Case("munster/munster_000000_000019", (33, 65), [[11, 23], [18, 1]], [[2, 10], [255, 255]]),
]


def make_cityscapes19(root: Path) -> list[Case]:
    """Cityscapes: val with all four kinds of annotation files, and train with images only."""
    base = root / "cityscapes"
    for case in CITYSCAPES19:
        write_image(base / "leftImg8bit/val" / f"{case.name}_leftImg8bit.png", case)
        stem = base / "gtFine/val" / case.name
        write_png(stem.with_name(f"{stem.name}_gtFine_labelIds.png"), case.shipped_label())
        write_png(stem.with_name(f"{stem.name}_gtFine_color.png"), np.zeros((*case.size, 4), np.uint8))
        write_png(stem.with_name(f"{stem.name}_gtFine_instanceIds.png"), np.full(case.size, 26001, np.uint16))
        stem.with_name(f"{stem.name}_gtFine_polygons.json").write_text("{}")
    for case in _train_cases([f"aachen/aachen_00000{index}_000019" for index in (0, 1, 2)], exif=False):
        write_image(base / "leftImg8bit/train" / f"{case.name}_leftImg8bit.png", case)
    return CITYSCAPES19


# person 0, bicycle 1, banner 91, wood 181, sky-other 156, toothbrush 89.
COCO = [
    Case("000000000139", (23, 31), [[0, 1], [91, 255]], [[0, 1], [80, 255]]),
    Case("000000000285", (41, 19), [[181, 181], [156, 89]], [[170, 170], [145, 79]], grey=True),
    Case("000000000632", (27, 35), [[0, 255], [156, 91]], [[0, 255], [145, 80]], orientation=7),
]
COCO_27 = {0: 9, 1: 11, 80: 17, 170: 24, 145: 23, 79: 4, 255: 255}
"""The classes of the miniature among the 171, and what they are among the 27."""


def make_coco_stuff(root: Path, count: int = 0) -> list[Case]:
    """COCO-Stuff: val (with ``count`` further images), and train with images only."""
    base = root / "coco"
    more = [Case(f"{900000 + index:012d}", (8, 9), [[0, 1], [0, 1]], [[0, 1], [0, 1]]) for index in range(count)]
    for case in [*COCO, *more]:
        write_image(base / "val2017" / f"{case.name}.jpg", case)
        write_png(base / "stuffthingmaps/val2017" / f"{case.name}.png", case.shipped_label())
    for case in _train_cases(["000000000009", "000000000025", "000000000030"]):
        write_image(base / "train2017" / f"{case.name}.jpg", case)
    return [*COCO, *more]


def expected_27(label: np.ndarray) -> np.ndarray:
    """A label of the 171 classes in the 27."""
    return np.vectorize(COCO_27.get)(label)
