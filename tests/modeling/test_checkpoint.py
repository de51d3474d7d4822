"""Checkpoints: the file's content, rejected files, and that nothing in a file is executed."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from reclip_d2.errors import ReclipError
from reclip_d2.modeling import checkpoint as module
from reclip_d2.modeling.checkpoint import ReclipCheckpointer
from tests.helpers import CLASS_NAMES, make_maskclip, make_rectified


def saved(folder, model=None, name: str = "model", **extra) -> Path:
    model = model or make_rectified()
    ReclipCheckpointer(model, str(folder)).save(name, **extra)
    return folder / f"{name}.pth"


def message_of(path, model=None) -> str:
    with pytest.raises(ReclipError) as caught:
        ReclipCheckpointer(model or make_rectified()).load(str(path))
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def test_file_holds_trained_parts_and_the_identity(tmp_path):
    model = make_rectified()
    content = torch.load(saved(tmp_path, model, iteration=7), weights_only=True)
    assert set(content) == {"model", "identity", "identity_version", "iteration"} and content["iteration"] == 7
    assert set(content["model"]) == set(model.state_dict())
    assert all(key.startswith(("bias_head.", "mask_decoder.")) for key in content["model"])
    assert json.loads(content["identity"])["class_names"] == CLASS_NAMES
    assert (tmp_path / "model.pth").stat().st_size < 100_000  # the tiny CLIP alone would be 6 MB


def test_round_trip(tmp_path):
    model, other = make_rectified(), make_rectified()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
        model.mask_decoder.norm.running_mean.add_(2.0)
    ReclipCheckpointer(other).load(str(saved(tmp_path, model)))
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_optimizer_and_counters_are_resumed_and_only_then(tmp_path):
    model = make_rectified()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    sum(p.sum() for p in model.parameters() if p.requires_grad).backward()
    optimizer.step()
    ReclipCheckpointer(model, str(tmp_path), optimizer=optimizer).save("model_0", iteration=0)

    def fresh() -> tuple[torch.optim.SGD, ReclipCheckpointer]:
        twin = make_rectified()
        own = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.5)
        return own, ReclipCheckpointer(twin, str(tmp_path), optimizer=own)

    own, checkpointer = fresh()
    extra = checkpointer.resume_or_load("", resume=True)
    assert extra["iteration"] == 0 and own.param_groups[0]["lr"] == 0.1 and len(own.state) == len(optimizer.state)
    own, checkpointer = fresh()
    checkpointer.resume_or_load(str(tmp_path / "model_0.pth"), resume=False)
    assert own.param_groups[0]["lr"] == 0.5 and not own.state


def test_last_checkpoint_is_tagged(tmp_path):
    saved(tmp_path, name="model_1")
    saved(tmp_path, name="model_2")
    checkpointer = ReclipCheckpointer(make_rectified(), str(tmp_path))
    assert checkpointer.has_checkpoint()
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_2.pth")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = saved(tmp_path)
    content = path.read_bytes()

    def fail(data, target):
        Path(target).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(module, "save_archive", fail)
    with pytest.raises((OSError, ReclipError), match="no space left"):
        saved(tmp_path)
    assert path.read_bytes() == content
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["last_checkpoint", "model.pth"]


def test_nothing_is_saved_without_a_folder_or_by_other_processes(tmp_path):
    ReclipCheckpointer(make_rectified()).save("model")
    ReclipCheckpointer(make_rectified(), str(tmp_path), save_to_disk=False).save("model")
    assert list(tmp_path.iterdir()) == []


# ---- refused --------------------------------------------------------------------------------------------------


def test_another_class_list(tmp_path):
    names = [["sky"], ["tall tree", "oak"], ["sea"], ["brick wall"]]
    message = message_of(saved(tmp_path, make_rectified(class_names=names)))
    assert "another class list: class 2 is 'sea' instead of 'water'" in message
    message = message_of(saved(tmp_path, make_rectified(class_names=names[:2])))
    assert "another class list: 2 classes instead of 4" in message


def test_other_templates(tmp_path):
    assert "another templates: imagenet instead of photo" in message_of(
        saved(tmp_path, make_rectified(templates="imagenet"))
    )


def test_another_clip(tmp_path):
    model = make_rectified()
    model.backbone.name = "ViT-B-16"
    assert "another clip: ViT-B-16 instead of tiny" in message_of(saved(tmp_path, model))
    model = make_rectified()
    model.backbone.fingerprint = "0" * 64
    assert "another fingerprint: 0000" in message_of(saved(tmp_path, model))


def test_another_kind_of_model(tmp_path):
    without = saved(tmp_path, make_rectified(decoder=False))
    assert "mask_decoder" in message_of(without) and "is missing" in message_of(without)
    with_decoder = saved(tmp_path)
    assert "is unknown" in message_of(with_decoder, make_rectified(decoder=False))
    other_length = saved(tmp_path, make_rectified(prompt_length=6))
    assert "has shape (6, 32) instead of (4, 32)" in message_of(other_length)
    assert "is missing" in message_of(saved(tmp_path, make_maskclip()))


@pytest.mark.parametrize("identity", [None, "", "{", "[]", "3", '"text"', 3, [1], {"clip": "tiny"}, "null"])
def test_a_damaged_identity(tmp_path, identity):
    path = tmp_path / "model.pth"
    torch.save({"model": make_rectified().state_dict(), "identity": identity}, path)
    message_of(path)


def test_files_of_other_projects(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"weight": torch.zeros(2)}, path)
    assert "not written by reclip_d2" in message_of(path)
    torch.save([torch.zeros(2)], path)
    assert "contains no weights" in message_of(path)
    torch.save({"model": {"a": "text"}, "identity": json.dumps(make_rectified().identity())}, path)
    message_of(path)
    torch.save({"model": 3, "identity": json.dumps(make_rectified().identity())}, path)
    message_of(path)


def test_missing_file(tmp_path):
    assert "does not exist" in message_of(tmp_path / "none.pth")
    assert "is a folder" in message_of(tmp_path)


def test_other_files_under_its_name(tmp_path):
    path = tmp_path / "model.pth"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n")
    assert "a Git LFS pointer" in message_of(path)
    path.write_text("")
    assert "it is empty" in message_of(path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_names_of_wrapped_models(tmp_path, prefix):
    model, other = make_rectified(), make_rectified()
    with torch.no_grad():
        model.mask_decoder.norm.running_mean.add_(2.0)
    path = tmp_path / "model.pth"
    state = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
    torch.save({"model": state, "identity": json.dumps(model.identity()), "epoch": np.int64(3)}, path)
    ReclipCheckpointer(other).load(str(path))
    assert torch.equal(other.mask_decoder.norm.running_mean, model.mask_decoder.norm.running_mean)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: value.to_sparse(), "is a sparse tensor"),
        (lambda value: value.to("meta"), "is a meta tensor"),
        (lambda value: value.long(), "is of type int64 instead of float32"),
        (lambda value: value.to(torch.complex64), "is of type complex64"),
        (lambda value: value * float("nan"), "has values that are not finite"),
        (lambda value: value[..., :1], "has shape"),
    ],
)
def test_unusual_tensors_are_named(tmp_path, change, words):
    path = tmp_path / "model.pth"
    model = make_rectified()
    state = model.state_dict()
    state["mask_decoder.conv.weight"] = change(state["mask_decoder.conv.weight"])
    torch.save({"model": state, "identity": json.dumps(model.identity())}, path)
    message = message_of(path)
    assert "mask_decoder.conv.weight" in message and words in message


def test_a_changed_bit_is_noticed(tmp_path):
    path = saved(tmp_path)
    content = bytearray(path.read_bytes())
    content[content.index(b"data/0") + 5000] ^= 1
    path.write_bytes(content)
    assert "the checksum of its entry" in message_of(path)


@pytest.mark.parametrize("value", ["7", -1, 1.5, float("nan"), None, [1]])
def test_a_damaged_iteration(tmp_path, value):
    assert "its iteration is" in message_of(saved(tmp_path, iteration=value))


def test_a_damaged_optimizer(tmp_path):
    model = make_rectified()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for state in ({}, {"state": {}, "param_groups": 3}, {"state": {}, "param_groups": []}, 7):
        path = saved(tmp_path, model, optimizer=state)
        with pytest.raises(ReclipError, match="does not fit this training"):
            ReclipCheckpointer(model, optimizer=optimizer).load(str(path))


@pytest.mark.parametrize("size", [0, 1, 10, 100, 1000, 10000, -100])
def test_cut_file(tmp_path, size):
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:size])
    assert "cannot be read" in message_of(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".pyth", ".safetensors"])
@pytest.mark.parametrize("seed", range(4))
def test_rubbish(tmp_path, suffix, seed):
    path = tmp_path / f"model{suffix}"
    torch.manual_seed(seed)
    rubbish = bytes(torch.randint(0, 256, (500,)).tolist())
    path.write_bytes([rubbish, b"text\n" * 30, b"\x80\x04." + rubbish, b"PK\x03\x04" + rubbish][seed])
    message_of(path)


class _Touch:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".pyth"])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_code_in_a_file_is_not_run(tmp_path, suffix, writer):
    marker, path = tmp_path / "marker", tmp_path / f"model{suffix}"
    content = {"model": make_rectified().state_dict(), "identity": "{}", "extra": _Touch(marker)}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps({"model": {}, "__author__": "x", "extra": _Touch(marker)}))
    assert "cannot be read" in message_of(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(_Touch(marker)))  # the trap works
    assert marker.exists()


# ---- safetensors ----------------------------------------------------------------------------------------------


def test_safetensors(tmp_path):
    model, other = make_rectified(), make_rectified()
    path = tmp_path / "model.safetensors"
    identity = {"identity": json.dumps(model.identity())}
    safetensors.torch.save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path, metadata=identity)
    ReclipCheckpointer(other).load(str(path))
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    safetensors.torch.save_file(model.state_dict(), path)
    assert "has no identity" in message_of(path)


# ---- what the features depend on ---------------------------------------------------------------------------------


def without_value_path_residual() -> torch.nn.Module:
    model = make_rectified()
    model.backbone.attention.residual = False
    return model


def normalised_otherwise(from_weights: bool = False) -> torch.nn.Module:
    model = make_rectified()
    model.pixel_mean.fill_(127.5)
    model.statistics_from_weights = from_weights
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (without_value_path_residual, "another MODEL.CLIP.VALUE_PATH_RESIDUAL: True instead of False"),
        (normalised_otherwise, "another MODEL.PIXEL_MEAN: [122.7709, 116.7"),
    ],
)
def test_all_that_changes_the_features_is_compared(tmp_path, make, words):
    usual, other = saved(tmp_path), saved(tmp_path, make(), "other")
    assert words in message_of(usual, make())
    assert "is of another MODEL." in message_of(other)
    ReclipCheckpointer(make()).load(str(other))


def test_checkpoints_of_earlier_versions(tmp_path):
    """They do not record the value path and the normalisation, which they took from the config."""
    path = saved(tmp_path)
    content = torch.load(path, weights_only=True)
    del content["identity_version"]
    torch.save(content, path)
    for model in (make_rectified(), without_value_path_residual(), normalised_otherwise()):
        ReclipCheckpointer(model).load(str(path))
    # A normalisation that only the weights ask for was not theirs.
    assert "another MODEL.PIXEL_MEAN" in message_of(path, normalised_otherwise(from_weights=True))
