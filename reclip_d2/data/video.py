"""Frames of video files, and pictures as a video file, by PyAV.

Shape letters: (H, W) size in pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from reclip_d2.errors import ReclipError
from reclip_d2.utils.files import StrPath, check_regular, display_path
from reclip_d2.utils.io import atomic_write

EXTENSIONS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg")
_ENCODERS = ("libx264", "libopenh264", "mpeg4")  # the first that this build of PyAV has


@dataclasses.dataclass(frozen=True)
class Frame:
    """One picture of a video.

    Attributes:
        index: from 0, in the order of display.
        seconds: time of display.
        pixels: ``(H, W, 3)`` uint8, RGB, upright.
    """

    index: int
    seconds: Fraction
    pixels: np.ndarray


def is_video(path: StrPath) -> bool:
    """Whether a path's extension is a video's."""
    return Path(path).suffix.lower() in EXTENSIONS


def load_av() -> ModuleType:
    """PyAV; raise :class:`ReclipError` that names the extra if it is not installed."""
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise ReclipError("PyAV, which reads videos, is not installed: pip install 'reclip_d2[video]'") from error


class Video:
    """A video file: its first video stream."""

    def __init__(self, path: StrPath) -> None:
        """
        Raises:
            ReclipError: PyAV is not installed, or the file cannot be read or has no video.
        """
        self.path = Path(path)
        self._av = load_av()
        check_regular(path, "video")
        with self._stream() as (_, stream):
            self.rate: Fraction = stream.average_rate or stream.base_rate or Fraction(25)
            duration = stream.duration * stream.time_base if stream.duration else None
            self.expected_frames: int = stream.frames or (round(duration * self.rate) if duration else 0)

    @contextlib.contextmanager
    def _stream(self) -> Iterator[tuple[Any, Any]]:
        name = display_path(self.path)
        try:
            with self._av.open(str(self.path)) as container:
                if not container.streams.video:
                    raise ReclipError(f"video {name} has no pictures: give another file")
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                yield container, stream
        except (self._av.FFmpegError, OSError, ValueError) as error:
            reason = str(getattr(error, "strerror", "") or error)
            raise ReclipError(
                f"video {name} cannot be read ({reason}): convert it to MP4, or give another file"
            ) from error

    def frames(self) -> Iterator[Frame]:
        """All frames in the order of display.

        Raises:
            ReclipError: the file is damaged. The frames before the damage have been given.
        """
        with self._stream() as (container, stream):
            for index, frame in enumerate(container.decode(stream)):
                seconds = Fraction(index) / self.rate if frame.pts is None else frame.pts * frame.time_base
                pixels = frame.to_ndarray(format="rgb24")
                yield Frame(index, seconds, _upright(pixels, getattr(frame, "rotation", 0)))


def write_video(path: Path, pictures: Iterable[tuple[Fraction, np.ndarray]], rate: Fraction) -> None:
    """Write pictures as an MP4 file with H.264, at their times.

    Odd sides lose their last row or column, since H.264 needs even ones.

    Args:
        pictures: time of display in seconds, and pixels ``(H, W, 3)`` uint8 of one size.
        rate: frames per second, for programs that ask.
    """
    av = load_av()
    encoder = next((name for name in _ENCODERS if name in av.codecs_available), None)
    if encoder is None:
        raise ReclipError("this build of PyAV has no encoder for MP4: reinstall it, pip install 'reclip_d2[video]'")
    time_base = Fraction(1, 90_000)
    # The container's format follows the name, which a temporary file does not have.
    with atomic_write(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = None
        for seconds, pixels in pictures:
            height, width = (side - side % 2 for side in pixels.shape[:2])
            if stream is None:
                stream = container.add_stream(encoder, rate=rate)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                stream.codec_context.time_base = time_base
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[:height, :width]), format="rgb24")
            frame.pts, frame.time_base = round(seconds / time_base), time_base
            container.mux(stream.encode(frame))
        if stream is not None:
            container.mux(stream.encode())


def _upright(pixels: np.ndarray, degrees: int) -> np.ndarray:
    """Pixels turned by the display rotation that phones record, counter-clockwise, in steps of 90 degrees."""
    turns = round(degrees / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels
