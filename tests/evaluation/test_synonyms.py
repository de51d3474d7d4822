"""Masks under synonyms: which names are tried, and how predictions are compared."""

import math

import numpy as np
import pytest
import torch

from reclip_d2.data.class_file import parse_classes
from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.synonyms import (
    Agreement,
    VariantResult,
    count_labelled,
    own_names,
    rename_queries,
    synonym_variants,
    table_lines,
)
from tests.helpers import make_maskclip, make_rectified, make_student

OWN = [["sky"], ["road", "path"], ["tree"]]


def test_each_synonym_alone_then_all_at_once():
    variants = synonym_variants(OWN, parse_classes("heaven, air\nstreet\ntree, oak", "s.txt"))
    assert [(v.title, v.changed) for v in variants] == [
        ("sky → heaven", (0,)), ("sky → air", (0,)), ("road → street", (1,)), ("tree → oak", (2,)),
        ("all, synonym 1", (0, 1, 2)), ("all, synonym 2", (0,)),
    ]  # fmt: skip
    assert variants[2].names == [["sky"], ["street"], ["tree"]]
    assert variants[4].names == [["heaven"], ["street"], ["oak"]]
    assert variants[5].names == [["air"], ["road", "path"], ["tree"]]


def test_wrong_synonyms():
    with pytest.raises(ReclipError, match=r"s\.txt has 2 classes, but the model has 3: .*: sky, road, tree"):
        synonym_variants(OWN, parse_classes("a\nb", "s.txt"))
    with pytest.raises(ReclipError, match="own names alone"):
        synonym_variants([["a"], ["b"]], parse_classes("a\nb", "s.txt"))


def test_agreement_by_hand():
    agreement = Agreement(4)
    agreement.add(np.array([[0, 0, 1]]), np.array([[0, 1, 1]]))
    agreement.add(np.array([[2]]), np.array([[2]]))
    assert agreement.pixels == 75.0
    np.testing.assert_allclose(agreement.class_ious, [50, 50, 100, np.nan])
    assert math.isclose(agreement.mean_iou, 200 / 3)


def test_labelled_scores_by_hand():
    confusion = np.zeros((2, 3), np.int64)
    count_labelled(confusion, np.array([[0, 0, 1, 255]]), np.array([[0, 1, 1, 0]]), 255)
    assert confusion.tolist() == [[1, 1, 0], [0, 1, 0]]
    variant = synonym_variants([["a"], ["b"]], parse_classes("a\nc", "s.txt"))[0]
    agreement = Agreement(2)
    agreement.add(np.array([[0, 0]]), np.array([[0, 0]]))
    result = VariantResult(variant, agreement, confusion)
    assert result.miou == 50.0 and result.changed_iou is None
    lines = list(table_lines([result], 60.0))
    assert lines[-1] == "| b → c | 100.0 | – | 100.0 | 50.0 |" and lines[-2].endswith("| 60.0 |")
    assert all(line.count("|") == lines[0].count("|") for line in lines)


@pytest.mark.parametrize("make", [make_maskclip, make_rectified])
def test_renamed_and_back(make):
    """Other names change the predictions; the own names give them back, whatever eval mode has cached."""
    model = make().eval()
    image = model.normalize(torch.rand(3, 32, 32) * 255)[None]
    with torch.no_grad():
        before = model.mask_logits(image)
        rename_queries(model, [[f"thing {k}"] for k in range(model.num_classes)])
        renamed = model.mask_logits(image)
        rename_queries(model, own_names(model).names)
        torch.testing.assert_close(model.mask_logits(image), before)
    assert not torch.allclose(renamed, before, atol=1e-4)


def test_a_student_has_no_queries():
    with pytest.raises(ReclipError, match="a student has none"):
        rename_queries(make_student(make_maskclip()).eval(), [["a"], ["b"]])


def test_names_that_two_classes_share():
    with pytest.raises(ReclipError, match="share the name"):
        rename_queries(make_maskclip().eval(), [["a"], ["a"]])
