"""Settings that depend on the weights: normalisation and activation, from tags and from files next to local weights."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch

from reclip_d2.backbones.build import build_clip
from reclip_d2.backbones.settings import pixel_statistics, settings_beside, settings_of_weights
from reclip_d2.config import load_config
from reclip_d2.errors import ReclipError
from tests.helpers import EMBED_DIM, TINY_NAME, TINY_TEXT, TINY_VISION, register_tiny_model, tiny_clip

OPENAI_MEAN, OPENAI_STD = [122.7709, 116.7460, 104.0937], [68.5005, 66.6322, 70.3232]
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
TINY_CONFIG = {"embed_dim": EMBED_DIM, "vision_cfg": TINY_VISION, "text_cfg": TINY_TEXT}


@pytest.fixture(autouse=True, scope="module")
def tiny_name(tmp_path_factory) -> None:
    register_tiny_model(tmp_path_factory.mktemp("models"))


@pytest.fixture
def weights(tmp_path) -> Path:
    path = tmp_path / "open_clip_pytorch_model.bin"
    torch.save(tiny_clip().state_dict(), path)
    return path


def config_of(pretrained: object, *keys: object, name: str = TINY_NAME):
    return load_config("", ["MODEL.CLIP.NAME", name, "MODEL.CLIP.PRETRAINED", str(pretrained), *keys])


def beside(weights: Path, name: str, content: object) -> None:
    (weights.parent / name).write_text(json.dumps(content))


def test_statistics_of_a_tag():
    found = pixel_statistics(config_of("laion2b_s32b_b82k", name="ViT-L-14"))
    assert found.mean == [127.5] * 3 and found.std == [127.5] * 3 and found.from_weights


@pytest.mark.parametrize("name", ["ViT-B-16-quickgelu", "reclip-embedded"])
def test_usual_statistics_are_the_keys_own_numbers(name):
    """To the last digit: the papers' results depend on them."""
    found = pixel_statistics(config_of("openai", name=name))
    assert found.mean == OPENAI_MEAN and found.std == OPENAI_STD and not found.from_weights


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("open_clip_config.json", {"preprocess_cfg": HALF}),
        ("open_clip_config.json", {"preprocess_cfg": {"mean": 0.5, "std": 0.5}}),
        ("preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": True}),
    ],
)
def test_statistics_beside_a_file(weights, file, content):
    beside(weights, file, content)
    found = pixel_statistics(config_of(weights))
    assert found.mean == found.std == [127.5] * 3 and found.from_weights
    # Keys that the user has set must agree, or be meant.
    assert pixel_statistics(config_of(weights, "MODEL.PIXEL_MEAN", [127.5] * 3, "MODEL.PIXEL_STD", [127.5] * 3))
    with pytest.raises(ReclipError, match=rf"MODEL.PIXEL_STD is \[1.0, 1.0, 1.0\], but .*{file} says \[127.5"):
        pixel_statistics(config_of(weights, "MODEL.PIXEL_STD", [1.0] * 3))
    kept = pixel_statistics(config_of(weights, "MODEL.PIXEL_STD", [1.0] * 3, "MODEL.CLIP.NORMALIZATION", "keys"))
    assert kept.mean == OPENAI_MEAN and kept.std == [1.0] * 3 and not kept.from_weights
    # The public code of ReCLIP++ normalises with ImageNet's statistics for every CLIP.
    public = config_of(weights, "MODEL.PIXEL_STD", [57.0] * 3, "MODEL.CLIP.LAYER_NORM_EPS", 1e-6)
    assert pixel_statistics(public).std == [57.0] * 3


@pytest.mark.parametrize("content", [{}, {"do_normalize": False, "image_mean": [0.5] * 3}, {"image_mean": None}])
def test_files_that_say_nothing(weights, content):
    beside(weights, "preprocessor_config.json", content)
    assert pixel_statistics(config_of(weights)).mean == OPENAI_MEAN


@pytest.mark.parametrize(
    "content",
    [
        [1],
        {"preprocess_cfg": 3},
        {"model_cfg": [1]},
        {"preprocess_cfg": {"mean": [0.5, 0.5]}},
        {"preprocess_cfg": {"mean": ["0.5"] * 3}},
        {"preprocess_cfg": {"mean": [127.5] * 3}},
        {"preprocess_cfg": {"std": [0.0] * 3}},
    ],
)
def test_damaged_settings_are_named(weights, content):
    beside(weights, "open_clip_config.json", content)
    with pytest.raises(ReclipError, match=r"open_clip_config\.json is damaged"):
        settings_beside(weights)


def test_no_json_and_deep_json(weights):
    for text in ("{", "[" * 100_000):
        (weights.parent / "open_clip_config.json").write_text(text)
        with pytest.raises(ReclipError, match=r"open_clip_config\.json is damaged"):
            settings_of_weights(TINY_NAME, str(weights))


def test_the_activation_of_an_open_clip_file(weights):
    beside(weights, "open_clip_config.json", {"model_cfg": {**TINY_CONFIG, "quick_gelu": True}})
    with pytest.raises(ReclipError, match=r"open_clip_config\.json says\) need QuickGELU"):
        build_clip(TINY_NAME, str(weights))
    beside(weights, "open_clip_config.json", {"model_cfg": TINY_CONFIG})
    assert build_clip(TINY_NAME, str(weights))


def test_another_architecture_than_the_one_beside_the_file(weights):
    model = {**TINY_CONFIG, "vision_cfg": {**TINY_VISION, "mlp_ratio": 2.0, "layers": 7}}
    beside(weights, "open_clip_config.json", {"model_cfg": model})
    with pytest.raises(ReclipError, match=r"says vision_cfg\.layers 7, but MODEL\.CLIP\.NAME .* has 3: set MODEL"):
        build_clip(TINY_NAME, str(weights))


def test_random_weights_and_unknown_ones():
    assert settings_of_weights(TINY_NAME, "random").mean is None
    assert settings_of_weights(TINY_NAME, "/none/file.pt").mean is None
    assert all(tag for tag in open_clip.list_pretrained_tags_by_model("ViT-L-14"))
