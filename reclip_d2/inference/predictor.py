"""Label maps of images of any size.

Shape letters: C classes, (H, W) size of the image in pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from torch import Tensor

from reclip_d2.data.dataset_mapper import build_test_augmentations
from reclip_d2.data.tiling import Tiling
from reclip_d2.errors import ReclipError
from reclip_d2.inference.windows import WindowLogits, blended_bands
from reclip_d2.layers import use_kernels
from reclip_d2.modeling.meta_arch.base import LanguageSegmentor

Turn = Callable[[], contextlib.AbstractContextManager[None]]
"""Makes a context that is entered around each use of a network: one that waits lets others in between."""


class ImagePredictor:
    """A model's labels for whole images, as ``train_net.py`` evaluates them, in bands of rows.

    An image goes through the network as one, resized by the test augmentation; a very large one in overlapping tiles,
    each resized as if it were an image, whose logits are blended. Either way the logits at the image's size are made
    and dropped in bands, so memory does not grow with classes times pixels.
    """

    def __init__(
        self, model: LanguageSegmentor, augmentations: list[T.Augmentation], tiling: Tiling, memory: int
    ) -> None:
        """
        Args:
            model: in eval mode.
            augmentations: of the test.
            memory: bytes for logits at the image's size.
        """
        if model.sliding_window is not None:
            raise ReclipError("TEST.SLIDING_WINDOW is of the evaluation: set INPUT.TILES to predict in windows")
        self.model = model
        self.augmentations = T.AugmentationList(augmentations)
        self.tiling = tiling
        self.memory = memory

    @classmethod
    def from_config(cls, model: LanguageSegmentor, cfg: CfgNode) -> ImagePredictor:
        """A predictor by the keys ``INPUT.*_TEST``, ``INPUT.TILES`` and ``TEST.BAND_MEMORY``."""
        return cls(model, build_test_augmentations(cfg), Tiling.from_config(cfg), cfg.TEST.BAND_MEMORY * 2**20)

    def window_logits(self, pixels: np.ndarray) -> WindowLogits:
        """Mask logits of an image or tile ``(H, W, 3)`` uint8, on the patch grid."""
        inputs = T.AugInput(np.ascontiguousarray(pixels))
        self.augmentations(inputs)
        image = torch.from_numpy(np.ascontiguousarray(inputs.image.transpose(2, 0, 1)))
        batch = self.model.preprocess_image([{"image": image}])
        with use_kernels(self.model.kernels):
            logits = self.model.mask_logits(batch.tensor)[0].float()
        height, width = batch.image_sizes[0]
        padded_height, padded_width = batch.tensor.shape[-2:]
        return WindowLogits(logits, (padded_height, padded_width), (int(height), int(width)), pixels.shape[:2])

    @torch.no_grad()
    def bands(self, image: np.ndarray, turn: Turn = contextlib.nullcontext) -> Iterator[tuple[slice, Tensor]]:
        """Mask logits of an image ``(H, W, 3)`` uint8: bands of rows, each with its logits ``(C, rows, W)``.

        Args:
            turn: entered around the forward pass of each window.
        """
        size = (image.shape[0], image.shape[1])
        tiled = self.tiling.applies_to(size)
        window = (self.tiling.size, self.tiling.size) if tiled else size
        stride = (self.tiling.stride, self.tiling.stride) if tiled else size

        def predict(rows: slice, columns: slice) -> WindowLogits:
            with turn():
                return self.window_logits(image[rows, columns])

        yield from blended_bands(size, window, stride, predict, self.memory)

    def labels(self, image: np.ndarray) -> np.ndarray:
        """Best class of each pixel of an image ``(H, W, 3)`` uint8: ``(H, W)`` uint8, or uint16 above 256 classes."""
        dtype = np.uint8 if self.model.num_classes <= 256 else np.uint16
        labels = np.empty(image.shape[:2], dtype)
        for rows, logits in self.bands(image):
            labels[rows] = logits.argmax(0).cpu().numpy()
        return labels
