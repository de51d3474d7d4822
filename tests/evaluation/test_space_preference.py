"""Space-preference score: curve and slope by hand, the evaluator on files."""

import json
import math

import numpy as np
import pytest
import torch
from detectron2.evaluation import DatasetEvaluators
from PIL import Image
from scipy import stats

from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.class_preference import ClassPreferenceEvaluator
from reclip_d2.evaluation.label_maps import LabelMapEvaluator
from reclip_d2.evaluation.space_preference import (
    SpacePreferenceEvaluator,
    compare_slopes,
    distance_curve,
    fitted_slope,
    mean_slope,
    read_instance_file,
)

DISTANCES = np.array([0.0, 39.9, 40.0, 85.0, 130.0])
IOUS = np.array([0.5, 0.7, 0.4, 0.2, 0.1])


def test_curve_by_hand():
    curve = distance_curve(DISTANCES, IOUS, 40)
    assert curve.edges.tolist() == [0, 40, 80, 120, 160] and curve.centres.tolist() == [20, 60, 100, 140]
    assert curve.counts.tolist() == [2, 1, 1, 1]
    np.testing.assert_allclose(curve.ious, [0.6, 0.4, 0.2, 0.1])
    assert curve.standard_errors[0] == pytest.approx(0.1)  # 0.5 and 0.7: deviation 0.1414, over the root of 2
    assert np.isnan(curve.standard_errors[1:]).all()


def test_mean_slope_by_hand():
    slope, error = mean_slope(distance_curve(DISTANCES, IOUS, 40))
    assert slope == pytest.approx((-0.2 - 0.2 - 0.1) / 40 / 3)
    assert math.isnan(error)  # the last bin has one object: its error is unknown


def test_an_empty_bin_is_stepped_over():
    keep = [0, 1, 3, 4]
    slope, _ = mean_slope(distance_curve(DISTANCES[keep], IOUS[keep], 40))
    assert slope == pytest.approx(((0.2 - 0.6) / 80 + (0.1 - 0.2) / 40) / 2)


def test_bins_of_few_objects_stay_out_of_the_slope():
    distances, ious = np.array([10, 10, 50, 90, 90]), np.array([0.5, 0.7, 0.0, 0.2, 0.4])
    slope, error = mean_slope(distance_curve(distances, ious, 40), min_objects=2)
    assert slope == pytest.approx((0.3 - 0.6) / 80)
    assert error == pytest.approx(math.hypot(0.1, 0.1) / 80)


def test_no_slope_without_two_bins():
    for distances in ([], [5.0, 6.0]):
        curve = distance_curve(np.array(distances), np.full(len(distances), 0.5), 40)
        assert all(map(math.isnan, mean_slope(curve)))


def test_error_is_that_of_repeated_draws():
    """The standard error against the spread of the slope over fresh draws of the objects."""
    rng = np.random.default_rng(0)
    distances = np.repeat([10.0, 50.0, 90.0, 170.0], [30, 60, 90, 20])  # a bin is empty
    spread = 0.1 + distances / 1000
    slopes, errors = zip(
        *(mean_slope(distance_curve(distances, 0.5 + spread * rng.normal(size=200), 40)) for _ in range(2000)),
        strict=True,
    )
    assert np.mean(errors) == pytest.approx(np.std(slopes), rel=0.1)
    assert np.mean(slopes) == pytest.approx(0, abs=3 * np.std(slopes) / math.sqrt(2000))


def test_fitted_slope_against_scipy():
    rng = np.random.default_rng(1)
    x = rng.uniform(0, 200, 50)
    y = 0.7 - 0.002 * x + rng.normal(0, 0.1, 50)
    slope, error = fitted_slope(x, y)
    expected = stats.linregress(x, y)
    assert slope == pytest.approx(expected.slope) and error == pytest.approx(expected.stderr)
    assert all(map(math.isnan, fitted_slope(np.ones(5), np.arange(5.0))))
    assert all(map(math.isnan, fitted_slope(np.zeros(0), np.zeros(0))))


def test_difference_of_two_models_is_that_of_their_slopes():
    rng = np.random.default_rng(2)
    distances, common = rng.uniform(0, 160, 200), rng.normal(0, 0.2, 200)
    before, after = 0.5 + common, 0.6 + common + 0.001 * distances
    difference, error = compare_slopes(distances, before, after, 40)
    slopes = [mean_slope(distance_curve(distances, ious, 40)) for ious in (before, after)]
    assert difference == pytest.approx(slopes[1][0] - slopes[0][0])
    assert error < 0.2 * slopes[0][1]  # what is common to both models takes no part


# ---- the evaluator ------------------------------------------------------------------------------------------

# One image, 12 x 16 px: object A, class 1, four pixels in the middle; object B, class 1, four in a corner; the ground
# is class 0. The model finds A and half of B.
LABEL = np.zeros((12, 16), np.uint8)
LABEL[5:7, 7:9] = 1
LABEL[0:2, 0:2] = 1
PREDICTED = LABEL.astype(np.int64)
PREDICTED[0, 0:2] = 0


@pytest.fixture
def record(tmp_path, datasets) -> dict:
    Image.fromarray(LABEL).save(tmp_path / "0.png")
    record = {"file_name": "0.jpg", "sem_seg_file_name": str(tmp_path / "0.png")}
    datasets("reclip_test_space", [record], ["ground", "thing"])
    return record


def evaluator(**arguments) -> SpacePreferenceEvaluator:
    defaults = {"bin_width": 2, "min_object_area": 1, "min_bin_objects": 1}
    return SpacePreferenceEvaluator("reclip_test_space", **{**defaults, **arguments})


def test_score_by_hand(record, tmp_path):
    space = evaluator(output_dir=str(tmp_path / "out"))
    space.process([record], [{"sem_seg": torch.from_numpy(PREDICTED)}])
    result = space.evaluate()["space_preference"]
    # A: distance 0, IoU 1. B: centroid (0.5, 0.5), the image's (5.5, 7.5), distance 8.6: bin [8, 10), IoU 2/4.
    # The ground: 184 px, IoU 184/186, at a distance below 2.
    ground = np.argwhere(LABEL == 0).mean(0) - (5.5, 7.5)
    assert np.hypot(*ground) < 2
    assert result["objects"] == 3
    assert result["IoU-8-10px"] == pytest.approx(50) and result["objects-8-10px"] == 1
    assert result["IoU-0-2px"] == pytest.approx(100 * (1 + 184 / 186) / 2) and result["objects-0-2px"] == 2
    assert "objects-2-4px" not in result
    slope = (0.5 - (1 + 184 / 186) / 2) / 8
    assert result["slope_percent_per_pixel"] == pytest.approx(100 * slope)
    assert result["score"] == pytest.approx(slope * 10)  # half the diagonal of 12 x 16
    x = np.array([0, math.hypot(5, 7), np.hypot(*ground)])
    assert result["fitted_score"] == pytest.approx(10 * np.polyfit(x, [1, 0.5, 184 / 186], 1)[0])
    assert space.curve.counts.tolist() == [2, 0, 0, 0, 1] and space.half_diagonal == 10
    written = json.loads((tmp_path / "out" / "reclip_test_space_space_preference.json").read_text())
    assert written["curve"]["counts"] == [2, 0, 0, 0, 1] and written["curve"]["ious"][1] is None
    assert written["score"] == pytest.approx(result["score"])


def test_small_objects_and_thin_bins_are_left_out(record):
    space = evaluator(min_object_area=5)
    space.process([record], [{"sem_seg": torch.from_numpy(PREDICTED)}])
    result = space.evaluate()["space_preference"]
    assert result["objects"] == 1 and math.isnan(result["score"])
    space = evaluator(min_bin_objects=2)
    space.process([record], [{"sem_seg": torch.from_numpy(PREDICTED)}])
    result = space.evaluate()["space_preference"]
    assert math.isnan(result["score"]) and result["objects-8-10px"] == 1  # in the curve it is


def test_in_one_pass_with_the_other_evaluators(record):
    both = DatasetEvaluators(
        [
            LabelMapEvaluator("reclip_test_space", distributed=True, output_dir=None),
            ClassPreferenceEvaluator("reclip_test_space"),
            evaluator(),
        ]
    )
    both.reset()
    both.process([record], [{"sem_seg": torch.from_numpy(PREDICTED)}])
    results = both.evaluate()
    assert set(results) == {"sem_seg", "class_preference", "space_preference"}
    assert all(isinstance(v, float) for task in results.values() for v in task.values())  # what Detectron2's hook wants
    both.reset()
    both.process([record], [{"sem_seg": torch.from_numpy(LABEL.astype(np.int64))}])
    again = both.evaluate()
    assert again["sem_seg"]["mIoU"] == 100 and again["class_preference"]["score"] == 1
    assert again["space_preference"]["score"] == 0


def test_objects_of_all_processes_come_together(record, monkeypatch):
    first, second = evaluator(), evaluator()
    for space in (first, second):
        space.process([record], [{"sem_seg": torch.from_numpy(PREDICTED)}])
    theirs = (second._distances, second._ious, second._half_diagonals)
    monkeypatch.setattr("detectron2.utils.comm.gather", lambda counts: [counts, theirs])
    result = first.evaluate()["space_preference"]
    assert result["objects"] == 6 and result["objects-8-10px"] == 2 and result["IoU-8-10px"] == pytest.approx(50)


def test_no_image_at_all(record):
    result = evaluator().evaluate()["space_preference"]
    assert result["objects"] == 0 and math.isnan(result["score"])


def test_instances_of_the_record(record, tmp_path, datasets):
    instances = np.zeros((12, 16), np.uint8)
    instances[LABEL == 1] = 3  # one thing in two parts
    instances[11, 15] = 255  # VOC's border: no instance
    Image.fromarray(instances).save(tmp_path / "instances.png")
    datasets(
        "reclip_test_instances",
        [{**record, "instance_file_name": str(tmp_path / "instances.png")}],
        ["ground", "thing"],
    )
    space = SpacePreferenceEvaluator("reclip_test_instances", bin_width=2, min_object_area=1, min_bin_objects=1)
    space.process([record], [{"sem_seg": torch.from_numpy(PREDICTED)}])
    result = space.evaluate()["space_preference"]
    assert result["objects"] == 2
    # The thing's centroid is the mean of its parts': (3, 4), 2.5 rows and 3.5 columns from the centre.
    assert result["IoU-4-6px"] == pytest.approx(100 * 6 / 8)


def test_bad_instance_files(tmp_path):
    path = tmp_path / "i.png"
    Image.fromarray(np.zeros((2, 3), np.uint8)).save(path)
    with pytest.raises(ReclipError, match="i.png has size 3x2, its label 2x2"):
        read_instance_file(str(path), (2, 2))
    Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(path)
    with pytest.raises(ReclipError, match="is a RGB image"):
        read_instance_file(str(path), (2, 3))
    with pytest.raises(ReclipError, match="none.png does not exist"):
        read_instance_file(str(tmp_path / "none.png"), (2, 3))
    reordered = Image.new("P", (2, 1))
    reordered.putpalette([224, 224, 192, 128, 0, 0])  # VOC's border has become index 0, no instance
    reordered.save(path)
    with pytest.raises(ReclipError, match="palette is not in the order of the ids"):
        read_instance_file(str(path), (1, 2))
    Image.fromarray(np.array([[255, 26001]], np.uint16)).save(path)
    assert read_instance_file(str(path), (1, 2)).tolist() == [[255, 26001]]
