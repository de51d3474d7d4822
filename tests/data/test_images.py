"""Reading images of all kinds."""

import numpy as np
import pytest
from PIL import Image

from reclip_d2.data.images import read_image
from reclip_d2.errors import ReclipError


def corners(height: int = 16, width: int = 24) -> np.ndarray:
    """Four quarters of one colour each: red, green / blue, white."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2] = (255, 0, 0)
    picture[: height // 2, width // 2 :] = (0, 255, 0)
    picture[height // 2 :, : width // 2] = (0, 0, 255)
    picture[height // 2 :, width // 2 :] = (255, 255, 255)
    return picture


def test_rgb(tmp_path):
    Image.fromarray(corners()).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.dtype == np.uint8 and image.shape == (16, 24, 3)
    assert (image == corners()).all()
    assert image.flags.writeable
    assert (read_image(str(tmp_path / "a.png")) == image).all()


# What each EXIF orientation asks for, by the position of the stored picture's corners after it is set upright.
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: x[::-1].transpose(1, 0, 2),  # rotate by 90 degrees clockwise
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: x[:, ::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(corners()).save(tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    image = read_image(tmp_path / "a.jpg").astype(int)
    expected = UPRIGHT[orientation](corners()).astype(int)
    assert image.shape == expected.shape
    assert np.abs(image - expected).mean() < 4


def test_grey(tmp_path):
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png") == grey[:, :, None]).all()


def test_grey_of_16_bits_is_scaled_and_not_clipped(tmp_path):
    grey = np.array([[0, 257, 25700], [32896, 65278, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.shape == (2, 3, 3)
    assert image[:, :, 0].tolist() == [[0, 1, 100], [128, 254, 255]]


def test_alpha_is_dropped(tmp_path):
    rgba = np.concatenate([corners(), np.full((16, 24, 1), 30, np.uint8)], axis=2)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png") == corners()).all()


def test_palette(tmp_path):
    Image.fromarray(corners()).quantize(8).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png") == corners()).all()


@pytest.mark.parametrize("mode", ["1", "LA", "CMYK"])
def test_other_modes_become_rgb(tmp_path, mode):
    name = "a.tif" if mode == "CMYK" else "a.png"
    Image.fromarray(corners()).convert(mode).save(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.shape == (16, 24, 3) and image.dtype == np.uint8
    expected = corners() if mode == "CMYK" else np.asarray(Image.fromarray(corners()).convert(mode).convert("RGB"))
    assert (image == expected).all()


def test_cmyk_jpeg(tmp_path):
    Image.fromarray(corners()).convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - corners()).mean() < 8


def message_of(path) -> str:
    with pytest.raises(ReclipError) as caught:
        read_image(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def test_missing_file(tmp_path):
    assert "does not exist" in message_of(tmp_path / "none.jpg")
    assert "does not exist" in message_of(tmp_path / "no_folder" / "none.jpg")


def test_folder(tmp_path):
    message_of(tmp_path)


@pytest.mark.parametrize("kind", ["text", "empty", "cut"])
def test_broken_file(tmp_path, kind):
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path, quality=95)
    path.write_bytes({"text": b"not an image", "empty": b"", "cut": path.read_bytes()[:1500]}[kind])
    assert "cannot be read" in message_of(path)


@pytest.mark.parametrize("cut", [20, 100, 200])
def test_broken_png(tmp_path, cut):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:cut])
    message_of(path)


def test_an_image_too_large_to_be_true(tmp_path, monkeypatch):
    """Pillow refuses "decompression bombs" by an error of its own."""
    Image.fromarray(corners()).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "cannot be read" in message_of(tmp_path / "a.png")


def test_floating_point_pixels(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")
    assert "floating-point" in message_of(tmp_path / "a.tif")
