"""Pictures of a training step (``reclip_d2.modeling.training_panel``)."""

import numpy as np
import torch

from reclip_d2.data.colors import class_colors
from reclip_d2.modeling.training_panel import training_panel


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
