"""Converted public checkpoints of ReCLIP++: the logits of a literal transcription of that model, and invalid input."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.modeling import build_model

from reclip_d2.config import load_config
from reclip_d2.errors import ReclipError
from reclip_d2.modeling.checkpoint import ReclipCheckpointer
from tests.helpers import TINY_VISION, datasets, isolated_cache
from tests.tools.public_code import (
    CLIP_OPTIONS,
    MEAN,
    QUICK_NAME,
    STD,
    built,
    error_of,
    name_file,
    public_model,
    quick_model,
    save_public,
    tool,
)

__all__ = ["datasets", "isolated_cache", "quick_model", "tool"]
NAMES = ["sky", "brick wall", "chest of drawers", "a very tall old tree"]
PUBLIC_NAMES = ["heaven", "wall", "chest of drawers", "very old tree"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("activation", ["own", "gelu"])
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_logits_are_those_of_the_public_model(tool, tmp_path, datasets, suffix, activation, prefix):
    public = public_model(activation)
    source, token = save_public(tmp_path, public, prefix)
    output = tmp_path / "out" / f"ours{suffix}"
    tool.main(
        [str(source), str(output), "--class-names", name_file(tmp_path, NAMES), "--class-token", str(token)]
        + ["--reference-names", name_file(tmp_path, PUBLIC_NAMES, "public.txt"), "--image-activation", activation]
        + list(CLIP_OPTIONS)
    )
    model = built(output.with_suffix(".yaml"), NAMES, datasets)
    image = torch.randint(0, 256, (3, 43, 61))  # no multiple of the patch: padded with zeros after the normalisation
    normalised = (image - MEAN[:, None, None]) / STD[:, None, None]
    images = model.preprocess_image([{"image": image}]).tensor
    with torch.no_grad():
        torch.testing.assert_close(
            model.backbone(images)["dense"], public.features(normalised[None])[0], rtol=0, atol=1e-5
        )
        reference = model.bias_head.reference_prompt(model.backbone)
        torch.testing.assert_close(reference, public.reference(PUBLIC_NAMES), rtol=0, atol=1e-5)
        expected = public(normalised[None], model.query_features, PUBLIC_NAMES)
        torch.testing.assert_close(model.mask_logits(images), expected, rtol=0, atol=1e-5)


def test_every_compatibility_key_has_its_say(tool, tmp_path, datasets):
    """Left out one at a time, each changes the logits; the test above would notice."""
    public = public_model("gelu")
    source, token = save_public(tmp_path, public)
    output = tmp_path / "ours.pth"
    tool.main(
        [str(source), str(output), "--class-names", name_file(tmp_path, NAMES), "--class-token", str(token)]
        + ["--image-activation", "gelu", *CLIP_OPTIONS]
    )
    datasets("reclip_test_public", [], NAMES)
    images = torch.randn(1, 3, 32, 48)
    options = ["MODEL.DEVICE", "cpu", "DATASETS.TEST", "('reclip_test_public',)", "MODEL.WEIGHTS", ""]

    def logits(*changes: object) -> torch.Tensor:
        model = build_model(load_config(str(output.with_suffix(".yaml")), [*options, *changes])).eval()
        model.load_state_dict(torch.load(output, weights_only=True)["model"])
        with torch.no_grad():
            return model.mask_logits(images)

    usual = logits()
    changes = {
        "MODEL.CLIP.LAYER_NORM_EPS": (0.0, 1e-7),
        "MODEL.CLIP.IMAGE_ACTIVATION": ("own", 1e-5),
        "MODEL.CLIP.CLASS_TOKEN": ("", 1e-5),
        "MODEL.BIAS_HEAD.REFERENCE_NORM": ("row", 1e-4),
        "MODEL.BIAS_HEAD.REFERENCE_NAMES": (PUBLIC_NAMES, 1e-5),
        "MODEL.MASK_DECODER.PADDING_MODE": ("replicate", 1e-4),
        "MODEL.BIAS_HEAD.NAME_TOKENS": (2, 1e-5),
    }
    for key, (value, least) in changes.items():
        assert (logits(key, value) - usual).abs().max() > least, key


def test_identity_and_files(tool, tmp_path, datasets):
    source, token = save_public(tmp_path, public_model())
    output = tmp_path / "out" / "ours.pth"
    arguments = [str(source), str(output), "--class-names", name_file(tmp_path, NAMES), "--class-token", str(token)]
    tool.main([*arguments, *CLIP_OPTIONS])
    names = {"ours.pth", "ours.yaml", "ours.class_token.safetensors"}
    assert {path.name for path in output.parent.iterdir()} == names
    content = torch.load(output, weights_only=True)
    identity = json.loads(content["identity"])
    assert identity["clip"] == QUICK_NAME and identity["class_names"] == [[name] for name in NAMES]
    assert identity["image_tower"] == "eps 1e-06" and identity["reference"].startswith("matrix ")
    model = built(output.with_suffix(".yaml"), NAMES, datasets)
    assert identity == model.identity() and set(content["model"]) == set(model.state_dict())
    keys = yaml.safe_load(output.with_suffix(".yaml").read_text())
    for change, named in (
        (["MODEL.CLIP.LAYER_NORM_EPS", 0.0], "image_tower"),
        (["MODEL.BIAS_HEAD.REFERENCE_NORM", "row"], "reference"),
        (["MODEL.BIAS_HEAD.NAME_TOKENS", 0, "MODEL.BIAS_HEAD.PROMPT_LENGTH", 70], "reference"),
        (["MODEL.CLIP.CLASS_TOKEN", ""], "fingerprint"),
    ):
        options = ["MODEL.DEVICE", "cpu", "DATASETS.TEST", "('reclip_test_public',)", *change]
        other = build_model(load_config(str(output.with_suffix(".yaml")), options)).eval()
        with pytest.raises(ReclipError, match=f"is of another {named}"):
            ReclipCheckpointer(other).load(keys["MODEL"]["WEIGHTS"])


def test_a_registered_data_set_and_a_class_token_in_the_checkpoint(tool, tmp_path, datasets):
    public = public_model()
    token = torch.full((1, 1, TINY_VISION["width"]), 0.25)
    source, _ = save_public(tmp_path, public, **{"vit.cls_token": token})
    datasets("reclip_test_named", [], ["sky", "tree", "water", "wall"])
    output = tmp_path / "ours.safetensors"
    tool.main([str(source), str(output), "--dataset", "reclip_test_named", *CLIP_OPTIONS])
    cfg = load_config(str(output.with_suffix(".yaml")), ["MODEL.DEVICE", "cpu"])
    assert tuple(cfg.DATASETS.TEST) == ("reclip_test_named",)
    model = build_model(cfg).eval()
    ReclipCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    assert model.backbone.clip.visual.class_embedding.tolist() == [0.25] * TINY_VISION["width"]


def test_clips_own_class_token(tool, tmp_path):
    source, _ = save_public(tmp_path, public_model())
    output = tmp_path / "ours.pth"
    names = name_file(tmp_path, NAMES)
    tool.main([str(source), str(output), "--class-names", names, "--class-token", "clip", *CLIP_OPTIONS])
    assert load_config(str(output.with_suffix(".yaml"))).MODEL.CLIP.CLASS_TOKEN == ""
    assert not (tmp_path / "ours.class_token.safetensors").exists()


# ---- refusals -------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> tuple[Path, Path, list[str]]:
    source, token = save_public(tmp_path, public_model())
    return source, tmp_path / "ours.pth", ["--class-names", name_file(tmp_path, NAMES), "--class-token", str(token)]


def test_other_files_are_refused(tool, capsys, saved):
    source, output, options = saved
    state = torch.load(source, weights_only=True)
    torch.save({name: value for name, value in state.items() if "pe_proj.bias" not in name}, source)
    assert "lacks pe_proj.bias" in error_of(tool, capsys, source, output, *options)
    torch.save({**state, "module.text_encoder.prompt_token": torch.zeros(73, 32)}, source)
    assert "other shapes" in error_of(tool, capsys, source, output, *options)
    torch.save({**state, "module.pe_proj.weight": torch.zeros(24, 48, 1, 1)}, source)
    message = error_of(tool, capsys, source, output, *options)
    assert "positional_projection.conv.weight has shape (24, 48, 1, 1) instead of (24, 32, 1, 1)" in message
    torch.save(torch.zeros(3), source)
    assert "contains no state dict" in error_of(tool, capsys, source, output, *options)
    source.write_bytes(b"rubbish")
    assert "cannot be read as tensors" in error_of(tool, capsys, source, output, *options)
    source.unlink()
    assert "does not exist" in error_of(tool, capsys, source, output, *options)


class _Touch:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_code_in_a_checkpoint_is_not_run(tool, capsys, saved, tmp_path):
    source, output, options = saved
    torch.save({"module.pe_proj.weight": _Touch(tmp_path / "marker")}, source)
    assert "contains code" in error_of(tool, capsys, source, output, *options)
    assert not (tmp_path / "marker").exists()


def test_class_lists_that_do_not_fit(tool, capsys, saved, tmp_path):
    source, output, options = saved
    token = options[2:]
    three = name_file(tmp_path, NAMES[:3], "three.txt")
    assert "has 4 classes, the class list 3" in error_of(tool, capsys, source, output, "--class-names", three, *token)
    message = error_of(tool, capsys, source, output, *options, "--reference-names", three)
    assert "REFERENCE_NAMES has 3 names for 4 classes" in message
    double = name_file(tmp_path, [*NAMES[:3], "sky"], "double.txt")
    assert "share the name 'sky'" in error_of(tool, capsys, source, output, "--class-names", double, *token)
    none = str(tmp_path / "none.txt")
    assert "none.txt does not exist" in error_of(tool, capsys, source, output, "--class-names", none, *token)


def test_class_tokens_that_do_not_fit(tool, capsys, saved, tmp_path):
    source, output, options = saved
    names = options[:2]
    assert "does not contain the class token" in error_of(tool, capsys, source, output, *names)
    torch.save(torch.zeros(1, 1, 48), tmp_path / "wide.pt")
    message = error_of(tool, capsys, source, output, *names, "--class-token", str(tmp_path / "wide.pt"))
    assert "has 48 values" in message
    torch.save({"a": 1}, tmp_path / "dict.pt")
    message = error_of(tool, capsys, source, output, *names, "--class-token", str(tmp_path / "dict.pt"))
    assert "must hold one tensor" in message


def test_outputs_that_exist_or_have_another_ending(tool, capsys, saved, tmp_path):
    source, output, options = saved
    assert "must end in .pth or .safetensors" in error_of(tool, capsys, source, tmp_path / "ours.bin", *options)
    output.with_suffix(".yaml").write_text("mine")
    with pytest.raises(SystemExit):
        tool.main([str(source), str(output), *options, *CLIP_OPTIONS])
    assert "exists: add --overwrite" in capsys.readouterr().err
    assert output.with_suffix(".yaml").read_text() == "mine" and not output.exists()
    tool.main([str(source), str(output), *options, *CLIP_OPTIONS, "--overwrite"])
    assert "RectifiedCLIP" in output.with_suffix(".yaml").read_text()
