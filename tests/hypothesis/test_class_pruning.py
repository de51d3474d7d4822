"""Classes that are left out, by each rule and by all."""

import pytest

from reclip_d2.config import load_config
from reclip_d2.errors import ReclipError
from reclip_d2.hypothesis.class_evidence import ClassEvidence
from reclip_d2.hypothesis.class_pruning import (
    CLASS_PRUNING_REGISTRY,
    lacking,
    prune_classes,
    prunes_classes,
    uses_evidence,
    with_left_out,
)
from reclip_d2.inference import ImagePredictor
from tests.helpers import make_maskclip, random_image

NAMES = [["sky"], ["tree", "oak"], ["dog"]]


@pytest.fixture
def config(tmp_path):
    """Makes configs; shares of the classes are .6, .39 and .01, confidences .9, .4 and .5."""
    path = tmp_path / "evidence.json"
    ClassEvidence(NAMES, 5, [0.6, 0.39, 0.01], [0.9, 0.4, 0.5]).write(path)
    return lambda *pairs: load_config("", ["TEST.CLASS_EVIDENCE", str(path), *map(str, pairs)])


def test_lacking():
    assert lacking([3, 0, 2], 2) == [1]
    assert lacking([3, 0, 2], 3) == [1, 2]
    assert lacking([0.5, 0.25], 0.25) == []


def test_by_share(config):
    pruning = prune_classes(config("TEST.MIN_CLASS_SHARE", 0.02), NAMES)
    assert pruning.dropped == [2]
    assert str(pruning) == "leaves out 1 of 3 classes: dog (TEST.MIN_CLASS_SHARE 0.02: 0.01)"
    assert str(prune_classes(config("TEST.MIN_CLASS_SHARE", 0.01), NAMES)) == "leaves out none of 3 classes"


def test_by_confidence(config):
    assert prune_classes(config("TEST.MIN_CLASS_CONFIDENCE", 0.45), NAMES).reasons == {
        1: "TEST.MIN_CLASS_CONFIDENCE 0.45: 0.4"
    }


def test_rules_add_up(config):
    cfg = config("TEST.MIN_CLASS_SHARE", 0.02, "TEST.MIN_CLASS_CONFIDENCE", 0.6)
    assert prune_classes(cfg, NAMES).reasons == {
        1: "TEST.MIN_CLASS_CONFIDENCE 0.6: 0.4",
        2: "TEST.MIN_CLASS_SHARE 0.02: 0.01; TEST.MIN_CLASS_CONFIDENCE 0.6: 0.5",
    }


def test_never_all(config):
    with pytest.raises(ReclipError, match=r"SHARE 0.7 would leave out all classes: the most for a class is 0.6"):
        prune_classes(config("TEST.MIN_CLASS_SHARE", 0.7), NAMES)
    cfg = config("TEST.LEAVE_OUT", "['sky', 'tree']", "TEST.MIN_CLASS_SHARE", 0.02)
    with pytest.raises(ReclipError, match="LEAVE_OUT and TEST.MIN_CLASS_SHARE would together leave out all classes"):
        prune_classes(cfg, NAMES)


def test_by_name(config):
    assert prune_classes(config("TEST.LEAVE_OUT", "['tree']"), NAMES).reasons == {1: "TEST.LEAVE_OUT"}
    with pytest.raises(ReclipError, match="names 'oak', which is not the first name of a class"):
        prune_classes(config("TEST.LEAVE_OUT", "['oak']"), NAMES)


def test_names_replace_the_rules(config):
    """As in a saved model, which has no files of the training."""
    cfg = config("TEST.MIN_CLASS_SHARE", 0.02, "TEST.LEAVE_OUT", "['sky']")
    pruning = prune_classes(cfg, NAMES)
    named = with_left_out(cfg, pruning)
    assert named.TEST.LEAVE_OUT == ["sky", "dog"] and named.TEST.MIN_CLASS_SHARE == 0 and not uses_evidence(named)
    assert prune_classes(named, NAMES).dropped == pruning.dropped == [0, 2]
    assert cfg.TEST.LEAVE_OUT == ["sky"]


def test_off_by_default(config):
    assert not prunes_classes(config()) and len([rule for _, rule in CLASS_PRUNING_REGISTRY]) == 3


@pytest.mark.parametrize("key", ["TEST.MIN_CLASS_SHARE", "TEST.MIN_CLASS_CONFIDENCE"])
def test_the_predictor_never_predicts_them(config, tmp_path, key):
    """Other pixels keep their labels."""
    model = make_maskclip().eval()
    image = random_image(3, 48, 64).permute(1, 2, 0).contiguous().numpy()
    support = [0.5, 0.01, 0.3, 0.19]
    ClassEvidence(model.class_names, 1, support, support).write(tmp_path / "evidence.json")
    cfg = config(key, 0.05, "INPUT.MIN_SIZE_TEST", 0)
    plain = ImagePredictor.from_config(model, cfg)
    pruned = plain.without_unsupported_classes(cfg)
    before, after = plain.labels(image), pruned.labels(image)
    assert (before == 1).any() and not (after == 1).any()
    assert (before == after)[before != 1].mean() > 0.99
