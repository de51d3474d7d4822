"""Colours of classes and pictures of label maps (``reclip_d2.data.colors``)."""

import numpy as np
import pytest

from reclip_d2.data.colors import class_colors, colorize_labels


@pytest.mark.parametrize("number", [1, 12, 171])
def test_colours_differ(number):
    colors = class_colors(number)
    assert colors.shape == (number, 3) and colors.dtype == np.uint8
    assert len({tuple(color) for color in colors.tolist()}) == number
    assert (colors.max(axis=1) > 0).all()  # none is the black of the ignored label


def test_labels_are_coloured_and_the_ignored_one_is_black():
    colors = np.array([[10, 20, 30], [40, 50, 60]], dtype=np.uint8)
    labels = np.array([[0, 1], [255, 0]])
    expected = [[[10, 20, 30], [40, 50, 60]], [[0, 0, 0], [10, 20, 30]]]
    assert colorize_labels(labels, colors).tolist() == expected
