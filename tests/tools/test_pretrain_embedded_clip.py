"""The shipped tiny CLIP, and the program that pretrains it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from reclip_d2.backbones import embedded
from reclip_d2.backbones.dense_attention import ValueAttention
from reclip_d2.backbones.query import get_templates, query_features
from reclip_d2.backbones.text import TextEncoder
from reclip_d2.backbones.vision import dense_image_features, last_block_input
from reclip_d2.errors import ReclipError
from reclip_d2.toy.scenes import render_close_up, render_scene
from reclip_d2.toy.worlds import EMBEDDED, EMBEDDED_CLASSES, NUM_MATERIALS, name_vocabulary

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tools" / "pretrain_embedded_clip.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("pretrain_embedded_clip", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def clip():
    return embedded.build_embedded_clip()


@pytest.fixture(scope="module")
def encoder(clip):
    return TextEncoder(clip, open_clip.get_tokenizer(embedded.EMBEDDED_MODEL_NAME))


def test_checkpoint_is_small_and_half_precision():
    assert embedded.EMBEDDED_CHECKPOINT.stat().st_size < 2 * 2**20
    state = safetensors.torch.load_file(embedded.EMBEDDED_CHECKPOINT)
    ids = state.pop("token_ids")
    assert ids.dtype == torch.int64 and torch.equal(ids, torch.unique(ids))
    assert all(tensor.dtype == torch.float16 and tensor.isfinite().all() for tensor in state.values())


def test_checkpoint_keeps_every_word_of_names_and_templates():
    embedded.register_embedded_config()
    tokenizer = open_clip.get_tokenizer(embedded.EMBEDDED_MODEL_NAME)
    kept = set(safetensors.torch.load_file(embedded.EMBEDDED_CHECKPOINT)["token_ids"].tolist())
    templates = get_templates("imagenet_scene")
    assert len(templates) == 85
    for template in templates:
        for name in name_vocabulary():
            assert kept.issuperset(tokenizer.encode(template.format(name)))
    assert {tokenizer.sot_token_id, tokenizer.eot_token_id} <= kept


def test_built_model_is_as_the_config_says(clip):
    config = json.loads(embedded.EMBEDDED_CONFIG.read_text())
    assert not clip.training
    assert all(parameter.dtype == torch.float32 for parameter in clip.parameters())
    assert clip.visual.image_size == (96, 96) and clip.visual.grid_size == (12, 12)
    assert clip.visual.conv1.out_channels == config["vision_cfg"]["width"] == 96
    assert clip.token_embedding.weight.shape == (49408, 64)
    assert clip.visual.transformer.resblocks[0].attn.num_heads == 3
    with torch.no_grad():
        assert clip.encode_image(torch.zeros(1, 3, 96, 96)).shape == (1, 96)


def test_rows_of_the_checkpoint_land_at_their_tokens(clip):
    state = safetensors.torch.load_file(embedded.EMBEDDED_CHECKPOINT)
    rows = clip.token_embedding.weight[state["token_ids"]]
    torch.testing.assert_close(rows, state["token_embedding.weight"].float(), rtol=0, atol=0)
    unseen = torch.ones(49408, dtype=torch.bool)
    unseen[state["token_ids"]] = False
    others = embedded.create_embedded_clip().token_embedding.weight
    assert torch.equal(clip.token_embedding.weight[unseen], others[unseen])


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    embedded.build_embedded_clip()
    assert torch.equal(torch.rand(3), expected)


def test_save_then_build_round_trips(tmp_path):
    model = embedded.create_embedded_clip(seed=5)
    ids = torch.tensor([0, 320, 49406, 49407])
    embedded.save_embedded_checkpoint(tmp_path / "tiny.safetensors", model, ids, {"seed": "5"})
    built = embedded.build_embedded_clip(tmp_path / "tiny.safetensors")
    for name, value in model.state_dict().items():
        if name != "token_embedding.weight":
            torch.testing.assert_close(built.state_dict()[name], value.half().float(), rtol=0, atol=0)
    torch.testing.assert_close(
        built.token_embedding.weight[ids], model.token_embedding.weight[ids].half().float(), rtol=0, atol=0
    )


def test_unusable_checkpoints_give_one_clear_line(tmp_path):
    with pytest.raises(ReclipError, match="missing.safetensors"):
        embedded.build_embedded_clip(tmp_path / "missing.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(embedded.EMBEDDED_CHECKPOINT.read_bytes()[:1000])
    with pytest.raises(ReclipError, match="damaged.safetensors") as error:
        embedded.build_embedded_clip(damaged)
    assert "\n" not in str(error.value)
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(2)}, other)
    with pytest.raises(ReclipError, match="other.safetensors"):
        embedded.build_embedded_clip(other)


def test_zero_shot_on_unseen_close_ups(program, clip, encoder):
    names = [[name] for name in name_vocabulary()[::2]]
    queries = query_features(encoder, names, get_templates("imagenet_scene"))
    images, materials = zip(*(render_close_up(987_654, index) for index in range(120)), strict=True)
    batch = program.normalize_images(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    with torch.no_grad():
        guesses = (clip.encode_image(batch) @ queries.T).argmax(dim=1)
    assert (guesses == torch.tensor(materials)).float().mean() > 0.75  # chance is 1 in 12


def test_dense_features_find_the_pair_of_most_patches(program, clip, encoder):
    """Confusions stay within pairs: biases to rectify, not noise."""
    queries = query_features(encoder, [[name] for name in EMBEDDED_CLASSES], get_templates("imagenet_scene"))
    hits = []
    for index in range(20):
        scene = render_scene(987_654, index)
        image = program.normalize_images(torch.from_numpy(scene.image).permute(2, 0, 1)[None])
        with torch.no_grad():
            dense, _ = dense_image_features(clip.visual, image, ValueAttention())
        guess = (dense[0] @ queries.T).argmax(dim=1).view(12, 12)
        hits.append((guess.numpy() // 2 == scene.labels[4::8, 4::8] // 2).mean())
    assert np.mean(hits) > 0.75


def test_shipped_log_belongs_to_the_shipped_checkpoint():
    log = json.loads((embedded.EMBEDDED_CHECKPOINT.parent / "pretrain_log.json").read_text())
    with safetensors.safe_open(embedded.EMBEDDED_CHECKPOINT, "pt") as file:
        metadata = file.metadata()
    assert str(log["seed"]) == metadata["seed"] and str(log["steps"]) == metadata["steps"]
    assert log["bytes"] == embedded.EMBEDDED_CHECKPOINT.stat().st_size


def test_image_loss_counts_equal_captions_once(program):
    logits = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    names = torch.tensor([1, 4, 1, 3])
    few = logits[:, [1, 3, 4]]
    to_text = -(few.log_softmax(dim=1)[torch.arange(4), torch.tensor([0, 2, 0, 1])]).mean()
    column = few.log_softmax(dim=0)
    to_image = -(0.5 * (column[0, 0] + column[2, 0]) + column[3, 1] + column[1, 2]) / 3
    torch.testing.assert_close(program.image_loss(logits, names), (to_text + to_image) / 2, check_dtype=False)


@pytest.fixture
def last_input(program, clip):
    images = program.normalize_images(torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8))
    with torch.no_grad():
        yield last_block_input(clip.visual, images)


def test_global_features_are_the_products_features(program, clip, last_input):
    pooled = program.global_features(clip.visual, last_input.tokens)
    torch.testing.assert_close(pooled, F.normalize(clip.encode_image(last_input.images), dim=-1))


def test_value_regions_are_means_of_the_products_dense_features(program, clip, last_input):
    weights = torch.zeros(2, 144)
    weights[0, [3, 4]], weights[1, 100] = torch.tensor([0.25, 0.75]), 1.0
    regions = program.value_regions(clip.visual, last_input, torch.tensor([1, 0]), weights)
    dense, _ = dense_image_features(clip.visual, last_input.images, ValueAttention())
    first = F.normalize(0.25 * dense[1, 3] + 0.75 * dense[1, 4], dim=0)
    torch.testing.assert_close(regions, torch.stack([first, dense[0, 100]]))


def test_a_class_token_region_is_the_global_feature_of_the_regions_tokens_alone(program, clip, last_input):
    """Tokens outside of the region have no effect; a region of one token gets that token's value."""
    weights = torch.zeros(2, 144)
    weights[0, [3, 4, 20]], weights[1, 100] = 1 / 3, 1.0
    regions = program.class_token_regions(clip.visual, last_input, torch.tensor([1, 1]), weights)
    last, visual, tokens = clip.visual.transformer.resblocks[-1], clip.visual, last_input.tokens[1]
    expected = []
    for inside in ([3, 4, 20], [100]):
        query, keys = last.ln_1(tokens[:1]), last.ln_1(tokens[[1 + i for i in inside]])
        token = tokens[:1] + last.attn(query[None], keys[None], keys[None], need_weights=False)[0][0]
        token = token + last.mlp(last.ln_2(token))
        expected.append(F.normalize(visual.ln_post(token) @ visual.proj, dim=-1))
    torch.testing.assert_close(regions, torch.cat(expected))


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """The program run for three steps on a handful of pictures."""
    folder = tmp_path_factory.mktemp("pretrain")
    arguments = ["--steps", "3", "--pool", "12", "--threads", "1", "--eval-scenes", "2", "--seed", "1"]
    command = [sys.executable, str(PROGRAM), "--out", str(folder / "tiny.safetensors"), *arguments]
    subprocess.run(command, check=True, capture_output=True, timeout=300, env=ENVIRONMENT)
    return folder


def test_program_writes_a_checkpoint_that_loads(tiny_run):
    model = embedded.build_embedded_clip(tiny_run / "tiny.safetensors")
    start = embedded.create_embedded_clip(seed=1)
    moved = (model.visual.conv1.weight - start.visual.conv1.weight).abs().max()
    assert moved > 1e-4
    log = json.loads((tiny_run / "pretrain_log.json").read_text())
    assert log["steps"] == 3 and log["training"][-1]["step"] == 2
    assert 0 <= log["maskclip_mIoU"] <= 100 and np.isfinite(log["training"][-1]["region_loss"])
    assert sorted(path.name for path in tiny_run.iterdir()) == ["pretrain_log.json", "tiny.safetensors"]


def test_training_with_class_token_regions_lowers_their_loss(program):
    rows = program.train(EMBEDDED, seed=1, steps=12, pool_size=12, threads=1, region_features="class_token")[2]
    assert rows[-1]["region_loss"] < rows[0]["region_loss"]


def test_same_seed_same_weights(program, tiny_run):
    # One thread, as in the other run: AdamW's first steps turn a rounding of a tiny gradient into a whole step.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, token_ids, _ = program.train(EMBEDDED, seed=1, steps=3, pool_size=12, threads=1)
    finally:
        torch.set_num_threads(threads)
    state = safetensors.torch.load_file(tiny_run / "tiny.safetensors")
    assert torch.equal(token_ids, state.pop("token_ids"))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value.half().float(), state[name].float(), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(("arguments", "key"), [(["--steps", "0"], "--steps"), (["--out", "tiny.bin"], "tiny.bin")])
def test_program_refuses_bad_arguments_in_one_line(program, tmp_path, monkeypatch, capsys, arguments, key):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), *arguments])
    with pytest.raises(SystemExit) as end:
        program.main()
    err = capsys.readouterr().err
    assert end.value.code == 1
    assert err.startswith("error: ") and key in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_materials_and_classes_line_up():
    assert len(EMBEDDED_CLASSES) == NUM_MATERIALS
    for index, name in enumerate(EMBEDDED_CLASSES):
        assert name in name_vocabulary()[2 * index : 2 * index + 2]
