"""The grid that refinements get, and the names in ``TEST.REFINE``."""

import pytest
import torch

from reclip_d2.config import load_config
from reclip_d2.errors import ReclipError
from reclip_d2.inference.refinements import Denoise, Grid, build_refinements, known_refinements, softmax_scale
from tests.helpers import make_maskclip, make_rectified, make_student


@pytest.mark.parametrize(
    ("cells", "padded", "size", "expected"),
    [((4, 5), (32, 40), (32, 40), (4, 5)), ((4, 5), (32, 40), (25, 33), (4, 5)), ((4, 5), (32, 40), (24, 32), (3, 4))],
)
def test_cells_without_a_pixel_are_not_valid(cells, padded, size, expected):
    grid = Grid(torch.zeros(3, *cells), torch.zeros(3, *size), padded)
    assert grid.valid == expected
    assert Grid(torch.zeros(3, *cells), torch.zeros(3, *size), padded, padding_counts=True).valid == cells


def test_names():
    assert set(known_refinements()) >= {"denoise", "flip", "lposs", "pamr", "scales"}
    built = build_refinements(load_config("", ["TEST.REFINE", "['flip', 'denoise']"]))
    assert [type(refinement) for refinement in built] == [Denoise]
    with pytest.raises(ReclipError, match="'blur', which is not known: choose from bank, denoise, flip"):
        build_refinements(load_config("", ["TEST.REFINE", "['blur']"]))
    with pytest.raises(ReclipError, match="'flip' twice"):
        build_refinements(load_config("", ["TEST.REFINE", "['flip', 'flip']"]))


def test_scale_of_the_soft_max():
    maskclip = make_maskclip()
    assert softmax_scale(maskclip) == maskclip.backbone.logit_scale
    assert softmax_scale(make_rectified()) == 10
    assert softmax_scale(make_student(maskclip)) == 1
