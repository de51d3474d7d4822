"""The selection that the figures of the bias report show, and that nothing is clipped."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from reclip_d2.data.colors import class_colors
from reclip_d2.evaluation.logit_parts import LogitParts
from reclip_d2.evaluation.preferences import Preference
from reclip_d2.evaluation.space_preference import distance_curve
from reclip_d2.visualization.figures import fold, legend_shape, save_figure
from reclip_d2.visualization.scene_figures import (
    frequent_classes,
    logit_figure,
    pixels_right,
    scene_figure,
    telling_classes,
)
from reclip_d2.visualization.score_figures import (
    MAX_MAPS,
    class_iou_figure,
    confusion_figure,
    distance_figure,
    most_confused_classes,
    preference_figure,
)

NAMES = ["MaskCLIP", "ReCLIP", "ReCLIP++ (rectified, as published)", "ReCLIP++ distilled student"]
CLASSES = [f"class {k} with a long name" for k in range(59)]


def assert_whole(figure: Figure) -> None:
    """Nothing in the saved figure extends over its edge by more than a hundredth of an inch."""
    figure.draw_without_rendering()
    figure.draw_without_rendering()
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert min(box.x0, box.y0, width - box.x1, height - box.y1) > -0.01, (box, width, height)


def test_most_confused_classes():
    confusion = np.diag([10, 10, 10, 10, 0]).astype(int)
    confusion[2, 0] = 30  # three quarters of label 2 are taken for 0
    confusion[1, 3] = 5
    assert most_confused_classes(confusion, 2) == [0, 2]
    assert most_confused_classes(confusion, 3) == [0, 1, 2]  # of the next pair the label comes first
    assert most_confused_classes(confusion, 9) == [0, 1, 2, 3]  # class 4 has no pixels


def test_telling_classes():
    before = np.array([[0, 0, 0, 1, 2, 2]])
    after = np.array([[0, 0, 0, 1, 3, 255]])
    assert telling_classes(before, after, 5) == [2, 3, 0, 1]  # 2 became 3; of the others 0 is larger
    assert telling_classes(before, after, 5, count=1) == [2]


def test_frequent_classes():
    maps = [np.array([[0, 3, 3, 255]]), np.array([[1, 3, 0, 0]])]
    assert frequent_classes(maps, 5) == [0, 1, 3]
    assert frequent_classes(maps, 5, count=2) == [0, 3]


def test_pixels_right():
    assert pixels_right(np.array([[1, 2, 3]]), np.array([[1, 0, 255]]), 255) == 50
    assert np.isnan(pixels_right(np.array([[1]]), np.array([[255]]), 255))


def test_names_are_fitted():
    assert fold("ReCLIP++ (rectified, as published)", 20) == "ReCLIP++ (rectified,\nas published)"
    assert fold("one two three four", 7) == "one two\nthree…"
    assert legend_shape(["a"] * 12, 100) == (12, 1) and legend_shape(["a"] * 12, 1)[0] == 1


def test_score_figures_are_whole():
    rng = np.random.default_rng(0)
    distances = rng.uniform(0, 300, 300)
    curves = [distance_curve(distances, rng.uniform(size=300), 40) for _ in NAMES]
    figure = distance_figure(NAMES, curves, [-0.5, -0.4, -0.3, float("nan")], 20)
    assert_whole(figure)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels[0] == "MaskCLIP (score -0.50)" and labels[3].endswith("(no score)")
    confusions = [rng.integers(0, 50, (59, 59)) + np.diag(rng.integers(100, 900, 59)) for _ in NAMES]
    chosen = most_confused_classes(confusions[0])
    for count in (1, 3, 4):
        figure = confusion_figure(NAMES[:count], confusions[:count], chosen, CLASSES)
        assert_whole(figure)
    ious = [rng.uniform(0, 100, 59) for _ in NAMES]
    ious[0][5] = np.nan
    figure = class_iou_figure(NAMES, [np.where(np.isnan(ious[0]), np.nan, row) for row in ious], CLASSES)
    assert_whole(figure)
    drawn = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert len(drawn) == 30 and CLASSES[5] not in drawn


def test_bars_stand_in_the_order_of_the_gain():
    figure = class_iou_figure(["a", "b"], [np.array([10.0, 20, 30]), np.array([15.0, 50, 20])], ["x", "y", "z"])
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["y", "x", "z"]


@pytest.mark.parametrize("size", [(60, 100), (100, 60)])
@pytest.mark.parametrize("labelled", [True, False])
def test_scene_figures_are_whole(size, labelled):
    rng = np.random.default_rng(0)
    colors = class_colors(59)
    maps = [np.kron(rng.integers(0, 59, (2, 2)), np.ones((size[0] // 2, size[1] // 2), int)) for _ in range(2)]
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for _ in maps]
    truths = [m.copy() if labelled else None for m in maps]
    if labelled:
        truths[1][0] = 255
    figure = scene_figure(images, truths, dict.fromkeys(NAMES, maps), CLASSES, colors)
    assert_whole(figure)
    titles = [axes.get_title() for axes in figure.axes[: len(NAMES) + 1 + labelled]]
    assert ("ground truth" in titles) == labelled and titles[-1] == "ReCLIP++ distilled\nstudent"

    grids = [torch.randn(59, 2, 3) for _ in range(3)]
    parts = LogitParts(grids[0], grids[1], grids[0] - grids[1], grids[2], size, size)
    figure = logit_figure(images[0], truths[0], parts, [3, 7, 40, 58], CLASSES, colors, NAMES[2])
    assert_whole(figure)


def test_preference_figure_is_whole_and_sorted():
    maps = np.random.default_rng(0).normal(size=(59, 4, 6))
    preference = Preference(maps, maps.mean((1, 2)), "mean soft-max", 7)
    figure = preference_figure("MaskCLIP", preference, CLASSES)
    assert_whole(figure)
    assert figure._suptitle.get_text() == f"MaskCLIP ({MAX_MAPS} of 59 classes)"
    figure = preference_figure("x", Preference(maps[:2], np.array([-1.0, 1.0]), "bias logits", 1), ["low", "high"])
    assert [axes.get_title() for axes in figure.axes[:2]] == ["high +1.00", "low -1.00"]


def test_png_is_written(tmp_path):
    figure = Figure(figsize=(2, 1))
    path = save_figure(figure, tmp_path / "new" / "f.png", dpi=50)
    with Image.open(path) as image:
        assert image.size == (100, 50)
