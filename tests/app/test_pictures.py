"""Pictures of the page."""

import re

import numpy as np
import torch
from PIL import Image

from reclip_d2.app import pictures
from reclip_d2.evaluation.logit_parts import LogitParts
from reclip_d2.formats import MaskClasses

CLASSES = MaskClasses(("sky", "<b>fire</b>"), ((255, 0, 0), (0, 0, 255)))


def test_overlay(tmp_path):
    """Half colour, half picture; ignored pixels are the picture; a narrow picture gets margins at the sides."""
    image = np.full((60, 30, 3), 100, np.uint8)
    labels = np.full((60, 30), 255, np.uint8)
    labels[:30] = 1
    file = pictures.write_overlay(tmp_path, "x", image, labels, CLASSES)
    drawn = np.asarray(Image.open(file)).astype(int)
    assert drawn.shape == (60, 90, 3)
    assert np.abs(drawn[10, 45] - (50, 50, 178)).max() < 12 and np.abs(drawn[50, 45] - 100).max() < 12
    assert (drawn[:, :20] > 220).all() and (drawn[:, 70:] > 220).all()
    wide = pictures.write_overlay(tmp_path, "wide", np.zeros((10, 40, 3), np.uint8), None, CLASSES)
    assert np.asarray(Image.open(wide)).shape == (10, 40, 3)


def test_legend():
    text = pictures.legend_html(CLASSES, {"0": 50, "1": 25, "255": 25}, {"0": 20, "1": 80}, ["road", "snow"])
    rows = [re.sub(r"<[^>]+>", " ", row).split() for row in text.split("<tr")[1:]]
    assert rows[1][-3:] == ["25.0", "80.0", "+55.0"] and "&lt;b&gt;fire&lt;/b&gt;" in rows[1]
    assert rows[2][-4:] == ["sky", "50.0", "20.0", "−30.0"]
    assert rows[3][-6:] == ["background:", "road,", "snow", "25.0", "0.0", "−25.0"]
    assert "rgb(0, 0, 255)" in text and "<b>" not in text
    before_only = pictures.legend_html(CLASSES, {"0": 100}, None, [])
    assert all(word not in before_only for word in ("after", "change", "transparent"))


def hand_made_parts():
    """2 classes on a grid of 2 x 4 patches of 8 px; the bias prefers class 0 on the left and class 1 on the right."""
    query = torch.zeros(2, 2, 4)
    query[1] = 0.5
    bias = torch.zeros(2, 2, 4)
    bias[0, :, :2], bias[1, :, 2:] = 0.3, 0.1
    return LogitParts(query, bias, query - bias, query - bias, (16, 32), (16, 32))


def test_heat_maps():
    """Positive where CLIP prefers the class; what all classes have in common is left out."""
    image = np.zeros((16, 32, 3), np.uint8)
    maps = pictures.heat_maps(image, hand_made_parts(), 0)
    assert {name: heat.shape for name, heat in maps.items()} == dict.fromkeys(("query", "bias", "rectified"), (16, 32))
    np.testing.assert_allclose(maps["query"], -0.25, atol=1e-6)
    np.testing.assert_allclose(maps["bias"][:, :12], 0.15, atol=1e-6)
    np.testing.assert_allclose(maps["bias"][:, 20:], -0.05, atol=1e-6)
    np.testing.assert_allclose(maps["rectified"], maps["query"] - maps["bias"], atol=1e-6)
    np.testing.assert_allclose(pictures.heat_maps(image, hand_made_parts(), 1)["bias"], -maps["bias"], atol=1e-6)


def test_drawn_heat_map():
    """Red on the left, where it is positive, blue on the right; a map of zeros can be drawn too."""
    image = np.full((60, 80, 3), 200, np.uint8)
    heat = np.concatenate([np.full((60, 40), 0.2), np.full((60, 40), -0.2)], axis=1).astype(np.float32)
    drawn = pictures.draw_heat_map(image, heat, "bias").astype(int)
    height, width = drawn.shape[:2]
    left, right = drawn[height // 3, width // 4], drawn[height // 3, 3 * width // 4]
    assert left[0] > left[2] + 30 and right[2] > right[0] + 30
    assert pictures.draw_heat_map(image, np.zeros((60, 80), np.float32), "nothing").shape == drawn.shape
