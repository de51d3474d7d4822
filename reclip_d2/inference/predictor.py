"""Logits and labels of images of any size.

Shape letters: C classes, (h, w) patch grid, (H, W) size of the image in pixels.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.structures import ImageList
from torch import Tensor

from reclip_d2.backbones.dense_attention.feedback import Feedback
from reclip_d2.data.dataset_mapper import build_test_augmentations
from reclip_d2.data.tiling import SlidingWindow, Tiling
from reclip_d2.errors import ReclipError
from reclip_d2.hypothesis.class_pruning import prune_classes, prunes_classes
from reclip_d2.inference.band import Band
from reclip_d2.inference.grid_logits import GridLogits, rows_in
from reclip_d2.inference.refinements import Grid, Refinement, build_refinements, softmax_scale
from reclip_d2.inference.region_masks import RegionMasks, vote_in_bands
from reclip_d2.inference.views import PredictedViews, ViewPlan
from reclip_d2.inference.windows import SlidingLogits, Windows, blended_bands, ramp_weights, uniform_weights
from reclip_d2.layers import use_kernels
from reclip_d2.modeling.meta_arch.base import LanguageSegmentor
from reclip_d2.modeling.meta_arch.segmentor import CLIPSegmentor
from reclip_d2.modeling.view_batch import batch_views
from reclip_d2.utils.files import StrPath

logger = logging.getLogger(__name__)


class WindowedImage(Protocol):
    """An image that is read in windows, such as :class:`~reclip_d2.data.geotiff.Scene`."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, 3)."""

    def window(self, rows: slice, columns: slice) -> np.ndarray | None:
        """Pixels ``(rows, columns, 3)`` uint8, RGB; None if no pixel has data."""


Turn = Callable[[], contextlib.AbstractContextManager[None]]
"""Makes a context that is entered for each forward pass; it may wait, to let others run in between."""


_DROPPED = -1e4
"""Logit of a class that is never predicted; finite, since logits are interpolated, and within half precision."""


def resized_pixels(pixels: np.ndarray, augmentations: T.AugmentationList) -> Tensor:
    """An image ``(H, W, 3)`` uint8, resized by test augmentations: ``(3, H', W')`` uint8."""
    inputs = T.AugInput(np.ascontiguousarray(pixels))
    augmentations(inputs)
    return torch.from_numpy(np.ascontiguousarray(inputs.image.transpose(2, 0, 1)))


class ImagePredictor:
    """Computes a model's logits and labels at the original size of images, in bands of rows.

    - By default, an image is resized by the test augmentation and passed through the network as a whole.
    - With ``TEST.SLIDING_WINDOW``, the resized image is passed through it in overlapping windows, whose logits are
      averaged.
    - With ``INPUT.TILES``, large images are cut into tiles before resizing. Each tile is predicted like an image (in
      windows, if both are on); the tiles' logits are blended with ramps where they overlap.

    Logits stay on the patch grid. At the image's size they are computed and dropped band by band, so that memory does
    not grow with classes times pixels.

    ``TEST.REFINE`` changes the logits of each forward pass (:mod:`reclip_d2.inference.refinements`), or averages the
    probabilities of several views of an image (:class:`~reclip_d2.inference.views.PredictedViews`).
    """

    def __init__(
        self,
        model: LanguageSegmentor,
        augmentations: list[T.Augmentation],
        tiling: Tiling,
        memory: int,
        sliding_window: SlidingWindow | None = None,
        *,
        refinements: Sequence[Refinement] = (),
        views: ViewPlan | None = None,
        scale: float = 0.0,
        stretch_padding: bool = False,
        region_masks: RegionMasks | None = None,
    ) -> None:
        """
        Args:
            model: in eval mode.
            augmentations: test augmentations.
            tiling: which images are cut into tiles, and how.
            memory: bytes for logits at the image's size.
            sliding_window: None to pass the resized image through the network as a whole.
            refinements: of each forward pass, in order.
            views: views of each image or tile whose probabilities are averaged; None for the image alone.
            scale: factor of the logits before refinements; 0 for :func:`softmax_scale`.
            stretch_padding: treat padding as part of the image: see :class:`GridLogits`.
            region_masks: regions that vote last, at the image's size.
        """
        self.model = model
        self.augmentations = T.AugmentationList(augmentations)
        self.tiling = tiling
        self.memory = memory
        self.sliding_window = sliding_window
        self.refinements = list(refinements)
        self.views = views
        self.scale = scale or softmax_scale(model)
        self.stretch_padding = stretch_padding
        self.region_masks = region_masks
        self.class_ids: list[int] | None = None
        self.dropped: list[int] = []

    @classmethod
    def from_config(cls, model: LanguageSegmentor, cfg: CfgNode) -> ImagePredictor:
        """A predictor for ``INPUT.*_TEST``, ``INPUT.TILES`` and ``TEST``."""
        return cls(
            model,
            build_test_augmentations(cfg),
            Tiling.from_config(cfg),
            cfg.TEST.BAND_MEMORY * 2**20,
            SlidingWindow.from_config(cfg),
            refinements=build_refinements(cfg, model),
            views=ViewPlan.from_config(cfg),
            scale=cfg.TEST.SOFTMAX_SCALE,
            stretch_padding=cfg.TEST.PADDING == "stretch",
            region_masks=RegionMasks.from_config(cfg),
        )

    @property
    def refines(self) -> bool:
        """Whether predictions are more than the model's own logits, so that features in a store are not enough."""
        return bool(self.refinements) or self.views is not None or self.region_masks is not None

    def for_classes(self, class_ids: Sequence[int]) -> ImagePredictor:
        """A predictor for a subset of the model's classes, in this order: each pixel gets the best of these."""
        predictor = copy.copy(self)
        predictor.class_ids = list(class_ids)
        return predictor

    def without_unsupported_classes(self, cfg: CfgNode) -> ImagePredictor:
        """A predictor that never predicts the classes that ``TEST.LEAVE_OUT``, ``TEST.MIN_CLASS_IMAGES``,
        ``MIN_CLASS_SHARE`` and ``MIN_CLASS_CONFIDENCE`` leave out; called by all processes.

        Raises:
            ReclipError: see :func:`~reclip_d2.hypothesis.class_pruning.prune_classes`.
        """
        if not prunes_classes(cfg):
            return self
        pruning, predictor = prune_classes(cfg, self.model.class_names), copy.copy(self)
        predictor.dropped = pruning.dropped
        logger.info("class pruning %s", pruning)
        return predictor

    def _own_logits(self, logits: Tensor) -> Tensor:
        """Logits ``(C, h, w)`` of the wanted classes; the dropped ones can win nowhere."""
        if self.dropped:
            logits = logits.index_fill(0, torch.tensor(self.dropped, device=logits.device), _DROPPED)
        return logits if self.class_ids is None else logits[self.class_ids]

    # ---- through the network ----------------------------------------------------------------------------------

    def resize(self, pixels: np.ndarray) -> Tensor:
        """Resize an image or tile ``(H, W, 3)`` uint8 by the test augmentation: ``(3, H', W')`` uint8."""
        return resized_pixels(pixels, self.augmentations)

    def grid_logits(self, pixels: Tensor, size: tuple[int, int], turn: Turn = contextlib.nullcontext) -> GridLogits:
        """One forward pass: mask logits of an image or window ``(3, H', W')``, RGB in [0, 255], with output size
        ``size``."""
        pixels = self.model.normalize(pixels)
        image = ImageList.from_tensors([pixels], self.model.size_divisibility)
        sizes, features = (None if self.stretch_padding else image.image_sizes), None
        with turn(), use_kernels(self.model.kernels):
            if any(refinement.needs_features for refinement in self.refinements):
                features, logits = self.model.segment(image.tensor, sizes)
                features = features[0].float()
            else:
                logits = self.model.mask_logits(image.tensor, sizes)
        logits = self._own_logits(logits[0].float())
        padded, network = (image.tensor.shape[-2], image.tensor.shape[-1]), (pixels.shape[-2], pixels.shape[-1])
        if not self.refines:
            return GridLogits(logits, padded, network, size, self.stretch_padding)
        first = Grid(logits * self.scale, pixels, padded, features, self.stretch_padding, self.class_ids)

        def again(feedback: Feedback) -> Grid:
            assert isinstance(self.model, CLIPSegmentor), "refinements with feedback refuse others"
            with turn(), use_kernels(self.model.kernels):
                other, logits = self.model.segment_with_feedback(image.tensor, sizes, feedback)
            logits = self._own_logits(logits[0].float()) * self.scale
            return dataclasses.replace(first, logits=logits, features=None if features is None else other[0].float())

        grid = dataclasses.replace(first, again=again)
        for refinement in self.refinements:
            grid = refinement(grid)
        return GridLogits(grid.logits, grid.padded_size, network, size, self.stretch_padding)

    def network_logits(
        self, image: Tensor, size: tuple[int, int], turn: Turn = contextlib.nullcontext
    ) -> GridLogits | SlidingLogits | PredictedViews:
        """Logits of a resized image or tile ``(3, H', W')``, RGB in [0, 255], with output size ``size``: from one
        forward pass, from windows, or from views of either kind."""
        if self.views is not None:
            return PredictedViews.predict(self.views, image, size, lambda view, size: self._one_view(view, size, turn))
        return self._one_view(image, size, turn)

    def _one_view(self, image: Tensor, size: tuple[int, int], turn: Turn) -> GridLogits | SlidingLogits:
        if self.sliding_window is None:
            return self.grid_logits(image, size, turn)
        area = (image.shape[-2], image.shape[-1])
        windows = Windows(area, self.sliding_window.size, self.sliding_window.stride, uniform_weights)

        def predict(rows: slice, columns: slice) -> GridLogits:
            return self.grid_logits(image[:, rows, columns], windows.size, turn)

        logits = {row: [predict(*slices) for slices in windows.slices(row)] for row in range(len(windows.tops))}
        return SlidingLogits(windows, logits, size)

    def stored_logits(self, features: Tensor, view_size: tuple[int, int], size: tuple[int, int]) -> GridLogits:
        """Mask logits from features ``(h, w, D)`` of a feature store; equal to those of the same view if the
        model rounds features (``MODEL.CLIP.HALF_FEATURES``).

        Args:
            view_size: (H, W) of the view: the image, resized by the test augmentation.
            size: output size.
        """
        model = self.model
        assert isinstance(model, CLIPSegmentor), "only models with a frozen CLIP predict from its features"
        batch = batch_views([features], [view_size], model.device, model.padding_mode)
        with use_kernels(model.kernels):
            logits = self._own_logits(model.segment_views(batch)[0].float())
        stride = model.backbone.stride
        return GridLogits(logits, (features.shape[0] * stride, features.shape[1] * stride), view_size, size)

    # ---- at the image's size ----------------------------------------------------------------------------------

    @torch.no_grad()
    def bands(
        self, image: np.ndarray, turn: Turn = contextlib.nullcontext, file: StrPath | None = None
    ) -> Iterator[Band]:
        """Predict an image ``(H, W, 3)`` uint8 in bands of rows, from top to bottom.

        Args:
            turn: makes a context that is entered for each forward pass.
            file: the image's file, by whose name regions are found; None for an image without one.

        Raises:
            ReclipError: the model's scores are not finite, or the image's regions cannot be read.
        """
        size = (image.shape[0], image.shape[1])
        if not self.tiling.applies_to(size):
            yield from self.image_bands(self.resize(image), size, turn, file)
            return

        def tiled() -> Iterator[Band]:
            return self._tiled_bands(size, lambda rows, columns: image[rows, columns], turn)

        if self.region_masks is None:
            yield from tiled()
        else:  # a second pass through the network, since the logits of all tiles do not fit into memory
            yield from vote_in_bands(tiled, self.region_masks.read(file, size))

    @torch.no_grad()
    def scene_bands(self, image: WindowedImage, turn: Turn = contextlib.nullcontext) -> Iterator[Band]:
        """Like :meth:`bands`, for an image that is read in windows: always in tiles, of which those without data do not
        pass through the network. Labels of pixels without data mean nothing.

        Raises:
            ReclipError: regions come from masks of image files.
        """
        if self.region_masks is not None:
            self.region_masks.read(None, (image.shape[0], image.shape[1]))
        yield from self._tiled_bands((image.shape[0], image.shape[1]), image.window, turn)

    def _tiled_bands(
        self, size: tuple[int, int], read: Callable[[slice, slice], np.ndarray | None], turn: Turn
    ) -> Iterator[Band]:
        side, stride = (self.tiling.size, self.tiling.size), (self.tiling.stride, self.tiling.stride)
        tiles = Windows(size, side, stride, ramp_weights)

        def predict(rows: slice, columns: slice) -> GridLogits | SlidingLogits | PredictedViews:
            pixels = read(rows, columns)
            if pixels is None:  # no pixel with data is blended with these
                count = self.model.num_classes if self.class_ids is None else len(self.class_ids)
                return GridLogits(torch.zeros(count, 1, 1, device=self.model.device), (1, 1), (1, 1), tiles.size)
            return self.network_logits(self.resize(pixels), tiles.size, turn)

        for rows, logits in blended_bands(tiles, predict, self.memory):
            yield Band(rows, lambda logits=logits: logits)

    @torch.no_grad()
    def image_bands(
        self,
        image: Tensor,
        size: tuple[int, int],
        turn: Turn = contextlib.nullcontext,
        file: StrPath | None = None,
    ) -> Iterator[Band]:
        """Like :meth:`bands`, for a resized image that needs no tiles.

        Args:
            image: ``(3, H', W')``, RGB in [0, 255].
            size: (H, W) of the output.
            turn, file: see :meth:`bands`.

        Raises:
            ReclipError: see :meth:`bands`.
        """
        if self.region_masks is None:
            yield from self.bands_of(self.network_logits(image, size, turn), size)
            return
        regions = self.region_masks.read(file, size)
        logits = self.network_logits(image, size, turn)
        yield from vote_in_bands(lambda: self.bands_of(logits, size), regions)

    @torch.no_grad()
    def stored_bands(self, features: Tensor, view_size: tuple[int, int], size: tuple[int, int]) -> Iterator[Band]:
        """Like :meth:`image_bands`, from the features of a feature store; arguments: see :meth:`stored_logits`."""
        yield from self.bands_of(self.stored_logits(features, view_size, size), size)

    @torch.no_grad()
    def bands_of(self, logits: GridLogits | SlidingLogits | PredictedViews, size: tuple[int, int]) -> Iterator[Band]:
        """The bands of logits with output size ``size``; see :meth:`bands`.

        Raises:
            ReclipError: the model's scores are not finite.
        """
        with use_kernels(self.model.kernels):
            labels = logits.labels(self.memory)
        if labels is not None and labels.min() < 0:
            raise ReclipError(
                "the model's scores are not finite: check its checkpoint, or set MODEL.CLIP.AUTOCAST float32"
            )
        # The band, and temporaries of twice its size.
        step = rows_in(self.memory, logits.num_classes, 3 * size[1])
        for start in range(0, size[0], step):
            rows = slice(start, min(start + step, size[0]))
            compute = functools.partial(logits.rows, rows.start, rows.stop)
            yield Band(rows, compute, None if labels is None else labels[rows])

    def labels(self, image: np.ndarray, file: StrPath | None = None) -> np.ndarray:
        """Best class of each pixel of an image ``(H, W, 3)`` uint8: ``(H, W)`` uint8, or uint16 above 256 classes.

        Args:
            file: see :meth:`bands`.
        """
        dtype = np.uint8 if self.model.num_classes <= 256 else np.uint16
        labels = np.empty(image.shape[:2], dtype)
        for band in self.bands(image, file=file):
            labels[band.rows] = band.labels.cpu().numpy()
        return labels
