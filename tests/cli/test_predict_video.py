"""``reclip predict clip.mp4``: masks by frame, the overlay, and how a run resumes."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from reclip_d2.data.video import Video, write_video
from tests.cli.conftest import all_files, picture, read_mask

FRAMES = 5


@pytest.fixture
def clip(tmp_path) -> Path:
    path = tmp_path / "clip.mp4"
    pictures = [np.roll(picture(3), 8 * k, axis=1) for k in range(FRAMES)]
    write_video(path, [(Fraction(k, 10), pixels) for k, pixels in enumerate(pictures)], Fraction(10))
    return path


@pytest.fixture
def predict(reclip, segment):
    """Predict the clip with MaskCLIP."""
    assert segment("--fast", output="fast").status == 0

    def run(*arguments: str, output: str = "video", opts: tuple[str, ...] = ()):
        call = ["predict", "clip.mp4", "--model", "fast", "--output", output, "--device", "cpu", *arguments]
        return reclip(*call, *(("--opts", *opts) if opts else ()))

    return run


def test_masks_and_overlay(predict, clip, tmp_path):
    result = predict()
    assert result.status == 0, result.err
    assert f"{FRAMES} masks by MaskCLIP ({FRAMES} new)" in result.out and "wood" in result.out
    names = [path.name for path in sorted((tmp_path / "video" / "masks").glob("*.png"))]
    assert names == [f"{k:06d}.png" for k in range(FRAMES)]
    assert read_mask(tmp_path / "video" / "masks" / names[0]).shape == (96, 96)
    overlay = list(Video(tmp_path / "video" / "overlay.mp4").frames())
    assert [float(frame.seconds) for frame in overlay] == pytest.approx([k / 10 for k in range(FRAMES)], abs=1e-3)

    masks = all_files(tmp_path / "video" / "masks")
    again = predict()
    assert again.status == 0 and "(0 new)" in again.out and all_files(tmp_path / "video" / "masks") == masks


@pytest.mark.parametrize("window", ["0", "1"])
def test_missing_masks_are_made_again_and_equal(predict, clip, tmp_path, window):
    opts = ("TEST.VIDEO_WINDOW", window)
    assert predict(opts=opts).status == 0
    masks = all_files(tmp_path / "video" / "masks")
    for k in (0, 3):
        (tmp_path / "video" / "masks" / f"{k:06d}.png").unlink()
    result = predict(opts=opts)
    assert result.status == 0 and "(2 new)" in result.out
    assert all_files(tmp_path / "video" / "masks") == masks


def test_other_settings_need_another_folder(predict, clip, tmp_path):
    assert predict().status == 0
    assert "masks of another video, model or setting" in predict(opts=("TEST.VIDEO_WINDOW", "1")).error
    assert predict("--overwrite", opts=("TEST.VIDEO_WINDOW", "1")).status == 0
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "letter.txt").write_text("x")
    assert "has other files" in predict(output="used").error
    assert (tmp_path / "used" / "letter.txt").exists()


def test_mistakes(predict, reclip, clip, tmp_path):
    assert "--formats coco: a video has index masks and an overlay" in predict("--formats", "coco").error
    call = ("predict", "clip.mp4", "photos", "--model", "fast", "--output", "x")
    assert "give one video, or images" in reclip(*call).error
    (tmp_path / "clip.mp4").write_bytes(b"broken")
    assert "cannot be read" in predict(output="y").error and not (tmp_path / "y" / "masks").exists()
