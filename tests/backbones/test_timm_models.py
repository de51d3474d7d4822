"""Models of open_clip with an image tower of timm, from the config to masks, training and exported files."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from reclip_d2.backbones.build import build_clip, check_supported, embedding_shape
from reclip_d2.backbones.dense import DenseCLIP
from reclip_d2.backbones.settings import settings_of_weights
from reclip_d2.config import load_config
from reclip_d2.errors import ReclipError
from reclip_d2.export import ExportOptions, export_model
from reclip_d2.export.export import FORMATS
from reclip_d2.modeling.build import build_clip_backbone
from tests.timm_models import PATCH, architecture_file, timm_dense


def config(name: str, folder: Path, datasets=None, **text: object) -> CfgNode:
    cfg = load_config("")
    cfg.MODEL.CLIP.NAME = architecture_file(name, folder, **text)
    cfg.MODEL.CLIP.PRETRAINED = "random"
    cfg.MODEL.CLIP.TEMPLATES = "photo"
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "DenseCLIP"
    cfg.MODEL.BIAS_HEAD.PROMPT_LENGTH = 4
    if datasets is not None:
        cfg.DATASETS.TEST = (datasets("reclip_test_timm", [], ["sky", "tall tree", "water"]),)
    return cfg


@pytest.mark.parametrize("name", ["small_siglip", "small_eva02", "small_vitamin"])
def test_sizes_are_known_before_the_model_is_built(name, tmp_path):
    cfg = config(name, tmp_path)
    summary, backbone = DenseCLIP.summary(cfg), build_clip_backbone(cfg)
    assert (summary.embed_dim, summary.patch_size) == (backbone.embed_dim, backbone.patch_size)
    assert summary.patch_size == PATCH[name] and summary.name == backbone.name == backbone.identity()["clip"]


def test_models_of_open_clip_that_work_and_that_do_not():
    assert embedding_shape("ViT-B-16-SigLIP2") == (768, 16) and embedding_shape("EVA02-B-16") == (512, 16)
    assert embedding_shape("ViTamin-S") == (384, 16) and embedding_shape("PE-Core-T-16-384") == (512, 16)
    for name, kind in (("convnext_tiny", "ConvNeXt"), ("MobileCLIP2-S0", "FastVit")):
        with pytest.raises(ReclipError, match=rf"{name}' is not supported: its image tower is timm's {kind}, not a"):
            check_supported(name)


def test_pixel_statistics_are_timms_unless_the_weights_have_others(tmp_path):
    cfg = config("small_siglip", tmp_path)
    assert build_clip_backbone(cfg).pixel_statistics.mean == pytest.approx([127.5] * 3)
    assert settings_of_weights("ViT-B-16-SigLIP", "webli").mean == pytest.approx((127.5,) * 3)
    assert build_clip_backbone(config("small_eva02", tmp_path)).pixel_statistics.mean[0] == pytest.approx(
        122.77, abs=0.01
    )


def test_weights_from_a_file(tmp_path):
    name = architecture_file("small_eva02", tmp_path)
    model, _ = build_clip(name, "random")
    state = {key: tensor + 0.1 for key, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    loaded, _ = build_clip(name, str(tmp_path / "weights.safetensors"))
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items())
    del state["visual.trunk.head.bias"]
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(ReclipError, match=r"does not fit small_eva02-.*: visual.trunk.head.bias is missing"):
        build_clip(name, str(tmp_path / "weights.safetensors"))


def test_checkpoints_know_the_tower_and_the_positions():
    own, sine = timm_dense("small_eva02"), timm_dense("small_eva02", positions="sine")
    assert "MODEL.CLIP.POSITIONS" not in own.identity() and own.fingerprint == sine.fingerprint
    assert sine.identity() == {**own.identity(), "MODEL.CLIP.POSITIONS": "sine"}
    assert own.fingerprint != timm_dense("small_clip").fingerprint


def test_regions_and_helpers_know_the_patch_of_the_tower(tmp_path):
    cfg = config("small_siglip", tmp_path)
    cfg.MODEL.CLIP.DENSE_ATTENTION = "regions"
    backbone = build_clip_backbone(cfg)
    assert backbone.attention.patch_size == 14
    assert backbone.dense(torch.randn(1, 3, 70, 84)).shape == (1, 32, 5, 6)
    cfg.MODEL.CLIP.DENSE_ATTENTION = "proxy"
    cfg.MODEL.CLIP.HELPER_NAME, cfg.MODEL.CLIP.HELPER_WEIGHTS = "small_clip", "random"
    assert build_clip_backbone(cfg).dense(torch.randn(1, 3, 70, 84)).shape == (1, 32, 5, 6)


@pytest.mark.parametrize("architecture", ["MaskCLIP", "RectifiedCLIP"])
@pytest.mark.parametrize("name", ["small_siglip", "small_rotary"])  # with learned and with sine positions
def test_segmentation_and_export(name, architecture, tmp_path, datasets):
    """For an image whose sides are not multiples of the patch."""
    cfg = config(name, tmp_path, datasets)
    cfg.MODEL.META_ARCHITECTURE = architecture
    model = build_model(cfg).eval()
    image = torch.randint(0, 256, (3, 75, 101), dtype=torch.uint8)
    with torch.no_grad():
        (output,) = model([{"image": image, "height": 75, "width": 101}])
    assert output["sem_seg"].shape == (3, 75, 101) and torch.isfinite(output["sem_seg"]).all()
    if architecture == "RectifiedCLIP":
        for target in FORMATS:
            for size in (None, (70, 90)):  # any size: compared at two, which are not the trace's
                results = export_model(model, tmp_path / "file", ExportOptions(format=target, size=size))
                assert len(results) == 2 and all(0 <= result.difference < 1e-4 * result.span for result in results)


@pytest.mark.parametrize(
    ("name", "attention"), [("small_eva02", "naclip"), ("small_rotary", "resclip"), ("small_vitamin", "value")]
)
def test_export_of_other_families(name, attention, tmp_path, datasets):
    cfg = config(name, tmp_path, datasets)
    cfg.MODEL.META_ARCHITECTURE = "MaskCLIP"
    cfg.MODEL.CLIP.DENSE_ATTENTION = attention
    model = build_model(cfg).eval()
    for target in FORMATS:
        results = export_model(model, tmp_path / "file", ExportOptions(format=target))
        assert all(0 <= result.difference < 1e-4 * result.span for result in results)


@pytest.mark.parametrize("name", ["small_siglip", "small_eva02", "small_vitamin"])
def test_training_reaches_all_trained_parts(name, tmp_path, datasets):
    cfg = config(name, tmp_path, datasets)
    cfg.MODEL.META_ARCHITECTURE = "RectifiedCLIP"
    model = build_model(cfg).train()
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    losses = model([{"image": image, "hypothesis": torch.tensor([0, 2])} for image in images])
    sum(losses.values()).backward()
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert {key.split(".")[0] for key in trained} == {"bias_head", "mask_decoder"}
    for key, parameter in trained.items():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
