"""The list of model families agrees with what is built."""

import open_clip
import pytest

from reclip_d2.backbones.build import check_supported
from reclip_d2.backbones.families import families
from reclip_d2.errors import ReclipError


def test_every_model_is_in_one_family():
    names = [name for family in families() for name in family.models]
    assert len(names) == len(set(names))
    assert {"ViT-B-16", "RN50", "coca_ViT-L-14"} < set(names) <= set(open_clip.list_models())


@pytest.mark.parametrize(
    ("kind", "name", "pooled"),
    [
        (("CLIP", "open_clip ViT", False), "ViT-B-16-quickgelu", False),
        (("SigLIP", "timm ViT", True), "ViT-B-16-SigLIP", True),
        (("SigLIP2", "timm ViT", True), "ViT-B-32-SigLIP2-256", True),
        (("EVA02", "timm ViT", False), "EVA02-L-14", False),
        (("PE-Core", "timm ViT", False), "PE-Core-T-16-384", True),
        (("MobileCLIP", "timm ViT", False), "MobileCLIP-B", False),
        (("CoCa", "open_clip ViT", False), "coca_ViT-B-32", True),
        (("XLM-R, mT5, NLLB", "open_clip ViT", True), "xlm-roberta-base-ViT-B-32", False),
        (("CLIPA", "open_clip ViT", True), "ViT-L-14-CLIPA", False),
    ],
)
def test_families_that_work(kind, name, pooled):
    family = next(family for family in families() if name in family.models)
    assert (family.name, family.tower, family.needs_transformers) == kind
    assert family.works and family.pooled == pooled
    check_supported(name)


@pytest.mark.parametrize(
    ("tower", "name"), [("ResNet", "RN50"), ("timm swin_transformer", "swin_base_patch4_window7_224")]
)
def test_families_that_do_not(tower, name):
    family = next(family for family in families() if name in family.models)
    assert family.tower == tower and not family.works
    with pytest.raises(ReclipError, match="is not supported"):
        check_supported(name)


def test_weights_are_those_of_open_clip():
    family = next(family for family in families() if family.name == "SigLIP2")
    tags = sum(len(open_clip.list_pretrained_tags_by_model(name)) for name in family.models)
    assert family.weights == tags > 0 and family.example == "ViT-B-16-SigLIP2 webli"
