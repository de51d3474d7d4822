"""Stretching samples of any depth to 8 bits: which values become black and white.

Shape letters: (H, W) size in pixels, B bands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

KINDS = ("auto", "percentiles", "minmax", "none")
PERCENTILES = (2.0, 98.0)


@dataclasses.dataclass(frozen=True)
class Limits:
    """The values of one band that become 0 and 255; values between them linearly, others the nearer of the two.

    Attributes:
        low, high: if they are equal, the band is constant and becomes 0.
    """

    low: float
    high: float

    def to_8bit(self, values: np.ndarray) -> np.ndarray:
        """Values of any type and shape as uint8: ``round(255 (v - low) / (high - low))``, clipped. NaN becomes 0."""
        if self.high <= self.low:
            return np.zeros(values.shape, np.uint8)
        if values.dtype == np.uint8 and (self.low, self.high) == (0, 255):
            return values
        # float32 has 24 bits, enough for a result of 8 unless the limits are close together and far from 0.
        wide = np.float64 if abs(self.low) > 1000 * (self.high - self.low) else np.float32
        scaled = (values.astype(wide) - wide(self.low)) * wide(255 / (self.high - self.low))
        return np.nan_to_num(np.rint(scaled.clip(0, 255)), nan=0).astype(np.uint8)


def full_range(dtype: np.dtype) -> Limits:
    """The range of an integer type; 0 to 1 for floating-point numbers."""
    if np.issubdtype(dtype, np.integer):
        info = np.iinfo(dtype)
        return Limits(0.0, float(info.max))  # signed samples are black from 0 down
    return Limits(0.0, 1.0)


def limits_of(
    values: np.ndarray, dtype: np.dtype, kind: str = "auto", percentiles: Sequence[float] = PERCENTILES
) -> Limits:
    """The limits of a band.

    Args:
        values: a sample of the band, of any shape; values that are not finite are left out.
        dtype: the band's type.
        kind: one of :data:`KINDS`. ``percentiles``: those of the sample; ``minmax``: its smallest and largest value;
            ``none``: the range of the type (0 to 1 for floating-point numbers); ``auto``: ``none`` for 8 bits,
            else ``percentiles``.
        percentiles: two, ascending, 0 to 100. If they fall on one value, the smallest and the largest count.
    """
    if kind == "auto":
        kind = "none" if dtype == np.uint8 else "percentiles"
    if kind == "none":
        return full_range(dtype)
    if np.issubdtype(values.dtype, np.floating):
        values = values[np.isfinite(values)]
    if not values.size:
        return full_range(dtype)
    ends = float(values.min()), float(values.max())
    if kind == "minmax":
        return Limits(*ends)
    low, high = (float(value) for value in np.percentile(values, percentiles))
    return Limits(low, high) if high > low else Limits(*ends)
