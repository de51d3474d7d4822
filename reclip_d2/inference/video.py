"""Predictions of the frames of a video, with temporal smoothing.

Shape letters: C classes, (h, w) patch grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

from reclip_d2.data.video import Frame
from reclip_d2.errors import ReclipError
from reclip_d2.inference.grid_logits import GridLogits
from reclip_d2.inference.predictor import Band, ImagePredictor

Predicted = tuple[Frame, Iterator[Band] | None]
"""A frame with its bands, see :meth:`ImagePredictor.bands`; None if it is not wanted."""


def predict_frames(
    predictor: ImagePredictor, frames: Iterable[Frame], window: int, wanted: Callable[[int], bool] = lambda _: True
) -> Iterator[Predicted]:
    """Predict the frames of a video.

    With a window K above 0, a frame's logits on the patch grid are the mean of those of the frames t - K to t + K that
    exist and have its size. At most 2 K + 1 frames are kept, and the result does not depend on where one begins.

    Args:
        window: K.
        wanted: by the index of a frame; frames that no wanted one needs do not pass through the network.

    Raises:
        ReclipError: regions come from masks of files; or smoothing is asked for, but frames are predicted in windows,
            tiles or views.
    """
    if predictor.region_masks is not None:
        raise ReclipError("TEST.REGION_VOTE.REGIONS masks is for image files, not for videos: use superpixels")
    if not window:
        for frame in frames:
            yield frame, predictor.bands(frame.pixels) if wanted(frame.index) else None
        return
    if predictor.sliding_window is not None or predictor.views is not None:
        raise ReclipError(
            "TEST.VIDEO_WINDOW smooths logits of whole frames: set TEST.SLIDING_WINDOW.ENABLED False, and remove flip"
            " and scales from TEST.REFINE"
        )
    smoother = _Smoother(predictor, window, wanted)
    for frame in frames:
        yield from smoother.add(frame)
    yield from smoother.finish()


class _Smoother:
    """The frames whose logits are still needed, and the position of the next one to give among them."""

    def __init__(self, predictor: ImagePredictor, window: int, wanted: Callable[[int], bool]) -> None:
        self._predictor, self._window, self._wanted = predictor, window, wanted
        self._kept: list[tuple[Frame, GridLogits | None]] = []
        self._next = 0

    def add(self, frame: Frame) -> Iterator[Predicted]:
        """Take a frame; give those that are complete."""
        if self._kept and self._kept[0][0].pixels.shape != frame.pixels.shape:
            yield from self.finish()
        self._kept.append((frame, self._logits(frame)))
        if len(self._kept) - 1 - self._next == self._window:
            yield self._give()

    def finish(self) -> Iterator[Predicted]:
        """Give the frames that are left."""
        while self._next < len(self._kept):
            yield self._give()
        self._kept, self._next = [], 0

    def _logits(self, frame: Frame) -> GridLogits | None:
        near = range(frame.index - self._window, frame.index + self._window + 1)
        if not any(index >= 0 and self._wanted(index) for index in near):
            return None
        size = (frame.pixels.shape[0], frame.pixels.shape[1])
        if self._predictor.tiling.applies_to(size):
            raise ReclipError("TEST.VIDEO_WINDOW smooths logits of whole frames: raise INPUT.TILES.FROM_SIDE")
        logits = self._predictor.network_logits(self._predictor.resize(frame.pixels), size)
        assert isinstance(logits, GridLogits)
        return logits

    def _give(self) -> Predicted:
        frame, logits = self._kept[self._next]
        bands = None
        if logits is not None and self._wanted(frame.index):
            total = sum(item.logits for _, item in self._kept if item is not None)
            mean = dataclasses.replace(logits, logits=total / len(self._kept))
            bands = self._predictor.bands_of(mean, mean.size)
        self._next += 1
        if self._next > self._window:
            self._kept.pop(0)
            self._next -= 1
        return frame, bands
