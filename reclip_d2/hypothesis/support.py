"""How many images support each class: those whose hypothesis has it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from detectron2.config import CfgNode

from reclip_d2.errors import ReclipError
from reclip_d2.hypothesis.file import find_threshold, hypotheses_of, read_header, read_hypothesis_file
from reclip_d2.hypothesis.training_records import build_training_records


def class_support(cfg: CfgNode, class_names: Sequence[Sequence[str]]) -> list[int]:
    """Images whose hypothesis has a class, for each class: of ``HYPOTHESIS.FILE``, or of ``DATASETS.TRAIN``, whose
    hypotheses are computed if they are missing. Reads no labels.

    Args:
        class_names: for each class of the model its name and any synonyms.

    Raises:
        ReclipError: the file is missing or damaged, or was made for other classes.
    """
    if not cfg.HYPOTHESIS.FILE:
        return count_images((record["hypothesis"] for record in build_training_records(cfg)), len(class_names))
    path, calibrated = Path(cfg.HYPOTHESIS.FILE), cfg.HYPOTHESIS.CALIBRATED
    header = read_header(path)
    if header.class_names != [list(names) for names in class_names]:
        raise ReclipError(f"{path} was made for other classes, so TEST.MIN_CLASS_IMAGES cannot use it: set it to 0")
    lines = read_hypothesis_file(path, header)
    threshold = cfg.HYPOTHESIS.THRESHOLD
    if wanted := cfg.HYPOTHESIS.CLASSES_PER_IMAGE:
        threshold = find_threshold(lines, header, lines, wanted, calibrated)
    return count_images(hypotheses_of(lines, header, lines, threshold, calibrated).values(), len(class_names))


def count_images(hypotheses: Iterable[Sequence[int]], num_classes: int) -> list[int]:
    """For each class the number of hypotheses that have it."""
    counts = [0] * num_classes
    for hypothesis in hypotheses:
        for index in set(hypothesis):
            counts[index] += 1
    return counts
