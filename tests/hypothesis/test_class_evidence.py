"""Estimated shares and confidences of classes, from unlabelled images.

Shape letters: n patches, D width of the joint embedding, C classes.
"""

import json
import math

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from reclip_d2.config import load_config
from reclip_d2.errors import ReclipError
from reclip_d2.hypothesis import class_evidence
from reclip_d2.hypothesis.class_evidence import (
    ClassEvidence,
    collect_evidence,
    load_or_make_evidence,
    region_confidences,
)
from reclip_d2.modeling.class_shares import estimate_class_shares
from tests.helpers import watch_opened_files, write_scenes

NAMES = [["sky"], ["lake", "water"], ["fire"]]


def test_confidence_of_a_region_by_hand():
    posteriors = torch.tensor([[0.6, 0.3, 0.1], [0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1]])
    expected = torch.tensor([(0.6 + 0.8 + 0.5) / 3, 0.7, 0.0])
    torch.testing.assert_close(region_confidences(posteriors), expected)


def test_evidence_by_hand():
    """With a scale of ln 3, cosines 1 and 0 give posteriors 3/4 and 1/4; 2 and 0 give 9/10 and 1/10."""
    first = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])  # (1, 2, 2)
    second = torch.tensor([[[0.0, 1.0]], [[0.0, 2.0]]])  # (2, 1, 2)
    number, shares, confidences = collect_evidence([first, second], torch.eye(2), math.log(3))
    assert number == 2
    torch.testing.assert_close(confidences, torch.tensor([0.75, (0.75 + 0.9) / 2]))
    patches = torch.cat([first.flatten(0, 1), second.flatten(0, 1)])
    torch.testing.assert_close(shares, estimate_class_shares(patches, torch.eye(2), math.log(3)))


class Images(list):
    """Images that note which of them are read; None cannot be."""

    def __init__(self, items):
        super().__init__(items)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        if super().__getitem__(index) is None:
            raise ReclipError("image 3 is damaged")
        return super().__getitem__(index)


def test_images_are_spread_evenly_and_damaged_ones_left_out():
    image = torch.eye(2)[None]
    images = Images([image, image, image, None, image])
    assert collect_evidence(images, torch.eye(2), 10.0, max_images=2)[0] == 1
    assert images.read == [0, 3]
    with pytest.raises(ReclipError, match="none could be read"):
        collect_evidence(Images([None]), torch.eye(2), 10.0)


def test_file(tmp_path):
    evidence = ClassEvidence(NAMES, 7, [0.5, 0.4, 0.1], [0.9, 0.8, 0.2])
    path = tmp_path / "new" / "evidence.json"
    evidence.write(path)
    assert ClassEvidence.read(path, NAMES) == evidence
    with pytest.raises(ReclipError, match="was made for other classes"):
        ClassEvidence.read(path, [["sky"], ["lake"], ["fire"]])
    for damage in ({"shares": [0.5, 0.5]}, {"confidences": [2.0, 0.0, 0.0]}, {"format": "x"}):
        path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
        with pytest.raises(ReclipError, match="is damaged"):
            ClassEvidence.read(path, NAMES)
        evidence.write(path)
    with pytest.raises(ReclipError, match="does not exist"):
        ClassEvidence.read(tmp_path / "none.json", NAMES)


@pytest.fixture
def scenes(tmp_path):
    """A registered data set of three scenes with labels, and its config."""
    records = [{**record, "image_id": str(k)} for k, record in enumerate(write_scenes(tmp_path, 3))]
    assert all("sem_seg_file_name" in record for record in records)
    DatasetCatalog.register("evidence_scenes", lambda: records)
    MetadataCatalog.get("evidence_scenes").set(stuff_classes=[names[0] for names in NAMES])
    files = [f"configs/datasets/{name}.yaml" for name in ("embedded",)] + ["configs/methods/maskclip.yaml"]
    yield load_config(
        files, ["MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "('evidence_scenes',)", "MODEL.CLIP.TEMPLATES", "photo"]
    )
    DatasetCatalog.remove("evidence_scenes")
    MetadataCatalog.remove("evidence_scenes")


def test_it_is_collected_once_and_blind_to_labels(scenes, tmp_path, monkeypatch):
    """No label is opened, and none is needed."""
    labels = tmp_path / "annotations_detectron2"
    for path in labels.iterdir():
        path.unlink()
    opened = []
    with watch_opened_files(opened.append):
        evidence = load_or_make_evidence(scenes, NAMES)
    assert sum(name.endswith(".jpg") for name in opened) >= 3
    assert not any(name.startswith(str(labels)) for name in opened)
    assert evidence.images == 3 and sum(evidence.shares) == pytest.approx(1, abs=1e-5)
    assert all(0 <= value <= 1 for value in evidence.confidences) and max(evidence.confidences) > 1 / 3
    monkeypatch.setattr(class_evidence, "collect_evidence", None)  # would fail
    assert load_or_make_evidence(scenes, NAMES) == evidence


def test_without_images(scenes):
    DatasetCatalog.remove("evidence_scenes")
    DatasetCatalog.register("evidence_scenes", list)
    with pytest.raises(ReclipError, match="no training images in evidence_scenes: TEST.MIN_CLASS_SHARE"):
        load_or_make_evidence(scenes, NAMES)
