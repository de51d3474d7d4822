"""``reclip doctor``."""

import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch

from reclip_d2.backbones import download
from reclip_d2.cli import doctor
from reclip_d2.errors import ReclipError
from reclip_d2.workspace import clip_weights
from tests.helpers import register_tiny_model, tiny_clip


@pytest.fixture(autouse=True)
def no_weights(tmp_path, monkeypatch):
    """A machine without weights and without a network."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_ready(reclip, isolated_cache):
    outcome = reclip("doctor", "--clip", "reclip-embedded")
    assert outcome.status == 0 and outcome.err == ""
    for words in ("reclip_d2", "Python 3.", f"torch {torch.__version__.split('+')[0]}", "detectron2", "extension",
                  "cpu: ", str(isolated_cache), "ships with the package", "ready",
                  "SigLIP2", "; needs transformers", "not supported: ResNet (10), timm convnext (11)",
                  "DENSE_ATTENTION for each: clearclip, "):  # fmt: skip
        assert words in outcome.out
    assert not list(isolated_cache.iterdir())  # the probe of the cache is gone


def without_detectron2(*arguments: str) -> subprocess.CompletedProcess:
    """The command in a process where detectron2 cannot be imported."""
    program = f"import sys; sys.modules['detectron2'] = None; from reclip_d2.cli.main import main; main({arguments!r})"
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )


def test_without_detectron2(isolated_cache):
    """It is what the user runs to learn what is missing."""
    outcome = without_detectron2("doctor", "--clip", "reclip-embedded")
    assert outcome.returncode == 1 and "Traceback" not in outcome.stderr
    assert (
        "detectron2 PROBLEM: detectron2 is not installed: run python -m reclip_d2.install_detectron2" in outcome.stdout
    )
    assert "ships with the package" in outcome.stdout and "see detectron2 above" in outcome.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("segment", "images", "--classes", "classes.txt", "--output", "out"),
        ("predict", "images", "--model", "model", "--output", "out"),
        ("export", "--model", "model", "--format", "onnx"),
    ],
)
def test_other_commands_without_detectron2(arguments):
    outcome = without_detectron2(*arguments)
    assert outcome.returncode == 1 and outcome.stderr.count("\n") == 1
    assert outcome.stderr.startswith("error: detectron2 is not installed: run python -m reclip_d2.install_detectron2")


def test_a_detectron2_that_is_broken(monkeypatch):
    def fail(name: str) -> object:
        raise ImportError("undefined symbol")

    monkeypatch.setattr(doctor.importlib, "import_module", fail)
    with pytest.raises(ReclipError, match=r"cannot be imported \(undefined symbol\): rebuild it"):
        list(doctor._detectron2())


def test_weights_that_are_not_here(reclip):
    outcome = reclip("doctor")
    assert "see CLIP above" in outcome.error
    assert "PROBLEM" in outcome.out and "--pretrained FILE" in outcome.out and "ViT-B-16-quickgelu" in outcome.out


def test_weights_that_can_be_fetched(reclip, monkeypatch):
    asked = []
    monkeypatch.setattr(clip_weights, "is_reachable", lambda address: asked.append(address) or True)
    outcome = reclip("doctor")
    assert outcome.status == 0
    assert asked[0].startswith("https://") and asked[0] in outcome.out and "the first run downloads" in outcome.out


def test_weights_in_a_file(reclip, tmp_path):
    name = register_tiny_model(tmp_path)
    model = open_clip.create_model(name, pretrained=None)
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    outcome = reclip("doctor", "--clip", name, "--pretrained", tmp_path / "clip.pt")
    assert outcome.status == 0, outcome.out
    assert str(tmp_path / "clip.pt") in outcome.out

    torch.save(tiny_clip(layers=2).state_dict(), tmp_path / "other.pt")
    outcome = reclip("doctor", "--clip", name, "--pretrained", tmp_path / "other.pt")
    assert outcome.status == 1 and "is of another model than" in outcome.out


def test_weights_in_the_hubs_cache(monkeypatch, tmp_path):
    """A cached file is found where the hub's client itself would look."""
    config = {"hf_hub": "owner/name/"}
    folder = tmp_path / "hub" / "models--owner--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    assert download.cached_file(config) is None
    file = folder / "snapshots" / "abc" / "open_clip_model.safetensors"
    file.write_bytes(b"")
    assert download.cached_file(config) == file
    other = {"url": "https://example.org/x/ViT.pt"}
    assert download.cached_file(other) is None
    (tmp_path / ".cache" / "clip").mkdir(parents=True)
    (tmp_path / ".cache" / "clip" / "ViT.pt").write_bytes(b"")
    assert download.cached_file(other) == tmp_path / ".cache" / "clip" / "ViT.pt"


def test_a_cache_that_cannot_be_written(reclip, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RECLIP_CACHE", str(tmp_path / "file"))
    outcome = reclip("doctor", "--clip", "reclip-embedded")
    assert outcome.status == 1 and "set RECLIP_CACHE to another" in outcome.out


def test_a_machine_without_kernels(reclip, monkeypatch):
    monkeypatch.setattr(doctor, "kernels_available", lambda device: False)
    outcome = reclip("doctor", "--clip", "reclip-embedded")
    assert outcome.status == 0 and "none for cpu: plain PyTorch is used" in outcome.out


def test_a_missing_package(reclip, monkeypatch):
    monkeypatch.setattr(doctor, "_PACKAGES", ("torch", "no-such-package"))
    outcome = reclip("doctor", "--clip", "reclip-embedded")
    assert outcome.status == 1 and "pip install no-such-package" in outcome.out


def test_optional_packages(reclip, monkeypatch):
    monkeypatch.setattr(doctor, "_OPTIONAL", {"torch": ("this", "x"), "no-such-package": ("reclip app", "app")})
    outcome = reclip("doctor", "--clip", "reclip-embedded")
    assert outcome.status == 0  # segment runs without them
    assert f"optional   torch {torch.__version__.split('+')[0]}" in outcome.out
    assert 'no-such-package is missing, for reclip app: pip install "reclip_d2[app]"' in outcome.out
