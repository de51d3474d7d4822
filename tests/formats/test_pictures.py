"""Index masks, palette masks, overlays and scores."""

from pathlib import PurePosixPath

import numpy as np
import pytest
from PIL import Image

from reclip_d2.errors import ReclipError
from reclip_d2.formats import FORMATS, IndexWriter, MaskClasses, Prediction, ScoresWriter, read_index
from reclip_d2.formats import pictures as module
from tests.formats.sample import CLASSES, COLORS, IGNORE, NAMES

PATH = PurePosixPath("a b/c.1.jpg")
LABELS = np.array([[0, 1, 2], [3, IGNORE, 0]], dtype=np.uint8)
MANY = MaskClasses.make([f"class {k}" for k in range(300)])
MANY_LABELS = np.array([[0, 255, 256], [299, 65535, 1]], dtype=np.uint16)


def write(folder, name, classes=CLASSES, labels=LABELS, path=PATH, options=None, **arrays):
    with FORMATS[name](folder, classes, **(options or {})) as writer:
        assert not writer.is_done(path)
        writer.add(Prediction(path, labels, **arrays))
        assert writer.is_done(path)
        writer.finish()
        (file,) = writer.files(path)
    return file


def test_index_holds_the_ids(tmp_path):
    file = write(tmp_path, "index")
    assert file == tmp_path / "a b" / "c.1.png"
    with Image.open(file) as image:
        assert image.mode == "L" and np.array_equal(np.asarray(image), LABELS)
    assert MaskClasses.read(tmp_path) == CLASSES


def test_index_of_300_classes_has_16_bits(tmp_path):
    file = write(tmp_path, "index", MANY, MANY_LABELS)
    with Image.open(file) as image:
        assert image.mode == "I;16" and np.array_equal(np.asarray(image), MANY_LABELS)
    assert np.array_equal(read_index(file, MANY), MANY_LABELS)


def test_palette_shows_the_colours_and_keeps_the_ids(tmp_path):
    with Image.open(write(tmp_path, "palette")) as image:
        assert image.mode == "P" and np.array_equal(np.asarray(image), LABELS)
        shown = np.asarray(image.convert("RGB"))
    black = (0, 0, 0)
    expected = [[COLORS[0], COLORS[1], COLORS[2]], [COLORS[3], black, COLORS[0]]]
    assert np.array_equal(shown, np.array(expected))


def test_palette_of_300_classes_is_rgb(tmp_path):
    with Image.open(write(tmp_path, "palette", MANY, MANY_LABELS)) as image:
        assert image.mode == "RGB"
        shown = np.asarray(image)
    assert tuple(shown[1, 0]) == MANY.colors[299] and tuple(shown[0, 1]) == MANY.colors[255]
    assert shown[1, 1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("strip", [1, 256])
def test_overlay_blends_and_spares_ignored_pixels_and_background(tmp_path, monkeypatch, strip):
    monkeypatch.setattr(module, "_STRIP", strip)
    image = np.full((2, 3, 3), 100, dtype=np.uint8)
    file = write(tmp_path, "overlay", options={"opacity": 0.25, "suffix": ".png"}, image=image)
    assert file.name == "c.1.png"
    # 100 * 0.75 + colour * 0.25, rounded.
    first, second, same = [75, 107, 75], [78, 80, 133], [100, 100, 100]
    with Image.open(file) as picture:
        assert np.asarray(picture).tolist() == [[first, second, first], [same, same, first]]


def test_overlay_is_a_jpeg(tmp_path):
    image = np.full((2, 3, 3), 100, dtype=np.uint8)
    file = write(tmp_path, "overlay", image=image)
    with Image.open(file) as picture:
        assert file.name == "c.1.jpg" and picture.format == "JPEG" and picture.size == (3, 2)


@pytest.mark.parametrize(
    ("options", "words"), [({"opacity": 1.5}, "opacity is 1.5"), ({"suffix": ".gif"}, "choose .jpg or .png")]
)
def test_overlay_options_that_are_refused(tmp_path, options, words):
    with pytest.raises(ReclipError, match=words):
        FORMATS["overlay"](tmp_path, CLASSES, **options)


def test_overlay_too_large_for_jpeg(tmp_path):
    labels = np.zeros((1, module.JPEG_MAX_SIDE + 1), dtype=np.uint8)
    image = np.zeros((*labels.shape, 3), dtype=np.uint8)
    with pytest.raises(ReclipError, match=r"too large for JPEG \(\d+ per side\): omit"):
        write(tmp_path, "overlay", labels=labels, image=image)


def test_scores_come_back(tmp_path):
    scores = np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float16)
    with np.load(write(tmp_path, "scores", scores=scores), allow_pickle=False) as file:
        assert file["scores"].dtype == np.float16 and np.array_equal(file["scores"], scores)
        assert file["class_names"].tolist() == NAMES


@pytest.mark.parametrize("name", ["overlay", "scores"])
def test_what_a_format_needs_must_be_given(tmp_path, name):
    with pytest.raises(ValueError, match=r"needs image or scores of a b/c\.1\.jpg"):
        write(tmp_path, name)


def test_scores_of_another_number_of_classes(tmp_path):
    with pytest.raises(ValueError, match="have 3 classes"), ScoresWriter(tmp_path, CLASSES) as writer:
        writer.add(Prediction(PATH, LABELS, scores=np.zeros((3, 2, 3), np.float16)))


def test_a_mask_that_is_none_is_one_line(tmp_path):
    file = tmp_path / "a.png"
    with pytest.raises(ReclipError, match="is missing"):
        read_index(file, CLASSES)
    noise = np.random.default_rng(0).integers(0, 4, (20, 30)).astype(np.uint8)
    whole = write(tmp_path, "index", labels=noise).read_bytes()
    for content in (b"", b"no picture", whole[:45], whole[: len(whole) // 2], whole[:20] + whole[30:]):
        file.write_bytes(content)
        with pytest.raises(ReclipError, match=r"a\.png cannot be read"):
            read_index(file, CLASSES)
    for mode in ("RGB", "I;16", "LA"):
        Image.new(mode, (3, 2)).save(file)
        with pytest.raises(ReclipError, match=f"is a {mode} image"):
            read_index(file, CLASSES)
    Image.new("L", (3, 2), 9).save(file)
    with pytest.raises(ReclipError, match="has id 9"):
        read_index(file, CLASSES)


def test_a_palette_mask_that_was_optimised(tmp_path):
    """Optimisers drop unused colours and put the others into their own order: the colours still name the classes."""
    classes = MaskClasses.make(["a", "b", "c"], [[9, 0, 0], [0, 9, 0], [0, 0, 9]])
    labels = np.array([[0, 1, 255], [2, 2, 0]], np.uint8)
    file = tmp_path / "mask.png"
    mask = Image.fromarray(labels)
    mask.putpalette(classes.table().tobytes())
    mask.save(file)
    assert np.array_equal(read_index(file, classes), labels)
    mask = Image.fromarray(np.array([[3, 1, 2], [0, 0, 3]], np.uint8))
    mask.putpalette([0, 0, 9, 0, 9, 0, 0, 0, 0, 9, 0, 0])
    mask.save(file)
    assert np.array_equal(read_index(file, classes), labels)
    mask.putpalette([0, 0, 9, 0, 9, 0, 0, 0, 0, 8, 0, 0])
    mask.save(file)
    with pytest.raises(ReclipError, match=r"mask .*mask\.png is a palette image .* colour \(8, 0, 0\)"):
        read_index(file, classes)


def test_an_index_folder_of_other_classes_is_refused(tmp_path):
    IndexWriter(tmp_path, CLASSES)
    with pytest.raises(ReclipError, match="another class list"):
        IndexWriter(tmp_path, MANY)


def test_masks_larger_than_pillows_limit_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)
    file = write(tmp_path, "index")
    assert np.array_equal(read_index(file, CLASSES), LABELS)
