"""Compute the hypotheses of a data set with a frozen CLIP: Eq. (6), by crops or in one pass (not in the papers), or
ReCLIP's whole-image rule.

Shape letters: N windows of an image, C classes, D width of the joint embedding.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.utils import comm
from torch import Tensor

from reclip_d2.backbones.interface import VisionLanguageBackbone
from reclip_d2.data.images import read_image
from reclip_d2.errors import ReclipError
from reclip_d2.hypothesis.blocks import ScoreBlocks, remove_blocks
from reclip_d2.hypothesis.file import (
    WINDOW_METHODS,
    HypothesisHeader,
    read_hypothesis_file,
    write_hypothesis_file,
)
from reclip_d2.hypothesis.windows import crop_windows, cut_crops, one_pass_size, resize_pixels
from reclip_d2.modeling.calibration import mean_probability_offset
from reclip_d2.utils.io import remove_leftovers_of
from reclip_d2.utils.one_maker import one_maker
from reclip_d2.utils.progress import count_steps
from reclip_d2.utils.work_shard import WorkShard

logger = logging.getLogger(__name__)

READERS = 4  # threads that read images ahead of a GPU
GROUPS_AHEAD = 2


class HypothesisGenerator:
    """Class scores of crops and images: cosine similarities of global image features and W_q."""

    def __init__(
        self,
        backbone: VisionLanguageBackbone,
        query_features: Tensor,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        batch_size: int = 0,
    ) -> None:
        """
        Args:
            query_features: W_q ``(C, D)``.
            pixel_mean, pixel_std: the CLIP's, RGB, in [0, 255].
            batch_size: windows per batch; 0 for 121 on a CPU, 484 on a GPU.
        """
        self.backbone = backbone
        self.query_features = query_features
        device = query_features.device
        self.pixel_mean = torch.tensor(pixel_mean, device=device).view(-1, 1, 1)
        self.pixel_std = torch.tensor(pixel_std, device=device).view(-1, 1, 1)
        self.batch_size = batch_size or (484 if self.on_gpu else 121)

    @property
    def on_gpu(self) -> bool:
        """Whether work is queued, and results arrive later."""
        return self.pixel_mean.is_cuda

    def _to_device(self, image: Tensor) -> Tensor:
        """The bytes of an image; from pinned memory, so that nothing waits."""
        pinned = image.pin_memory() if self.on_gpu and not image.is_cuda else image
        return pinned.to(self.pixel_mean.device, non_blocking=True)

    def _encode(self, crops: Tensor) -> Tensor:
        return torch.cat(
            [
                self.backbone.global_features((chunk - self.pixel_mean) / self.pixel_std) @ self.query_features.T
                for chunk in crops.split(self.batch_size)
            ]
        )

    def window_scores(self, images: Sequence[Tensor], ratio: float) -> list[Tensor]:
        """``(N, C)`` scores of the windows of each image ``(3, H, W)`` uint8; the crops of all images are batched."""
        crops = []
        for image in images:
            windows = crop_windows(image.shape[1], image.shape[2], ratio)
            crops.append(cut_crops(self._to_device(image).float(), windows, self.backbone.image_size))
        return list(self._encode(torch.cat(crops)).split([len(part) for part in crops]))

    def one_pass_scores(
        self, images: Sequence[Tensor], ratio: float, sides: tuple[int, int] = (0, 0), split: int = 0
    ) -> list[Tensor]:
        """``(N, C)`` scores of the windows of each image ``(3, H, W)`` uint8, without cropping them.

        Consecutive images with the same resized size share a forward pass of
        :meth:`VisionLanguageBackbone.window_features`.

        Args:
            ratio: r of Eq. (6).
            sides: see :func:`~reclip_d2.hypothesis.windows.one_pass_size`.
            split: index of the first block with separate window tokens.
        """
        patch = self.backbone.patch_size
        scores: list[Tensor] = []
        for size, group in itertools.groupby(images, lambda image: one_pass_size(*image.shape[1:], sides, patch)):
            pixels = torch.cat([resize_pixels(self._to_device(image), size) for image in group])
            normalised = (pixels - self.pixel_mean) / self.pixel_std
            features = self.backbone.window_features(normalised, crop_windows(*size, ratio), split)
            scores += list(features @ self.query_features.T)
        return scores

    def image_scores(self, image: Tensor) -> Tensor:
        """``(C,)`` scores of a whole image ``(3, H, W)`` uint8, resized to the CLIP's input size.

        The aspect ratio changes, so that nothing is cropped.
        """
        return self._encode(resize_pixels(self._to_device(image), self.backbone.image_size))[0]


def _read(record: dict[str, Any]) -> Tensor:
    """Image ``(3, H, W)`` uint8 of a record."""
    return torch.from_numpy(read_image(record["file_name"])).permute(2, 0, 1)


def _read_groups(records: Sequence[dict[str, Any]], size: int, ahead: bool) -> Iterator[list[Tensor]]:
    """Images ``(3, H, W)`` uint8, ``size`` at a time.

    Args:
        ahead: read the next groups in threads, while a GPU works.
    """
    groups = [records[start : start + size] for start in range(0, len(records), size)]
    if not ahead:
        yield from ([_read(record) for record in group] for group in groups)
        return
    with ThreadPoolExecutor(READERS) as pool:
        reading: deque[list[Future[Tensor]]] = deque()
        try:
            for number in range(len(groups) + GROUPS_AHEAD):
                if number < len(groups):
                    reading.append([pool.submit(_read, record) for record in groups[number]])
                if number >= GROUPS_AHEAD:
                    yield [image.result() for image in reading.popleft()]
        finally:
            pool.shutdown(cancel_futures=True)


class _Arriving:
    """A tensor on its way to the host."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.to("cpu", non_blocking=True)  # pinned, if it comes from a GPU
        self.event = torch.cuda.Event() if tensor.is_cuda else None
        if self.event is not None:
            self.event.record()

    def numpy(self) -> np.ndarray:
        """The values, once they are there."""
        if self.event is not None:
            self.event.synchronize()
        return self.tensor.numpy()


def _window_arrays(
    generator: HypothesisGenerator, records: Sequence[dict[str, Any]], header: HypothesisHeader, steps: count_steps
) -> dict[str, np.ndarray]:
    """Eq. (6) on one block: sizes ``(n, 2)``, best class of each window ``(n, N)``, and, for the calibration, scores
    ``(n, N, C)`` float16. Images are encoded a few at a time; a GPU works on a group while the host fetches the scores
    of the last, and reads the next."""
    ratio = header.window_ratio
    group = max(1, generator.batch_size // len(crop_windows(96, 96, ratio)))
    sizes, top1, scores = [], [], []
    arriving: deque[tuple[_Arriving, _Arriving]] = deque()

    def fetch(most: int) -> None:
        while len(arriving) > most:
            classes, similarities = (part.numpy() for part in arriving.popleft())
            top1.append(classes)
            scores.append(similarities)
            steps.advance(len(classes))

    for images in _read_groups(records, group, ahead=generator.on_gpu):
        if header.method == "one_pass":
            of_images = generator.one_pass_scores(images, ratio, tuple(header.image_sides), header.split_block)
        else:
            of_images = generator.window_scores(images, ratio)
        sizes += [image.shape[1:] for image in images]
        stacked = torch.stack(of_images)  # (images, N, C)
        arriving.append((_Arriving(stacked.argmax(2)), _Arriving(stacked.half())))
        fetch(1 if generator.on_gpu else 0)
    fetch(0)
    return {"size": np.array(sizes), "top1": np.concatenate(top1), "scores": np.concatenate(scores)}


def _image_arrays(
    generator: HypothesisGenerator, records: Sequence[dict[str, Any]], steps: count_steps
) -> dict[str, np.ndarray]:
    """The whole-image rule on one block: sizes ``(n, 2)`` and scores ``(n, C)``."""
    sizes, scores = [], []
    for record in records:
        image = _read(record)
        sizes.append(image.shape[1:])
        scores.append(generator.image_scores(image).cpu().numpy())
        steps.advance()
    return {"size": np.array(sizes), "scores": np.stack(scores)}


def _array_shapes(header: HypothesisHeader, num_classes: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """For each array of a block its dtype kind, and its shape per image."""
    if header.method == "image":
        return {"size": ("i", (2,)), "scores": ("f", (num_classes,))}
    windows = len(crop_windows(96, 96, header.window_ratio))
    return {"size": ("i", (2,)), "top1": ("i", (windows,)), "scores": ("f", (windows, num_classes))}


def _missing_blocks(blocks: ScoreBlocks, header: HypothesisHeader) -> list[int]:
    """Missing or damaged blocks, as the main process sees them."""
    shapes = _array_shapes(header, len(header.class_names))

    def is_sound(arrays: dict[str, np.ndarray], images: int) -> bool:
        return {name: (array.dtype.kind, array.shape) for name, array in arrays.items()} == {
            name: (kind, (images, *shape)) for name, (kind, shape) in shapes.items()
        }

    return comm.all_gather(blocks.missing(is_sound) if comm.is_main_process() else [])[0]


def _make_blocks(
    generator: HypothesisGenerator,
    records: Sequence[dict[str, Any]],
    header: HypothesisHeader,
    blocks: ScoreBlocks,
    part: WorkShard | None = None,
) -> None:
    """Compute the missing blocks, or a part of them; the processes share the work."""
    missing = _missing_blocks(blocks, header)
    if part is not None:
        missing = [block for block in missing if part.holds(block)]
    mine = missing[comm.get_rank() :: comm.get_world_size()]
    total = sum(len(blocks.images[block]) for block in mine)
    with count_steps("hypotheses", total, silent=not comm.is_main_process()) as steps:
        for block in mine:
            part = [records[i] for i in blocks.images[block]]
            if header.method == "image":
                arrays = _image_arrays(generator, part, steps)
            else:
                arrays = _window_arrays(generator, part, header, steps)
            blocks.write(block, arrays)


def _calibration_offset(blocks: ScoreBlocks, scale: float, max_images: int) -> np.ndarray:
    """Offset ``(C,)`` that makes the mean softmax over the windows of at most ``max_images`` images uniform."""
    step = -(-blocks.images[-1].stop // max_images)
    sample = []
    for block, images in enumerate(blocks.images):
        scores = blocks.read(block)["scores"]
        sample += [scores[i - images.start].astype(np.float32) for i in images if i % step == 0]
    return mean_probability_offset(torch.from_numpy(np.concatenate(sample)), scale).numpy()


def _lines(
    blocks: ScoreBlocks, records: Sequence[dict[str, Any]], offset: np.ndarray | None
) -> Iterator[dict[str, Any]]:
    """Lines of the file, from all blocks.

    Args:
        offset: calibration offset ``(C,)``; None for the whole-image rule.
    """
    for block, images in enumerate(blocks.images):
        arrays = blocks.read(block)
        for row, image in enumerate(images):
            line = {"image_id": records[image]["image_id"], "size": arrays["size"][row].tolist()}
            scores = arrays["scores"][row]
            if offset is None:
                line["scores"] = [round(float(score), 5) for score in scores]
            else:
                line["top1"] = arrays["top1"][row].tolist()
                line["top1_calibrated"] = (scores.astype(np.float32) + offset).argmax(1).tolist()
            yield line


def _check_makeable(header: HypothesisHeader, path: Path) -> None:
    """Raise :class:`ReclipError` if the file can only be imported."""
    if header.method == "imported":
        raise ReclipError(f"HYPOTHESIS.FILE {path} does not exist: write it with tools/import_public_hypotheses.py")


class HypothesisParts:
    """The blocks of :func:`generate_hypotheses`, which finds them finished, as
    :class:`~reclip_d2.utils.work_parts.WorkParts`."""

    stage, unit = "hypotheses", "image"

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        header: HypothesisHeader,
        path: Path,
        make_generator: Callable[[], HypothesisGenerator],
    ) -> None:
        """
        Args:
            make_generator: builds a :class:`HypothesisGenerator`; called only to make a part, and once.

        Raises:
            ReclipError: the file can only be imported.
        """
        _check_makeable(header, path)
        self.target, self._records, self._header = path, records, header
        self._blocks = ScoreBlocks(path, [record["image_id"] for record in records], header.fields())
        self.count = len(self._blocks.images)
        self._generator = functools.cache(make_generator)

    def problem(self) -> str:
        """None: blocks are small."""
        return ""

    def missing(self) -> list[int]:
        """Missing or damaged blocks, as the main process sees them."""
        return _missing_blocks(self._blocks, self._header)

    def steps(self, number: int) -> int:
        """Images of a block."""
        return len(self._blocks.images[number])

    def file(self, number: int) -> Path:
        """The file of a block."""
        return self._blocks.file(number)

    def make(self, part: WorkShard) -> None:
        """Compute the missing blocks of a part; called by all processes."""
        _make_blocks(self._generator(), self._records, self._header, self._blocks, part)
        comm.synchronize()


def generate_hypotheses(
    generator: HypothesisGenerator,
    records: Sequence[dict[str, Any]],
    header: HypothesisHeader,
    path: Path,
    calibration_images: int = 2000,
) -> None:
    """Write the hypothesis file of ``records`` (Detectron2 records with ``file_name`` and ``image_id``).

    Called by all processes, which share the work; the main process writes the file. After an interruption, the next
    call computes only the missing blocks.

    Args:
        header: header of the file; names the rule.
        path: path of the file.
        calibration_images: maximum number of images, spread evenly over the data set, for the calibration offset.

    Raises:
        ReclipError: the method is ``imported``, or a block is damaged.
    """
    _check_makeable(header, path)
    ids = [record["image_id"] for record in records]
    blocks = ScoreBlocks(path, ids, header.fields())
    _make_blocks(generator, records, header, blocks)
    comm.synchronize()
    if comm.is_main_process():
        offset = None
        if header.method in WINDOW_METHODS:
            offset = _calibration_offset(blocks, generator.backbone.logit_scale, calibration_images)
        remove_leftovers_of(path)  # from killed runs; no other run writes the file now
        write_hypothesis_file(path, header, _lines(blocks, records, offset))
        blocks.remove()


def _exists(path: Path) -> bool:
    """Whether the main process sees the file, so that all processes take the same branch."""
    return comm.all_gather(path.exists())[0]


def load_or_generate(
    path: Path,
    header: HypothesisHeader,
    records: Sequence[dict[str, Any]],
    make_generator: Callable[[], HypothesisGenerator],
) -> dict[str, dict[str, Any]]:
    """Lines of the hypothesis file by image id; computes the file if it is missing.

    Called by all processes, which share the work. If several runs need the same file, one computes it and the others
    wait.

    Args:
        make_generator: builds a :class:`HypothesisGenerator`; called only if needed.
    """
    return load_or_make(
        path, header, len(records), lambda: generate_hypotheses(make_generator(), records, header, path)
    )


def load_or_make(
    path: Path, header: HypothesisHeader, images: int, make: Callable[[], None]
) -> dict[str, dict[str, Any]]:
    """Lines of the hypothesis file by image id, see :func:`load_or_generate`.

    Args:
        images: how many there are, for the log.
        make: writes the file; called by all processes, only if it is needed.
    """
    if not _exists(path):
        with one_maker(path, "hypotheses"):
            if not _exists(path):  # not computed by another run meanwhile
                logger.info("Computing hypotheses of %d images: %s", images, path)
                make()
    comm.synchronize()
    if comm.is_main_process():
        remove_blocks(path)
    return read_hypothesis_file(path, header)
