"""Images that support each class, and predictions without the others."""

import json

import pytest

from reclip_d2.config import load_config
from reclip_d2.errors import ReclipError
from reclip_d2.hypothesis.file import HypothesisHeader, write_hypothesis_file
from reclip_d2.hypothesis.support import class_support, count_images
from reclip_d2.inference import ImagePredictor
from tests.helpers import make_maskclip, random_image

NAMES = [["sky"], ["tree", "oak"], ["road"]]


def hypothesis_file(tmp_path, *classes: list[int], names: list = NAMES) -> str:
    header = HypothesisHeader("custom", names, "", "", "", "imported", 0.0)
    path = tmp_path / "hypotheses.jsonl"
    write_hypothesis_file(path, header, [{"image_id": str(k), "classes": ids} for k, ids in enumerate(classes)])
    return str(path)


def config(path: str, *keys: object):
    return load_config("", ["HYPOTHESIS.FILE", path, *map(str, keys)])


def test_counts_of_a_file(tmp_path):
    assert class_support(config(hypothesis_file(tmp_path, [0], [0, 2], [2, 0, 2])), NAMES) == [3, 0, 2]


def test_scores_and_their_threshold(tmp_path):
    header = HypothesisHeader("custom", NAMES, "c", "f", "t", "dense", 0.0, class_shares="uniform")
    rows = [[0.9, 0.1, 0.0], [0.5, 0.3, 0.2], [0.2, 0.0, 0.8]]
    path = tmp_path / "h.jsonl"
    write_hypothesis_file(path, header, [{"image_id": str(k), "scores": row} for k, row in enumerate(rows)])
    keys = ("HYPOTHESIS.METHOD", "dense", "HYPOTHESIS.CLASSES_PER_IMAGE", 0)
    assert class_support(config(str(path), *keys, "HYPOTHESIS.THRESHOLD", 0.25), NAMES) == [2, 1, 1]
    assert class_support(config(str(path), *keys, "HYPOTHESIS.THRESHOLD", 0.05), NAMES) == [3, 2, 2]


def test_count_images():
    assert count_images([[0, 1, 1], [], [1]], 3) == [1, 2, 0]


def test_wrong_files(tmp_path):
    with pytest.raises(ReclipError, match=r"none\.jsonl does not exist"):
        class_support(config(str(tmp_path / "none.jsonl")), NAMES)
    path = hypothesis_file(tmp_path, [0], names=[["sky"], ["tree"]])
    with pytest.raises(ReclipError, match="was made for other classes"):
        class_support(config(path), NAMES)
    (tmp_path / "other.jsonl").write_text(json.dumps({"format": "x"}) + "\n")
    with pytest.raises(ReclipError, match="is not a hypothesis file"):
        class_support(config(str(tmp_path / "other.jsonl")), NAMES)


@pytest.mark.parametrize("refine", ["[]", "['flip', 'denoise']"])
def test_the_predictor_never_predicts_them(tmp_path, refine):
    """Other pixels keep their labels, and the dropped class's get their second best."""
    model = make_maskclip().eval()
    count = model.num_classes
    image = random_image(3, 48, 64).permute(1, 2, 0).contiguous().numpy()
    path = hypothesis_file(tmp_path, *[[k for k in range(count) if k != 1]] * 2, names=model.class_names)
    keys = ("TEST.REFINE", refine, "TEST.DENOISE.THRESHOLD", 0, "INPUT.MIN_SIZE_TEST", 0)
    plain = ImagePredictor.from_config(model, config(path, *keys))
    cfg = config(path, "TEST.MIN_CLASS_IMAGES", 2, *keys)
    pruned = ImagePredictor.from_config(model, cfg).without_unsupported_classes(cfg)
    assert pruned.dropped == [1] and plain.without_unsupported_classes(config(path)) is plain
    before, after = plain.labels(image), pruned.labels(image)
    assert (before == 1).any() and not (after == 1).any()
    assert (before == after)[before != 1].mean() > 0.99
    others = pruned.for_classes([2, 1, 0]).labels(image)
    assert not (others == 1).any()
