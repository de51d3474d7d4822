"""Videos: frames and times, what cannot be read, and what is written."""

import sys
from fractions import Fraction

import av
import numpy as np
import pytest

from reclip_d2.data.video import Video, _upright, is_video, write_video
from reclip_d2.errors import ReclipError


def picture(level: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Grey levels that change from left to right, by more than the loss of the codec."""
    return np.repeat(np.clip(level + 3 * np.arange(width), 0, 255).astype(np.uint8)[None, :, None], height, 0).repeat(
        3, 2
    )


def test_frames_and_their_times_come_back(tmp_path):
    """Of a variable rate, too."""
    times = [Fraction(0), Fraction(1, 10), Fraction(3, 10), Fraction(1, 2)]
    write_video(tmp_path / "a.mp4", [(time, picture(20 * k)) for k, time in enumerate(times)], Fraction(10))
    video = Video(tmp_path / "a.mp4")
    frames = list(video.frames())
    assert [frame.index for frame in frames] == [0, 1, 2, 3] and video.expected_frames == 4
    assert [float(frame.seconds) for frame in frames] == pytest.approx([0, 0.1, 0.3, 0.5], abs=1e-3)
    for k, frame in enumerate(frames):
        assert frame.pixels.shape == (32, 48, 3)
        assert np.abs(frame.pixels.astype(int) - picture(20 * k)).mean() < 6


def test_odd_sides_lose_a_pixel(tmp_path):
    write_video(tmp_path / "a.mp4", [(Fraction(0), picture(0, 33, 47))], Fraction(25))
    assert next(Video(tmp_path / "a.mp4").frames()).pixels.shape == (32, 46, 3)


def test_nothing_is_left_of_an_interrupted_video(tmp_path):
    def pictures():
        yield Fraction(0), picture(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "a.mp4", pictures(), Fraction(25))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("degrees", [0, 90, -90, 180, 270])
def test_rotation_of_phones(degrees):
    """Counter-clockwise by 90 degrees moves the right column to the top."""
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3, 1).repeat(3, 2)
    expected = {0: [[0, 1, 2], [3, 4, 5]], 90: [[2, 5], [1, 4], [0, 3]], 180: [[5, 4, 3], [2, 1, 0]]}
    expected |= {-90: [[3, 0], [4, 1], [5, 2]], 270: [[3, 0], [4, 1], [5, 2]]}
    assert _upright(pixels, degrees)[:, :, 0].tolist() == expected[degrees]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ReclipError, match="does not exist"):
        Video(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(ReclipError, match=r"video .*text.mp4 cannot be read \(.*\): convert it to MP4"):
        Video(tmp_path / "text.mp4")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(ReclipError, match="has no pictures"):
        Video(tmp_path / "sound.mp4")


def test_a_truncated_video_gives_its_frames_first(tmp_path):
    rng = np.random.default_rng(0)
    noise = [(Fraction(k, 25), rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for k in range(20)]
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 64
        for _, pixels in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    data = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "b.mkv").write_bytes(data[: len(data) // 2])
    count = sum(1 for _ in Video(tmp_path / "b.mkv").frames())
    assert 0 < count < 20


def test_without_pyav(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ReclipError, match=r"not installed: pip install 'reclip_d2\[video\]'"):
        Video(tmp_path / "a.mp4")


def test_extensions():
    assert is_video("x/clip.MP4") and is_video("a.webm") and not is_video("a.png") and not is_video("mp4")
