"""A prediction in bands of rows, so that memory does not grow with classes times pixels.

Shape letters: C classes, W width of the image in pixels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from torch import Tensor


@dataclasses.dataclass
class Band:
    """Some rows of an image, at its own size.

    Attributes:
        rows: the band's rows.
        compute_logits: computes :attr:`logits`.
        known_labels: :attr:`labels`, if known without the logits.
    """

    rows: slice
    compute_logits: Callable[[], Tensor]
    known_labels: Tensor | None = None

    @functools.cached_property
    def logits(self) -> Tensor:
        """Mask logits ``(C, rows, W)`` float32, computed on first access."""
        return self.compute_logits()

    @property
    def labels(self) -> Tensor:
        """Best class of each pixel ``(rows, W)`` int64."""
        return self.logits.argmax(0) if self.known_labels is None else self.known_labels
