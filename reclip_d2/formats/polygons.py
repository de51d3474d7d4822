"""Exact polygons of a label map's regions, along the edges of pixels.

Pixel (x, y) covers the square from (x, y) to (x + 1, y + 1). A region is a set of pixels of one label, joined by their
sides; pixels that touch only at a corner are in different regions. Its polygon encloses the centres of its pixels and
no others.

A polygon is one closed line: holes are cut out through slits, lines from the outer boundary to the hole and back. A
slit is invisible in the filled polygon, for either fill rule.

Segments are the straight parts of the boundaries, with the region on their right. Shape letters: (H, W) size of
the mask, S segments, P points.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

import numpy as np

# Pixels compared at a time: limits the memory for very large label maps.
_BLOCK = 1 << 24


@dataclasses.dataclass(frozen=True)
class _Segments:
    """Segments of one direction, sorted by line, then by their start on it.

    Attributes:
        line: ``(S,)`` y of horizontal, x of vertical segments.
        low, high: ``(S,)`` the ends on that line, low < high.
        forward: ``(S,)`` bool: from low to high; rightwards or downwards.
    """

    line: np.ndarray
    low: np.ndarray
    high: np.ndarray
    forward: np.ndarray

    @property
    def start(self) -> np.ndarray:
        return np.where(self.forward, self.low, self.high)

    @property
    def end(self) -> np.ndarray:
        return np.where(self.forward, self.high, self.low)


def polygons(labels: np.ndarray, wanted: Collection[int]) -> Iterator[tuple[int, list[np.ndarray]]]:
    """The regions of the labels of a label map.

    Args:
        labels: ``(H, W)`` unsigned integers.
        wanted: which labels.

    Yields:
        Each wanted label that occurs, ascending, with one polygon per region: ``(P, 2)`` int64 (x, y), clockwise on the
        screen, without repeating the first point; regions in the order of their highest, then leftmost pixel.
    """
    height, width = labels.shape
    vertical = _edges_by_label(labels.T, wanted)
    for label, (keys, upper) in _edges_by_label(labels, wanted).items():
        yield label, _regions(_segments(keys, upper, width), vertical[label], height, width)


def _regions(horizontal: _Segments, edges: tuple[np.ndarray, np.ndarray], height: int, width: int) -> list[np.ndarray]:
    """Polygons of one label: its horizontal segments, and its vertical edges from :func:`_edges_by_label`."""
    keys, is_left = edges
    vertical = _segments(keys, ~is_left, height)  # left edges are walked upwards
    following = _follow(horizontal, vertical, width)
    boundary = _smallest_on_cycle(following)
    count = len(horizontal.line)

    # A boundary's first segment is its highest, leftmost edge: of an outer boundary walked to the right.
    outer = [first for first in np.unique(boundary).tolist() if horizontal.forward[first]]
    # A hole's leftmost, highest edge; outer boundaries walk theirs upwards.
    _, leftmost = np.unique(boundary[count:], return_index=True)
    hole_edges = leftmost[vertical.forward[leftmost]]
    x, y = vertical.line[hole_edges], vertical.low[hole_edges]
    # To the left in its top pixel's row is the region, up to the next left edge, whose segment is the parent.
    left_x, left_y = np.divmod(keys[is_left], height)
    left = np.sort(left_y * (width + 1) + left_x)
    meet = left[np.searchsorted(left, y * (width + 1) + x) - 1] % (width + 1)
    parents = np.searchsorted(vertical.line * height + vertical.low, meet * height + y, side="right") - 1

    boundaries = _Boundaries(
        xs=np.concatenate([horizontal.start, vertical.line]).tolist(),
        ys=np.concatenate([horizontal.line, vertical.start]).tolist(),
        following=following.tolist(),
    )
    for hole in np.lexsort([y, parents]).tolist():  # the lowest on a parent last: met first on the way up
        boundaries.cut(count + int(parents[hole]), count + int(hole_edges[hole]))
    return [boundaries.walk(first) for first in outer]


def _edges_by_label(labels: np.ndarray, wanted: Collection[int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Horizontal edges of the pixels of each label, where another label or the image's border is beyond.

    Args:
        labels: ``(H, W)``; the transposed map gives vertical edges.
        wanted: which labels.

    Returns:
        For each wanted label that occurs, ascending, its edges by line, then by position on it: ``line * W +
        position`` int64, and bool: whether the label is below the edge, not above it.
    """
    height, width = labels.shape
    step = max(1, _BLOCK // width)
    # The border: all pixels of the first and last row.
    keys, owners, below = [np.arange(width)], [labels[0]], [np.ones(width, dtype=bool)]
    for first in range(1, height, step):
        upper, lower = labels[first - 1 : min(first + step, height) - 1], labels[first : first + step]
        line, position = np.nonzero(upper != lower)
        for rows, is_below in ((upper, False), (lower, True)):
            keys.append((line + first) * width + position)
            owners.append(rows[line, position])
            below.append(np.full(len(line), is_below))
    keys.append(height * width + np.arange(width))
    owners.append(labels[-1])
    below.append(np.zeros(width, dtype=bool))

    key, owner, is_below = np.concatenate(keys), np.concatenate(owners), np.concatenate(below)
    chosen = np.isin(owner, list(wanted))
    key, owner, is_below = key[chosen], owner[chosen], is_below[chosen]
    order = np.lexsort([key, owner])
    present, starts = np.unique(owner[order], return_index=True)
    parts = np.split(order, starts[1:])
    return {label: (key[part], is_below[part]) for label, part in zip(present.tolist(), parts, strict=False)}


def _segments(keys: np.ndarray, forward: np.ndarray, length: int) -> _Segments:
    """Join neighbouring edges of one direction.

    Args:
        keys: keys of edges, ascending: line * length + position.
        forward: for each edge whether it is walked forward.
        length: positions of a line.
    """
    line, position = np.divmod(keys, length)
    breaks = (np.diff(keys) != 1) | (np.diff(line) != 0) | (forward[1:] != forward[:-1])
    first = np.concatenate([[0], np.flatnonzero(breaks) + 1])
    last = np.append(first[1:], len(keys)) - 1
    return _Segments(line[first], position[first], position[last] + 1, forward[first])


def _follow(horizontal: _Segments, vertical: _Segments, width: int) -> np.ndarray:
    """The next segment along the boundary for each segment, horizontal ones first."""
    h_start = horizontal.line * (width + 1) + horizontal.start
    h_end = horizontal.line * (width + 1) + horizontal.end
    v_start = vertical.start * (width + 1) + vertical.line
    v_end = vertical.end * (width + 1) + vertical.line
    # Where two pixels touch at a corner, turn right, so that the boundary stays with its pixel: down after going right,
    # left after going down, and so on.
    after_h = _starting_at(h_end, horizontal.forward, v_start, vertical.forward)
    after_v = _starting_at(v_end, ~vertical.forward, h_start, horizontal.forward)
    return np.concatenate([after_h + len(h_start), after_v])


def _starting_at(points: np.ndarray, preferred: np.ndarray, start: np.ndarray, forward: np.ndarray) -> np.ndarray:
    """For each point the segment that starts there; of two the one whose ``forward`` is ``preferred``."""
    keys = start * 2 + forward
    order = np.argsort(keys)
    keys = keys[order]
    wanted = points * 2 + preferred
    found = np.searchsorted(keys, wanted)
    missing = (found == len(keys)) | (keys[np.minimum(found, len(keys) - 1)] != wanted)
    found[missing] = np.searchsorted(keys, points[missing] * 2 + ~preferred[missing])
    return order[found]


def _smallest_on_cycle(following: np.ndarray) -> np.ndarray:
    """For each element of a permutation the smallest of its cycle, by doubling the steps."""
    smallest, jump = np.arange(len(following)), following
    for _ in range(len(following).bit_length()):
        smallest = np.minimum(smallest, smallest[jump])
        jump = jump[jump]
    return smallest


class _Boundaries:
    """Closed lists of points; the points are the segments' starts, and those of slits."""

    def __init__(self, xs: list[int], ys: list[int], following: list[int]) -> None:
        self.xs, self.ys, self.following = xs, ys, following
        self.preceding = [0] * len(following)
        for segment, after in enumerate(following):
            self.preceding[after] = segment

    def _insert(self, after: int, x: int, y: int) -> int:
        self.xs.append(x)
        self.ys.append(y)
        self.following.append(self.following[after])
        self.following[after] = len(self.following) - 1
        return self.following[after]

    def cut(self, parent: int, edge: int) -> None:
        """Join a hole to the boundary on its left.

        Args:
            parent: vertical segment, walked upwards, that the slit meets.
            edge: the hole's vertical segment, walked downwards, from whose start the slit leads to the left.
        """
        y = self.ys[edge]
        here = self._insert(parent, self.xs[parent], y)
        back = self._insert(here, self.xs[parent], y)
        last = self.preceding[edge]  # horizontal: nothing was inserted after it
        self.following[here] = edge
        self.following[last] = back
        self._insert(last, self.xs[edge], y)

    def walk(self, first: int) -> np.ndarray:
        """Points ``(P, 2)`` of the boundary of segment ``first`` and of all holes joined to it."""
        points, node = [], first
        while True:
            point = (self.xs[node], self.ys[node])
            if not points or points[-1] != point:  # a slit may meet a corner
                points.append(point)
            node = self.following[node]
            if node == first:
                return np.array(points, dtype=np.int64)
