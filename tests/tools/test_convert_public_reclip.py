"""Converted public checkpoints of ReCLIP, the conference model: the logits of a literal transcription, and invalid
input."""

import json

import pytest
import torch
import yaml

from reclip_d2.config import load_config
from reclip_d2.engine.public_checkpoint import read_public_checkpoint
from reclip_d2.modeling import ReCLIPBiasHead
from tests.helpers import datasets, isolated_cache
from tests.tools.public_code import (
    CLIP_OPTIONS,
    MEAN,
    STD,
    PublicReCLIP,
    built,
    error_of,
    name_file,
    public_model,
    quick_model,
    save_public,
    tool,
)

__all__ = ["datasets", "isolated_cache", "quick_model", "tool"]
NAMES = ["sky", "brick wall", "chest of drawers", "a very tall old tree", "sand"]
PUBLIC_NAMES = ["heaven", "wall", "chest of drawers", "very old tree", "beach"]


@pytest.fixture
def public():
    torch.manual_seed(0)
    return public_model("gelu", len(NAMES), PublicReCLIP)


@pytest.fixture
def saved(tmp_path, public):
    """Checkpoint, output, options."""
    source, token = save_public(tmp_path, public)
    names = name_file(tmp_path, NAMES)
    return source, tmp_path / "ours.pth", ["--class-names", names, "--class-token", str(token)]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("size", [(43, 61), (32, 32)])  # no multiple of the patch, and the CLIP's own
def test_logits_are_those_of_the_public_model(tool, tmp_path, datasets, public, saved, suffix, size):
    source, output, options = saved
    output = output.with_suffix(suffix)
    reference = name_file(tmp_path, PUBLIC_NAMES, "public.txt")
    tool.main(
        [str(source), str(output), *options, "--reference-names", reference, "--image-activation", "gelu"]
        + list(CLIP_OPTIONS)
    )
    model = built(output.with_suffix(".yaml"), NAMES, datasets)
    assert isinstance(model.bias_head, ReCLIPBiasHead) and model.mask_decoder is None
    image = torch.randint(0, 256, (3, *size))
    normalised = ((image - MEAN[:, None, None]) / STD[:, None, None])[None]
    images = model.preprocess_image([{"image": image}]).tensor
    with torch.no_grad():
        expected = public(normalised, model.query_features, PUBLIC_NAMES)
        got = model.mask_logits(images)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(model.mask_logits(images), expected, rtol=0, atol=1e-4)  # from what was kept
        # All parts have a say that the tolerance cannot hide.
        features, grid = public.features(normalised)
        prompt = public.reference(PUBLIC_NAMES)
        similarity = torch.einsum("bdhw,cd->bchw", features, prompt / prompt.norm())
        assert similarity.std() > 0.01 and public.proj_net(grid).std() > 0.1


def test_files_and_keys(tool, saved, datasets):
    source, output, options = saved
    tool.main([str(source), str(output), *options, *CLIP_OPTIONS])
    text = output.with_suffix(".yaml").read_text()
    assert "the public ReCLIP code with ours.pth" in text
    keys = yaml.safe_load(text)["MODEL"]
    assert keys["BIAS_HEAD"]["NAME"] == "ReCLIPBiasHead" and keys["BIAS_HEAD"]["SPACE_CHANNELS"] == [20, 12]
    assert keys["BIAS_HEAD"]["REFERENCE_NORM"] == "matrix" and keys["BIAS_HEAD"]["PROMPT_LENGTH"] == 73
    assert keys["MASK_DECODER"] == {"ENABLED": False}
    assert load_config(str(output.with_suffix(".yaml"))).MODEL.MASK_DECODER.ENABLED is False
    content = torch.load(output, weights_only=True)
    model = built(output.with_suffix(".yaml"), NAMES, datasets)
    assert set(content["model"]) == set(model.state_dict())
    assert json.loads(content["identity"]) == model.identity()


def test_a_checkpoint_without_batch_counters(saved):
    """Old PyTorch did not save them."""
    source, *_ = saved
    state = torch.load(source, weights_only=True)
    torch.save({name: value for name, value in state.items() if "num_batches" not in name}, source)
    checkpoint = read_public_checkpoint(source)
    assert checkpoint.model == "ReCLIP" and checkpoint.num_classes == 5
    assert checkpoint.state["bias_head.space_projection.norms.2.num_batches_tracked"].item() == 0


def test_refusals(tool, capsys, tmp_path, saved):
    source, output, options = saved
    state = torch.load(source, weights_only=True)
    torch.save({name: value for name, value in state.items() if "proj_net.4.weight" not in name}, source)
    message = error_of(tool, capsys, source, output, *options)
    assert "not a checkpoint of the public ReCLIP code: it lacks proj_net.4.weight" in message
    torch.save({**state, "module.proj_net.3.weight": torch.zeros(12)}, source)
    assert "public ReCLIP code: its tensors have other shapes" in error_of(tool, capsys, source, output, *options)
    torch.save({**state, "module.proj_net.0.weight": torch.zeros(20, 32, 1, 1)}, source)
    message = error_of(tool, capsys, source, output, *options)
    assert "space_projection.convs.0.weight has shape (20, 32, 1, 1) instead of (20, 32, 3, 3)" in message
    torch.save(state, source)
    three = name_file(tmp_path, NAMES[:3], "three.txt")
    message = error_of(tool, capsys, source, output, "--class-names", three, *options[2:])
    assert "has 5 classes, the class list 3" in message
