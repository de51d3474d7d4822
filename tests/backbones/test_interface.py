"""The interface of backbones: nothing else uses their towers, and any implementation works."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import reclip_d2
from reclip_d2.backbones.interface import VisionLanguageBackbone, valid_patches
from reclip_d2.config import load_config
from reclip_d2.errors import ReclipError
from reclip_d2.modeling.build import backbone_class
from tests.helpers import (
    CLASS_NAMES,
    EMBED_DIM,
    TINY_NAME,
    make_rectified,
    random_image,
    register_tiny_model,
    tiny_dense,
)

# Attributes of DenseCLIP that are not in the interface.
TOWERS = {"visual", "text_encoder", "token_embedding", "resblocks", "image_tower", "text_projection"}


def test_only_backbones_read_the_towers():
    package = Path(reclip_d2.__file__).parent
    readers = [
        f"{path.relative_to(package)}:{node.lineno} .{node.attr}"
        for path in package.rglob("*.py")
        if path.relative_to(package).parts[0] != "backbones"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in TOWERS
    ]
    assert readers == []


class Delegate(VisionLanguageBackbone):
    """Another backbone behind the interface, without any other attribute."""

    def __init__(self, inner: VisionLanguageBackbone) -> None:
        super().__init__()
        object.__setattr__(self, "_inner", inner)  # not a submodule: its parameters are not found either
        self.name, self.fingerprint, self.pixel_statistics = inner.name, inner.fingerprint, inner.pixel_statistics


def _delegated(name: str) -> object:
    if isinstance(VisionLanguageBackbone.__dict__[name], property):
        return property(lambda self: getattr(self._inner, name))
    return lambda self, *args, **kwargs: getattr(self._inner, name)(*args, **kwargs)


for _name in VisionLanguageBackbone.__abstractmethods__:
    setattr(Delegate, _name, _delegated(_name))
Delegate.__abstractmethods__ = frozenset()


def test_a_model_needs_nothing_but_the_interface():
    model, other = make_rectified(), make_rectified()
    other.load_state_dict(model.state_dict())
    other.backbone = Delegate(tiny_dense())
    batch = [
        {"image": random_image(i, *size), "hypothesis": torch.tensor([0, 2])}
        for i, size in enumerate([(32, 40), (24, 33)])
    ]
    losses = []
    for one in (model, other):
        torch.manual_seed(0)
        losses.append(sum(one(batch).values()))
    assert torch.equal(losses[0], losses[1])
    assert other.identity() == model.identity() and other.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(other.eval()(batch)[0]["sem_seg"], model.eval()(batch)[0]["sem_seg"])


def test_what_is_known_before_a_backbone_is_built(tmp_path):
    cfg = load_config("", ["MODEL.CLIP.NAME", register_tiny_model(tmp_path), "MODEL.BACKBONE.NAME", "DenseCLIP"])
    summary, dense = backbone_class(cfg).summary(cfg), tiny_dense()
    assert summary == (TINY_NAME, EMBED_DIM, 8, 32)
    assert summary[1:] == (dense.embed_dim, dense.patch_size, min(dense.image_size))
    assert dense.positional_width == dense.positional_embedding((1, 1)).shape[0] == 32
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    with pytest.raises(ReclipError, match="MODEL.BACKBONE.NAME 'build_resnet_backbone' is not a vision-language"):
        backbone_class(cfg)


def test_on_a_grid_nothing_is_resized():
    dense = tiny_dense()
    images, before = torch.randn(1, 3, 24, 40), dense.positional_grid
    expected, own = dense.dense(images), dense.positional_embedding((4, 4))
    with dense.on_grid((3, 5)):
        assert dense.positional_grid == (3, 5)
        assert torch.equal(dense.dense(images), expected)
    assert dense.positional_grid == before == (4, 4) and torch.equal(dense.positional_embedding((4, 4)), own)


def test_query_features_are_those_of_the_texts(isolated_cache):
    dense = tiny_dense()
    got = dense.query_features(CLASS_NAMES, ["a {}."])
    assert got.shape == (4, EMBED_DIM)
    torch.testing.assert_close(got[0], dense.text_features(["a sky."])[0])
    mean = nn.functional.normalize(dense.text_features(["a tall tree.", "a oak."]).mean(0), dim=0)
    torch.testing.assert_close(got[1], mean)
    assert len(list(isolated_cache.rglob("*.safetensors"))) == 1


def test_valid_patches_by_hand():
    """Patch 8, grid 2 x 3. Centres at 4 and 12 down, at 4, 12 and 20 across."""
    got = valid_patches([(16, 24), (12, 20), (13, 13), (4, 5)], (2, 3), 8, torch.device("cpu"))
    expected = [
        [1, 1, 1, 1, 1, 1],
        [1, 1, 0, 0, 0, 0],  # centres at 12 and 20 are just outside
        [1, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    assert torch.equal(got, torch.tensor(expected, dtype=torch.bool))
