"""The choice between compiled kernels and twins."""

import logging

import pytest
import torch

from reclip_d2.layers import _extension, kernels_available, kernels_enabled, upsample_argmax, use_kernels


def test_use_kernels_holds_and_restores(kernels, device):
    assert kernels_enabled(device.type)
    with use_kernels(False):
        assert not kernels_enabled(device.type)
        with use_kernels(True):
            assert kernels_enabled(device.type)
        assert not kernels_enabled(device.type)
    assert kernels_enabled(device.type)


def test_use_kernels_works_as_a_plain_call(kernels, device):
    use_kernels(False)
    try:
        assert not kernels_enabled(device.type)
    finally:
        use_kernels(True)
    assert kernels_enabled(device.type)


@pytest.fixture
def fresh_cache():
    _extension._warn_once.cache_clear()
    yield
    _extension._warn_once.cache_clear()


def test_missing_extension_falls_back_with_one_log_line(monkeypatch, caplog, fresh_cache):
    monkeypatch.setattr(_extension, "_problem", "is not built")
    monkeypatch.setattr(_extension, "_served", frozenset())
    logits = torch.randn(1, 3, 4, 4)
    with caplog.at_level(logging.WARNING, logger="reclip_d2.layers._extension"):
        labels = upsample_argmax(logits, (8, 8))
        upsample_argmax(logits, (8, 8))
    assert labels.shape == (1, 8, 8)
    (record,) = caplog.records
    assert "is not built; falling back to plain PyTorch" in record.getMessage()
    assert "pip install -e . --no-build-isolation" in record.getMessage()


def test_an_extension_of_an_older_build_is_not_used(kernels, device, monkeypatch):
    assert _extension._load() is None
    monkeypatch.setattr(_extension, "OPERATORS", (*_extension.OPERATORS, "of_tomorrow"))
    assert _extension._load() == "is older than this code (it lacks of_tomorrow)"


def test_device_without_kernels_falls_back(caplog, fresh_cache):
    with caplog.at_level(logging.WARNING, logger="reclip_d2.layers._extension"):
        assert not kernels_available("mps")
        assert not kernels_available("mps")
    assert len(caplog.records) == 1
