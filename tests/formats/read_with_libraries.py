"""Read the formats back with libraries that conflict with the project's requirements.

A program, not a test: it runs in a separate environment with NumPy, Pillow and one of the libraries, on a folder
that ``sample.py`` wrote, and fails where a library sees anything but the index masks::

    PYTHONPATH=. python tests/formats/sample.py FOLDER
    pip install datumaro           # in a separate environment; PACKAGES below has those of each library
    python tests/formats/read_with_libraries.py datumaro FOLDER

``test_with_libraries.py`` does that in slow tests.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

IGNORE = 255


def expected(folder: Path) -> tuple[dict[str, np.ndarray], dict]:
    """Label maps by path without extension, and the content of ``classes.json``."""
    index = folder / "index"
    maps = {
        file.relative_to(index).with_suffix("").as_posix(): np.asarray(Image.open(file))
        for file in index.rglob("*.png")
    }
    return maps, json.loads((index / "classes.json").read_text("utf-8"))


def unannotated(labels: np.ndarray, background: int) -> np.ndarray:
    """The label map with the background ignored."""
    return np.where(labels == background, IGNORE, labels)


def check(seen: dict[str, np.ndarray], wanted: dict[str, np.ndarray], what: str) -> None:
    """Fail unless the label maps are the same."""
    if seen.keys() != wanted.keys():
        raise SystemExit(f"{what}: images {sorted(seen)}, not {sorted(wanted)}")
    for name, labels in wanted.items():
        if not np.array_equal(seen[name], labels):
            raise SystemExit(f"{what}: {name} differs:\n{seen[name]}\n{labels}")


def with_datumaro(folder: Path) -> None:
    """datumaro, coco, coco_panoptic; cvat as Pascal VOC segmentation, as CVAT reads it."""
    from datumaro.components.annotation import AnnotationType
    from datumaro.components.dataset import Dataset

    maps, classes = expected(folder)
    names = [entry["name"] for entry in classes["classes"]]
    foreground = {name: unannotated(labels, classes["background"]) for name, labels in maps.items()}

    def read(path: Path, kind: str) -> dict[str, np.ndarray]:
        dataset = Dataset.import_from(str(path), kind)
        labels = [label.name for label in dataset.categories()[AnnotationType.label].items]
        seen = {}
        for item in dataset:
            seen[item.id] = np.full(maps[item.id].shape, IGNORE, dtype=np.uint8)
            for annotation in item.annotations:
                if annotation.type != AnnotationType.mask:
                    continue  # COCO's boxes come as annotations of their own
                seen[item.id][np.asarray(annotation.image).astype(bool)] = names.index(labels[annotation.label])
        return seen

    for name in ("coco", "coco_panoptic"):
        (folder / name / "images").mkdir(exist_ok=True)  # Datumaro insists on the folder, not on the images
    check(read(folder / "datumaro", "datumaro"), maps, "datumaro")
    check(read(folder / "coco", "coco_instances"), foreground, "coco")
    check(read(folder / "coco_panoptic", "coco_panoptic"), maps, "coco_panoptic")
    with tempfile.TemporaryDirectory() as unpacked:
        zipfile.ZipFile(folder / "cvat" / "segmentation_mask_1.1.zip").extractall(unpacked)
        check(read(Path(unpacked), "voc_segmentation"), foreground, "cvat")


def as_cvat_imports(folder: Path) -> None:
    """cvat, coco and datumaro as CVAT's server imports them: read by Datumaro, then each mask in the encoding of CVAT's
    SDK. (The server has a fork of Datumaro, which is not on PyPI.)

    The server takes pixels equal to 1 for the mask. Its switch *Convert masks to polygons* is Datumaro's
    ``masks_to_polygons``, which changes pixels: there, only that the parts of a mask stay a group is checked.
    """
    from cvat_sdk.masks import decode_mask, encode_mask
    from datumaro.components.annotation import AnnotationType
    from datumaro.components.dataset import Dataset

    maps, classes = expected(folder)
    names = [entry["name"] for entry in classes["classes"]]
    foreground = {name: unannotated(labels, classes["background"]) for name, labels in maps.items()}
    (folder / "coco" / "images").mkdir(exist_ok=True)
    unpacked = folder / "cvat" / "unpacked"
    zipfile.ZipFile(folder / "cvat" / "segmentation_mask_1.1.zip").extractall(unpacked)
    for path, kind, wanted in (
        (unpacked, "voc_segmentation", foreground),
        (folder / "coco", "coco_instances", foreground),
        (folder / "datumaro", "datumaro", maps),
    ):
        name = kind
        dataset = Dataset.import_from(str(path), kind)
        labels = [label.name for label in dataset.categories()[AnnotationType.label].items]
        seen, parts = {}, {}
        for item in dataset:
            height, width = wanted[item.id].shape
            seen[item.id] = np.full((height, width), IGNORE, dtype=np.uint8)
            for annotation in item.annotations:
                if annotation.type == AnnotationType.mask:
                    points = encode_mask(np.asarray(annotation.image) == 1)
                    mask = decode_mask(points, image_width=width, image_height=height)
                    seen[item.id][mask] = names.index(labels[annotation.label])
        check(seen, wanted, f"{name} in CVAT")
        dataset.transform("masks_to_polygons")
        for item in dataset:  # polygons of one mask are a group, and no group has two classes
            for annotation in item.annotations:
                if annotation.type == AnnotationType.polygon:
                    parts.setdefault((item.id, annotation.group), set()).add(annotation.label)
        if not parts or any(group == 0 or len(found) > 1 for (_, group), found in parts.items()):
            raise SystemExit(f"{name} in CVAT: polygons of one mask are not a group: {parts}")


def with_pycocotools(folder: Path) -> None:
    """coco, by COCO's own reader."""
    from pycocotools.coco import COCO

    maps, classes = expected(folder)
    coco = COCO(str(folder / "coco" / "annotations" / "instances_default.json"))
    seen = {}
    for image in coco.dataset["images"]:
        name = Path(image["file_name"]).with_suffix("").as_posix()
        seen[name] = np.full((image["height"], image["width"]), IGNORE, dtype=np.uint8)
        for annotation in coco.loadAnns(coco.getAnnIds([image["id"]])):
            mask = coco.annToMask(annotation).astype(bool)
            if mask.sum() != annotation["area"]:
                raise SystemExit(f"coco: area {annotation['area']} of {mask.sum()} pixels")
            seen[name][mask] = annotation["category_id"] - 1
    check(seen, {n: unannotated(labels, classes["background"]) for n, labels in maps.items()}, "coco")


def with_supervision(folder: Path) -> None:
    """coco, by its data set of masks."""
    from supervision import DetectionDataset

    maps, classes = expected(folder)
    names = [entry["name"] for entry in classes["classes"]]
    dataset = DetectionDataset.from_coco(
        images_directory_path=str(folder / "photos"),
        annotations_path=str(folder / "coco" / "annotations" / "instances_default.json"),
        force_masks=True,
    )
    if dataset.classes != names:
        raise SystemExit(f"supervision: classes {dataset.classes}")
    seen = {}
    for path, image, detections in dataset:
        name = Path(path).relative_to(folder / "photos").with_suffix("").as_posix()
        seen[name] = np.full(image.shape[:2], IGNORE, dtype=np.uint8)
        for mask, k in zip(detections.mask if len(detections) else [], detections.class_id, strict=True):
            seen[name][np.asarray(mask, dtype=bool)] = k
    check(seen, {n: unannotated(labels, classes["background"]) for n, labels in maps.items()}, "supervision")


def with_fiftyone(folder: Path) -> None:
    """fiftyone, by its importer; without a database."""
    os.environ["FIFTYONE_DATABASE_URI"] = "mongodb://127.0.0.1:1"
    os.environ["FIFTYONE_DO_NOT_TRACK"] = "1"
    from fiftyone.utils.data.importers import ImageSegmentationDirectoryImporter

    maps, classes = expected(folder)
    targets = json.loads((folder / "fiftyone" / "mask_targets.json").read_text("utf-8"))
    names = [entry["name"] for entry in classes["classes"]]
    if targets != {str(k + 1): name for k, name in enumerate(names)}:
        raise SystemExit(f"fiftyone: mask targets {targets}")
    seen = {}
    with ImageSegmentationDirectoryImporter(dataset_dir=str(folder / "fiftyone"), load_masks=True) as importer:
        for image, _, label in importer:
            name = Path(image).relative_to(folder.resolve() / "fiftyone" / "data").with_suffix("").as_posix()
            if Image.open(image).size[::-1] != label.mask.shape:
                raise SystemExit(f"fiftyone: the mask of {image} has shape {label.mask.shape}")
            seen[name] = np.where(label.mask == 0, IGNORE, label.mask - 1)
    check(seen, maps, "fiftyone")


def with_ultralytics(folder: Path) -> None:
    """yolo, by the data set class that training uses; the masks that its polygons give are compared."""
    import cv2
    from ultralytics.data.dataset import YOLODataset
    from ultralytics.data.utils import check_det_dataset

    maps, classes = expected(folder)
    data = check_det_dataset(str(folder / "yolo" / "data.yaml"), autodownload=False)
    if data["names"] != {entry["id"]: entry["name"] for entry in classes["classes"]}:
        raise SystemExit(f"yolo: names {data['names']}")
    dataset = YOLODataset(data["train"], data=data, task="segment", augment=False)
    seen = set()
    for entry in dataset.get_labels():
        name = Path(entry["im_file"]).relative_to(Path(data["train"])).with_suffix("").as_posix()
        seen.add(name)
        labels = unannotated(maps[name], classes["background"])
        height, width = labels.shape
        for k in range(len(classes["classes"])):
            # OpenCV fills the boundary's own pixels as well. At 16 times the size, half a pixel to the upper left, they
            # are far from all centres of pixels.
            large = np.zeros((height * 16, width * 16), dtype=np.uint8)
            chosen = [s for s, c in zip(entry["segments"], entry["cls"][:, 0], strict=True) if c == k]
            for polygon in chosen:
                one = np.zeros_like(large)
                cv2.fillPoly(one, [np.rint(polygon * (width * 16, height * 16)).astype(np.int32)], 1)
                large |= one
            if not np.array_equal(large[8::16, 8::16].astype(bool), labels == k):
                raise SystemExit(f"yolo: class {k} of {name} differs")
    if seen != maps.keys():
        raise SystemExit(f"yolo: images {sorted(seen)}")


def with_label_studio_sdk(folder: Path) -> None:
    """labelstudio, by the converter of the SDK."""
    from label_studio_sdk._extensions.label_studio_tools.core.label_config import parse_config
    from label_studio_sdk.converter.brush import decode_rle

    maps, classes = expected(folder)
    names = [entry["name"] for entry in classes["classes"]]
    shown = [name for k, name in enumerate(names) if k != classes["background"]]
    config = parse_config((folder / "labelstudio" / "labeling_config.xml").read_text("utf-8"))
    if config["brush"]["labels"] != shown or config["brush"]["to_name"] != ["image"]:
        raise SystemExit(f"labelstudio: configuration {config}")
    seen = {}
    for name, task in zip(
        sorted(maps), json.loads((folder / "labelstudio" / "tasks.json").read_text("utf-8")), strict=True
    ):
        seen[name] = np.full(maps[name].shape, IGNORE, dtype=np.uint8)
        for region in task["predictions"][0]["result"]:
            mask = decode_rle(region["value"]["rle"]).reshape(*maps[name].shape, 4)[:, :, 3] > 0
            seen[name][mask] = names.index(region["value"]["brushlabels"][0])
    check(seen, {n: unannotated(labels, classes["background"]) for n, labels in maps.items()}, "labelstudio")


LIBRARIES = {
    "cvat": as_cvat_imports,
    "datumaro": with_datumaro,
    "fiftyone": with_fiftyone,
    "label-studio-sdk": with_label_studio_sdk,
    "pycocotools": with_pycocotools,
    "supervision": with_supervision,
    "ultralytics": with_ultralytics,
}
# What to install for a library, next to NumPy and Pillow; by default the library alone.
PACKAGES = {"cvat": ("cvat-sdk", "datumaro")}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    LIBRARIES[arguments.library](arguments.folder)
