"""The judge without labels (``reclip_d2.evaluation.label_free``)."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from reclip_d2.config import load_config
from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.label_free import (
    Candidate,
    Reference,
    estimated_miou,
    expected_iou,
    fit_reference,
    judge_masks,
    judge_score,
    judged_images,
    predicted_labels,
    reference_from_store,
    smooth,
)
from reclip_d2.features.store import build_store, images_digest
from reclip_d2.features.views import ViewPlan
from reclip_d2.hypothesis.training_records import unlabelled_records
from reclip_d2.modeling.class_shares import fit_class_mixture
from tests.helpers import datasets, isolated_cache, make_maskclip, make_student, tiny_dense, write_scenes

__all__ = ["datasets", "isolated_cache"]


def test_expected_iou_of_certain_posteriors_is_the_iou():
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    truth = torch.tensor([0, 1, 1, 1, 1, 2])
    found = expected_iou(labels, F.one_hot(truth, 4).float())
    assert found[:3].tolist() == pytest.approx([1 / 2, 2 / 4, 1 / 2])
    assert found[3].isnan()


def test_expected_iou_by_hand():
    """Class 0: 0.9 + 0.2 hits; 1.4 expected patches and 2 predicted."""
    posteriors = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]])
    found = expected_iou(torch.tensor([0, 0, 1]), posteriors)
    assert found.tolist() == pytest.approx([1.1 / (1.4 + 2 - 1.1), 0.7 / (1.6 + 1 - 0.7)])


def test_classes_that_the_images_do_not_contain_are_left_out():
    posteriors = torch.tensor([[0.99, 0.01, 0.0]] * 4 + [[0.01, 0.99, 0.0]] * 4)  # 1 / (20 C) is 0.017
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    iou = 3.96 / (4 + 4 - 3.96)
    assert estimated_miou(labels, posteriors) == pytest.approx(100 * iou, abs=1e-3)
    labels[7] = 2  # a false class still costs the right one
    assert estimated_miou(labels, posteriors) == pytest.approx(50 * (iou + 2.97 / (4 + 3 - 2.97)), abs=1e-3)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 3)])
def test_smoothing_is_the_mean_of_the_neighbours_in_the_image(size):
    features = torch.randn(*size, 2, generator=torch.Generator().manual_seed(0))
    found = smooth(features)
    for i in range(size[0]):
        for j in range(size[1]):
            window = features[max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
            assert torch.allclose(found[i, j], window.mean((0, 1)), atol=1e-6)


def scenes(count: int = 40, classes: int = 3, width: int = 8) -> tuple[list, list, torch.Tensor]:
    """Images of two vertical halves: features around a class's centre, true labels, and the names' features, of which
    the first is too attractive."""
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(classes, width, generator=generator), dim=1)
    names = F.normalize(centres + 0.3 * torch.randn(classes, width, generator=generator), dim=1)
    names[1:] = F.normalize(names[1:] + 0.4 * names[0], dim=1)
    features, labels = [], []
    for number in range(count):
        truth = torch.empty(6, 6, dtype=torch.int64)
        truth[:, :3], truth[:, 3:] = number % classes, (number // classes) % classes
        noise = 0.4 * torch.randn(6, 6, width, generator=generator)
        features.append(F.normalize(centres[truth] + noise, dim=-1))
        labels.append(truth)
    return features, labels, names


def test_the_reference_is_the_mixture_of_smoothed_features():
    features, _, names = scenes(6)
    reference = fit_reference(features, names, 10.0, images=range(0, 12, 2))
    smoothed = torch.cat([smooth(image).reshape(-1, 8) for image in features])
    mixture = fit_class_mixture(smoothed, 10 * smoothed @ names.T)
    expected = mixture.log_posteriors(smoothed, 10 * smoothed @ names.T).softmax(1)
    assert torch.allclose(reference.posteriors, expected)
    assert reference.images == (0, 2, 4, 6, 8, 10) and reference.grids == ((6, 6),) * 6


def noisy(labels: list, share: float) -> list:
    """Labels of which a share is replaced by the next class."""
    generator = torch.Generator().manual_seed(1)
    return [torch.where(torch.rand(6, 6, generator=generator) < share, (y + 1) % 3, y) for y in labels]


def test_the_better_labels_are_kept():
    features, labels, names = scenes()
    reference = fit_reference(features, names, 10.0)
    candidates = {name: noisy(labels, share) for name, share in (("maskclip", 0.3), ("rectified", 0.1), ("student", 0))}
    verdict = judge_masks([Candidate(*pair) for pair in candidates.items()], reference)
    assert verdict.kept == "student" and verdict.warning is None
    assert verdict.scores["maskclip"] < verdict.scores["rectified"] < verdict.scores["student"]
    assert verdict.reason.startswith("kept the masks of student") and "\n" not in verdict.reason
    for name in ("maskclip", "rectified"):
        assert f"{name} {verdict.scores[name]:.1f}" in verdict.reason


def test_a_training_that_hurt():
    features, labels, names = scenes()
    reference = fit_reference(features, names, 10.0)
    pairs = (("maskclip", 0.1), ("rectified", 0.4))
    verdict = judge_masks([Candidate(name, noisy(labels, share)) for name, share in pairs], reference)
    assert verdict.kept == "maskclip"
    assert "training probably hurt here" in verdict.warning and "rectified" in verdict.warning


def test_ties_go_to_the_first():
    reference = Reference((0,), ((1, 2),), torch.eye(2))
    labels = [torch.tensor([[0, 1]])]
    assert judge_masks([Candidate("maskclip", labels), Candidate("student", labels)], reference).kept == "maskclip"


def test_candidates_that_do_not_fit():
    reference = Reference((0,), ((1, 2),), torch.eye(2))
    right, wrong = [torch.tensor([[0, 1]])], [torch.tensor([[0], [1]])]
    with pytest.raises(ReclipError, match="include maskclip"):
        judge_masks([Candidate("rectified", right)], reference)
    with pytest.raises(ReclipError, match="names must differ"):
        judge_masks([Candidate("maskclip", right)] * 2, reference)
    with pytest.raises(ReclipError, match="label maps of rectified do not have the patch grids"):
        judge_masks([Candidate("maskclip", right), Candidate("rectified", wrong)], reference)


# ---- labels and features of models ----------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path, datasets, isolated_cache):
    """Scenes of two sizes that are no multiples of the patch size, with the store of their views."""
    records = write_scenes(tmp_path / "wide", 3, size=(34, 60)) + write_scenes(tmp_path / "tall", 2, size=(50, 36))
    for number, record in enumerate(records):
        record["image_id"] = str(number)
    datasets("reclip_test_train", records, ["sky", "tree", "water", "wall"])
    keys = {"INPUT.MIN_SIZE_TEST": 0, "DATASETS.TRAIN": ("reclip_test_train",), "MODEL.DEVICE": "cpu"}
    cfg = load_config("", [str(part) for pair in keys.items() for part in pair])
    records = unlabelled_records(cfg.DATASETS.TRAIN)
    backbone, images = tiny_dense(), images_digest(records)
    found = build_store(cfg, backbone, records, dataclasses.replace(ViewPlan.whole_images(cfg), number=2), images)
    found.make(make_maskclip().view_encoder)
    return found


def test_labels_of_a_model_on_the_patch_grid(store):
    """Those of an encoded image, without its padding."""
    model = make_maskclip()
    found = predicted_labels(model, store, [1, 4])
    for image, labels in zip((1, 4), found, strict=True):
        pixels = store.views.sample(2 * image)["image"]
        batch = model.preprocess_image([{"image": pixels}])
        expected = model.mask_logits(batch.tensor, batch.image_sizes)[0].argmax(0)
        rows, columns = (int((side + 3) // 8) for side in pixels.shape[1:])  # patches whose centre is inside
        assert labels.shape == (rows, columns)
        assert (labels == expected[:rows, :columns]).float().mean() > 0.9  # a patch may tie after rounding


def test_labels_of_a_student_on_the_patch_grid(store):
    student = make_student(make_maskclip(), head="query").eval()
    (labels,) = predicted_labels(student, store, [1])
    assert labels.shape == (4, 7) and labels.dtype == torch.int64


def test_images_are_spread_evenly(store):
    assert judged_images(store) == [0, 1, 2, 3, 4]
    assert judged_images(store, max_patches=70) == [0, 2, 4]  # the first has 28 patches


def test_the_score_of_a_model_is_that_of_its_labels(store):
    model = make_maskclip().train()
    reference = reference_from_store(store, model.query_features, 10.0, max_patches=70)
    assert reference.images == (0, 2, 4)
    score = judge_score(model, store, reference)
    verdict = judge_masks([Candidate("maskclip", predicted_labels(model.eval(), store, [0, 2, 4]))], reference)
    assert score == verdict.scores["maskclip"]
