"""CLIP weights from local files of every format, and files that do not fit."""

import json
from pathlib import Path

import open_clip
import pytest
import safetensors.torch
import torch
from torch import Tensor

from reclip_d2.backbones.build import build_clip, clip_fingerprint
from reclip_d2.backbones.weights import open_clip_names, read_clip_weights, tower_sizes
from reclip_d2.errors import ReclipError
from tests.helpers import EMBED_DIM, TINY_NAME, TINY_TEXT, TINY_VISION, register_tiny_model, tiny_clip

QUICK_NAME = f"{TINY_NAME}-quickgelu"
CUSTOM_NAME = f"{TINY_NAME}-custom"


@pytest.fixture(autouse=True, scope="module")
def tiny_names(tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("models")
    register_tiny_model(folder)
    config = {"embed_dim": EMBED_DIM, "vision_cfg": TINY_VISION, "text_cfg": TINY_TEXT}
    for name, extra in ((QUICK_NAME, {"quick_gelu": True}), (CUSTOM_NAME, {"custom_text": True})):
        if name not in open_clip.list_models():
            path = folder / f"{name}.json"
            path.write_text(json.dumps({**config, **extra}))
            open_clip.add_model_config(path)


def message_of(name: str, path: Path) -> str:
    with pytest.raises(ReclipError) as caught:
        build_clip(name, str(path))
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def hugging_face_state(clip: open_clip.CLIP) -> dict[str, Tensor]:
    """State dict of transformers' CLIPModel with the weights of a CLIP, written down part by part."""
    state: dict[str, Tensor] = {"logit_scale": clip.logit_scale}
    for side, tower in (("vision", clip.visual), ("text", clip)):
        for i, block in enumerate(tower.transformer.resblocks):
            prefix = f"{side}_model.encoder.layers.{i}."
            width = block.attn.embed_dim
            for j, letter in enumerate("qkv"):
                rows = slice(j * width, (j + 1) * width)
                state[f"{prefix}self_attn.{letter}_proj.weight"] = block.attn.in_proj_weight[rows]
                state[f"{prefix}self_attn.{letter}_proj.bias"] = block.attn.in_proj_bias[rows]
            for theirs, module in (
                ("self_attn.out_proj", block.attn.out_proj),
                ("layer_norm1", block.ln_1),
                ("layer_norm2", block.ln_2),
                ("mlp.fc1", block.mlp.c_fc),
                ("mlp.fc2", block.mlp.c_proj),
            ):
                state[f"{prefix}{theirs}.weight"], state[f"{prefix}{theirs}.bias"] = module.weight, module.bias
    visual = clip.visual
    state["vision_model.embeddings.class_embedding"] = visual.class_embedding
    state["vision_model.embeddings.patch_embedding.weight"] = visual.conv1.weight
    state["vision_model.embeddings.position_embedding.weight"] = visual.positional_embedding
    state["vision_model.embeddings.position_ids"] = torch.arange(len(visual.positional_embedding))[None]
    for theirs, module in (
        ("vision_model.pre_layrnorm", visual.ln_pre),
        ("vision_model.post_layernorm", visual.ln_post),
    ):
        state[f"{theirs}.weight"], state[f"{theirs}.bias"] = module.weight, module.bias
    state["text_model.embeddings.token_embedding.weight"] = clip.token_embedding.weight
    state["text_model.embeddings.position_embedding.weight"] = clip.positional_embedding
    state["text_model.final_layer_norm.weight"] = clip.ln_final.weight
    state["text_model.final_layer_norm.bias"] = clip.ln_final.bias
    state["visual_projection.weight"] = visual.proj.T
    state["text_projection.weight"] = clip.text_projection.T
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}


def assert_same_model(name: str, path: Path, clip: open_clip.CLIP) -> None:
    model, _ = build_clip(name, str(path))
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())
    images, texts = torch.randn(2, 3, 32, 32), torch.randint(1, 49000, (2, 77))
    torch.testing.assert_close(model.encode_image(images), clip.encode_image(images), rtol=0, atol=1e-6)
    torch.testing.assert_close(model.encode_text(texts), clip.encode_text(texts), rtol=0, atol=1e-6)


# ---- Hugging Face ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_hugging_face_file(tmp_path, suffix):
    clip, path = tiny_clip(seed=5), tmp_path / f"model{suffix}"
    state = hugging_face_state(clip)
    safetensors.torch.save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert_same_model(TINY_NAME, path, clip)


@pytest.mark.parametrize(
    ("config", "needs_quick"),
    [
        ({"vision_config": {"hidden_act": "quick_gelu"}, "text_config": {"hidden_act": "quick_gelu"}}, True),
        ({"vision_config": {"hidden_act": "gelu"}, "text_config": {"hidden_act": "gelu"}}, False),
        ({"vision_config": {}, "text_config": {}}, True),  # transformers' default
    ],
)
def test_hugging_face_activation(tmp_path, config, needs_quick):
    clip, path = tiny_clip(seed=5, quick_gelu=needs_quick), tmp_path / "pytorch_model.bin"
    torch.save(hugging_face_state(clip), path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    right, wrong = (QUICK_NAME, TINY_NAME) if needs_quick else (TINY_NAME, QUICK_NAME)
    assert_same_model(right, path, clip)
    message = message_of(wrong, path)
    assert "QuickGELU" in message and f"set MODEL.CLIP.NAME to {right} instead of {wrong}" in message


def test_hugging_face_file_without_a_config_is_warned_of(tmp_path, caplog):
    path = tmp_path / "model.bin"
    torch.save(hugging_face_state(tiny_clip()), path)
    with caplog.at_level("WARNING", logger="reclip_d2"):
        build_clip(TINY_NAME, str(path))
    assert "no config.json" in caplog.text and "QuickGELU" in caplog.text
    (tmp_path / "config.json").write_text("[1]")
    build_clip(TINY_NAME, str(path))  # a config of something else tells as little


def test_an_incomplete_hugging_face_file(tmp_path):
    state = hugging_face_state(tiny_clip())
    del state["vision_model.encoder.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(ReclipError, match=r"lack a part of visual.transformer.resblocks.1.attn.in_proj_bias"):
        open_clip_names(state)


# ---- OpenAI ---------------------------------------------------------------------------------------------------


def openai_archive(path: Path, clip: open_clip.CLIP) -> Path:
    """A TorchScript archive in half precision, with OpenAI's settings as buffers."""
    del clip.context_length, clip.vocab_size  # numbers in open_clip
    for name, value in (("input_resolution", 32), ("context_length", 77), ("vocab_size", 49408)):
        clip.register_buffer(name, torch.tensor(value))
    inputs = (torch.randn(1, 3, 32, 32), torch.randint(1, 100, (1, 77)))
    torch.jit.trace(clip, inputs, check_trace=False, strict=False).half().save(str(path))
    return path


def test_openai_archive(tmp_path, monkeypatch):
    clip = tiny_clip(seed=6, quick_gelu=True)
    path = openai_archive(tmp_path / "ViT-tiny.pt", clip)
    monkeypatch.setattr(torch.jit, "load", None)  # it would compile the archive's code
    assert_same_model(QUICK_NAME, path, tiny_clip(seed=6, quick_gelu=True).half().float())
    message = message_of(TINY_NAME, path)
    assert "OpenAI weights" in message and "need QuickGELU" in message and QUICK_NAME in message


def test_openai_state_dict_needs_quick_gelu_too(tmp_path):
    clip, path = tiny_clip(seed=6, quick_gelu=True), tmp_path / "state.pt"
    torch.save({**clip.half().state_dict(), "input_resolution": torch.tensor(32)}, path)
    assert_same_model(QUICK_NAME, path, clip.float())
    assert "need QuickGELU" in message_of(TINY_NAME, path)


# ---- open_clip ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["plain", "training", "half", "vector scale"])
def test_open_clip_files(tmp_path, form):
    clip, path = tiny_clip(seed=7), tmp_path / "epoch_32.pt"
    if form == "half":
        clip = clip.half()
    state = dict(clip.state_dict())
    if form == "vector scale":
        state["logit_scale"] = state["logit_scale"][None]
    if form == "training":
        state = {"epoch": 32, "name": "run", "state_dict": {f"module.{name}": value for name, value in state.items()}}
    torch.save(state, path)
    assert_same_model(TINY_NAME, path, clip.float())


def test_a_file_for_the_other_text_tower_layout(tmp_path):
    clip, path = tiny_clip(seed=8), tmp_path / "plain.pt"
    torch.save(clip.state_dict(), path)
    assert_same_model(CUSTOM_NAME, path, clip)


# ---- sizes ----------------------------------------------------------------------------------------------------


def test_sizes_by_hand():
    assert tower_sizes(tiny_clip().state_dict()) == {
        "image width": 32, "image layers": 3, "patch": 8, "image side": 32, "text width": 32, "text layers": 2,
        "context length": 77, "vocabulary": 49408, "embedding": EMBED_DIM,
    }  # fmt: skip
    assert tower_sizes(tiny_clip(custom_text=True).state_dict()) == tower_sizes(tiny_clip().state_dict())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"width": 48}, "image width 48 instead of 32"),
        ({"layers": 2}, "image layers 2 instead of 3"),
        ({"patch_size": 16, "image_size": 64}, "patch 16 instead of 8, image side 64 instead of 32"),
        ({"image_size": 48}, "image side 48 instead of 32"),  # open_clip would resize the positional embedding
        ({"text": {"width": 64}}, "text width 64 instead of 32"),
        ({"text": {"layers": 1}}, "text layers 1 instead of 2"),
        ({"context_length": 32}, "context length 32 instead of 77"),
        ({"text": {"vocab_size": 100}}, "vocabulary 100 instead of 49408"),
    ],
)
@pytest.mark.parametrize("form", ["open_clip", "hugging_face"])
def test_wrong_sizes_are_named(tmp_path, arguments, expected, form):
    clip, path = tiny_clip(**arguments), tmp_path / "model.pt"
    torch.save(clip.state_dict() if form == "open_clip" else hugging_face_state(clip), path)
    message = message_of(TINY_NAME, path)
    assert f"is of another model than {TINY_NAME}: {expected}; set MODEL.CLIP.NAME" in message


def test_missing_unknown_and_misshapen_tensors(tmp_path):
    path = tmp_path / "model.pt"
    state = tiny_clip().state_dict()
    torch.save({name: value for name, value in state.items() if name != "visual.ln_post.bias"}, path)
    assert "visual.ln_post.bias is missing" in message_of(TINY_NAME, path)
    torch.save({**state, "visual.extra": torch.zeros(2), "more": torch.zeros(1)}, path)
    assert "visual.extra is unknown (and 1 more)" in message_of(TINY_NAME, path)
    torch.save({**state, "visual.ln_post.bias": torch.zeros(5)}, path)
    assert "visual.ln_post.bias has shape (5,) instead of (32,)" in message_of(TINY_NAME, path)


def test_files_without_a_clip(tmp_path):
    path = tmp_path / "model.pt"
    for content in (torch.zeros(3), [1, 2], {1: torch.zeros(2)}):
        torch.save(content, path)
        assert "contains no state dict" in message_of(TINY_NAME, path)
    torch.save({"layer1.conv.weight": torch.zeros(2)}, path)
    assert "holds no weights of a CLIP" in message_of(TINY_NAME, path)


def test_memory_that_runs_out_is_no_damage(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    torch.save(tiny_clip().state_dict(), path)

    def load(*_: object, **__: object) -> None:
        torch.empty(2**60)

    monkeypatch.setattr(torch, "as_strided", load)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        read_clip_weights(path)


def test_reading_leaves_float32_and_says_where_it_is_from(tmp_path):
    path = tmp_path / "model.safetensors"
    clip = tiny_clip().half()
    safetensors.torch.save_file(clip.state_dict(), path)
    weights = read_clip_weights(path)
    assert weights.source == "open_clip" and weights.quick_gelu is None
    assert all(tensor.dtype == torch.float32 for tensor in weights.state.values())
    assert clip_fingerprint(build_clip(TINY_NAME, str(path))[0]) == clip_fingerprint(clip)
