"""The embedded data set on disk: content, reuse, repair, a user's files, and concurrent processes."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reclip_d2.errors import ReclipError
from reclip_d2.toy import dataset
from reclip_d2.toy.scenes import render_scene
from reclip_d2.toy.worlds import EMBEDDED, EMBEDDED_LONGTAIL, WORLDS

# Few pictures a split: what is tested does not depend on how many there are.
SMALL = dataclasses.replace(EMBEDDED, split_counts={"train": 3, "dev": 2, "val": 2})


def stamp(root: Path) -> dict[str, int]:
    return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}


def test_writes_pictures_labels_and_description(tmp_path):
    root = dataset.ensure_dataset(tmp_path / "embedded", SMALL)
    assert root == tmp_path / "embedded"
    for split, count in SMALL.split_counts.items():
        assert len(list((root / "images" / split).iterdir())) == count
        assert len(list((root / "annotations_detectron2" / split).iterdir())) == count
    description = json.loads((root / "dataset.json").read_text())
    assert description["version"] == dataset.DATASET_VERSION and description["counts"] == SMALL.split_counts
    assert description["classes"] == list(dataset.EMBEDDED_CLASSES)
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == ["embedded"]


def test_files_hold_the_rendered_scene(tmp_path):
    root = dataset.ensure_dataset(tmp_path / "embedded", SMALL)
    record = dataset.list_split(root, "val", SMALL)[1]
    scene = render_scene(SMALL.dataset_seed, dataset._FIRST_INDEX["val"] + 1)
    with Image.open(record["sem_seg_file_name"]) as label:
        assert label.mode == "L"
        assert np.array_equal(np.asarray(label), scene.labels)
    with Image.open(record["file_name"]) as image:
        assert image.format == "JPEG" and image.mode == "RGB"
        assert image.size == (record["width"], record["height"])
        assert np.abs(np.asarray(image).astype(float) - scene.image).mean() < 4


def test_second_call_changes_nothing(tmp_path):
    root = dataset.ensure_dataset(tmp_path / "embedded", SMALL)
    before = stamp(root)
    dataset.ensure_dataset(root, SMALL)
    assert stamp(root) == before


def test_same_content_every_time(tmp_path):
    first, second = (dataset.ensure_dataset(tmp_path / name, SMALL) for name in ("a", "b"))
    for path in first.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (second / path.relative_to(first)).read_bytes(), path


@pytest.mark.parametrize(
    "lost", ["images/train/00001.jpg", "images/val/00000.jpg", "annotations_detectron2/dev/00001.png"]
)
def test_incomplete_folder_is_remade(tmp_path, lost):
    root = dataset.ensure_dataset(tmp_path / "embedded", SMALL)
    content = (root / lost).read_bytes()
    (root / lost).unlink()
    assert (dataset.ensure_dataset(root, SMALL) / lost).read_bytes() == content


def test_truncated_to_nothing_is_remade(tmp_path):
    root = dataset.ensure_dataset(tmp_path / "embedded", SMALL)
    victim = root / "images/dev/00000.jpg"
    victim.write_bytes(b"")
    dataset.ensure_dataset(root, SMALL)
    assert victim.stat().st_size > 0


def test_other_version_is_remade(tmp_path, monkeypatch):
    root = dataset.ensure_dataset(tmp_path / "embedded", SMALL)
    before = stamp(root)
    monkeypatch.setattr(dataset, "DATASET_VERSION", dataset.DATASET_VERSION + 1)
    dataset.ensure_dataset(root, SMALL)
    assert json.loads((root / "dataset.json").read_text())["version"] == dataset.DATASET_VERSION
    assert stamp(root)["images/val/00000.jpg"] != before["images/val/00000.jpg"]
    assert not list(tmp_path.glob(".embedded.*/"))


def test_labels_of_the_training_split_may_be_deleted(tmp_path):
    root = dataset.ensure_dataset(tmp_path / "embedded", SMALL)
    for label in (root / "annotations_detectron2" / "train").iterdir():
        label.unlink()
    dataset.ensure_dataset(root, SMALL)
    assert not list((root / "annotations_detectron2" / "train").iterdir())


def test_files_of_the_user_are_never_replaced(tmp_path):
    root = tmp_path / "embedded"
    root.mkdir()
    (root / "thesis.txt").write_text("mine")
    with pytest.raises(ReclipError, match="thesis.txt"):
        dataset.ensure_dataset(root, SMALL)
    assert (root / "thesis.txt").read_text() == "mine"
    other = tmp_path / "other"
    (other / "images").mkdir(parents=True)
    (other / "images" / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(ReclipError, match="dataset.json"):
        dataset.ensure_dataset(other, SMALL)
    assert (other / "images" / "holiday.jpg").read_bytes() == b"mine"


def test_empty_folder_is_filled(tmp_path):
    (tmp_path / "embedded").mkdir()
    assert (dataset.ensure_dataset(tmp_path / "embedded", SMALL) / "dataset.json").is_file()


def test_a_file_in_the_way_is_an_error(tmp_path):
    (tmp_path / "embedded").write_text("mine")
    with pytest.raises(ReclipError, match="embedded"):
        dataset.ensure_dataset(tmp_path / "embedded", SMALL)
    assert (tmp_path / "embedded").read_text() == "mine"


def test_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset, "render_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dataset.ensure_dataset(tmp_path / "embedded", SMALL)
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == []


def _race(root: str, barrier, queue) -> None:
    writes = []
    original = dataset._write
    dataset._write = lambda *arguments: (writes.append(1), original(*arguments))
    barrier.wait()
    dataset.ensure_dataset(root, SMALL)
    queue.put((len(writes), dataset._is_complete(Path(root), SMALL)))


def test_processes_that_race_make_one_data_set(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(3), context.Queue()
    arguments = (str(tmp_path / "embedded"), barrier, queue)
    workers = [context.Process(target=_race, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert sum(writes for writes, _ in results) == 1
    assert all(complete for _, complete in results)


def test_list_split(tmp_path):
    records = dataset.list_split(tmp_path, "train", SMALL)
    assert [r["image_id"] for r in records] == ["train_00000", "train_00001", "train_00002"]
    assert records[2]["file_name"] == str(tmp_path / "images/train/00002.jpg")
    assert records[2]["sem_seg_file_name"] == str(tmp_path / "annotations_detectron2/train/00002.png")
    with pytest.raises(ReclipError, match="'test'"):
        dataset.list_split(tmp_path, "test", SMALL)


def test_splits_share_no_scene():
    first = sorted(dataset._FIRST_INDEX.values())
    counts = [count for world in WORLDS.values() for count in world.split_counts.values()]
    assert min(b - a for a, b in zip(first[:-1], first[1:], strict=True)) > max(counts)


def test_a_folder_of_another_world_is_remade(tmp_path):
    root = dataset.ensure_dataset(tmp_path / "scenes", SMALL)
    other = dataclasses.replace(EMBEDDED_LONGTAIL, split_counts=SMALL.split_counts)
    before = (root / "images/train/00000.jpg").read_bytes()
    dataset.ensure_dataset(root, other)
    assert json.loads((root / "dataset.json").read_text())["name"] == "embedded_longtail"
    assert (root / "images/train/00000.jpg").read_bytes() != before
