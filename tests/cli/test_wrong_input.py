"""Users' mistakes: one line, a non-zero status, and nothing half-written."""

import os

import numpy as np
import pytest
from PIL import Image

from tests.cli.conftest import picture


def nothing_written(tmp_path) -> None:
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sky\nsky\n", "line 2: 'sky' is also in line 1"),
        ("sky\nwood,\n", "line 2: an empty name"),
        ("sky\n" + "very " * 80 + "long name\n", "line 2: the name 'very very very"),
        ("", "names no class"),
        ("sky\n", "names only one class"),
        ("sky\n\u200b\n", "line 2"),
    ],
)
def test_class_files(segment, classes, tmp_path, text, words):
    classes.write_text(text)
    error = segment().error
    assert "classes.txt" in error and words in error
    nothing_written(tmp_path)


def test_class_file_of_another_encoding(segment, classes, tmp_path):
    classes.write_bytes("sky\nfum\xe9e\n".encode("latin-1"))
    assert "line 2: not UTF-8 text" in segment().error
    classes.unlink()
    os.mkfifo(classes)
    assert "class file classes.txt is a named pipe, not a regular file" in segment().error
    classes.unlink()
    assert "class file classes.txt does not exist: check --classes" in segment().error
    nothing_written(tmp_path)


def test_images_that_are_not_there(segment, tmp_path):
    assert "does not exist" in segment(images=("none",)).error
    (tmp_path / "empty").mkdir()
    assert "has no images" in segment(images=("empty",)).error
    (tmp_path / "empty" / "a.gif").touch()
    assert "its files are 1 .gif" in segment(images=("empty",)).error
    assert "none of .jpg" in segment(images=("empty/a.gif",)).error
    nothing_written(tmp_path)


def test_two_images_for_one_mask(segment, photos, tmp_path):
    Image.fromarray(picture(0)).save(photos / "0.png")
    assert "0.jpg and 0.png would share the mask 0.png" in segment().error
    nothing_written(tmp_path)


def test_a_name_that_is_no_utf8(segment, photos, tmp_path):
    (photos / "0.jpg").rename(photos / os.fsdecode(b"\xff.jpg"))
    assert "is not UTF-8: rename the file" in segment().error
    nothing_written(tmp_path)


def test_images_that_a_format_cannot_hold(segment, photos, tmp_path):
    """Known before the training, not after it."""
    (photos / "0.jpg").rename(photos / "#0.jpg")
    assert "'#0.jpg' cannot be written to CVAT's image list" in segment("--formats", "coco", "cvat").error
    Image.fromarray(np.zeros((700, 65501, 3), np.uint8)).save(photos / "wide.png")
    assert "the overlay of wide.png, 65501 x 700 pixels, is too large" in segment("--formats", "overlay").error
    nothing_written(tmp_path)


def test_output_that_is_the_folder_of_the_images(segment, photos):
    before = sorted(photos.rglob("*"))
    assert "IMAGES photos is the output folder: choose another" in segment(output="photos").error
    assert sorted(photos.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--formats", "gif"), "format 'gif' is unknown: choose from index, palette"),
        (("--device", "gpu"), "--device gpu is unknown"),
        (("--device", "cuda:77"), "--device cuda:77: there are"),
        (("--device", "meta"), "--device meta is not supported"),
        (("--iterations", "0"), "--iterations 0: give a number above 0"),
        (("--tile", "-5"), "--tile -5: give a number above 0"),
        (("--tile", "1"), "--tile is 1; it must be a whole number from 16"),
        (("--iterations", "3000000000"), "--iterations is 3000000000; it must be a whole number from 1"),
    ],
)
def test_arguments(segment, tmp_path, arguments, words):
    assert words in segment(*arguments).error
    nothing_written(tmp_path)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("", "--output is empty"),
        ("s3://bucket/x", "--output s3://bucket/x is a URL"),
        ("classes.txt", "is a file"),
        ("classes.txt/x", "is a file"),
        ("/proc/x", "cannot write to /proc"),
        ("x" * 300, "too long"),
        (os.fsdecode(b"\xff"), "is not UTF-8"),
    ],
)
def test_outputs_that_cannot_be_made(segment, tmp_path, output, words):
    before = sorted(tmp_path.iterdir())
    assert words in segment(output=output).error
    assert sorted(tmp_path.iterdir()) == before


def test_keys(segment, tmp_path):
    assert "NONSENSE" in segment(keys=("NONSENSE", "1")).error
    assert "has no value" in segment(keys=("SOLVER.BASE_LR",)).error
    assert "there is no key SOLVER.BASE_RL; did you mean SOLVER.BASE_LR?" in segment(keys=("SOLVER.BASE_RL", "1")).error
    assert "TEST.BAND_MEMORY is 0; it must be" in segment(keys=("TEST.BAND_MEMORY", "0")).error
    assert "--iterations is 0; it must be" in segment(keys=("SOLVER.MAX_ITER", "0")).error
    assert "MODEL.MASK_DECODER.NORM 'GN' does not work" in segment(keys=("MODEL.MASK_DECODER.NORM", "GN")).error
    assert "MODEL.BIAS_HEAD.NAME 'X' is not registered" in segment(keys=("MODEL.BIAS_HEAD.NAME", "X")).error
    nothing_written(tmp_path)


def test_clip(reclip, photos, classes, tmp_path):
    call = ("segment", "photos", "--classes", "classes.txt", "--output", "out", "--fast")
    assert "--clip ViT-Z is not known to open_clip" in reclip(*call, "--clip", "ViT-Z").error
    assert "its image tower is a ResNet" in reclip(*call, "--clip", "RN50").error
    error = reclip(*call, "--pretrained", "no_such_tag").error
    assert "--pretrained no_such_tag is neither a file nor a tag" in error and "openai" in error
    nothing_written(tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"no weights")
    assert "weights.pt cannot be read as tensors" in reclip(*call, "--pretrained", "weights.pt").error


def test_a_hub_that_cannot_be_reached(reclip, photos, classes, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOME", str(tmp_path))  # where no weights are
    error = reclip("segment", "photos", "--classes", "classes.txt", "--output", "out").error
    assert "server cannot be reached: download https://" in error and "pass the file with --pretrained FILE" in error
    nothing_written(tmp_path)


def test_student_weights_are_looked_for_at_the_start(segment, tmp_path):
    error = segment("--student", "--student-weights", str(tmp_path / "none.pth")).error
    assert "--student-weights" in error and "does not exist" in error
    nothing_written(tmp_path)


def test_output_that_cannot_be(segment, tmp_path):
    (tmp_path / "out").write_text("a file")
    assert "is a file: name a folder" in segment().error
    assert (tmp_path / "out").read_text() == "a file"


def test_a_full_disk_is_one_line(segment, monkeypatch):
    from reclip_d2.formats import IndexWriter

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "out/masks/0.png")

    monkeypatch.setattr(IndexWriter, "_add", full)
    assert "out/masks/0.png: No space left on device" in segment("--fast").error


def test_images_that_are_no_images(segment, photos, tmp_path):
    """None is waited for, or handed to another program, and the others get their masks."""
    os.mkfifo(photos / "pipe.jpg")
    (photos / "loop.png").symlink_to("loop.png")
    (photos / "zero.bmp").symlink_to("/dev/zero")
    (photos / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    result = segment("--fast")
    assert "4 of 10 images have no mask (listed above)" in result.error
    for words in (
        "image {}/pipe.jpg is a named pipe, not a regular file",
        "image {}/loop.png is a loop of symbolic links",
        "image {}/zero.bmp is a device, not a regular file",
        "image {}/program.png cannot be read (it is a PostScript file, not JPEG, PNG,",
    ):
        assert words.format(photos) in result.out
    assert len(list((tmp_path / "out" / "masks").rglob("*.png"))) == 6


def test_odd_images_all_get_masks(segment, tmp_path):
    """Grey, alpha, palette, CMYK, 16 bits, one pixel, thin ones, pages and upper-case names."""
    odd = tmp_path / "odd"
    odd.mkdir()
    image = Image.fromarray(picture(1, 40, 60))
    for mode, name in (
        ("L", "grey.png"), ("LA", "grey_alpha.png"), ("RGBA", "alpha.png"), ("P", "palette.png"), ("1", "bits.png"),
        ("CMYK", "cmyk.jpg"), ("CMYK", "cmyk too.tif"), ("RGB", "UPPER.JPG"), ("RGB", "a.bmp"), ("RGB", "a b é.webp"),
    ):  # fmt: skip
        image.convert(mode).save(odd / name)
    Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27).save(odd / "deep.png")
    image.save(odd / "pages.tif", save_all=True, append_images=[image.rotate(180)])
    Image.fromarray(np.linspace(-1, 1, 2400, dtype=np.float32).reshape(40, 60)).save(odd / "measured.tif")
    image.resize((1, 1)).save(odd / "pixel.png")
    image.resize((300, 3)).save(odd / "wide.png")
    image.resize((3, 300)).save(odd / "high.png")
    image.save(odd / "moving.gif")
    result = segment(images=("odd",))
    assert "left out: 1 .gif\n" in result.out
    assert "2 images have an alpha channel: transparent regions are read as white\n" in result.out
    assert result.status == 0, result.err
    (odd / "moving.gif").unlink()
    (odd / "pages.tif").replace(odd / "pages_page_0002.tif")
    for path in odd.iterdir():
        with Image.open(path) as source, Image.open(tmp_path / "out" / "masks" / f"{path.stem}.png") as mask:
            assert mask.size == source.size, path


def test_an_image_that_is_too_thin(segment, tmp_path, photos):
    Image.fromarray(picture(0, 1, 101)).save(photos / "line.png")
    result = segment("--fast")
    assert "1 of 7 images have no mask" in result.error and "101 x 1 pixels" in result.out
