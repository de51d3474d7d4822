"""Pictures of label maps and of training (``reclip_d2.visualization``)."""

import numpy as np
import pytest
import torch

from reclip_d2.visualization import class_colors, colorize_labels, training_panel


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


def test_panel_shows_image_prediction_and_bias():
    image = torch.arange(3 * 4 * 6, dtype=torch.float32).reshape(3, 4, 6)
    logits = torch.zeros(2, 2, 3)
    logits[1, :, 2] = 1.0  # right third is class 1
    bias = torch.zeros(2, 3, 2)
    bias[0, :, 1] = 1.0  # upper half prefers class 1
    panel = training_panel(image, logits, bias)
    assert panel.shape == (3, 4, 18) and panel.dtype == np.uint8
    assert (panel[:, :, :6] == image.numpy().astype(np.uint8)).all()
    colors = class_colors(2)
    assert (panel[:, :, 6:10] == colors[0][:, None, None]).all()
    assert (panel[:, :, 10:12] == colors[1][:, None, None]).all()
    assert (panel[:, :2, 12:] == colors[1][:, None, None]).all()
    assert (panel[:, 2:, 12:] == colors[0][:, None, None]).all()
