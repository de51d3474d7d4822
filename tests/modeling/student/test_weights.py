"""Initial weights of the student's backbone: every supported source, and invalid ones."""

import hashlib
import os
import pickle
import re
import urllib.error

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from detectron2.layers import ShapeSpec

from reclip_d2.config import load_config
from reclip_d2.errors import ReclipError
from reclip_d2.modeling.student import weights as module
from reclip_d2.modeling.student.network import build_dilated_resnet_backbone
from reclip_d2.modeling.student.weights import load_backbone_weights
from tests.helpers import tiny_resnet


def usual_resnet(depth: int) -> torch.nn.Module:
    """Of torchvision's width, output stride 32."""
    width = "64" if depth < 50 else "256"
    keys = ["MODEL.RESNETS.DEPTH", str(depth), "MODEL.RESNETS.RES2_OUT_CHANNELS", width]
    cfg = load_config("", [*keys, "MODEL.STUDENT.OUTPUT_STRIDE", "32"])
    return build_dilated_resnet_backbone(cfg, ShapeSpec(channels=3))


@torch.no_grad()
def torchvision_resnet(depth: int) -> torchvision.models.ResNet:
    """Random, with batch norms whose four tensors all have their say."""
    model = getattr(torchvision.models, f"resnet{depth}")(weights=None).eval()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.weight.uniform_(0.5, 1.0)
            layer.bias.normal_(std=0.1)
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.8, 1.5)
    return model


def perturbed_tiny() -> torch.nn.Module:
    backbone = tiny_resnet()
    with torch.no_grad():
        for value in backbone.state_dict().values():
            if value.is_floating_point():
                value.uniform_(0.1, 1.0)
    return backbone


def assert_loaded(path: str, source: torch.nn.Module) -> None:
    target = tiny_resnet()
    load_backbone_weights(target, str(path))
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value), key


def message_of(source: object, backbone: torch.nn.Module | None = None) -> str:
    with pytest.raises(ReclipError) as caught:
        load_backbone_weights(backbone or tiny_resnet(), str(source))
    message = str(caught.value)
    assert "\n" not in message and message.startswith("MODEL.STUDENT.WEIGHTS") and str(source) in message
    return message


# ---- what is understood -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "suffix"), [(18, "pth"), (50, "pth"), (18, "safetensors")])
@torch.no_grad()
def test_torchvision_weights_give_torchvisions_features(tmp_path, depth, suffix):
    theirs, path = torchvision_resnet(depth), tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save(theirs.state_dict(), path)
    else:
        safetensors.torch.save_file(theirs.state_dict(), path)
    ours = usual_resnet(depth).eval()
    load_backbone_weights(ours, str(path))
    x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images := torch.randn(1, 3, 64, 96)))))
    expected = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(x))))
    scale = expected.abs().max()
    torch.testing.assert_close(ours(images)["res5"] / scale, expected / scale, rtol=0, atol=1e-5)


def test_torchvision_by_name_asks_for_its_file(tmp_path, monkeypatch):
    path, asked = tmp_path / "resnet18.pth", []
    torch.save(torchvision_resnet(18).state_dict(), path)
    monkeypatch.setattr(module.PathManager, "get_local_path", lambda url: asked.append(url) or str(path))
    checked = []
    monkeypatch.setattr(module, "check_digest", lambda path, prefix, what: checked.append(prefix))
    for name in ("torchvision://resnet18", "torchvision://resnet18/IMAGENET1K_V1"):
        load_backbone_weights(usual_resnet(18), name)
    assert len(set(asked)) == 1 and re.fullmatch(r"https://.*/resnet18-\w+\.pth", asked[0])
    assert {f"{prefix}.pth" for prefix in checked} == {asked[0].rpartition("-")[2]}


def test_a_file_that_torchvision_has_not_published(tmp_path, monkeypatch):
    path = tmp_path / "resnet18.pth"
    torch.save(torchvision_resnet(18).state_dict(), path)
    monkeypatch.setattr(module.PathManager, "get_local_path", lambda url: str(path))
    found = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    with pytest.raises(ReclipError, match=rf"resnet18\.pth is not the published file: .* {found} instead of"):
        load_backbone_weights(usual_resnet(18), "torchvision://resnet18")


def test_detectron2s_pickle_of_arrays(tmp_path):
    source, path = perturbed_tiny(), tmp_path / "R-18.pkl"
    arrays = {key: value.numpy() for key, value in source.state_dict().items()}
    arrays["stem.fc.weight"] = np.zeros((3, 3), np.float32)  # the zoo's files keep the classifier
    for protocol in (2, 4):
        content = pickle.dumps({"model": arrays, "__author__": "someone", "matching_heuristics": True}, protocol)
        path.write_bytes(content)
        assert_loaded(path, source)
        if protocol == 2:  # the zoo's files were written by an older NumPy, whose modules had other names
            path.write_bytes(content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
            assert_loaded(path, source)


def test_caffe2_names_of_the_zoos_msra_files(tmp_path):
    """As in ``ImageNetPretrained/MSRA``: ``res2_0_branch2a_w``, ``..._bn_gamma``; ``conv1``, ``res_conv1_bn``."""
    source, path = perturbed_tiny(), tmp_path / "R.pkl"
    norm = {"weight": "gamma", "bias": "beta", "running_mean": "running_mean", "running_var": "running_var"}
    part = {"conv1": "branch2a", "conv2": "branch2b", "shortcut": "branch1"}
    arrays = {}
    for key, value in source.state_dict().items():
        *where, leaf = key.split(".")
        if leaf == "num_batches_tracked":
            continue
        is_norm = where[-1] == "norm"
        name = "res_conv1" if where[0] == "stem" and is_norm else "conv1"
        if where[0] != "stem":
            name = f"{where[0]}_{where[1]}_{part[where[2]]}"
        arrays[f"{name}_bn_{norm[leaf]}" if is_norm else f"{name}_w"] = value.numpy()
    assert {"conv1_w", "res_conv1_bn_gamma", "res2_0_branch2a_w", "res3_0_branch1_bn_running_var"} <= set(arrays)
    path.write_bytes(pickle.dumps({"blobs": arrays}, protocol=2))
    target = tiny_resnet()
    load_backbone_weights(target, str(path))
    for key, value in source.state_dict().items():
        assert key.endswith("num_batches_tracked") or torch.equal(target.state_dict()[key], value), key


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "backbone.bottom_up."])
@pytest.mark.parametrize("wrapped", [True, False])
def test_detectron2s_names_in_a_state_dict(tmp_path, prefix, wrapped):
    source, path = perturbed_tiny(), tmp_path / "model.pth"
    state = {prefix + key: value for key, value in source.state_dict().items()}
    torch.save({"model": state} if wrapped else state, path)
    assert_loaded(path, source)


def test_frozen_norms_take_the_statistics(tmp_path):
    source, path = perturbed_tiny(), tmp_path / "model.pth"
    torch.save(source.state_dict(), path)
    frozen = tiny_resnet("MODEL.BACKBONE.FREEZE_AT", 5)
    load_backbone_weights(frozen, str(path))
    assert torch.equal(frozen.res5[0].conv1.norm.running_var, source.res5[0].conv1.norm.running_var)


# ---- what is refused --------------------------------------------------------------------------------------------


class Attack:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, marker: object) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("suffix", ["pkl", "pth"])
@pytest.mark.parametrize("hidden", [False, True])
def test_code_in_a_file_does_not_run(tmp_path, suffix, hidden):
    marker, path = tmp_path / "ran", tmp_path / f"weights.{suffix}"
    attack = Attack(marker)
    # Hidden in an array of objects, whose elements are pickled like any other.
    content = {"model": {"stem.conv1.weight": np.array([attack], dtype=object)}} if hidden else {"model": attack}
    if suffix == "pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    assert "contains code" in message_of(path)
    assert not marker.exists()


def test_the_attack_would_run(tmp_path):
    """The test above is meaningless if the pickle is harmless."""
    pickle.loads(pickle.dumps(Attack(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", ["pkl", "pth", "safetensors"])
def test_damaged_files(tmp_path, suffix):
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(b"\x80\x02rubbish")
    assert "cannot be read as tensors" in message_of(path)


@pytest.mark.parametrize("content", [{}, [1, 2], {"model": {}}, {"epoch": 3}])
def test_files_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    assert f"contains no {'weights' if isinstance(content, dict) else 'state dict'}" in message_of(
        tmp_path / "weights.pth"
    )


def test_object_arrays_are_no_weights(tmp_path):
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps({"stem.conv1.weight": np.array(["a", 1], dtype=object)}))
    assert "stem.conv1.weight is an array of objects" in message_of(path)


def test_another_depth_width_or_norm(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(perturbed_tiny().state_dict(), path)
    deeper = message_of(path, tiny_resnet(depth=34))
    assert "of another backbone: res2.2.conv1.weight is missing (and " in deeper and "DEPTH" in deeper
    wider = message_of(path, tiny_resnet("MODEL.RESNETS.STEM_OUT_CHANNELS", 16, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16))
    assert "stem.conv1.weight has shape (8, 3, 7, 7) instead of (16, 3, 7, 7)" in wider and "MODEL.RESNETS" in wider
    torch.save({k: v for k, v in tiny_resnet("MODEL.RESNETS.NORM", "").state_dict().items()}, path)
    assert "norm.weight is missing" in message_of(path) and "NORM" in message_of(path)


def test_torchvisions_weights_of_another_depth(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    assert "is of another backbone: res2.2.conv1.weight is missing" in message_of(path, tiny_resnet(depth=34))


def test_missing_file(tmp_path):
    assert "does not exist" in message_of(tmp_path / "none.pth")


@pytest.mark.parametrize("name", ["torchvision://resnet5", "torchvision://resnet18/IMAGENET9", "torchvision://"])
def test_names_that_torchvision_does_not_know(name):
    assert "is not known to torchvision: use for example torchvision://resnet50" in message_of(name)


def test_names_that_the_zoo_does_not_know():
    assert "is not in Detectron2's model zoo" in message_of("catalog://ImageNetPretrained/none")


def test_a_scheme_that_nobody_knows():
    assert "is not a known source" in message_of("nothing://resnet18")


@pytest.mark.parametrize("source", ["torchvision://resnet18", "detectron2://ImageNetPretrained/MSRA/R-50.pkl"])
def test_no_network(monkeypatch, source):
    def unreachable(url: str) -> str:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(module.PathManager, "get_local_path", unreachable)
    message = message_of(source)
    assert "cannot be fetched (URLError)" in message and "copy the file to this machine" in message
