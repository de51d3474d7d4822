"""The exported module: one graph from an image's pixels to its logits or labels.

Shape letters: C classes, (H, W) size of the image in pixels, (h, w) grid of the features, n = h*w.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclip_d2.modeling.bias_head import bias_to_subtract, query_logits, rectified_logits
from reclip_d2.modeling.meta_arch.base import LanguageSegmentor
from reclip_d2.modeling.meta_arch.maskclip import MaskCLIP
from reclip_d2.modeling.meta_arch.rectified_clip import RectifiedCLIP
from reclip_d2.modeling.meta_arch.segmentor import CLIPSegmentor
from reclip_d2.modeling.meta_arch.student import Student
from reclip_d2.modeling.view_batch import round_features


class ExportModule(nn.Module):
    """Normalisation, padding, the model, upsampling to the image's size and, optionally, the argmax.

    Made for tracing: its operators are in ONNX opset 17, sizes are computed in the graph, and it contains no device. It
    shares the model's parameters.

    Padding is part of the image: the graph gives dense attentions no mask of it (``AttentionInput.valid`` is None). For
    an attention that mixes patches, its logits therefore differ from :class:`~reclip_d2.inference.ImagePredictor`'s
    unless the sides of the image are multiples of the patch size. ``value`` does not mix patches.
    """

    def __init__(
        self,
        model: LanguageSegmentor,
        *,
        size: tuple[int, int] | None = None,
        labels: bool = False,
        label_ids: Sequence[int] | None = None,
    ) -> None:
        """
        Args:
            model: the model, in eval mode. Our kernels are not part of the graph.
            size: (H, W) of all images; None for any. For a fixed size, trace the module inside :func:`maps_on_grid`.
            labels: output labels instead of logits.
            label_ids: label id of each class, below 65536; by default 0 to C - 1.
        """
        super().__init__()
        self.mask_logits = _RectifiedLogits(model) if isinstance(model, RectifiedCLIP) else _MaskLogits(model)
        self.register_buffer("pixel_mean", model.pixel_mean.clone())
        self.register_buffer("pixel_std", model.pixel_std.clone())
        self.bgr = getattr(model, "image_format", "RGB") == "BGR"
        self.divisibility = model.size_divisibility
        self.size = size
        self.labels = labels
        ids = list(range(model.num_classes)) if label_ids is None else list(label_ids)
        dtype = torch.uint8 if max(ids) <= 255 else torch.int32  # few runtimes support uint16
        self.register_buffer("label_ids", torch.tensor(ids, dtype=dtype))
        self.own_ids = ids == list(range(model.num_classes))

    def forward(self, image: Tensor) -> Tensor:
        """
        Args:
            image: ``(1, 3, H, W)``, RGB in [0, 255], uint8 or floating point.

        Returns:
            Mask logits ``(1, C, H, W)`` float32, or labels ``(1, H, W)`` uint8 (int32 if an id is above 255).
        """
        pixels = image.to(torch.float32)
        pixels = pixels.flip(1) if self.bgr else pixels
        pixels = (pixels - self.pixel_mean) / self.pixel_std
        # In a trace, a tensor's sizes are values of the graph; a given size is constant.
        height, width = (image.shape[-2], image.shape[-1]) if self.size is None else self.size
        below, right = -height % self.divisibility, -width % self.divisibility
        padded_size = (height + below, width + right)
        if self.size is None or below or right:
            pixels = F.pad(pixels, [0, right, 0, below])
        logits = self.mask_logits(pixels)
        logits = F.interpolate(logits, size=padded_size, mode="bilinear", align_corners=False)
        if self.size is None or below or right:
            logits = logits[:, :, :height, :width]
        if not self.labels:
            return logits
        best = logits.argmax(1)
        return best.to(self.label_ids.dtype) if self.own_ids else self.label_ids[best]


class _MaskLogits(nn.Module):
    """The model's own mask logits ``(1, C, h, w)`` of normalised, padded pixels ``(1, 3, H, W)``."""

    def __init__(self, model: LanguageSegmentor) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.mask_logits(pixels)


class _RectifiedLogits(nn.Module):
    """:meth:`RectifiedCLIP.segment` without the text encoder and its caches per size."""

    def __init__(self, model: RectifiedCLIP) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.bias_head = model.bias_head
        self.mask_decoder = model.mask_decoder
        self.rectification = model.rectification
        self.half_features = model.half_features
        with torch.no_grad():
            self.register_buffer("query_features", model.query_features.clone())
            self.register_buffer("reference_features", model.bias_head.reference_features(model.backbone).clone())

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.backbone(pixels)["dense"]
        features = round_features(features) if self.half_features else features
        bias = None
        if self.rectification != "none":
            embedding = self.backbone.positional_embedding((features.shape[-2], features.shape[-1]))
            shared = self.bias_head.shared_bias(embedding, self.reference_features)
            bias = self.bias_head.add_image_bias(shared, self.reference_features, features)
        bias = bias_to_subtract(bias, self.rectification)
        logits = rectified_logits(query_logits(features, self.query_features), bias)
        return logits if self.mask_decoder is None else self.mask_decoder(logits, features)


def map_grids(model: LanguageSegmentor) -> list[tuple[int, int]]:
    """Grids (h, w) of the model's maps that are resized to an image's grid: the positional embedding of a CLIP, the
    bias map of a student, the offset of a calibrated MaskCLIP."""
    shapes = []
    if isinstance(model, CLIPSegmentor) and model.backbone.positional_grid is not None:
        shapes.append(model.backbone.positional_grid)
    if isinstance(model, MaskCLIP) and model.calibration_offset is not None:
        shapes.append(model.calibration_offset.shape[-2:])
    if isinstance(model, Student) and model.inherited.bias_map is not None:
        shapes.append(model.inherited.bias_map.shape[-2:])
    return [(int(height), int(width)) for height, width in shapes]


def trace_size(model: LanguageSegmentor) -> tuple[int, int]:
    """(H, W) of an example image for tracing a graph for any size.

    If an image's grid equals a map's, the model does not resize the map. A trace records only one branch: it must
    record the resize, which is correct for all grids (resizing to the same size changes nothing).
    """
    grids = map_grids(model) or [(8, 8)]
    step = model.size_divisibility
    height, width = (max(sides) for sides in zip(*grids, strict=True))
    return (height + 1) * step - 1, (width + 2) * step - 1


@contextlib.contextmanager
def maps_on_grid(model: LanguageSegmentor, size: tuple[int, int] | None) -> Iterator[None]:
    """Context in which the maps of :func:`map_grids` have the grid of images of ``size`` (H, W), so that the traced
    graph has no bicubic resize, which some runtimes lack. Does nothing for ``None``."""
    if size is None:
        yield
        return
    grid = (-(-size[0] // model.size_divisibility), -(-size[1] // model.size_divisibility))
    with contextlib.ExitStack() as stack:

        def put(owner: object, name: str, value: object) -> None:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        with torch.no_grad():
            if isinstance(model, CLIPSegmentor):
                stack.enter_context(model.backbone.on_grid(grid))
            if isinstance(model, MaskCLIP) and (offset := model.calibration_offset) is not None:
                if offset.shape[-2:] != (1, 1):
                    resized = F.interpolate(offset[None], size=grid, mode="bilinear", align_corners=False)[0]
                    put(model, "calibration_offset", resized)
            if isinstance(model, Student) and (bias_map := model.inherited.bias_map) is not None:
                resized = F.interpolate(bias_map[None], size=grid, mode="bicubic", align_corners=False)[0]
                put(model.inherited, "bias_map", resized)
        yield
