"""Views of an image, mirrored or of other sizes, whose probabilities are averaged (``TEST.REFINE``: flip, scales).

Shape letters: C classes, (H, W) size of the output in pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor

from reclip_d2.inference.grid_logits import BYTES, GridLogits
from reclip_d2.inference.windows import SlidingLogits

_FLOOR = 1e-12
Logits = GridLogits | SlidingLogits


@dataclasses.dataclass(frozen=True)
class ViewPlan:
    """The views of an image.

    Attributes:
        scales: sizes relative to the resized image.
        flip: also predict the mirror image of each.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    @classmethod
    def from_config(cls, cfg: CfgNode) -> ViewPlan | None:
        """The views that ``TEST.REFINE`` asks for; None without ``flip`` and ``scales``."""
        names = cfg.TEST.REFINE
        if not {"flip", "scales"} & set(names):
            return None
        return cls(tuple(cfg.TEST.SCALES) if "scales" in names else (1.0,), "flip" in names)


@dataclasses.dataclass(frozen=True)
class PredictedViews:
    """Logits of an image's views, from which any rows of their mean can be computed: the log of the mean soft-max.

    Attributes:
        members: the logits of each view, of the same output size, and whether it is a mirror image.
    """

    members: Sequence[tuple[Logits, bool]]

    @classmethod
    def predict(
        cls, plan: ViewPlan, image: Tensor, size: tuple[int, int], network: Callable[[Tensor, tuple[int, int]], Logits]
    ) -> PredictedViews:
        """Predict the views of an image.

        Args:
            image: ``(3, H', W')`` uint8 or float, RGB in [0, 255].
            size: (H, W) of the output.
            network: computes the logits of a view with an output size; their soft-max must give probabilities.
        """
        members = []
        for scale in plan.scales:
            view = image if scale == 1 else _resized(image, scale)
            members.append((network(view, size), False))
            if plan.flip:
                members.append((network(view.flip(-1), size), True))
        return cls(members)

    @property
    def num_classes(self) -> int:
        return self.members[0][0].num_classes

    @property
    def size(self) -> tuple[int, int]:
        return self.members[0][0].size

    def rows(self, start: int, stop: int) -> Tensor:
        """Log of the mean probabilities ``(C, stop - start, W)`` of some rows of the output."""
        total: Tensor | None = None
        for logits, mirrored in self.members:
            part = logits.rows(start, stop).softmax(0)
            part = part.flip(-1) if mirrored else part
            total = part if total is None else total.add_(part)
        assert total is not None
        return total.div_(len(self.members)).clamp_(min=_FLOOR).log_()

    def labels(self, memory: int) -> Tensor | None:
        """Labels ``(H, W)`` int64; None if the probabilities need more than ``memory`` bytes."""
        height, width = self.size
        if 2 * self.num_classes * height * width * BYTES > memory:
            return None
        scores = self.rows(0, height)
        finite = torch.isfinite(scores).all(0)
        return torch.where(finite, scores.argmax(0), -1)


def _resized(image: Tensor, scale: float) -> Tensor:
    """An image ``(3, H', W')`` at another scale, at least one pixel, float32."""
    size = [max(1, round(side * scale)) for side in image.shape[-2:]]
    pixels = image[None].float()
    return F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=scale < 1)[0]
