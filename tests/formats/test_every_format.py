"""Requirements on every format: odd sizes, ignored images, single classes, many classes, any order."""

from pathlib import Path, PurePosixPath

import numpy as np
import pytest

from reclip_d2 import formats
from reclip_d2.errors import ReclipError
from reclip_d2.formats import FORMATS, IndexWriter, MaskClasses, Prediction, Writer, check_formats, write_formats
from reclip_d2.formats.registry import Formats
from reclip_d2.formats.yolo import YoloWriter
from reclip_d2.utils.io import atomic_write
from tests.formats.sample import CLASSES, IGNORE, sample_labels

LABEL_MAPS = {
    "one pixel": np.zeros((1, 1), np.uint8),
    "one row": np.array([[0, 1, 1, IGNORE, 2]], np.uint8),
    "one column": np.array([[0], [1], [1], [3], [2]], np.uint8),
    "all ignored": np.full((3, 5), IGNORE, np.uint8),
    "one class": np.full((3, 5), 2, np.uint8),
    "background alone": np.full((3, 5), 3, np.uint8),
    "not contiguous": np.array([[0, 1, 2], [3, IGNORE, 0]], np.uint8).T,
    "int64": np.array([[0, 1, 2], [3, IGNORE, 0]]),
}


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def predictions(label_maps: dict[str, np.ndarray], num_classes: int) -> list[Prediction]:
    """Predictions with all that any format needs."""
    return [
        Prediction(
            PurePosixPath(path),
            labels,
            image=np.full((*labels.shape, 3), 9, np.uint8),
            scores=np.zeros((num_classes, *labels.shape), np.float16),
        )
        for path, labels in label_maps.items()
    ]


def write(folder: Path, name: str, classes: MaskClasses, items: list[Prediction]) -> dict[str, bytes]:
    with FORMATS[name](folder, classes) as writer:
        for prediction in items:
            writer.add(prediction)
        writer.finish()
    return tree(folder)


@pytest.mark.parametrize("name", FORMATS)
def test_odd_label_maps_are_written_the_same_in_any_order(tmp_path, name):
    items = predictions({f"{key}.jpg": labels for key, labels in LABEL_MAPS.items()}, len(CLASSES.names))
    first = write(tmp_path / "1", name, CLASSES, items)
    assert first and write(tmp_path / "2", name, CLASSES, items[::-1]) == first
    assert not [path for path in first if ".tmp" in path]


@pytest.mark.parametrize("name", FORMATS)
def test_spaces_and_marks_of_all_scripts_in_names(tmp_path, name):
    """U+202F as in macOS's screenshots, a no-break space, an ideographic one, a mark of direction, joined letters."""
    images = ["Screen Shot at 9.41.00\u202fAM", "a\xa0b", "雲\u3000雲", "a\u200eb", "👩\u200d🌾", "a#'\"b"]
    labels = np.array([[0, 1], [2, IGNORE]], np.uint8)
    items = predictions({f"in {stem}/{stem}.jpg": labels for stem in images}, len(CLASSES.names))
    write(tmp_path, name, CLASSES, items)
    with FORMATS[name](tmp_path, CLASSES) as writer:
        assert all(file.exists() for item in items for file in writer.files(item.path))


@pytest.mark.parametrize("name", FORMATS)
def test_no_image_at_all(tmp_path, name):
    write(tmp_path, name, CLASSES, [])


@pytest.mark.parametrize("name", FORMATS)
def test_a_single_class_and_300_classes(tmp_path, name):
    one = MaskClasses.make(["only"], background=0)
    write(tmp_path / "one", name, one, predictions({"a.jpg": np.array([[0, 255]], np.uint8)}, 1))
    many = MaskClasses.make([f"class {k}" for k in range(300)])
    labels = np.arange(300, dtype=np.uint16).reshape(2, 150)[:, 30:]
    assert write(tmp_path / "many", name, many, predictions({"a.jpg": labels}, 300))


@pytest.mark.parametrize("name", FORMATS)
def test_ids_of_no_class_are_refused(tmp_path, name):
    (prediction,) = predictions({"b/a.jpg": np.array([[0, 4]], np.uint8)}, 4)
    with FORMATS[name](tmp_path, CLASSES) as writer, pytest.raises(ReclipError, match=r"mask of b/a\.jpg has id 4"):
        writer.add(prediction)


@pytest.mark.parametrize("name", FORMATS)
def test_an_error_before_the_end_leaves_no_half_written_file(tmp_path, name):
    items = predictions({str(path): labels for path, labels in sample_labels().items()}, 4)
    whole = write(tmp_path / "whole", name, CLASSES, items)
    with pytest.raises(KeyboardInterrupt), FORMATS[name](tmp_path / "half", CLASSES) as writer:
        writer.add(items[0])
        raise KeyboardInterrupt
    half = tree(tmp_path / "half")
    assert len(half) < len(whole) and all(whole[path] == content for path, content in half.items())


def test_unknown_formats_and_names_are_refused_beforehand():
    check_formats(FORMATS, CLASSES)
    with pytest.raises(ReclipError, match="'cvta' is unknown: choose from index, palette"):
        check_formats(["index", "cvta"], CLASSES)
    with pytest.raises(ReclipError, match="'a:b' cannot be written to CVAT's label map"):
        check_formats(["index", "cvat"], MaskClasses.make(["a:b"]))


class AreasWriter(Writer):
    """A format as a user would add it: one text file per image with the classes' areas, and a list of the images."""

    def files(self, path):
        return [self.output / path.with_suffix(".txt")]

    def _add(self, prediction):
        lines = [f"{s.label} {s.area}\n" for s in prediction.segments if s.label in self.classes.annotated]
        with atomic_write(self.files(prediction.path)[0]) as temporary:
            temporary.write_text("".join(lines))

    def finish(self):
        with atomic_write(self.output / "names.txt") as temporary:
            temporary.write_text(" ".join(self.classes.names))


def test_a_new_format_is_a_writer_and_a_registration(tmp_path, monkeypatch):
    """``Formats`` of the registry takes a class, or the name of one that is imported on first use."""
    monkeypatch.setitem(FORMATS, "areas", AreasWriter)
    images = {PurePosixPath("a/b.jpg"): None}
    with IndexWriter(tmp_path / "index", CLASSES) as index:
        index.add(Prediction(PurePosixPath("a/b.jpg"), np.array([[0, 1, 1], [3, IGNORE, 1]], np.uint8)))
    assert write_formats(tmp_path / "index", images, tmp_path, ["areas"]) == {"areas": tmp_path / "areas"}
    assert tree(tmp_path / "areas") == {"a/b.txt": b"0 1\n1 3\n", "names.txt": " ".join(CLASSES.names).encode()}
    assert Formats({"mine": "yolo:YoloWriter"})["mine"] is YoloWriter is FORMATS["yolo"]
    with pytest.raises(KeyError):
        FORMATS["none"]


def test_every_format_is_documented():
    text = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    assert [name for name in FORMATS if f"`{name}`" not in text or f"``{name}``" not in formats.__doc__] == []
