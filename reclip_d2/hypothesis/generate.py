"""Compute the hypotheses of a data set with a frozen CLIP: Eq. (6), or ReCLIP's whole-image rule.

Shape letters: N windows of an image, C classes, D width of the joint embedding.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.utils import comm
from torch import Tensor
from tqdm import tqdm

from reclip_d2.clip.dense import DenseCLIP
from reclip_d2.data.images import read_image
from reclip_d2.hypothesis.file import (
    HypothesisHeader,
    hypotheses_of,
    read_hypothesis_file,
    write_hypothesis_file,
)
from reclip_d2.hypothesis.windows import crop_windows, cut_crops
from reclip_d2.modeling.calibration import mean_probability_offset

logger = logging.getLogger(__name__)


class HypothesisGenerator:
    """Class scores of crops and images, cosine similarities between global image features and W_q."""

    def __init__(
        self,
        backbone: DenseCLIP,
        query_features: Tensor,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        batch_size: int = 242,
    ) -> None:
        """
        Args:
            query_features: W_q ``(C, D)``.
            pixel_mean, pixel_std: the CLIP's, RGB, in [0, 255].
            batch_size: crops that are encoded together.
        """
        self.backbone = backbone
        self.query_features = query_features
        device = query_features.device
        self.pixel_mean = torch.tensor(pixel_mean, device=device).view(-1, 1, 1)
        self.pixel_std = torch.tensor(pixel_std, device=device).view(-1, 1, 1)
        self.batch_size = batch_size

    def _encode(self, crops: Tensor) -> Tensor:
        return torch.cat(
            [
                self.backbone.global_features((chunk - self.pixel_mean) / self.pixel_std) @ self.query_features.T
                for chunk in crops.split(self.batch_size)
            ]
        )

    def window_scores(self, images: Sequence[Tensor], ratio: float) -> list[Tensor]:
        """``(N, C)`` scores of the windows of each image ``(3, H, W)`` uint8; all crops make one batch."""
        crops = []
        for image in images:
            windows = crop_windows(image.shape[1], image.shape[2], ratio)
            crops.append(cut_crops(image.float().to(self.pixel_mean.device), windows, self.backbone.image_size))
        return list(self._encode(torch.cat(crops)).split([len(part) for part in crops]))

    def image_scores(self, image: Tensor) -> Tensor:
        """``(C,)`` scores of a whole image ``(3, H, W)`` uint8, resized to the CLIP's size.

        The image is squeezed to the square that the CLIP was trained at, so that no border is cut off.
        """
        pixels = image.float()[None].to(self.pixel_mean.device)
        size = self.backbone.image_size
        pixels = F.interpolate(pixels, size=size, mode="bicubic", align_corners=False, antialias=True)
        return self._encode(pixels.clamp_(0, 255))[0]


def _read(record: dict[str, Any]) -> Tensor:
    """``(3, H, W)`` uint8."""
    return torch.from_numpy(read_image(record["file_name"])).permute(2, 0, 1)


def _encode_windows(
    generator: HypothesisGenerator, records: Sequence[dict[str, Any]], ratio: float, scores: np.ndarray
) -> list[dict[str, Any]]:
    """Fill ``scores`` ``(images, N, C)`` and return the lines without calibration. Images are decoded once and
    encoded a few at a time."""
    group = max(1, generator.batch_size // scores.shape[1])
    lines = []
    with tqdm(total=len(records), desc="hypotheses (crops)", unit="image") as bar:
        for start in range(0, len(records), group):
            chunk = records[start : start + group]
            images = [_read(record) for record in chunk]
            for record, image, image_scores in zip(chunk, images, generator.window_scores(images, ratio), strict=True):
                scores[len(lines)] = image_scores.cpu().numpy()
                lines.append(
                    {
                        "image_id": record["image_id"],
                        "size": [image.shape[1], image.shape[2]],
                        "top1": image_scores.argmax(1).tolist(),
                    }
                )
            bar.update(len(images))
    return lines


def _window_lines(
    generator: HypothesisGenerator,
    records: Sequence[dict[str, Any]],
    ratio: float,
    calibration_images: int,
    scratch: Path,
) -> Iterator[dict[str, Any]]:
    """Lines of Eq. (6): the best class of each window, as it is and calibrated.

    The calibration needs all scores before the first line can be written; they wait in a file, as half floats.
    """
    shape = (len(records), len(crop_windows(96, 96, ratio)), len(generator.query_features))
    with tempfile.TemporaryFile(dir=scratch) as file:
        scores = np.memmap(file, dtype=np.float16, mode="w+", shape=shape)
        lines = _encode_windows(generator, records, ratio, scores)
        step = -(-len(records) // calibration_images)
        sample = torch.from_numpy(scores[::step].reshape(-1, shape[-1]))
        offset = mean_probability_offset(sample, generator.backbone.logit_scale).numpy()
        for line, image_scores in zip(lines, scores, strict=True):
            calibrated = image_scores.astype(np.float32) + offset
            yield {**line, "top1_calibrated": calibrated.argmax(1).tolist()}


def _image_lines(generator: HypothesisGenerator, records: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Lines of the whole-image rule: the score of each class."""
    for record in tqdm(records, desc="hypotheses (whole image)", unit="image"):
        image = _read(record)
        yield {
            "image_id": record["image_id"],
            "size": [image.shape[1], image.shape[2]],
            "scores": [round(score, 5) for score in generator.image_scores(image).tolist()],
        }


def generate_hypotheses(
    generator: HypothesisGenerator,
    records: Sequence[dict[str, Any]],
    header: HypothesisHeader,
    path: Path,
    calibration_images: int = 2000,
) -> None:
    """Write the hypothesis file of ``records`` (Detectron2 records with ``file_name`` and ``image_id``).

    Args:
        header: says the rule; goes into the file.
        calibration_images: the per-class offset of the calibrated classes is found on at most so many images, spread
            evenly over the data set.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if header.method == "image":
        lines = _image_lines(generator, records)
    else:
        lines = _window_lines(generator, records, header.window_ratio, calibration_images, path.parent)
    write_hypothesis_file(path, header, lines)


def load_or_generate(
    path: Path,
    header: HypothesisHeader,
    records: Sequence[dict[str, Any]],
    threshold: float,
    calibrated: bool,
    make_generator: Callable[[], HypothesisGenerator],
) -> dict[str, list[int]]:
    """Hypothesis H of each record by image id; the file is made first if it is missing.

    With several processes the main one makes the file and the others wait for it.

    Args:
        threshold, calibrated: see :func:`~reclip_d2.hypothesis.file.hypotheses_of`.
        make_generator: called without arguments for a :class:`HypothesisGenerator`, only if it is needed.
    """
    if not path.exists() and comm.is_main_process():
        logger.info("Making hypotheses of %d images: %s", len(records), path)
        generate_hypotheses(make_generator(), records, header, path)
    comm.synchronize()
    lines = read_hypothesis_file(path, header)
    return hypotheses_of(lines, header, (record["image_id"] for record in records), threshold, calibrated)
