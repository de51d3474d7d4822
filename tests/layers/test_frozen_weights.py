"""Copies of frozen weights in autocast's precision."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from reclip_d2.layers import autocast_copy
from reclip_d2.layers.frozen_weights import _NAME


def under_autocast(weight, dtype=torch.bfloat16):
    with torch.autocast("cpu", dtype):
        return autocast_copy(weight)


@pytest.fixture
def weight():
    return nn.Parameter(torch.randn(5, 7), requires_grad=False)


def test_a_copy_is_made_once(weight):
    with torch.inference_mode():
        first = under_autocast(weight)
    assert torch.equal(first, weight.bfloat16()) and not first.is_inference()
    assert under_autocast(weight) is first
    assert autocast_copy(weight) is weight and under_autocast(None) is None


def test_it_follows_the_weight_without_moving(weight):
    first = under_autocast(weight)
    with torch.no_grad():
        weight.mul_(2)
    assert under_autocast(weight) is first and torch.equal(first, weight.bfloat16())
    weight.data = torch.randn(5, 7)  # as moving a module does
    assert torch.equal(under_autocast(weight), weight.bfloat16())
    assert under_autocast(weight, torch.float16).dtype == torch.float16


def test_what_is_not_copied(weight):
    assert under_autocast(weight.requires_grad_(True)) is weight
    wide, number = torch.randn(3, dtype=torch.float64), torch.arange(3)
    assert under_autocast(wide) is wide and under_autocast(number) is number
    with torch.inference_mode():
        made = torch.randn(3)
    assert under_autocast(made) is made


def test_a_capture_keeps_no_copy(weight, monkeypatch):
    """Its values would come with the first replay."""

    class OnGPU(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr("reclip_d2.layers.frozen_weights._may_be_copied", lambda _: True)
    on_gpu = weight.detach().as_subclass(OnGPU)
    assert under_autocast(on_gpu).dtype == torch.bfloat16 and not hasattr(on_gpu, _NAME)


def test_copies_go_with_their_weights():
    model = nn.Linear(3, 4).requires_grad_(False)
    kept = weakref.ref(under_autocast(model.weight))
    other = copy.deepcopy(model)
    assert under_autocast(other.weight) is not kept()
    assert not hasattr(model.state_dict()["weight"], _NAME)
    del model
    gc.collect()
    assert kept() is None
