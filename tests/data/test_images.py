"""Reading images of all kinds."""

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from reclip_d2.data import image_file, images, samples
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


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
@pytest.mark.parametrize("block", [b"Exif\0\0nonsense", b"Exif\0\0MM\0*"])
def test_a_damaged_exif_block_is_passed_over(tmp_path, caplog, name, block):
    """The pixels are sound. The log names the file, once."""
    path = tmp_path / name
    # With a resolution: without one Pillow itself looks into a JPEG's EXIF block for it, and forgives the damage.
    options = {"quality": 100, "subsampling": 0, "dpi": (72, 72)} if name == "a.jpg" else {"lossless": True}
    Image.fromarray(corners()).save(path, exif=block, **options)
    with caplog.at_level(logging.WARNING, images.__name__):
        for _ in range(3):
            assert np.abs(read_image(path).astype(int) - corners()).mean() < 4
    (message,) = [record.getMessage() for record in caplog.records if record.name == images.__name__]
    assert str(path) in message


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


def test_tiff_orientation_is_applied_once(tmp_path):
    """Pillow itself turns TIFFs."""
    Image.fromarray(corners()).save(tmp_path / "a.tif", tiffinfo={0x0112: 6})
    assert (read_image(tmp_path / "a.tif") == UPRIGHT[6](corners())).all()


@pytest.mark.parametrize("extension", ["png", "webp"])
def test_orientation_of_other_formats(tmp_path, extension):
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(corners()).save(tmp_path / f"a.{extension}", exif=exif, lossless=True)
    assert (read_image(tmp_path / f"a.{extension}") == UPRIGHT[8](corners())).all()


def test_first_of_several_pages(tmp_path):
    pages = [Image.fromarray(corners()), Image.fromarray(255 - corners())]
    for name in ("a.tif", "a.webp"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:], lossless=True)
        assert (read_image(tmp_path / name) == corners()).all(), name


def test_transparent_regions_are_white(tmp_path):
    """By hand: 30 of 255 parts of the colour, the rest white."""
    alpha = np.full((16, 24, 1), 255, np.uint8)
    alpha[:8, :12], alpha[:8, 12:] = 0, 30
    expected = corners()
    expected[:8, :12] = 255
    expected[:8, 12:] = (225, 255, 225)
    rgba = Image.fromarray(np.concatenate([corners(), alpha], axis=2))
    for name in ("a.png", "a.tif", "a.webp"):
        rgba.save(tmp_path / name, lossless=True, exact=True)
        assert (read_image(tmp_path / name) == expected).all(), name
    grey = np.dstack([np.full((16, 24), 10, np.uint8), alpha[..., 0]])
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert np.unique(read_image(tmp_path / "a.png")).tolist() == [10, 226, 255]


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


def test_pillows_limit_is_not_ours(tmp_path, monkeypatch, recwarn):
    """Pillow refuses images of 179 million pixels as "decompression bombs"; scans and aerial images have more."""
    Image.fromarray(corners()).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert (read_image(tmp_path / "a.png") == corners()).all()
    assert Image.MAX_IMAGE_PIXELS == 100
    assert not recwarn.list


def test_our_limit_on_pixels(tmp_path, monkeypatch):
    assert image_file.MAX_PIXELS > 20_000 * 20_000
    Image.fromarray(corners()).save(tmp_path / "a.png")
    monkeypatch.setattr(image_file, "MAX_PIXELS", 16 * 24 - 1)
    assert "24 x 16 pixels, more than 383" in message_of(tmp_path / "a.png")


def test_a_header_that_promises_too_much(tmp_path):
    """Nothing is allocated before the limit is asked."""
    Image.fromarray(corners()).save(tmp_path / "a.bmp")
    data = bytearray((tmp_path / "a.bmp").read_bytes())
    data[18:26] = (100_000).to_bytes(4, "little") * 2  # width and height
    (tmp_path / "a.bmp").write_bytes(data)
    assert "100000 x 100000 pixels" in message_of(tmp_path / "a.bmp")


def test_rows_are_converted_in_strips(tmp_path, monkeypatch):
    picture = np.random.default_rng(0).integers(0, 256, (50, 7, 3), dtype=np.uint8)
    monkeypatch.setattr(samples, "_STRIP", 16)
    for mode in ("RGB", "L", "P", "CMYK"):
        image = Image.fromarray(picture).convert(mode)
        image.save(tmp_path / f"{mode}.tif")
        assert (read_image(tmp_path / f"{mode}.tif") == np.asarray(image.convert("RGB"))).all(), mode


def test_threads_leave_pillows_limit_as_it_was(tmp_path):
    Image.fromarray(corners()).save(tmp_path / "a.png")
    before = Image.MAX_IMAGE_PIXELS
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read_image, [tmp_path / "a.png"] * 64))
    assert before == Image.MAX_IMAGE_PIXELS
