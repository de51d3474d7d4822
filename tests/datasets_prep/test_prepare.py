"""The preparation programs on miniatures of the data sets: every pixel, resuming, and invalid input."""

import dataclasses
import json
import os
import subprocess
import sys
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reclip_d2.data.datasets import preparation
from reclip_d2.data.datasets.coco_stuff import COCO_STUFF27, COCO_STUFF171
from reclip_d2.data.datasets.context59 import CONTEXT59 as CONTEXT59_DATASET
from reclip_d2.data.datasets.registration import DatasetOnDisk
from reclip_d2.data.datasets.voc20 import VOC20
from tests.datasets_prep.miniatures import (
    COCO,
    CONTEXT59,
    ROOT,
    VOC20_TRAIN,
    expected_27,
    load_program,
    make_ade150,
    make_cityscapes19,
    make_coco_stuff,
    make_context59,
    make_voc20,
    quadrants,
    write_list,
    write_png,
)

# Data set: maker, folder of the written labels, and the end of their names after a case's name.
LAYOUTS = {
    "voc20": (make_voc20, "VOCdevkit/VOC2012/annotations_detectron2", ""),
    "context59": (make_context59, "VOC2010/annotations_detectron2", ""),
    "ade150": (make_ade150, "ADEChallengeData2016/annotations_detectron2/validation", ""),
    "cityscapes19": (make_cityscapes19, "cityscapes/annotations_detectron2/val", "_leftImg8bit"),
    "coco_stuff": (make_coco_stuff, "coco/annotations_detectron2/coco_stuff171/val2017", ""),
}


@pytest.fixture(params=LAYOUTS)
def miniature(request, datasets_root):
    """(name, cases, folder of the written labels, end of their names)."""
    make, folder, end = LAYOUTS[request.param]
    return request.param, make(datasets_root), datasets_root / folder, end


def prepare(name: str, *arguments: str) -> None:
    load_program(name).main(["--workers", "1", *arguments])


def failure(capfd, name: str, *arguments: str) -> str:
    """The one line of a program that ends with exit status 1."""
    with pytest.raises(SystemExit) as caught:
        prepare(name, *arguments)
    assert caught.value.code == 1
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    assert err.splitlines()[-1].startswith("error: ")
    return err.splitlines()[-1]


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image)


def state(folder: Path) -> dict[str, tuple]:
    """Inode and time of every file, which change if a file is rewritten."""
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


# ---- what is written ------------------------------------------------------------------------------------------


def test_every_pixel(miniature, capfd):
    name, cases, folder, end = miniature
    prepare(name)
    for case in cases:
        np.testing.assert_array_equal(read(folder / f"{case.name}{end}.png"), case.expected_label(), case.name)
    assert len(state(folder)) == len(cases)  # nothing else, no temporary file
    assert f"{len(cases)} written, 0 already there" in capfd.readouterr().out


def test_a_second_run_writes_nothing(miniature, capfd):
    name, cases, folder, _ = miniature
    prepare(name)
    before = state(folder)
    first = capfd.readouterr().out
    prepare(name)
    assert state(folder) == before
    second = capfd.readouterr().out
    assert f"0 written, {len(cases)} already there" in second
    counts = [[line for line in text.splitlines() if "%" in line] for text in (first, second)]
    assert counts[0] == counts[1] and len(counts[0]) > len(cases)


def test_a_run_that_was_stopped_goes_on(miniature):
    name, cases, folder, end = miniature
    prepare(name)
    before = state(folder)
    gone, broken = (folder / f"{case.name}{end}.png" for case in cases[:2])
    gone.unlink()
    broken.write_bytes(broken.read_bytes()[:40])
    prepare(name)
    after = state(folder)
    changed = {path for path in before if before[path] != after[path]}
    assert changed == {str(gone), str(broken)}
    for path, case in zip((gone, broken), cases, strict=False):
        np.testing.assert_array_equal(read(path), case.expected_label())


def test_overwrite(miniature):
    name, cases, folder, end = miniature
    prepare(name)
    path = folder / f"{cases[0].name}{end}.png"
    Image.fromarray(np.zeros(cases[0].size, np.uint8)).save(path)
    prepare(name)  # sound, as far as anyone can tell
    assert not read(path).any()
    prepare(name, "--overwrite")
    np.testing.assert_array_equal(read(path), cases[0].expected_label())


def test_labels_of_other_classes_are_made_anew(datasets_root):
    (case, *_) = make_voc20(datasets_root)
    path = datasets_root / LAYOUTS["voc20"][1] / f"{case.name}.png"
    path.parent.mkdir()
    Image.fromarray(np.full(case.size, 20, np.uint8)).save(path)  # the 20 classes are 0 to 19
    prepare("voc20")
    np.testing.assert_array_equal(read(path), case.expected_label())


def test_histogram(datasets_root, capfd):
    make_voc20(datasets_root)
    prepare("voc20")
    lines = capfd.readouterr().out.splitlines()
    assert "4 written, 0 already there, 1 rotated upright with their image" in lines[0]
    assert lines[1] == "note: the complete split has 1449 images"
    assert lines[2].startswith("orientation: 2 images have an EXIF orientation of 2 to 8; by their size 1 of their")
    rows = {line.split()[-1]: line.split()[:3] for line in lines[4:]}
    # Images of 23x31, 40x17, 19x37 and 33x25 (as stored) px: 2921 in all. Person is the upper half of the second image,
    # 20 x 17 px; bicycle (1) occurs nowhere.
    assert rows["person"] == ["14", f"{20 * 17 / 2921:.4%}", "1"]
    assert rows["bicycle"] == ["1", "0.0000%", "0"]
    # Ignored: 11x15 + 12x16 of the first, 20x8 of the second, 9x19 + 10x18 of the third, 17x13 of the fourth.
    ignored = 11 * 15 + 12 * 16 + 20 * 8 + 9 * 19 + 10 * 18 + 17 * 13
    assert rows["(ignored)"] == ["255", f"{ignored / 2921:.4%}", "4"]


@pytest.mark.parametrize("labels", ["png60", "png59"])
def test_context_from_pngs(datasets_root, labels):
    make_context59(datasets_root, labels)
    prepare("context59", "--png-classes", labels.removeprefix("png"))
    for case in CONTEXT59:
        path = datasets_root / LAYOUTS["context59"][1] / f"{case.name}.png"
        np.testing.assert_array_equal(read(path), case.expected_label())


def test_context_writes_its_lists(datasets_root):
    make_context59(datasets_root)
    prepare("context59")
    lists = datasets_root / "VOC2010/ImageSets/SegmentationContext"
    assert (lists / "val.txt").read_text() == "2008_000002\n2008_000015\n"
    assert (lists / "train.txt").read_text() == "2008_000003\n2008_000007\n2008_000008\n"
    before = state(lists)
    prepare("context59")
    assert state(lists) == before


def test_context_train(datasets_root):
    """Labels of train are made on request; this image's label is nothing but ignored pixels, and a bag over none."""
    make_context59(datasets_root)
    path = datasets_root / "VOC2010/trainval_merged.json"
    content = json.loads(path.read_text())
    annotation = next(a for a in content["annos_segmentation"] if a["image_id"] == 2008000003)
    annotation["segmentation"]["counts"] = [10, 30, 21 * 27 - 40]  # columns of 21 px: the end of the first, and so on
    path.write_text(json.dumps(content))
    prepare("context59", "--splits", "train")
    expected = np.full(21 * 27, 255)
    expected[10:40] = 1
    label = read(datasets_root / LAYOUTS["context59"][1] / "2008_000003.png")
    np.testing.assert_array_equal(label, expected.reshape(27, 21).T)


def test_coco_27(datasets_root):
    make_coco_stuff(datasets_root)
    prepare("coco_stuff", "--classes", "27")
    base = datasets_root / "coco/annotations_detectron2"
    assert [path.name for path in base.iterdir()] == ["coco_stuff27"]
    for case in COCO:
        label = read(base / "coco_stuff27/val2017" / f"{case.name}.png")
        np.testing.assert_array_equal(label, expected_27(case.expected_label()))


def test_voc_folder_of_detectron2_comes_first(datasets_root):
    make_voc20(datasets_root)
    cases = make_voc20(datasets_root, "VOC2012")
    prepare("voc20")
    assert len(state(datasets_root / "VOC2012/annotations_detectron2")) == len(cases)
    assert not (datasets_root / "VOCdevkit/VOC2012/annotations_detectron2").exists()


def test_trainaug(datasets_root, tmp_path, capfd):
    make_voc20(datasets_root)
    # SBD's lists hold images of VOC's val, of VOC's train, and others.
    write_list(tmp_path / "sbd/train.txt", ["2008_000008", "2007_000033", VOC20_TRAIN[0]])
    write_list(tmp_path / "sbd/val.txt", ["2008_000015", "2007_000042"])
    prepare("voc20", "--sbd", str(tmp_path / "sbd"))
    written = datasets_root / "VOCdevkit/VOC2012/ImageSets/Segmentation/trainaug.txt"
    assert written.read_text().split() == [*VOC20_TRAIN, "2008_000008", "2008_000015"]
    assert "voc20_trainaug: 6 images" in capfd.readouterr().out
    assert "--sbd is the folder" in failure(capfd, "voc20", "--sbd", str(tmp_path))


# ---- several processes ----------------------------------------------------------------------------------------


def test_several_processes(datasets_root):
    cases = make_coco_stuff(datasets_root, count=40)
    load_program("coco_stuff").main(["--workers", "2", "--classes", "171"])
    folder = datasets_root / LAYOUTS["coco_stuff"][1]
    assert len(state(folder)) == 43
    for case in cases:
        np.testing.assert_array_equal(read(folder / f"{case.name}.png"), case.expected_label())


def test_program_with_a_broken_file(datasets_root):
    """What a shell sees when a worker process fails: one line; the labels that are done stay, and are sound."""
    cases = make_coco_stuff(datasets_root, count=40)
    bad = datasets_root / "coco/stuffthingmaps/val2017" / f"{cases[-1].name}.png"
    bad.write_bytes(bad.read_bytes()[:30])
    program = str(ROOT / "datasets" / "prepare_coco_stuff.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, program, "--workers", "2", "--classes", "27"],
        capture_output=True, text=True, timeout=120, env=environment, cwd=datasets_root,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and str(bad) in errors[0] and "cannot be read" in errors[0]
    folder = datasets_root / "coco/annotations_detectron2/coco_stuff27/val2017"
    names = {case.name: case for case in cases}
    for path in folder.iterdir() if folder.exists() else ():
        np.testing.assert_array_equal(read(path), expected_27(names[path.stem].expected_label()))


def test_a_worker_that_is_killed(datasets_root, capfd, monkeypatch):
    class Executor:
        def __init__(self, workers: int, **_: object) -> None:
            assert workers == 2

        def submit(self, *_: object) -> Future:
            future = Future()
            future.set_exception(BrokenProcessPool("killed"))
            return future

        def shutdown(self, **_: object) -> None:
            pass

    monkeypatch.setattr(preparation, "ProcessPoolExecutor", Executor)
    make_coco_stuff(datasets_root, count=40)
    assert "lower --workers" in failure(capfd, "coco_stuff", "--workers", "2")


# ---- bad input ------------------------------------------------------------------------------------------------

# Data set: folder of labels as shipped, end of their names; folder of images, end of their names; both for a case.
FOLDERS = {
    "voc20": ("VOCdevkit/VOC2012/SegmentationClass", ".png", "VOCdevkit/VOC2012/JPEGImages", ".jpg"),
    "ade150": ("ADEChallengeData2016/annotations/validation", ".png", "ADEChallengeData2016/images/validation", ".jpg"),
    "cityscapes19": ("cityscapes/gtFine/val", "_gtFine_labelIds.png", "cityscapes/leftImg8bit/val", "_leftImg8bit.png"),
    "coco_stuff": ("coco/stuffthingmaps/val2017", ".png", "coco/val2017", ".jpg"),
}
BAD_ID = {"voc20": 21, "ade150": 151, "cityscapes19": 34, "coco_stuff": 182}


@pytest.fixture(params=FOLDERS)
def bad(request, datasets_root):
    """(name, first case, its shipped label, its image)."""
    case = LAYOUTS[request.param][0](datasets_root)[0]
    labels, label_end, images, image_end = FOLDERS[request.param]
    label, image = (
        datasets_root / labels / f"{case.name}{label_end}",
        datasets_root / images / f"{case.name}{image_end}",
    )
    assert label.is_file() and image.is_file()
    return request.param, case, label, image


def test_rgb_label(bad, capfd):
    name, case, label, _ = bad
    Image.fromarray(np.zeros((*case.size, 3), np.uint8)).save(label)
    line = failure(capfd, name)
    assert str(label) in line and "is a RGB image" in line


def test_deep_label(bad, capfd):
    name, case, label, _ = bad
    Image.fromarray(np.zeros(case.size, np.uint16)).save(label)
    assert "is a I;16 image" in failure(capfd, name)


def test_id_out_of_range(bad, capfd):
    name, case, label, _ = bad
    ids = case.shipped_label()
    ids[-1, -1] = BAD_ID[name]
    Image.fromarray(ids).save(label)
    line = failure(capfd, name)
    assert str(label) in line and f"has id {BAD_ID[name]}" in line and "0-" in line


def complete(monkeypatch: pytest.MonkeyPatch, dataset: DatasetOnDisk, count: int) -> None:
    """Let a miniature of ``count`` images pass for the whole split."""
    monkeypatch.setitem(dataset.splits, "val", dataclasses.replace(dataset.splits["val"], count=count))


def write_binary_masks(name: str, root: Path) -> None:
    folder, end, *_ = FOLDERS[name]
    for case in LAYOUTS[name][0](root):
        mask = np.where(case.shipped_label() % 2 == 0, 0, 255).astype(np.uint8)
        mask[0, 0], mask[-1, -1] = 0, 255
        Image.fromarray(mask).save(root / folder / f"{case.name}{end}")


@pytest.mark.parametrize("name", FOLDERS)
def test_binary_masks(name, datasets_root, capfd, monkeypatch):
    """All labels are 0 and 255. Where both are ids of the data set only the whole set tells."""
    write_binary_masks(name, datasets_root)
    if name == "coco_stuff":
        complete(monkeypatch, COCO_STUFF171, len(COCO))
        complete(monkeypatch, COCO_STUFF27, len(COCO))
    for _ in range(2):  # files written by the first run do not hide the error in the second
        line = failure(capfd, name)
        assert "binary mask" in line and "0 and 255" in line


def test_one_binary_mask_among_labels_of_voc(datasets_root, capfd):
    """Only background and border, no class of VOC. With VOC's palette the label is accepted."""
    (case, *_) = make_voc20(datasets_root)
    path = datasets_root / FOLDERS["voc20"][0] / f"{case.name}.png"
    mask = quadrants([[0, 255], [255, 0]], case.size).astype(np.uint8)
    Image.fromarray(mask).save(path)
    line = failure(capfd, "voc20")
    assert f"label {path} contains only 0 and 255, neither of which is a class: it is a binary mask" in line
    write_png(path, mask, palette=True)
    prepare("voc20")
    assert "note: 1 labels contain no class" in capfd.readouterr().out


def test_a_subset_of_one_class_and_ignored_pixels(datasets_root, capfd, monkeypatch):
    """COCO's id 0 is person and 255 unlabelled: a subset may contain only these. The complete set never does."""
    cases = make_coco_stuff(datasets_root)
    for case in cases:
        mask = quadrants([[0, 255], [255, 0]], case.size).astype(np.uint8)
        Image.fromarray(mask).save(datasets_root / FOLDERS["coco_stuff"][0] / f"{case.name}.png")
    prepare("coco_stuff", "--classes", "171")
    out, err = capfd.readouterr()
    assert "note: person is the only class that occurs" in out and "binary" not in out + err
    complete(monkeypatch, COCO_STUFF171, len(cases))
    assert "the labels contain only 0 and 255: they are binary masks" in failure(
        capfd, "coco_stuff", "--classes", "171"
    )


def test_binary_masks_in_the_encoding_of_59_classes(datasets_root, capfd, monkeypatch):
    cases = make_context59(datasets_root, "png59")
    complete(monkeypatch, CONTEXT59_DATASET, len(cases))
    for case in cases:
        mask = quadrants([[0, 255], [255, 0]], case.size).astype(np.uint8)
        Image.fromarray(mask).save(datasets_root / "VOC2010/SegmentationClassContext" / f"{case.name}.png")
    line = failure(capfd, "context59", "--png-classes", "59")
    assert "context59_val: the labels contain only 0 and 255" in line


def test_repaired_binary_masks(datasets_root, capfd):
    """What the error says helps."""
    write_binary_masks("voc20", datasets_root)
    assert "get the data set's own labels" in failure(capfd, "voc20")
    cases = make_voc20(datasets_root)
    prepare("voc20", "--overwrite")
    for case in cases:
        label = read(datasets_root / LAYOUTS["voc20"][1] / f"{case.name}.png")
        np.testing.assert_array_equal(label, case.expected_label())


def test_palette_labels_that_lost_their_palette(datasets_root, capfd):
    """Saved as grey: the ids have become the luminance of their colours."""
    (case, *_) = make_voc20(datasets_root)
    path = datasets_root / FOLDERS["voc20"][0] / f"{case.name}.png"
    with Image.open(path) as image:
        grey = image.convert("L")
    grey.save(path)
    assert "has id" in failure(capfd, "voc20")


def test_ids_that_are_one_too_small(datasets_root, capfd, monkeypatch):
    """Labels from which someone has taken 1 already: background is 255, and the last class would never occur."""
    cases = make_voc20(datasets_root)
    complete(monkeypatch, VOC20, len(cases))
    prepare("voc20")
    for case in cases:
        label = case.shipped_label()
        label = np.where(label == 0, 255, np.where(label == 255, 255, label - 1)).astype(np.uint8)
        Image.fromarray(label).save(datasets_root / FOLDERS["voc20"][0] / f"{case.name}.png")
    for arguments in (("--overwrite",), ()):
        line = failure(capfd, "voc20", *arguments)
        assert "none of the 4 labels contains the last class, tv monitor: are the ids one too small?" in line


def test_ids_that_are_one_too_small_in_ade(datasets_root, capfd):
    for case in make_ade150(datasets_root):
        label = case.shipped_label().astype(int) - 1
        path = datasets_root / FOLDERS["ade150"][0] / f"{case.name}.png"
        Image.fromarray(np.where(label < 0, 255, label).astype(np.uint8)).save(path)
    assert "has id 255; the data set's ids are 0-150" in failure(capfd, "ade150")


def test_size_differs(bad, capfd):
    name, case, label, image = bad
    Image.fromarray(case.shipped_label()[:-1]).save(label)
    line = failure(capfd, name)
    height, width = case.size
    assert f"{label} has size {width}x{height - 1}, its image {image} {width}x{height}" in line


def test_label_missing(bad, capfd):
    name, _, label, _ = bad
    label.unlink()
    line = failure(capfd, name)
    assert str(label) in line and "1 of" in line and "label file missing" in line


def test_image_missing(bad, capfd):
    name, _, _, image = bad
    image.unlink()
    line = failure(capfd, name)
    assert str(image) in line and ("image file missing" in line or "1 labels have no image" in line)


def test_broken_label(bad, capfd):
    name, _, label, _ = bad
    label.write_bytes(label.read_bytes()[:60])
    line = failure(capfd, name)
    assert str(label) in line and "cannot be read" in line


def test_broken_image(bad, capfd):
    name, _, _, image = bad
    image.write_bytes(b"not an image")
    line = failure(capfd, name)
    assert str(image) in line and "cannot be read" in line


def test_folder_of_labels_missing(bad, capfd, datasets_root):
    name = bad[0]
    folder = datasets_root / FOLDERS[name][0]
    folder.rename(datasets_root / "elsewhere")
    line = failure(capfd, name)
    assert f"folder {folder} does not exist" in line


def test_folder_of_images_missing(bad, capfd, datasets_root):
    name = bad[0]
    folder = datasets_root / FOLDERS[name][2]
    folder.rename(datasets_root / "elsewhere")
    line = failure(capfd, name)
    assert f"folder {folder} does not exist" in line and "datasets/README.md" in line


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_data_set_at_all(name, datasets_root, capfd):
    assert f"folder {datasets_root}" in failure(capfd, name)


def test_no_images(datasets_root, capfd):
    make_ade150(datasets_root)
    for path in (datasets_root / "ADEChallengeData2016/images/validation").iterdir():
        path.unlink()
    assert "images/validation has no .jpg files" in failure(capfd, "ade150")


def test_images_of_an_unknown_extension(datasets_root, capfd):
    make_ade150(datasets_root)
    for path in (datasets_root / "ADEChallengeData2016/images/validation").iterdir():
        path.rename(path.with_suffix(".heic"))
    assert "images/validation has no .jpg files, only .heic: " in failure(capfd, "ade150")


def test_nothing_but_ignored_pixels(datasets_root, capfd):
    for case in make_ade150(datasets_root):
        path = datasets_root / FOLDERS["ade150"][0] / f"{case.name}.png"
        Image.fromarray(np.zeros(case.size, np.uint8)).save(path)
    assert "no label contains any class" in failure(capfd, "ade150")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "val.txt does not exist"),
        (b"", "val.txt is empty"),
        (b"2007_000033\n2007_000033\n", "names 2007_000033 twice"),
        (b"2007_000033\n\xff\xfe\x00", "val.txt, line 2: not UTF-8 text"),
        (b"2007_000033\n2007_999999\n", "2007_999999.png"),
    ],
)
def test_image_lists(datasets_root, capfd, content, expected):
    make_voc20(datasets_root)
    path = datasets_root / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert expected in failure(capfd, "voc20")


def test_context_encodings_are_told_apart(datasets_root, capfd):
    make_context59(datasets_root, "png59")
    line = failure(capfd, "context59")
    assert "has id 255; the data set's ids are 0-59" in line
    make_context59(datasets_root, "png60")
    line = failure(capfd, "context59", "--png-classes", "59")
    assert "has id 59; the data set's ids are 0-58, 255" in line


def edit_json(root: Path, change) -> None:
    make_context59(root)
    path = root / "VOC2010/trainval_merged.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c.pop("annos_segmentation"), "is not PASCAL Context's trainval_merged.json (KeyError"),
        (lambda c: c["images"].clear(), "has no images of train"),
        (lambda c: c["annos_segmentation"][1].update(category_id=460), "2008_000002, has id 460"),
        (lambda c: c["annos_segmentation"][1]["segmentation"].update(size=[31, 23]), "has a mask of size [31, 23]"),
        (lambda c: c["annos_segmentation"][1]["segmentation"].pop("counts"), "not a run-length code"),
        (lambda c: c["images"][0].update(height=22), "has size 31x22, its image"),
    ],
)
def test_context_json(datasets_root, capfd, change, expected):
    edit_json(datasets_root, change)
    assert expected in failure(capfd, "context59")


def test_context_json_that_is_none(datasets_root, capfd):
    make_context59(datasets_root)
    path = datasets_root / "VOC2010/trainval_merged.json"
    path.write_text("<html>")
    assert f"{path} is not PASCAL Context's" in failure(capfd, "context59")
    path.unlink()
    assert f"{path} does not exist" in failure(capfd, "context59", "--source", "json")
    assert "SegmentationClassContext does not exist" in failure(capfd, "context59")


def test_workers(capfd):
    with pytest.raises(SystemExit) as caught:
        load_program("voc20").main(["--workers", "0"])
    assert caught.value.code == 2
    assert "must be 1 or more" in capfd.readouterr().err


# ---- palettes and orientations ----------------------------------------------------------------------------------


def write_reordered(path: Path, ids: np.ndarray, colors: dict[int, tuple[int, int, int]]) -> None:
    """A palette PNG of these colours, in the order of how often they occur, as an optimiser writes it."""
    values, counts = np.unique(ids, return_counts=True)
    order = values[np.argsort(-counts, kind="stable")].tolist()
    image = Image.fromarray(np.array([order.index(k) for k in ids.reshape(-1)], np.uint8).reshape(ids.shape))
    image.putpalette([value for k in order for value in colors[k]])
    image.save(path)


VOC_COLORS = {0: (0, 0, 0), 255: (224, 224, 192), 12: (64, 0, 128), 15: (192, 128, 128), 20: (0, 64, 128)}


def one_voc_image(root: Path, ids: np.ndarray, orientation: int = 1) -> Path:
    """VOC with a single image of the label's size; the path of its label."""
    base = root / "VOC2012"
    name = "2007_000001"
    exif = Image.Exif()
    exif[0x0112] = orientation
    for folder in ("JPEGImages", "SegmentationClass"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", ids.shape[::-1]).save(base / "JPEGImages" / f"{name}.jpg", exif=exif)
    write_png(base / "SegmentationClass" / f"{name}.png", ids, palette=True)
    for split in ("train", "val"):
        write_list(base / f"ImageSets/Segmentation/{split}.txt", [name])
    return base / "SegmentationClass" / f"{name}.png"


IDS = np.array([[15, 15, 15, 12], [15, 15, 255, 12], [0, 0, 255, 20]], np.uint8)
CLASSES = np.array([[14, 14, 14, 11], [14, 14, 255, 11], [255, 255, 255, 19]])


def test_vocs_colours_in_another_order(datasets_root, capfd):
    path = one_voc_image(datasets_root, IDS)
    write_reordered(path, IDS, VOC_COLORS)
    with Image.open(path) as image:
        assert not np.array_equal(np.asarray(image), IDS)  # the indices are others
    prepare("voc20")
    np.testing.assert_array_equal(read(datasets_root / "VOC2012/annotations_detectron2/2007_000001.png"), CLASSES)


def test_labels_that_were_written_from_indices_are_written_again(datasets_root, capfd):
    path = one_voc_image(datasets_root, IDS)
    prepare("voc20")
    target = datasets_root / "VOC2012/annotations_detectron2/2007_000001.png"
    Image.fromarray(np.full(IDS.shape, 3, np.uint8)).save(target)  # as if read with the wrong palette
    write_reordered(path, IDS, VOC_COLORS)
    capfd.readouterr()
    prepare("voc20")
    assert "1 written, 0 already there" in capfd.readouterr().out
    np.testing.assert_array_equal(read(target), CLASSES)
    prepare("voc20")
    assert "0 written, 1 already there" in capfd.readouterr().out


def test_colours_that_are_not_vocs(datasets_root, capfd):
    path = one_voc_image(datasets_root, IDS)
    write_reordered(path, IDS, {**VOC_COLORS, 20: (1, 2, 3)})
    line = failure(capfd, "voc20")
    assert f"label {path} is a palette image" in line and "colour (1, 2, 3) is not one of the data set's" in line
    assert not (datasets_root / "VOC2012/annotations_detectron2/2007_000001.png").exists()


@pytest.mark.parametrize("name", ["ade150", "cityscapes19", "coco_stuff"])
def test_palettes_of_data_sets_without_one(name, datasets_root, capfd):
    """In the order of the ids they say what the indices say; in another, nothing."""
    folder, end, *_ = FOLDERS[name]
    (case, *_) = LAYOUTS[name][0](datasets_root)
    path, ids = datasets_root / folder / f"{case.name}{end}", case.shipped_label()
    write_reordered(path, ids, {k: (k, 7, 9) for k in np.unique(ids).tolist()})
    assert f"label {path} is a palette image" in failure(capfd, name)
    image = Image.fromarray(ids)
    image.putpalette([k for k in range(256) for _ in range(3)])
    image.save(path)
    prepare(name)
    target = datasets_root / LAYOUTS[name][1] / f"{case.name}{LAYOUTS[name][2]}.png"
    np.testing.assert_array_equal(read(target), case.expected_label())


@pytest.mark.parametrize(("orientation", "turn"), [(2, np.fliplr), (3, lambda x: x[::-1, ::-1]), (4, np.flipud)])
def test_orientations_that_the_size_does_not_tell(datasets_root, capfd, orientation, turn):
    one_voc_image(datasets_root, IDS, orientation)
    target = datasets_root / "VOC2012/annotations_detectron2/2007_000001.png"
    prepare("voc20")
    out = capfd.readouterr().out
    assert "1 rotated upright" in out and "orientation: 1 images have an EXIF orientation of 2 to 8" in out
    np.testing.assert_array_equal(read(target), turn(CLASSES))
    prepare("voc20", "--labels-drawn-on", "upright")  # the finished label is of the other choice
    assert "0 rotated upright" in capfd.readouterr().out
    np.testing.assert_array_equal(read(target), CLASSES)


# ---- nothing outside of the data set's folder ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../../x", "/tmp/x", "a/../../x", "..", ".", "a\x00b", "a\\b", "c:/x", "x" * 300, "a/\x1b[2J"],
)
def test_ids_that_lead_outside(datasets_root, capfd, name):
    one_voc_image(datasets_root, IDS)
    listed = datasets_root / "VOC2012/ImageSets/Segmentation/val.txt"
    listed.write_text(f"2007_000001\n{name}\n")
    before = state(datasets_root)
    line = failure(capfd, "voc20")
    assert f"image list {listed}" in line and line.isprintable()
    assert state(datasets_root) == before


def test_a_link_that_leads_outside(datasets_root, capfd, tmp_path):
    """The folder of labels may be a link itself, as to another disk; one below it may not lead elsewhere."""
    outside, disk = tmp_path / "outside", tmp_path / "disk"
    outside.mkdir()
    disk.mkdir()
    base = datasets_root / "VOC2012"
    one_voc_image(datasets_root, IDS)
    (base / "annotations_detectron2").symlink_to(disk)
    prepare("voc20")
    assert [path.name for path in disk.iterdir()] == ["2007_000001.png"]
    for folder in ("JPEGImages", "SegmentationClass"):
        (base / folder / "sub").mkdir()
        (path,) = (base / folder).glob("2007*")
        path.rename(base / folder / "sub" / path.name)
    (disk / "sub").symlink_to(outside)
    write_list(base / "ImageSets/Segmentation/val.txt", ["sub/2007_000001"])
    capfd.readouterr()
    assert "is a link that leads out of" in failure(capfd, "voc20")
    assert not list(outside.iterdir())


@pytest.mark.parametrize("name", ["..", "a\nb", "a b", "a\x00b", ""])
def test_context_json_with_names_that_are_no_ids(datasets_root, capfd, name):
    edit_json(datasets_root, lambda c: c["images"][0].update(file_name=name))
    line = failure(capfd, "context59")
    assert "trainval_merged.json" in line and line.isprintable()
    assert not (datasets_root / "VOC2010/ImageSets").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["images"][0].update(height=10**9, width=10**9),
        lambda c: c["images"][0].update(height="23"),
        lambda c: c["annos_segmentation"][1].update(category_id="x"),
        lambda c: c["annos_segmentation"][1].update(category_id=10**30),
        lambda c: c["annos_segmentation"][1]["segmentation"].update(counts="0"),
        lambda c: c.update(images=3),
    ],
)
def test_context_json_with_absurd_values(datasets_root, capfd, change):
    edit_json(datasets_root, change)
    line = failure(capfd, "context59")
    assert "memory" not in line and "trainval_merged.json" in line


def test_deeply_nested_json(datasets_root, capfd):
    make_context59(datasets_root)
    (datasets_root / "VOC2010/trainval_merged.json").write_text("[" * 100_000)
    assert "is not PASCAL Context's trainval_merged.json" in failure(capfd, "context59")
