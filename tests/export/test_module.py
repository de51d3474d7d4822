"""The sizes at which models are traced and checked, and their stored maps."""

import pytest
import torch

from reclip_d2.export.module import map_grids, maps_on_grid, trace_size
from reclip_d2.export.parity import check_sizes
from tests.export.conftest import MODELS, build, logits_of
from tests.helpers import random_image

GRIDS = {
    "student": [(4, 5)],
    "student with a classifier": [],
    "ReCLIP++": [(4, 4)],
    "MaskCLIP with all options": [(4, 4), (5, 3)],
}


@pytest.mark.parametrize("name", GRIDS)
def test_grids_of_the_maps(name):
    assert map_grids(build(name)) == GRIDS[name]


@pytest.mark.parametrize("name", MODELS)
def test_a_trace_sees_the_resize_and_the_check_both_ways(name):
    model = build(name)
    step = model.size_divisibility
    height, width = trace_size(model)
    assert height % step and width % step  # there is padding
    grid = (-(-height // step), -(-width // step))
    assert grid not in map_grids(model)
    first, second = check_sizes(model)
    assert (first[0] // step, first[1] // step) in (map_grids(model) or [(8, 9)])
    assert not first[0] % step and not first[1] % step
    assert second[0] % step and second[1] % step
    assert len({first, second, (height, width)}) == 3


@pytest.mark.parametrize("name", ["student", "ReCLIP++", "MaskCLIP with all options"])
def test_maps_on_a_grid(name):
    model = build(name)
    image = random_image(0, 45, 61)[None]
    before, state = logits_of(model, image), {k: v.clone() for k, v in model.state_dict().items()}
    with maps_on_grid(model, (45, 61)):
        assert set(map_grids(model)) == {(6, 8)}
        torch.testing.assert_close(logits_of(model, image), before)
    with pytest.raises(RuntimeError, match="stop"), maps_on_grid(model, (9, 9)):
        raise RuntimeError("stop")
    assert map_grids(model) == GRIDS[name]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits_of(model, image), before)
