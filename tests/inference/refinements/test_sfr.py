"""Semantic feedback refinement: relations of patches entry by entry, and what the second pass gets."""

import math
from fractions import Fraction

import pytest
import torch

from reclip_d2.backbones.dense_attention import dense_attention_class
from reclip_d2.config import load_config
from reclip_d2.errors import ReclipError
from reclip_d2.inference import ImagePredictor
from reclip_d2.inference.refinements import SFR, Grid, build_refinements, sfr
from reclip_d2.inference.refinements.sfr import LabelRelations, on_grid, patch_labels
from tests.helpers import make_maskclip, make_rectified, make_student, random_image

MAPS = {
    "one label": torch.zeros(3, 4, dtype=torch.int64),
    "one patch": torch.tensor([[2]]),
    "a row": torch.tensor([[0, 0, 1, 0, 1, 1]]),
    "random": torch.randint(3, (5, 6), generator=torch.Generator().manual_seed(0)),
    "a wall": torch.tensor([[0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]),
}


def literal_relations(labels: torch.Tensor, sigma: float) -> torch.Tensor:
    """A, number by number in float64; Python rounds halves to even numbers, too."""
    height, width = labels.shape
    places = [(y, x) for y in range(height) for x in range(width)]
    farthest = max([max(abs(a - c), abs(b - d)) for a, b in places for c, d in places]) or 1
    relation = torch.zeros(len(places), len(places), dtype=torch.float64)
    for i, (a, b) in enumerate(places):
        for j, (c, d) in enumerate(places):
            steps = max(abs(a - c), abs(b - d))
            line = [(a, b)]
            for k in range(1, steps + 1):
                line.append((round(a + Fraction((c - a) * k, steps)), round(b + Fraction((d - b) * k, steps))))
            if labels[a, b] == labels[c, d]:
                connected = all(labels[point] == labels[a, b] for point in line)
                relation[i, j] = 1 if connected else math.exp(-steps / farthest)
    size = min(len(places), int(6 * sigma + 1))
    half = (size + 1 - size % 2) // 2
    weights = {o: math.exp(-(o**2) / (2 * sigma**2)) for o in range(-half, half + 1)}
    smooth = torch.zeros_like(relation)
    for i in range(len(places)):
        for j in range(len(places)):
            near = [(weights[o], relation[i, j + o]) for o in weights if 0 <= j + o < len(places)]
            smooth[i, j] = sum(weight * value for weight, value in near) / sum(weights.values())
    smooth = smooth / smooth.sum(1, keepdim=True)
    return smooth / smooth.max()


@pytest.mark.parametrize("sigma", [5.0, 0.7])
@pytest.mark.parametrize("name", MAPS)
def test_relations(name, sigma, monkeypatch):
    labels = MAPS[name]
    expected = literal_relations(labels, sigma)
    count = labels.numel()
    for most in (2**25, count * count - 1, 1):  # kept in memory; by blocks of rows
        monkeypatch.setattr(sfr, "MAX_SCORES", most)
        relations = LabelRelations(labels, sigma)
        parts = [relations.rows(slice(start, min(start + 4, count))) for start in range(0, count, 4)]
        torch.testing.assert_close(torch.cat(parts).double(), expected, rtol=0, atol=2e-6)


def test_a_line_that_leaves_the_label_counts_by_its_length():
    """Behind the wall: (0, 0) and (0, 2) are two patches apart of three."""
    same, connected = sfr.is_connected(MAPS["a wall"], slice(0, 16))
    assert same[0, 2] and not connected[0, 2] and connected[2, 15] and connected[0, 12] and not same[0, 1]
    assert torch.equal(connected, connected.T)


def test_relations_on_a_larger_grid():
    labels = MAPS["random"]
    relations = LabelRelations(labels, 1.0)
    expected = torch.zeros(7, 8, 7, 8)
    expected[:5, :6, :5, :6] = relations.rows(slice(0, 30)).view(5, 6, 5, 6)
    found = torch.cat([on_grid(relations, slice(start, start + 14), (7, 8)) for start in range(0, 56, 14)])
    assert torch.equal(found.view(7, 8, 7, 8), expected)


def test_labels_of_patches_by_hand():
    """Patches of two pixels; the last column and row have one. Three of the five classes' chunks are used."""
    pixels = torch.tensor([[0, 0, 1, 2, 4], [0, 1, 1, 2, 4], [3, 3, 3, 3, 0]])
    probabilities = torch.full((5, 3, 5), 0.02)
    probabilities.scatter_(0, pixels[None], 0.92)
    probabilities[:, 2, 4] = 0.2  # nobody's
    grid = Grid(probabilities.log(), torch.zeros(3, 3, 5), (3, 5))
    assert patch_labels(grid, 2, (2, 3), 0.5).tolist() == [[0, 1, 4], [3, 3, 5]]
    assert patch_labels(grid, 2, (2, 3), 0.0).tolist() == [[0, 1, 4], [3, 3, 0]]
    assert patch_labels(grid, 2, (1, 2), 0.95).tolist() == [[5, 5]]


def model_of(kind: str, attention: str = "naclip"):
    model = (make_maskclip() if kind == "maskclip" else make_rectified()).eval()
    model.backbone.attention = dense_attention_class(attention)().eval()
    return model


def predictor(model, *opts: object, refine: str = "['sfr']") -> ImagePredictor:
    keys = ["MODEL.CLIP.DENSE_ATTENTION", model.backbone.attention.name, "INPUT.MIN_SIZE_TEST", 0]
    return ImagePredictor.from_config(model, load_config("", [*keys, "TEST.REFINE", refine, *map(str, opts)]))


@pytest.mark.parametrize("attention", ["sclip", "clearclip", "naclip", "resclip"])
@pytest.mark.parametrize("kind", ["maskclip", "rectified"])
def test_without_weight_the_second_pass_is_the_first(kind, attention):
    model, image = model_of(kind, attention), random_image(1, 37, 44)
    with torch.no_grad():
        first = predictor(model, refine="[]").grid_logits(image, (37, 44))
        again = predictor(model, "TEST.SFR.WEIGHT", 0, "TEST.SFR.SCALE", 1).grid_logits(image, (37, 44))
        changed = predictor(model).grid_logits(image, (37, 44))
    scale = predictor(model).scale
    assert again.padded_size == first.padded_size
    torch.testing.assert_close(again.logits / scale, first.logits, rtol=0, atol=1e-5)
    assert (changed.logits / scale - first.logits).abs().max() > 1e-4


@pytest.mark.parametrize("refine", ["['sfr']", "['pamr', 'sfr', 'lposs']"])
def test_what_the_attention_gets(refine, monkeypatch):
    """tau (1 - lambda) times its scores, and tau lambda times the relations of the labels so far, in the image."""
    model, image = model_of("rectified"), random_image(2, 27, 45)  # the fourth row of patches is padding
    given, labels = [], []
    own, labelled = model.backbone.dense_with_feedback, sfr.patch_labels

    def watched(images, sizes, feedback):
        given.append((tuple(images.shape), sizes, feedback))
        return own(images, sizes, feedback)

    monkeypatch.setattr(model.backbone, "dense_with_feedback", watched)
    monkeypatch.setattr(sfr, "patch_labels", lambda *args: labels.append(labelled(*args)) or labels[-1])
    with torch.no_grad():
        result = predictor(model, "TEST.SFR.SCALE", 3, "TEST.SFR.WEIGHT", 0.25, refine=refine).grid_logits(
            image, (27, 45)
        )
    ((shape, sizes, feedback),) = given
    assert shape == (1, 3, 32, 48) and [tuple(size) for size in sizes] == [(27, 45)]
    assert labels[0].shape == (3, 6) and torch.isfinite(result.logits).all()
    expected = torch.zeros(4, 6, 4, 6, dtype=torch.float64)
    expected[:3, :, :3, :] = 0.75 * literal_relations(labels[0], 5.0).view(3, 6, 3, 6)
    torch.testing.assert_close(feedback.rows(slice(0, 24)).double(), expected.view(24, 24), rtol=0, atol=2e-6)
    assert feedback.gain == pytest.approx(2.25)


def test_dropped_classes_and_subsets_stay():
    chosen = predictor(model_of("maskclip")).for_classes([2, 0])
    chosen.dropped = [0]
    with torch.no_grad():
        logits = chosen.grid_logits(random_image(0, 24, 32), (24, 32)).logits
    assert logits.shape[0] == 2 and (logits[1] < -1000).all() and (logits[0] > -1000).all()


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        (["MODEL.CLIP.DENSE_ATTENTION", "value"], "value lacks: choose one of clearclip, naclip, resclip, sclip,"),
        (["MODEL.CLIP.DENSE_ATTENTION", "radseg"], "DENSE_ATTENTION radseg lacks"),
        (["MODEL.META_ARCHITECTURE", "Distillation", "MODEL.CLIP.DENSE_ATTENTION", "naclip"], "a student does not"),
        (
            ["MODEL.META_ARCHITECTURE", "MaskCLIP", "MODEL.CLIP.DENSE_ATTENTION", "sclip",
             "MODEL.MASKCLIP.KEY_SMOOTHING", "0.5"],
            "does not work with MODEL.MASKCLIP.KEY_SMOOTHING",
        ),
    ],
)  # fmt: skip
def test_combinations_without_meaning_are_refused_by_the_config(keys, match):
    with pytest.raises(ReclipError, match=match):
        build_refinements(load_config("", ["TEST.REFINE", "['sfr']", *keys]))


def test_a_student_is_refused():
    with pytest.raises(ReclipError, match="a student does not have"):
        SFR(load_config("", ["MODEL.CLIP.DENSE_ATTENTION", "naclip"])).bind(make_student(make_maskclip()))
