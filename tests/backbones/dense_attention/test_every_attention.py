"""What holds for every registered dense attention: padding, grids, precision, memory, export, config."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reclip_d2.backbones.dense_attention import (
    DENSE_ATTENTION_REGISTRY,
    DenseAttention,
    build_dense_attention,
    rows,
)
from reclip_d2.backbones.dense_attention.proxy import ProxyAttention
from reclip_d2.backbones.dense_attention.regions import RegionAttention
from reclip_d2.config import KEYS, load_config
from reclip_d2.config.checks import value_at
from reclip_d2.errors import ReclipError
from reclip_d2.export import ExportOptions, export_model
from reclip_d2.export.export import FORMATS
from reclip_d2.toy.scenes import render_scene
from reclip_d2.toy.worlds import EMBEDDED
from tests.backbones.dense_attention.inputs import make_input, padded, tiny_helper
from tests.backbones.literal import PATCH
from tests.helpers import CONFIGS, isolated_cache, make_maskclip, tiny_dense

__all__ = ["isolated_cache"]

KEY = "MODEL.CLIP.DENSE_ATTENTION"
NAMES = ["sclip", "clearclip", "naclip", "resclip", "radseg", "scclip", "dihclip", "proxy", "proxy2", "regions"]
# For each option another value than its default.
OTHER = {
    "MODEL.CLIP.VALUE_PATH_RESIDUAL": False,
    "MODEL.CLIP.ATTENTION_RESIDUAL": "keep",
    "MODEL.CLIP.NACLIP_SIGMA": 2.0,
    "MODEL.CLIP.RESCLIP_WEIGHT": 0.5,
    "MODEL.CLIP.RESCLIP_BLOCKS": [1, 1],
    "MODEL.CLIP.RADSEG_ATTENTION_SCALE": 5.0,
    "MODEL.CLIP.RADSEG_FEATURE_SCALE": 5.0,
    "MODEL.CLIP.CALIBRATED_THRESHOLD": 0.5,
    "MODEL.CLIP.CALIBRATED_CLASS_TOKEN": 0.1,
    "MODEL.CLIP.SCCLIP_NEIGHBOURS": 5,
    "MODEL.CLIP.SCCLIP_ANOMALIES": 0.1,
    "MODEL.CLIP.DIHCLIP_HEADS": 1,
    "MODEL.CLIP.PROXY_SHIFT": 1.0,
    "MODEL.CLIP.PROXY_SCALE": 5.0,
    "MODEL.CLIP.REGIONS_SCALE": 1.0,
    "MODEL.CLIP.REGIONS_SIZE": 2,
    "MODEL.CLIP.REGIONS_COMPACTNESS": 0.5,
}


def make(name: str, **changes: object) -> DenseAttention:
    """An attention by its name, with options by their keys: proxy with a tiny helper, proxy2 with one of half the patch
    size, regions for the patches of the tiny CLIP."""
    if name in ("proxy", "proxy2", "regions"):
        cls = RegionAttention if name == "regions" else ProxyAttention
        options = {argument: changes[key] for argument, key in cls.options.items() if key in changes}
        if name == "regions":
            return RegionAttention(PATCH, **options).eval()
        factor = 2 if name == "proxy2" else 1
        return ProxyAttention(tiny_helper(patch_size=PATCH // factor).float(), upsampling=factor, **options).eval()
    cfg = load_config("", [KEY, name])
    for key, value in changes.items():
        cfg.merge_from_list([key, value])
    return build_dense_attention(cfg).eval()


def test_every_registered_attention_is_tested_here():
    assert {name for name, _ in DENSE_ATTENTION_REGISTRY} == {"value", *NAMES} - {"proxy2"}


@pytest.mark.parametrize("name", NAMES)
def test_padding_never_changes_the_patches_of_the_image(name):
    """In a corner of a larger grid of noise, the image has the same features as alone. (The positional embedding of a
    helper model is zero here: it is resized to the grid with its padding, as CLIP's is.)"""
    attention = make(name).double()
    if name.startswith("proxy"):
        attention.helper.model.pos_embed.data.zero_()
    inputs = make_input(attention, batch=2)
    larger = padded(inputs, (5, 6))
    inside = larger.valid[0].view(5, 6)
    inside = inside.repeat_interleave(attention.upsampling, 0).repeat_interleave(attention.upsampling, 1).flatten()
    output = attention(larger)
    assert output.isfinite().all()
    torch.testing.assert_close(output[:, inside], attention(inputs), rtol=0, atol=1e-10)
    features = torch.randn(2, len(inside), 24, dtype=torch.float64)
    refined = attention.refine(features, larger)
    torch.testing.assert_close(refined[:, inside], attention.refine(features[:, inside], inputs), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (7, 3)])
def test_any_grid_and_images_of_a_batch_do_not_mix(name, grid):
    attention = make(name).double()
    inputs = make_input(attention, grid, batch=2)
    output = attention(inputs)
    assert output.shape == (2, attention.upsampling**2 * grid[0] * grid[1], 32) and output.isfinite().all()
    one = dataclasses.replace(
        inputs,
        images=inputs.images[1:],
        tokens=inputs.tokens[1:],
        earlier={index: dataclasses.replace(b, tokens=b.tokens[1:]) for index, b in inputs.earlier.items()},
    )
    torch.testing.assert_close(attention(one), output[1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_without_a_single_valid_patch_is_finite(name):
    """An image smaller than half a patch, in a batch."""
    attention = make(name).double()
    inputs = dataclasses.replace(make_input(attention), valid=torch.zeros(1, 15, dtype=torch.bool))
    assert attention.refine(attention(inputs), inputs).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name):
    images = torch.randn(1, 3, 40, 48)
    exact, low = (
        tiny_dense(attention=make(name), autocast_dtype=dtype).dense(images) for dtype in (None, torch.bfloat16)
    )
    assert low.dtype == torch.float32
    assert F.cosine_similarity(exact, low, dim=1).min() > 0.99


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest output of any operator."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:  # noqa: ANN001
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.numel())
        return out


@pytest.mark.parametrize("name", NAMES)
def test_no_matrix_of_all_pairs_of_patches(name, monkeypatch):
    """With n = 1,024 patches and a limit of 2^16 scores, no tensor is larger than the limit or a few times n * E."""
    monkeypatch.setattr(rows, "MAX_SCORES", 2**16)
    attention = make(name)
    inputs = make_input(attention, (32, 32), dtype=torch.float32)
    with LargestTensor() as largest:
        attention.refine(attention(inputs), inputs)
    limit = 2**18 * attention.upsampling**2
    assert largest.elements <= limit < (1024 * attention.upsampling**2) ** 2


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_16_384_patches_within_the_default_limit(name):
    attention = make(name)
    inputs = make_input(attention, (128, 128), dtype=torch.float32)
    with LargestTensor() as largest:
        attention.refine(attention(inputs), inputs)
    assert largest.elements <= rows.MAX_SCORES < 16_384**2 / 7


@pytest.mark.parametrize("name", NAMES)
def test_fine_tuning_asks_for_gradients_of_what_is_used(name):
    """Distributed training expects a gradient for every parameter that needs one."""
    dense = tiny_dense(attention=make(name), fine_tune=True)
    features = dense(torch.randn(1, 3, 32, 40))["dense"]
    (features * torch.randn_like(features)).sum().backward()
    asked = {key for key, parameter in dense.clip.visual.named_parameters() if parameter.requires_grad}
    assert asked == {key for key, parameter in dense.clip.visual.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", ["value", *NAMES])
def test_options_are_keys_and_part_of_the_identity(name):
    attention = make(name)
    usual = {} if name == "value" else {KEY: attention.name}
    assert attention.identity() == usual | (attention.helper.identity() if name.startswith("proxy") else {}) | (
        {"MODEL.CLIP.PROXY_UPSAMPLING": attention.upsampling} if name.startswith("proxy") else {}
    )
    for argument, key in attention.options.items():
        other = make(name, **{key: OTHER[key]})
        assert getattr(other, argument) == OTHER[key] != KEYS[key].default
        assert other.identity() == {**attention.identity(), key: OTHER[key]}
    if name.startswith(("proxy", "regions")):
        return  # test_helper_attentions.py builds it by its keys
    foreign = next(key for key in OTHER if key not in attention.options.values())
    with pytest.raises(ReclipError, match=rf"{foreign} .* is for {KEY} .*, not {name}: remove one of the two keys"):
        make(name, **{foreign: OTHER[foreign]})


def test_each_option_is_in_one_table():
    named = {key for _, one in DENSE_ATTENTION_REGISTRY for key in one.options.values()}
    assert named == set(OTHER)
    assert all(value_at(load_config(""), key) is not None for key in named)


@pytest.fixture(scope="module")
def maskclip():
    return make_maskclip()


@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_export(name, target, maskclip, tmp_path):
    """A graph for any size, checked on two sizes with padding."""
    maskclip.backbone.attention = make(name)
    results = export_model(maskclip, tmp_path / "file", ExportOptions(format=target))
    assert len(results) == 2 and all(result.within(1e-4) for result in results)


@pytest.fixture(scope="module")
def scenes() -> list[tuple[Tensor, np.ndarray]]:
    rendered = [render_scene(7, index, EMBEDDED) for index in range(6)]
    return [(torch.from_numpy(scene.image.copy()).permute(2, 0, 1), scene.labels) for scene in rendered]


def accuracy(name: str, scenes: list, configs: list[Path], *options: str) -> float:
    cfg = load_config(configs, [KEY, name, "MODEL.DEVICE", "cpu", *options])
    model = build_model(cfg).eval()
    right = []
    for image, labels in scenes:
        out = model([{"image": image, "height": image.shape[1], "width": image.shape[2]}])[0]["sem_seg"]
        right.append((out.argmax(0).numpy() == labels).mean())
    return float(np.mean(right))


@pytest.mark.parametrize("name", sorted({*NAMES} - {"proxy2"}))
def test_maskclip_on_the_embedded_world(name, scenes):
    """Twelve materials: chance is 8 %. The helper has random weights."""
    configs = [CONFIGS / "datasets/embedded.yaml", CONFIGS / "methods/maskclip.yaml"]
    helper = ("MODEL.CLIP.HELPER_NAME", "test_vit", "MODEL.CLIP.HELPER_WEIGHTS", "random") if name == "proxy" else ()
    assert accuracy(name, scenes, configs, *helper) > 0.4
