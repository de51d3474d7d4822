#!/usr/bin/env python
"""Draw a model's prediction on images, as Detectron2's demo does.

    python demo/demo.py --config-file configs/datasets/embedded.yaml \\
        --config-file configs/methods/reclippp_rectify.yaml --input photos a.jpg --output pictures \\
        --opts MODEL.WEIGHTS output/embedded/reclippp_rectify/model_final.pth

Works with every model of ``train_net.py --eval-only``; MaskCLIP needs no weights. Pictures are drawn by Detectron2
(``Visualizer.draw_sem_seg``), with the names and colours of the config's data set. No window is opened: without
--output the pictures go to the folder ``demo`` in the config's OUTPUT_DIR.
"""

from __future__ import annotations

import reclip_d2.utils.program_start  # noqa: F401  isort: skip  (first: see there)
import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog

from reclip_d2.config import load_config
from reclip_d2.config.files import add_config_file_argument
from reclip_d2.data.classes import class_names_from_config
from reclip_d2.data.datasets.custom import register_custom
from reclip_d2.data.image_folder import ImageFile, find_images
from reclip_d2.data.images import read_image
from reclip_d2.data.working_files import check_shape
from reclip_d2.engine.trainer import build_evaluation_model
from reclip_d2.errors import ReclipError, exit_on_error
from reclip_d2.inference import ImagePredictor
from reclip_d2.modeling.build import check_registered_parts
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.output_paths import check_output_folder, check_output_path

# Files of --output; anything else names a folder.
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def argument_parser() -> argparse.ArgumentParser:
    """Arguments of the program: those of Detectron2's demo for images."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_config_file_argument(parser, required=True)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="IMAGES", help="images, folders, globs or .txt lists of these"
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER|FILE",
        help="where pictures go; a file for one image (default: demo in the config's OUTPUT_DIR)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing pictures")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides; must come last"
    )
    return parser


def load(args: argparse.Namespace) -> CfgNode:
    """Config of the command line; its data set is registered."""
    cfg = load_config(args.config_file, args.opts)
    if not cfg.DATASETS.CUSTOM.IMAGES:  # the images come from --input; only the class file is used
        cfg.DATASETS.CUSTOM.IMAGES = args.input[0]
    register_custom(cfg)
    check_registered_parts(cfg)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        print(f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, but there is no GPU: using the CPU")
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def picture_paths(images: Sequence[ImageFile], output: Path, overwrite: bool) -> list[Path]:
    """The picture file of each image; in a folder, pictures mirror the images' paths.

    Raises:
        ReclipError: ``output`` is one file for several images, or a picture exists already.
    """
    if output.suffix.lower() in PICTURES and not output.is_dir():
        if len(images) > 1:
            raise ReclipError(f"--output {output} is one file, but there are {len(images)} images: name a folder")
        paths = [output]
    elif output.is_file():
        raise ReclipError(f"--output {output} is neither a picture ({', '.join(PICTURES)}) nor a folder: name another")
    else:
        paths = [output / image.name.with_suffix(".png") for image in images]
    if not overwrite and (there := [path for path in paths if path.exists()]):
        raise ReclipError(f"{there[0]} exists: give --overwrite, or another --output")
    return paths


def visualizer_class() -> type:
    """Detectron2's Visualizer. Only it needs OpenCV, which Detectron2 does not install.

    Raises:
        ReclipError: OpenCV is not installed.
    """
    try:
        from detectron2.utils.visualizer import Visualizer
    except ModuleNotFoundError as error:
        if error.name != "cv2":
            raise
        raise ReclipError(
            "OpenCV is not installed, and Detectron2's Visualizer needs it: pip install opencv-python-headless"
        ) from error
    return Visualizer


def draw(image: np.ndarray, labels: np.ndarray, metadata: Metadata, path: Path) -> None:
    """Write Detectron2's picture of a prediction.

    Args:
        image: ``(H, W, 3)`` uint8, RGB.
        labels: ``(H, W)``.
        metadata: the data set's metadata, with ``stuff_classes`` and ``stuff_colors``.
    """
    picture = visualizer_class()(image, metadata).draw_sem_seg(labels)
    with atomic_write(path) as temporary:
        picture.save(str(temporary))


@exit_on_error
def main(arguments: Sequence[str] | None = None) -> None:
    """Predict and draw; images that cannot be read are listed, and the exit status is then 1."""
    args = argument_parser().parse_args(arguments)
    visualizer_class()  # before any work
    cfg = load(args)
    output = Path(args.output if args.output is not None else Path(cfg.OUTPUT_DIR) / "demo").expanduser()
    found = find_images(args.input, exclude=[output])
    images = found.images
    paths = picture_paths(images, output, args.overwrite)
    if args.output is not None:
        (check_output_path if paths == [output] else check_output_folder)(args.output)
    if found.left_out:
        print(found.left_out)
    if args.output is None:
        print(f"no --output: the pictures go to {output}")
    class_names_from_config(cfg)  # raises for data sets with different classes
    metadata = MetadataCatalog.get([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST][0])
    predictor = ImagePredictor.from_config(build_evaluation_model(cfg, resume=False), cfg)

    problems = []
    for image, path in zip(images, paths, strict=True):
        start = time.perf_counter()
        try:
            pixels = read_image(image.path)
            check_shape(image.path, pixels.shape[:2], predictor.tiling)
        except ReclipError as error:
            problems.append(str(error))
            print(f"skipped: {error}")
            continue
        labels = predictor.labels(pixels)
        names = [metadata.stuff_classes[label] for label in np.unique(labels)]
        draw(pixels, labels, metadata, path)
        print(f"{image.path}: {', '.join(names)} ({time.perf_counter() - start:.2f} s) -> {path}", flush=True)
    if problems:
        raise ReclipError(f"{len(problems)} of {len(images)} images cannot be read (listed above)")


if __name__ == "__main__":
    main()
