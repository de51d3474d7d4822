"""Objects of a label map, their IoU and their distance from the centre, by hand."""

import math

import numpy as np
import pytest

from reclip_d2.evaluation.objects import centroid_distances, find_objects, object_areas, object_ious

LABELS = np.array(
    [
        [0, 0, 1, 1, 1],
        [0, 0, 1, 1, 1],
        [2, 1, 1, 1, 0],
        [255, 2, 1, 0, 0],
    ]
)
PREDICTION = np.array(
    [
        [0, 0, 0, 1, 1],
        [0, 1, 1, 1, 1],
        [2, 1, 1, 0, 0],
        [0, 0, 1, 0, 2],
    ]
)


def test_connected_regions_diagonals_included():
    objects = find_objects(LABELS, 255)
    assert objects.class_ids.tolist() == [0, 0, 1, 2]
    assert objects.regions.tolist() == [
        [1, 1, 3, 3, 3],
        [1, 1, 3, 3, 3],
        [4, 3, 3, 3, 2],
        [0, 4, 3, 2, 2],
    ]
    assert object_areas(objects).tolist() == [4, 3, 10, 2]


def test_iou_by_hand():
    ious = object_ious(find_objects(LABELS, 255), PREDICTION, LABELS, 255)
    # Class 0 is predicted on three pixels of other classes, (0,2), (2,3) and (3,1): they count against both of its
    # objects; (3,0) is ignored. Class 1 is predicted on one pixel of another class, class 2 too.
    expected = [3 / (4 + 3), 2 / (3 + 3), 8 / (10 + 1), 1 / (2 + 1)]
    np.testing.assert_allclose(ious, expected, rtol=1e-12)


def test_iou_against_sets():
    """The definition, with sets of pixels."""
    rng = np.random.default_rng(0)
    labels = np.kron(rng.integers(0, 3, (5, 6)), np.ones((2, 2), int))
    labels[rng.random(labels.shape) < 0.1] = 255
    prediction = rng.integers(0, 4, labels.shape)  # class 3 is in no label
    objects = find_objects(labels, 255)
    ious = object_ious(objects, prediction, labels, 255)
    pixels = {(r, c) for r, c in np.ndindex(labels.shape) if labels[r, c] != 255}
    for index, class_id in enumerate(objects.class_ids):
        own = {p for p in pixels if objects.regions[p] == index + 1}
        others = {p for p in pixels if labels[p] == class_id} - own
        predicted = {p for p in pixels if prediction[p] == class_id} - others
        assert ious[index] == pytest.approx(len(own & predicted) / len(own | predicted), rel=1e-12)


def test_perfect_and_hopeless():
    objects = find_objects(LABELS, 255)
    assert object_ious(objects, np.where(LABELS == 255, 0, LABELS), LABELS, 255).tolist() == [1, 1, 1, 1]
    assert object_ious(objects, np.full_like(LABELS, 3), LABELS, 255).tolist() == [0, 0, 0, 0]


def test_distance_by_hand():
    # The image's centroid is row 1.5, column 2. Objects' centroids: (0.5, 0.5); rows 2, 3, 3 and columns 4, 3, 4;
    # rows 0 0 0 1 1 1 2 2 2 3 and columns 2 3 4 2 3 4 1 2 3 2; (2.5, 0.5).
    expected = [
        math.hypot(1, 1.5),
        math.hypot(8 / 3 - 1.5, 11 / 3 - 2),
        math.hypot(1.2 - 1.5, 2.6 - 2),
        math.hypot(1, 1.5),
    ]
    np.testing.assert_allclose(centroid_distances(find_objects(LABELS, 255)), expected, rtol=1e-12)


def test_instances_part_what_touches_and_join_what_is_cut():
    labels = np.array([[1, 1, 1, 1, 0, 1]])
    instances = np.array([[7, 7, 9, 9, 0, 7]])
    objects = find_objects(labels, 255, instances)
    assert objects.class_ids.tolist() == [0, 1, 1]
    assert objects.regions.tolist() == [[2, 2, 3, 3, 1, 2]]


def test_classes_without_instances_fall_into_regions():
    labels = np.array([[1, 1, 0, 1, 1]])
    instances = np.array([[4, 4, 0, 0, 0]])
    objects = find_objects(labels, 255, instances)
    assert objects.regions.tolist() == [[2, 2, 1, 3, 3]]


def test_nothing_but_ignored_pixels():
    labels = np.full((3, 3), 255)
    objects = find_objects(labels, 255)
    assert len(objects.class_ids) == 0
    assert len(object_ious(objects, np.zeros((3, 3), int), labels, 255)) == 0
    assert len(centroid_distances(objects)) == 0
