"""Building a frozen CLIP, and wrong names and files."""

import hashlib
import pickle
from pathlib import Path

import open_clip
import pytest
import safetensors.torch
import torch

from reclip_d2.backbones import download
from reclip_d2.backbones.build import build_clip, check_supported, clip_fingerprint
from reclip_d2.backbones.embedded import EMBEDDED_CHECKPOINT, EMBEDDED_CHECKPOINTS
from reclip_d2.errors import ReclipError
from tests.helpers import TINY_NAME, register_tiny_model, tiny_clip, tiny_dense


@pytest.fixture(autouse=True, scope="module")
def tiny_name(tmp_path_factory) -> str:
    return register_tiny_model(tmp_path_factory.mktemp("model"))


def message_of(name: str, pretrained: str) -> str:
    with pytest.raises(ReclipError) as caught:
        build_clip(name, pretrained)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_embedded_model_is_frozen_and_ready():
    model, tokenizer = build_clip("reclip-embedded", "openai")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert tokenizer(["sky"]).shape == (1, 77)


@pytest.mark.parametrize("missing", ["embedded_shorttail", "no/such.safetensors"])
def test_embedded_model_of_unknown_weights(missing):
    message = f"PRETRAINED '{missing}' of reclip-embedded is neither a file, nor embedded or embedded_longtail"
    with pytest.raises(ReclipError, match=message):
        build_clip("reclip-embedded", missing)


def test_each_embedded_world_has_a_clip_of_its_own():
    worlds = [build_clip("reclip-embedded", world)[0] for world in ("embedded", "embedded_longtail")]
    assert len({clip_fingerprint(model) for model in worlds}) == 2
    assert EMBEDDED_CHECKPOINTS["embedded_longtail"].stat().st_size < 2e6


def test_embedded_model_with_weights_of_a_file(tmp_path):
    usual = clip_fingerprint(build_clip("reclip-embedded", "embedded")[0])
    state = safetensors.torch.load_file(EMBEDDED_CHECKPOINT)
    state["visual.proj"] = -state["visual.proj"]
    safetensors.torch.save_file(state, tmp_path / "mine.safetensors")
    own, _ = build_clip("reclip-embedded", str(tmp_path / "mine.safetensors"))
    assert torch.equal(own.visual.proj, state["visual.proj"].float()) and clip_fingerprint(own) != usual
    assert clip_fingerprint(build_clip("reclip-embedded", "openai")[0]) == usual


def test_random_weights_are_seeded_and_leave_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, _ = build_clip(TINY_NAME, "random")
    assert torch.equal(torch.rand(3), expected)
    second, _ = build_clip(TINY_NAME, "random")
    assert clip_fingerprint(first) == clip_fingerprint(second)
    assert not any(parameter.requires_grad for parameter in first.parameters()) and not first.training


def test_unknown_model():
    assert "'ViT-Z-99' is not known to open_clip" in message_of("ViT-Z-99", "openai")


def test_unknown_tag_or_file():
    message = message_of("ViT-B-32-quickgelu", "opneai")
    assert "'opneai' is neither a file nor a tag" in message and "openai" in message


def test_no_tags_at_all():
    assert "tags: none" in message_of(TINY_NAME, "openai")


@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-L-14"])
def test_openai_weights_need_quick_gelu(name):
    message = message_of(name, "openai")
    assert "QuickGELU" in message and f"{name}-quickgelu" in message


def test_weights_that_cannot_be_downloaded():
    message = message_of("ViT-B-16", "laion2b_s34b_b88k")
    assert "laion2b_s34b_b88k" in message and "MODEL.CLIP.PRETRAINED" in message


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_from_a_file(tmp_path, suffix):
    clip = tiny_clip(seed=3)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(clip.state_dict(), path)
    else:
        import safetensors.torch

        safetensors.torch.save_file(clip.state_dict(), path)
    model, _ = build_clip(TINY_NAME, str(path))
    assert clip_fingerprint(model) == clip_fingerprint(clip)
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model.encode_image(images), clip.encode_image(images))


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_damaged_file(tmp_path, damage):
    path = tmp_path / "weights.pt"
    torch.save(tiny_clip().state_dict(), path)
    path.write_bytes({"cut": path.read_bytes()[:20000], "text": b"no weights\n" * 50, "empty": b""}[damage])
    message = message_of(TINY_NAME, str(path))
    assert str(path) in message and "damaged" in message


def test_file_of_another_model(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(tiny_clip(width=48, head_width=24).state_dict(), path)
    assert str(path) in message_of(TINY_NAME, str(path))
    torch.save({"weight": torch.zeros(2)}, path)
    assert str(path) in message_of(TINY_NAME, str(path))


class _Touch:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_code_in_a_file_is_not_run(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "weights.pt"
    torch.save({"state_dict": tiny_clip().state_dict(), "extra": _Touch(marker)}, path)
    assert str(path) in message_of(TINY_NAME, str(path))
    assert not marker.exists()
    pickle.loads(pickle.dumps(_Touch(marker)))  # the trap works
    assert marker.exists()


def test_fingerprint_changes_with_one_weight():
    clip = tiny_clip()
    before = clip_fingerprint(clip)
    assert before == clip_fingerprint(tiny_clip()) and len(before) == 64
    weight = clip.text_projection
    value = weight[0, 0].item()
    weight[0, 0] += 1e-4
    assert clip_fingerprint(clip) != before
    weight[0, 0] = value
    assert clip_fingerprint(clip) == before


def test_fingerprint_of_half_precision_weights_is_that_of_their_values():
    clip = tiny_clip().half().float()
    assert clip_fingerprint(clip) == clip_fingerprint(tiny_clip().half())


def test_resnet_clip_is_refused_as_a_backbone():
    from reclip_d2.backbones.dense import DenseCLIP

    vision = open_clip.CLIPVisionCfg(layers=(1, 1, 1, 1), width=8, head_width=8, image_size=32)
    clip = open_clip.CLIP(24, vision, open_clip.CLIPTextCfg(width=32, heads=2, layers=1))
    with pytest.raises(ReclipError, match="'RN-tiny' is not supported"):
        DenseCLIP(clip, object(), name="RN-tiny")
    assert tiny_dense().name == "tiny"


# ---- what open_clip has and this project does not take -------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("convnext_base", "image tower is timm's ConvNeXt, not a Vision Transformer"),
        ("vit_relpos_medium_patch16_cls_224", "image tower is timm's VisionTransformerRelPos"),
        ("RN50-quickgelu", "image tower is a ResNet"),
    ],
)
def test_models_without_a_value_path(name, reason, monkeypatch):
    monkeypatch.setattr(open_clip, "create_model", None)  # refused before anything is built
    message = message_of(name, "random")
    assert f"MODEL.CLIP.NAME {name!r} is not supported: " in message and reason in message


@pytest.mark.parametrize("name", ["ViT-B-16-quickgelu", "ViT-L-14-CLIPA", "coca_ViT-B-32", "roberta-ViT-B-32"])
def test_models_with_a_value_path(name):
    check_supported(name)


def test_a_small_vit_of_open_clip_as_a_backbone():
    from reclip_d2.backbones.dense import DenseCLIP

    model, tokenizer = build_clip("ViT-S-32-alt", "random")
    features = DenseCLIP(model, tokenizer, name="ViT-S-32-alt")(torch.randn(1, 3, 64, 96))["dense"]
    assert features.shape == (1, 256, 2, 3)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(1, 2, 3))


# ---- tags -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["metaclip_400m", "dfn2b"])
def test_other_weights_that_need_quick_gelu(tag):
    assert "need QuickGELU: set MODEL.CLIP.NAME to ViT-B-16-quickgelu instead of ViT-B-16" in message_of(
        "ViT-B-16", tag
    )


def test_offline_message_names_the_file_and_the_key():
    message = message_of("ViT-B-16-quickgelu", "openai")
    assert "open_clip_model.safetensors of the Hugging Face repository timm/vit_base_patch16_clip_224.openai" in message
    assert "ViT-B-16.pt" in message and "set MODEL.CLIP.PRETRAINED to its path" in message


def test_a_fetched_tag_is_read_like_a_local_file(tmp_path, monkeypatch):
    """A download that does not belong to the model is refused."""
    path = tmp_path / "open_clip_model.bin"
    torch.save(tiny_clip(width=48, head_width=24).state_dict(), path)
    monkeypatch.setattr(download, "is_reachable", lambda address: True)
    monkeypatch.setattr(download, "download_pretrained", lambda config: str(path))
    message = message_of("ViT-B-32", "laion2b_s34b_b79k")
    assert "laion2b_s34b_b79k is of another model than ViT-B-32: image width 48 instead of 768" in message


def test_a_damaged_file_in_the_hubs_cache(tmp_path, monkeypatch):
    """Snapshots are links to blobs that are named by their SHA-256."""
    torch.save(tiny_clip().state_dict(), tmp_path / "weights")
    content = (tmp_path / "weights").read_bytes()
    blob = (tmp_path / "weights").rename(tmp_path / hashlib.sha256(content).hexdigest())
    link = tmp_path / "open_clip_model.bin"
    link.symlink_to(blob)
    monkeypatch.setattr(download, "is_reachable", lambda address: True)
    monkeypatch.setattr(download, "download_pretrained", lambda config: str(link))
    assert "is of another model" in message_of("ViT-B-32", "laion2b_s34b_b79k")  # it was read
    blob.write_bytes(content[:-1] + b"x")
    message = message_of("ViT-B-32", "laion2b_s34b_b79k")
    assert "is not the published file" in message and str(blob) in message


def test_a_local_file_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(tiny_clip(seed=3).state_dict(), tmp_path / "weights.pt")
    model, _ = build_clip(TINY_NAME, "~/weights.pt")
    assert clip_fingerprint(model) == clip_fingerprint(tiny_clip(seed=3))
