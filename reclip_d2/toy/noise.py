"""Seeded noise fields, the raw material of the textures: float32 (S, S), S = ``SIZE`` pixels.

Every function takes a NumPy ``Generator``; nothing reads or changes global random state.
"""

from __future__ import annotations

from functools import cache

import numpy as np

SIZE = 96
"""Side of the world's images, in pixels."""


@cache
def pixel_grid() -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each pixel as two read-only float32 arrays (S, S), in pixels."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    y.setflags(write=False)
    x.setflags(write=False)
    return y, x


@cache
def _cubic_weights(cells: int) -> np.ndarray:
    """Cubic B-spline weights (S, cells + 3) of ``cells`` equal intervals over the S pixels of an axis."""
    position = (np.arange(SIZE) + 0.5) * cells / SIZE
    start = np.floor(position).astype(int)
    t = position - start
    basis = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], axis=1) / 6
    weights = np.zeros((SIZE, cells + 3), dtype=np.float32)
    for k in range(4):
        weights[np.arange(SIZE), start + k] = basis[:, k]
    return weights


def value_noise(rng: np.random.Generator, cells_y: int, cells_x: int) -> np.ndarray:
    """Smooth noise: random values on a grid of cells_y x cells_x intervals, cubic B-spline between them.

    Returns float32 (S, S) of mean about 0 and standard deviation about 1; unequal cell counts give
    streaks.
    """
    grid = rng.standard_normal((cells_y + 3, cells_x + 3), dtype=np.float32)
    # 0.48 = the mean sum of squared cubic B-spline weights: the variance of each axis, so the field's
    # standard deviation.
    return _cubic_weights(cells_y) @ grid @ _cubic_weights(cells_x).T / np.float32(0.48)


def fractal_noise(rng: np.random.Generator, cells_y: int, cells_x: int, octaves: int, gain: float = 0.5) -> np.ndarray:
    """Sum of ``octaves`` value noises, each of twice the frequency and ``gain`` times the amplitude.

    The sum is scaled to a standard deviation of about 1.
    """
    total = np.zeros((SIZE, SIZE), dtype=np.float32)
    amplitude, power = 1.0, 0.0
    for octave in range(octaves):
        total += np.float32(amplitude) * value_noise(rng, min(cells_y << octave, SIZE), min(cells_x << octave, SIZE))
        power += amplitude**2
        amplitude *= gain
    return total / np.float32(power**0.5)


def scattered_stamps(rng: np.random.Generator, cell: float, stretch: float) -> dict[str, np.ndarray]:
    """Scatter ellipses over a jittered grid; returns the top one at each pixel.

    Args:
        cell: distance between neighbouring stamps, in pixels.
        stretch: length over width of a stamp.

    Returns:
        ``u``, ``v``: the pixel in the top stamp's frame, along and across its axis, in units of
        ``cell``; ``tone``: that stamp's random number in [0, 1); ``depth``: its order, 0 (bottom) to 1 (top), and -1
        where no stamp covers the pixel. All float32 (S, S).
    """
    count = int(SIZE / cell) + 4
    position = (np.arange(SIZE, dtype=np.float32) / np.float32(cell)) + 1.5
    home = position.astype(np.int64)
    jitter_y, jitter_x, angle, tone, depth = rng.random((5, count, count), dtype=np.float32)
    # Per stamp: position, axis, tone, depth. Each pixel checks the stamps of the surrounding 3 x 3 cells.
    number = np.arange(count, dtype=np.float32)
    angle = angle * np.float32(np.pi)
    stamps = np.stack([number[:, None] + jitter_y, number + jitter_x, np.cos(angle), np.sin(angle), tone, depth])
    best = None
    for dr in (-1, 0, 1):
        strip = stamps[:, home + dr]
        for dc in (-1, 0, 1):
            center_y, center_x, cos, sin, tone, depth = strip[:, :, home + dc]
            py, px = position[:, None] - center_y, position - center_x
            u, v = px * cos + py * sin, py * cos - px * sin
            depth = np.where(u * u + (v * np.float32(stretch)) ** 2 < 0.85, depth, np.float32(-1))
            found = np.stack([u, v, tone, depth])
            best = found if best is None else np.where(depth > best[3], found, best)
    return dict(zip(("u", "v", "tone", "depth"), best, strict=True))


def cell_distances(rng: np.random.Generator, cell: float, aspect: float = 1.0) -> tuple[np.ndarray, ...]:
    """Worley noise: distances to the two nearest points of a jittered grid, and the nearest one's number.

    Args:
        cell: spacing of the points along y, in pixels; along x it is ``cell * aspect``.

    Returns:
        (nearest, second, tone): float32 (S, S) each; distances in units of the spacing, tone in [0, 1).
    """
    width = cell * aspect
    rows, cols = int(SIZE / cell) + 4, int(SIZE / width) + 4
    row = np.arange(SIZE, dtype=np.float32) / np.float32(cell) + 1.5
    col = np.arange(SIZE, dtype=np.float32) / np.float32(width) + 1.5
    row0, col0 = row.astype(np.int64), col.astype(np.int64)
    draws = rng.random((3, rows, cols), dtype=np.float32)
    # Jitter stays in the middle 80 % of the cell: no slivers, and 3 x 3 cells nearly always contain the nearest
    # point.
    draws[0] = 0.1 + 0.8 * draws[0] + np.arange(rows, dtype=np.float32)[:, None]
    draws[1] = 0.1 + 0.8 * draws[1] + np.arange(cols, dtype=np.float32)
    nearest = np.full((SIZE, SIZE), 9, dtype=np.float32)
    second = nearest.copy()
    tone = np.zeros_like(nearest)
    for dr in (-1, 0, 1):
        strip = draws[:, row0 + dr]
        for dc in (-1, 0, 1):
            center_y, center_x, number = strip[:, :, col0 + dc]
            distance = np.hypot(row[:, None] - center_y, col - center_x)
            second = np.minimum(second, np.maximum(nearest, distance))
            tone = np.where(distance < nearest, number, tone)
            nearest = np.minimum(nearest, distance)
    return nearest, second, tone
