"""CLIPs whose architecture is given by a JSON file."""

from __future__ import annotations

import json
import logging

import open_clip
import pytest
import torch

from reclip_d2.backbones.architectures import image_side, model_config, open_clip_name, suits_resolution
from reclip_d2.backbones.build import build_clip, embedding_shape
from reclip_d2.config import load_config
from reclip_d2.errors import ReclipError
from reclip_d2.modeling.build import build_clip_backbone
from reclip_d2.workspace.stage_config import stage_config
from tests.helpers import EMBED_DIM, TINY_TEXT, TINY_VISION, isolated_cache, tiny_clip

__all__ = ["isolated_cache"]

ARCHITECTURE = {"embed_dim": EMBED_DIM, "vision_cfg": TINY_VISION, "text_cfg": TINY_TEXT}


@pytest.fixture
def file(tmp_path, isolated_cache):
    path = tmp_path / "my clip.json"
    path.write_text(json.dumps(ARCHITECTURE))
    return path


def test_a_model_of_a_file(file, tmp_path):
    torch.save(tiny_clip(seed=3).state_dict(), tmp_path / "weights.pt")
    model, tokenizer = build_clip(str(file), str(tmp_path / "weights.pt"))
    assert torch.equal(model.visual.conv1.weight, tiny_clip(seed=3).visual.conv1.weight)
    assert tokenizer.encode("sky")
    assert embedding_shape(str(file)) == (EMBED_DIM, TINY_VISION["patch_size"])


def test_the_name_follows_the_content_and_not_the_place(file, tmp_path):
    name = open_clip_name(str(file))
    assert name.startswith("my_clip-") and name in open_clip.list_models()
    moved = file.rename(tmp_path / "open_clip_config.json")
    moved.write_text(json.dumps({"model_cfg": ARCHITECTURE, "preprocess_cfg": {}}))
    assert open_clip_name(str(moved)).rpartition("-")[2] == name.rpartition("-")[2]
    moved.write_text(json.dumps({**ARCHITECTURE, "quick_gelu": True}))
    assert open_clip_name(str(moved)).rpartition("-")[2] != name.rpartition("-")[2]


def test_checkpoints_know_the_architecture(file):
    keys = ["MODEL.BACKBONE.NAME", "DenseCLIP", "MODEL.CLIP.NAME", str(file), "MODEL.CLIP.PRETRAINED", "random"]
    assert build_clip_backbone(load_config("", keys)).name == open_clip_name(str(file))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"model_cfg": 3}',
        json.dumps({**ARCHITECTURE, "embed_dim": 0}),
        json.dumps({**ARCHITECTURE, "embed_dim": 10**12}),
        json.dumps({**ARCHITECTURE, "vision_cfg": {**TINY_VISION, "width": 10**9}}),
        json.dumps({**ARCHITECTURE, "text_cfg": {**TINY_TEXT, "vocab_size": -1}}),
    ],
)
def test_files_that_are_no_architecture(file, content):
    file.write_text(content)
    with pytest.raises(ReclipError, match=r"MODEL\.CLIP\.NAME .*my clip\.json is damaged .*: use a model config"):
        build_clip(str(file), "random")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"unknown": 3}, "open_clip cannot build"),
        ({"vision_cfg": {**TINY_VISION, "patch_size": 64, "image_size": 32}}, "a patch_size above its image_size"),
        ({"vision_cfg": {**TINY_VISION, "width": 33}}, "open_clip cannot build"),
        ({"vision_cfg": {"timm_model_name": "vit_base"}}, "timm cannot build the image tower"),
    ],
)
def test_architectures_that_cannot_be_built(file, change, words):
    file.write_text(json.dumps({**ARCHITECTURE, **change}))
    with pytest.raises(ReclipError, match=words):
        build_clip(str(file), "random")


def test_a_missing_file(tmp_path):
    with pytest.raises(ReclipError, match=r"none\.json does not exist: use a model config"):
        build_clip(str(tmp_path / "none.json"), "random")


# ---- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "clip", "suits"), [(512, 224, True), (512, 336, True), (512, 96, False),
                                                     (96, 96, True), (336, 672, True), (335, 672, False)])  # fmt: skip
def test_sizes_that_suit(side, clip, suits):
    assert suits_resolution(side, clip) is suits


def small_clip(file, side: int) -> str:
    file.write_text(json.dumps({**ARCHITECTURE, "vision_cfg": {**TINY_VISION, "image_size": side, "patch_size": 16}}))
    return str(file)


def test_a_clip_of_another_resolution_is_warned_of(file, caplog):
    name = small_clip(file, 96)
    assert image_side(name) == 96
    keys = ["MODEL.BACKBONE.NAME", "DenseCLIP", "MODEL.CLIP.NAME", name, "MODEL.CLIP.PRETRAINED", "random",
            "INPUT.MIN_SIZE_TRAIN", (512,)]  # fmt: skip
    for size, warned in ((512, True), (224, True)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            build_clip_backbone(load_config("", [*keys, "INPUT.MIN_SIZE_TEST", size]))
        assert ("was trained at 96 px" in caplog.text) is warned
    caplog.clear()
    build_clip_backbone(load_config("", [*keys[:-1], (224,), "INPUT.MIN_SIZE_TEST", 224]))
    assert "was trained at" not in caplog.text


def test_own_images_take_their_sizes_from_the_clip(file):
    """512 px for a CLIP of 224; in proportion, in whole patches of 16: 219.4 -> 224, 877.7 -> 880, 576 -> 576."""
    cfg = stage_config("rectified", small_clip(file, 96), ["INPUT.MAX_SIZE_TEST", "1000"])
    assert cfg.INPUT.MIN_SIZE_TRAIN == (224,) and cfg.INPUT.MIN_SIZE_TEST == 224
    assert cfg.INPUT.CROP.SIZE == [224, 224] and cfg.INPUT.COPIES.SHORT_SIDE == 576
    assert cfg.INPUT.MAX_SIZE_TRAIN == 880 and cfg.INPUT.MAX_SIZE_TEST == 1000  # the user's stays
    for name in ("ViT-B-16-quickgelu", "ViT-L-14-336-quickgelu", small_clip(file, 224)):
        assert stage_config("rectified", name, []).INPUT.MIN_SIZE_TEST == 512
    assert stage_config("rectified", "reclip-embedded", []).INPUT.MIN_SIZE_TEST == 96


def test_a_config_that_cannot_be_fetched():
    with pytest.raises(ReclipError, match=r"MODEL.CLIP.NAME 'hf-hub:nobody/nothing': its config cannot be fetched"):
        model_config("hf-hub:nobody/nothing")
