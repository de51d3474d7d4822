"""Scores of a folder of masks: by hand, and against Detectron2's evaluator."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from PIL import Image

from reclip_d2.data.mask_files import NO_CLASS, MaskFiles
from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.class_preference import ClassPreferenceEvaluator
from reclip_d2.evaluation.folder_scores import FolderEvaluation, class_ids
from reclip_d2.evaluation.label_maps import LabelMapEvaluator
from reclip_d2.evaluation.scores import iou_per_class, segmentation_scores
from reclip_d2.evaluation.space_preference import SpacePreferenceEvaluator

NAME = "reclip_test_folder_scores"


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)
    return str(path)


@pytest.fixture
def folder(tmp_path, datasets):
    """Two images of 2 x 3 with labels of 3 classes, registered, and an empty folder for masks."""
    labels = [[[0, 0, 1], [0, 255, 1]], [[2, 2, 2], [1, 1, 1]]]
    records = []
    for k, label in enumerate(labels):
        image = save(tmp_path / "images" / f"{k}.png", np.zeros((2, 3, 3)))
        records.append({"file_name": image, "sem_seg_file_name": save(tmp_path / "labels" / f"{k}.png", label)})
    datasets(NAME, records, ["a", "b", "c"])
    return tmp_path / "masks"


def write_masks(folder, *masks):
    for k, mask in enumerate(masks):
        save(folder / f"{k}.png", mask)


def test_scores_by_hand(folder):
    """Label a: 2 of 3 right, the third without a class. b: all 5 right, and one of c. c: 2 of 3."""
    write_masks(folder, [[0, 0, 1], [255, 0, 1]], [[2, 2, 1], [1, 1, 1]])
    found = FolderEvaluation(NAME, MaskFiles(folder, ids=range(3))).evaluate()
    ious = [200 / 3, 500 / 6, 200 / 3]
    assert list(found.ious) == ["a", "b", "c"] and np.allclose(list(found.ious.values()), ious)
    assert found.scores["mIoU"] == pytest.approx(np.mean(ious))
    assert found.scores["pACC"] == pytest.approx(900 / 11)
    assert found.scores["mACC"] == pytest.approx((200 / 3 + 100 + 200 / 3) / 3)
    assert found.scores["fwIoU"] == pytest.approx((3 * ious[0] + 5 * ious[1] + 3 * ious[2]) / 11)
    assert found.without_class == pytest.approx(1 / 11)
    assert found.clusters is None and found.space_preference is None
    # a: 2/3 of its row against 1/3 without a class; b: 1; c: 2/3 against 1/3
    assert found.class_preference == pytest.approx((1 / 3 + 1 + 1 / 3) / 3)


@pytest.mark.parametrize("seed", range(3))
def test_with_a_class_everywhere_the_scores_are_detectron2s(tmp_path, datasets, seed):
    rng = np.random.default_rng(seed)
    records, masks = [], []
    for k in range(3):
        image = save(tmp_path / "images" / f"{k}.png", np.zeros((20, 30, 3)))
        labels = rng.choice([0, 1, 3, 255], (20, 30))  # class 2 is in no label
        records.append({"file_name": image, "sem_seg_file_name": save(tmp_path / "labels" / f"{k}.png", labels)})
        masks.append(np.where(rng.random((20, 30)) < 0.6, labels % 4, rng.integers(0, 4, (20, 30))))
    write_masks(tmp_path / "masks", *masks)
    datasets(NAME, records, ["a", "b", "c", "d"])
    found = FolderEvaluation(NAME, MaskFiles(tmp_path / "masks")).evaluate(space_preference=True)
    evaluators = [
        LabelMapEvaluator(NAME, distributed=False),
        ClassPreferenceEvaluator(NAME, distributed=False),
        SpacePreferenceEvaluator(NAME, distributed=False),
    ]
    for evaluator in evaluators:
        evaluator.reset()
        evaluator.process(records, [{"sem_seg": torch.from_numpy(mask.astype(np.int64))} for mask in masks])
    miou, classes, space = (evaluator.evaluate() for evaluator in evaluators)
    for key in ("mIoU", "fwIoU", "mACC", "pACC"):
        assert found.scores[key] == pytest.approx(miou["sem_seg"][key])
    assert found.class_preference == pytest.approx(classes["class_preference"]["score"])
    assert found.space_preference == pytest.approx(space["space_preference"], nan_ok=True)
    assert np.isnan(found.ious["c"])


def test_clusters(folder):
    """Cluster 7 is b, 4 is a and 5 is c by most pixels; 6 finds no class any more."""
    write_masks(folder, [[4, 4, 7], [6, 6, 7]], [[5, 5, 5], [7, 7, 7]])
    evaluation = FolderEvaluation(NAME, MaskFiles(folder))
    one = evaluation.evaluate("one-to-one", space_preference=True)
    assert one.clusters == [None, None, None, None, "a", "c", None, "b"]
    assert list(one.ious.values()) == pytest.approx([200 / 3, 100, 100]) and one.without_class == pytest.approx(1 / 11)
    many = evaluation.evaluate("many-to-one", space_preference=True)
    assert many.clusters == [None, None, None, None, "a", "c", "a", "b"]
    assert many.scores["mIoU"] == 100 and many.without_class == 0
    assert many.space_preference["objects"] == one.space_preference["objects"]


def test_clusters_and_pixels_without_one(folder):
    write_masks(folder, [[1, 1, 0], [1, 1, 255]], [[2, 2, 2], [0, 0, 0]])
    found = FolderEvaluation(NAME, MaskFiles(folder)).evaluate("one-to-one", space_preference=True)
    assert found.clusters == ["b", "a", "c"]
    assert found.ious["b"] == pytest.approx(80) and found.without_class == pytest.approx(1 / 11)


def test_an_id_too_many(folder):
    write_masks(folder, [[0, 0, 3], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]])
    with pytest.raises(ReclipError, match=r"id 3, but .* has the classes 0 to 2: give the names .*--names"):
        FolderEvaluation(NAME, MaskFiles(folder)).evaluate()


def test_a_mask_is_missing(folder):
    write_masks(folder, [[0, 0, 0], [0, 0, 0]])
    with pytest.raises(ReclipError, match="1 of 2 images have no mask"):
        FolderEvaluation(NAME, MaskFiles(folder))


def test_a_data_set_without_labels(folder, datasets):
    write_masks(folder, [[0]])
    datasets("reclip_test_unlabelled", [{"file_name": "a.png"}], ["a"])
    with pytest.raises(ReclipError, match="no labels"):
        FolderEvaluation("reclip_test_unlabelled", MaskFiles(folder))


def test_ids_by_name(folder):
    assert class_ids(NAME, None) == [0, 1, 2]
    assert class_ids(NAME, [["sky"], ["c"], ["A"]]) == [NO_CLASS, 2, 0]
    assert len(DatasetCatalog.get(NAME)) == 2


def test_only_classes_that_occur_count():
    confusion = np.array([[3, 0, 1], [0, 0, 0]])
    assert iou_per_class(confusion).tolist() == pytest.approx([0.75, np.nan], nan_ok=True)
    assert segmentation_scores(confusion) == pytest.approx({"mIoU": 75, "fwIoU": 75, "mACC": 75, "pACC": 75})
