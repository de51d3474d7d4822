"""All formats from index masks: uninterrupted, interrupted, killed, repeated."""

import multiprocessing
import os
import signal
import tracemalloc
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from PIL import Image

from reclip_d2.errors import ReclipError
from reclip_d2.formats import FORMATS, MaskClasses, Prediction, write_formats
from reclip_d2.utils.io import remove_leftovers
from tests.formats.sample import sample_labels, write_images, write_index
from tests.formats.test_every_format import tree

PER_IMAGE = ["palette", "overlay", "yolo", "fiftyone"]


@pytest.fixture
def sample(tmp_path):
    """Index masks, scores and images, and the images' paths."""
    labels = sample_labels()
    images = write_images(tmp_path / "photos", labels)
    write_index(tmp_path, labels, scores=True)
    return tmp_path, images


def times(folder: Path) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.lstat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def test_all_formats_in_their_folders(sample):
    folder, images = sample
    steps = []
    made = write_formats(folder / "index", images, folder, FORMATS, progress=lambda *step: steps.append(step))
    assert made == {name: folder / name for name in FORMATS}
    assert all(any(path.iterdir()) for path in made.values())
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_one_run_and_two_give_the_same_bytes(sample, tmp_path_factory):
    folder, images = sample
    expected = tree_of_formats(folder / "index", images, tmp_path_factory.mktemp("whole"))

    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    other = tmp_path_factory.mktemp("broken")
    with pytest.raises(KeyboardInterrupt):
        tree_of_formats(folder / "index", images, other, progress=interrupt)
    assert set(tree(other)) < set(expected)
    assert tree_of_formats(folder / "index", images, other) == expected
    assert tree_of_formats(folder / "index", dict(reversed(images.items())), other, overwrite=True) == expected


def tree_of_formats(index: Path, images: dict, output: Path, **arguments: object) -> dict[str, bytes]:
    write_formats(index, images, output, [name for name in FORMATS if name != "scores"], **arguments)
    return tree(output)


def write_and_die(index: Path, images: dict, output: Path, when: int) -> None:
    """Write all formats, and get killed in place of the ``when``-th renaming of a finished file."""
    rename, calls = os.replace, iter(range(1, when + 1))

    def replace(source: Path, target: Path) -> None:
        if next(calls) == when:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.replace = replace
    tree_of_formats(index, images, output)


@pytest.mark.parametrize("when", [3, 20, 34])  # while the first image, the last, and the files of all are written
def test_a_killed_run_is_completed_by_the_next(sample, tmp_path_factory, when):
    folder, images = sample
    expected = tree_of_formats(folder / "index", images, tmp_path_factory.mktemp("whole"))
    output = tmp_path_factory.mktemp("killed")
    process = multiprocessing.get_context("fork").Process(
        target=write_and_die, args=(folder / "index", images, output, when)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = tree(output)
    assert any(".tmp" in name for name in left)
    assert all(expected[name] == content for name, content in left.items() if ".tmp" not in name)
    assert tree_of_formats(folder / "index", images, output) == expected


def test_a_second_run_writes_only_what_is_missing_or_old(sample):
    folder, images = sample
    write_formats(folder / "index", images, folder, PER_IMAGE)
    first = times(folder)
    missing, path = folder / "palette" / "two.png", PurePosixPath("a b/one.jpg")
    missing.unlink()
    new = folder / "index" / path.with_suffix(".png")
    later = max(first.values()) + 1_000_000_000
    os.utime(new, ns=(later, later))
    write_formats(folder / "index", images, folder, PER_IMAGE)
    changed = {name for name, time in times(folder).items() if time != first.get(name)}
    of_all = {"yolo/data.yaml", "fiftyone/mask_targets.json"}
    expected = {"palette/two.png", "index/a b/one.png"}
    expected |= {"palette/a b/one.png", "overlay/a b/one.jpg", "yolo/labels/a b/one.txt", "fiftyone/labels/a b/one.png"}
    assert changed - of_all == expected


def test_overwrite_writes_everything(sample):
    folder, images = sample
    write_formats(folder / "index", images, folder, PER_IMAGE)
    file = folder / "palette" / "two.png"
    whole = file.read_bytes()
    file.write_bytes(b"damaged")
    write_formats(folder / "index", images, folder, PER_IMAGE)
    assert file.read_bytes() == b"damaged"
    write_formats(folder / "index", images, folder, PER_IMAGE, overwrite=True)
    assert file.read_bytes() == whole


def test_options_reach_the_writers(sample):
    folder, images = sample
    options = {"overlay": {"suffix": ".png"}, "yolo": {"images": "none"}}
    write_formats(folder / "index", images, folder, ["overlay", "yolo"], options=options)
    assert (folder / "overlay" / "two.png").exists() and not (folder / "yolo" / "images").exists()


def test_images_that_are_not_at_hand(sample):
    folder, images = sample
    unknown = dict.fromkeys(images)
    write_formats(folder / "index", unknown, folder, ["yolo", "fiftyone", "cvat"])
    assert not (folder / "yolo" / "images").exists()
    with pytest.raises(ReclipError, match="overlay needs the image a b/one.jpg"):
        write_formats(folder / "index", unknown, folder, ["overlay"])


def test_an_upright_overlay_of_a_rotated_photo(tmp_path):
    path = PurePosixPath("a.jpg")
    image = Image.fromarray(np.zeros((4, 6, 3), np.uint8))
    exif = image.getexif()
    exif[274] = 6  # shown turned by a quarter
    (tmp_path / "photos").mkdir()
    image.save(tmp_path / "photos" / "a.jpg", exif=exif)
    index = write_index(tmp_path, {path: np.zeros((6, 4), np.uint8)})
    write_formats(index, {path: tmp_path / "photos" / "a.jpg"}, tmp_path, ["overlay"])
    with Image.open(tmp_path / "overlay" / "a.jpg") as overlay:
        assert overlay.size == (4, 6) and 274 not in overlay.getexif()


def test_user_errors_are_one_line(sample):
    folder, images = sample
    index = folder / "index"

    def fails(words: str, images: dict = images, formats: tuple = ("palette",), index: Path = index) -> None:
        with pytest.raises(ReclipError, match=words) as info:
            write_formats(index, images, folder, formats)
        assert "\n" not in str(info.value)

    fails("'nothing' is unknown", formats=("nothing",))
    fails("classes.json is missing", index=folder)
    fails("differ only in their extension", images={**images, PurePosixPath("two.jpg"): None})
    fails("c.png is missing", images={**images, PurePosixPath("c.jpg"): None})
    (folder / "scores" / "two.npz").unlink()
    fails("two.npz is missing, and masks contain no scores", formats=("scores",))
    Image.new("RGB", (3, 3)).save(images[PurePosixPath("two.png")])
    fails("has size 3x3, its mask 11x10", formats=("overlay",))
    (index / "two.png").write_bytes(b"damaged")
    fails("two.png cannot be read")
    (index / "classes.json").write_text("{")
    fails("classes.json is damaged")


def test_scores_are_left_as_they_are(sample):
    folder, images = sample
    before = times(folder / "scores")
    write_formats(folder / "index", images, folder, ["scores"], overwrite=True)
    assert times(folder / "scores") == before and len(before) == len(images)


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    keep = ["a.png", ".a.png", "a.tmp.png", "b/.tmp.png", "b/.a.abcdefgh.tmp2"]
    gone = ["b/.a.png.abcd_fg1.tmp.png", ".data.yaml.12345678.tmp.yaml", ".x.12345678.tmp", "b/.link.a1b2c3d4.tmp/a"]
    for name in keep + gone:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "missing")
    assert set(tree(tmp_path)) == set(keep) and not (tmp_path / "b" / ".link.a1b2c3d4.tmp").exists()


@pytest.mark.parametrize(("name", "side"), [("coco", 48), ("cvat", 48), ("labelstudio", 16), ("datumaro", 48)])
def test_memory_does_not_grow_with_the_images(tmp_path, name, side):
    """The records are on disk; memory holds a path and two numbers an image."""
    classes = MaskClasses.make(["a", "b"])
    noise = np.random.default_rng(0).integers(0, 2, (side, side)).astype(np.uint8)
    # The least of three, since all threads of the process are counted, those of other tests too.
    few, many = (
        min(peak_memory(name, tmp_path / f"{count}-{attempt}", classes, noise, count) for attempt in range(3))
        for count in (10, 50)
    )
    size = sum(map(len, tree(tmp_path / "50-0").values())) // 50
    assert size > 1200 and many - few < 40 * 700


def peak_memory(name: str, folder: Path, classes: MaskClasses, labels: np.ndarray, count: int) -> int:
    tracemalloc.start()
    try:
        with FORMATS[name](folder, classes) as writer:
            for number in range(count):
                writer.add(Prediction(PurePosixPath(f"{number:04d}.jpg"), labels))
            writer.finish()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
