"""Class-preference score: a confusion matrix and its score by hand, and the evaluator on files."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.class_preference import (
    ClassPreferenceEvaluator,
    class_preference_score,
    class_preference_scores,
    confusion_matrix,
    row_normalized,
)

# Of label 0 two pixels are right and one is predicted as 1; of label 1 the same with 0; label 2 is right; 3 is absent.
LABELS = np.array([[0, 0, 0, 1], [1, 1, 255, 2]])
PREDICTION = np.array([[0, 0, 1, 1], [1, 0, 3, 2]])
CONFUSION = [[2, 1, 0, 0], [1, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


def test_confusion_by_hand():
    assert confusion_matrix(PREDICTION, LABELS, 4, 255).tolist() == CONFUSION


@pytest.mark.parametrize("wrong", [-1, 4])
def test_ids_out_of_range(wrong):
    with pytest.raises(ValueError, match="class ids are 0 to 3"):
        confusion_matrix(np.full((2, 2), wrong), np.zeros((2, 2), int), 4, 255)


def test_score_by_hand():
    normalized = row_normalized(np.array(CONFUSION))
    np.testing.assert_allclose(normalized[:3], [[2 / 3, 1 / 3, 0, 0], [1 / 3, 2 / 3, 0, 0], [0, 0, 1, 0]])
    assert np.isnan(normalized[3]).all()
    scores = class_preference_scores(normalized)
    np.testing.assert_allclose(scores[:3], [1 / 3, 1 / 3, 1])
    assert math.isnan(scores[3])
    assert class_preference_score(normalized) == pytest.approx(5 / 9)  # of three classes: the fourth has no pixels


def test_largest_other_entry_and_not_their_sum():
    normalized = np.array([[0.4, 0.35, 0.25], [0.7, 0.2, 0.1], [0.0, 0.0, 1.0]])
    np.testing.assert_allclose(class_preference_scores(normalized), [0.05, -0.5, 1.0])
    assert class_preference_score(normalized) == pytest.approx(0.55 / 3)


def test_the_input_is_left_alone():
    normalized = np.array([[0.4, 0.6], [0.5, 0.5]])
    class_preference_scores(normalized)
    assert normalized.tolist() == [[0.4, 0.6], [0.5, 0.5]]


def test_one_class_and_no_pixels():
    assert class_preference_score(row_normalized(np.array([[7]]))) == 1
    assert math.isnan(class_preference_score(row_normalized(np.zeros((3, 3), int))))


# ---- the evaluator ------------------------------------------------------------------------------------------


@pytest.fixture
def records(tmp_path, datasets) -> list[dict]:
    """Two images: the first and the second row of LABELS."""
    records = []
    for index, row in enumerate(LABELS):
        label = tmp_path / f"{index}.png"
        Image.fromarray(row[None].astype(np.uint8)).save(label)
        records.append({"file_name": f"{index}.jpg", "sem_seg_file_name": str(label)})
    datasets("reclip_test_preference", records, ["a", "b", "c", "d"])
    return records


def outputs(logits: bool = False) -> list[dict]:
    maps = [torch.from_numpy(row[None]) for row in PREDICTION]
    return [{"sem_seg": F.one_hot(m, 4).permute(2, 0, 1).float() if logits else m} for m in maps]


@pytest.mark.parametrize("logits", [False, True])
def test_label_maps_and_logits_in_any_batches(records, tmp_path, logits):
    evaluator = ClassPreferenceEvaluator("reclip_test_preference", output_dir=str(tmp_path / "out"))
    for batches in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        evaluator.reset()
        for batch in batches:
            evaluator.process(records[batch], outputs(logits)[batch])
        result = evaluator.evaluate()["class_preference"]
        assert result["score"] == pytest.approx(5 / 9)
        assert result["score-a"] == pytest.approx(1 / 3) and math.isnan(result["score-d"])
        assert evaluator.confusion.tolist() == CONFUSION
    written = json.loads((tmp_path / "out" / "reclip_test_preference_class_preference.json").read_text())
    assert written["score"] == pytest.approx(5 / 9) and written["class_scores"][3] is None
    assert written["confusion_pixels"] == CONFUSION


def test_counts_of_all_processes_are_added(records, monkeypatch):
    first, second = (ClassPreferenceEvaluator("reclip_test_preference") for _ in range(2))
    first.process(records[:1], outputs()[:1])
    second.process(records[1:], outputs()[1:])
    monkeypatch.setattr("detectron2.utils.comm.gather", lambda counts: [counts, second.confusion])
    assert first.evaluate()["class_preference"]["score"] == pytest.approx(5 / 9)


def test_other_processes_have_no_result(records, monkeypatch):
    evaluator = ClassPreferenceEvaluator("reclip_test_preference")
    evaluator.process(records, outputs())
    monkeypatch.setattr("detectron2.utils.comm.gather", lambda counts: [])
    monkeypatch.setattr("detectron2.utils.comm.is_main_process", lambda: False)
    assert evaluator.evaluate() is None


def test_the_label_files_are_checked(records):
    evaluator = ClassPreferenceEvaluator("reclip_test_preference", distributed=False)
    with pytest.raises(ReclipError, match="0.png has size 4x1, its image 3x1"):
        evaluator.process(records[:1], [{"sem_seg": torch.zeros(1, 3, dtype=torch.int64)}])
