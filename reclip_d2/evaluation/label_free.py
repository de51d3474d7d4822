"""Judging masks without labels (not in the papers): which of several models segments a folder best.

The score of a model is an estimate of its mIoU, from its labels on the patch grid and a reference. The reference is
a Gaussian mixture with one component per class (:mod:`reclip_d2.modeling.class_shares`), fitted to CLIP's features
after a mean over 3 x 3 patches: it gives each patch a probability for each class.

This module opens no label file and imports nothing that does; the order of imports is checked.

Shape letters: n patches of all images, D width of the joint embedding, C classes, (h, w) patch grid of an image.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from reclip_d2.errors import ReclipError
from reclip_d2.features.store import FeatureStore
from reclip_d2.features.whole_images import inside_image
from reclip_d2.layers import use_kernels
from reclip_d2.modeling.class_shares import fit_class_mixture
from reclip_d2.modeling.meta_arch.base import LanguageSegmentor
from reclip_d2.modeling.meta_arch.segmentor import CLIPSegmentor
from reclip_d2.modeling.postprocessing import upsample_logits
from reclip_d2.modeling.view_batch import batch_views

MAX_PATCHES = 50_000
"""Patches that a judgement uses, spread over the images, to bound its time and memory."""
SMOOTHING = 3
"""Side of the mean filter on the features, in patches."""
FALLBACK = "maskclip"
"""Name of the candidate that is always there."""
UNTRAINED = ("maskclip", "calibrated")
"""Names of candidates that no training has made."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model to judge.

    Attributes:
        name: such as ``maskclip``, ``calibrated``, ``rectified`` or ``student``.
        labels: for each image of the reference the model's label map ``(h, w)``, class ids 0 to C - 1.
    """

    name: str
    labels: Sequence[Tensor]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The judgement.

    Attributes:
        kept: name of the candidate to keep.
        scores: for each candidate the estimate of its mIoU, in percent.
        reason: one sentence for the user.
        warning: one sentence if a trained candidate is probably worse than the fallback; else None.
    """

    kept: str
    scores: dict[str, float]
    reason: str
    warning: str | None


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the candidates are compared with.

    Attributes:
        images: index of each image in the data set.
        grids: (h, w) of each image, without padding.
        posteriors: probability of each class for all patches, image after image, ``(n, C)``.
    """

    images: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]
    posteriors: Tensor


def smooth(features: Tensor, side: int = SMOOTHING) -> Tensor:
    """Mean of the features ``(h, w, D)`` over a window of ``side`` x ``side`` patches, clipped at the border."""
    maps = features.permute(2, 0, 1)[None].float()
    return F.avg_pool2d(maps, side, stride=1, padding=side // 2, count_include_pad=False)[0].permute(1, 2, 0)


def fit_reference(
    features: Sequence[Tensor], query_features: Tensor, logit_scale: float, images: Sequence[int] | None = None
) -> Reference:
    """Fit the mixture to the smoothed features of unlabelled images.

    Args:
        features: for each image Z ``(h, w, D)``, without padding.
        query_features: W_q ``(C, D)``.
        logit_scale: CLIP's.
        images: index of each image in the data set; None for 0, 1, ...
    """
    smoothed = torch.cat([smooth(image).flatten(0, 1) for image in features])
    logits = logit_scale * (smoothed @ query_features.cpu().float().T)
    mixture = fit_class_mixture(smoothed, logits)
    return Reference(
        images=tuple(range(len(features)) if images is None else images),
        grids=tuple((image.shape[0], image.shape[1]) for image in features),
        posteriors=mixture.log_posteriors(smoothed, logits).softmax(1),
    )


def expected_iou(labels: Tensor, posteriors: Tensor) -> Tensor:
    """Intersection over union of each class, estimated from probabilities of the true class.

    ``IoU_c = sum_i q_ic [y_i = c] / (sum_i q_ic + sum_i [y_i = c] - sum_i q_ic [y_i = c])``: the IoU of the expected
    confusion matrix, if q_i is the probability of the true class of patch i.

    Args:
        labels: y ``(n,)`` int64.
        posteriors: q ``(n, C)``.

    Returns:
        ``(C,)`` in [0, 1]; NaN for a class with neither.
    """
    num_classes = posteriors.shape[1]
    predicted = torch.bincount(labels, minlength=num_classes).to(posteriors)
    hit = posteriors.gather(1, labels[:, None])[:, 0]
    intersection = torch.zeros_like(predicted).index_add_(0, labels, hit)
    return intersection / (posteriors.sum(0) + predicted - intersection)


def estimated_miou(labels: Tensor, posteriors: Tensor) -> float:
    """Estimate of the mIoU in percent: the mean of :func:`expected_iou` over the classes that the images contain.

    A class counts as contained if its mean probability is at least a twentieth of an equal share, 1 / (20 C).
    """
    shares = posteriors.mean(0)
    contained = shares >= 1 / (20 * len(shares))
    return 100 * float(expected_iou(labels, posteriors)[contained].mean())


def judge_masks(candidates: Sequence[Candidate], reference: Reference, *, fallback: str = FALLBACK) -> Verdict:
    """Estimate each candidate's mIoU without labels, and keep the best; on a tie the one that is listed first.

    Args:
        candidates: with different names, one of them ``fallback``.
        reference: of the same images.
        fallback: the candidate that needs no training.

    Raises:
        ReclipError: the fallback is missing, names repeat, or a candidate's labels do not fit the reference's grids.
    """
    names = [candidate.name for candidate in candidates]
    if len(set(names)) < len(names) or fallback not in names:
        raise ReclipError(f"candidates are {', '.join(names) or 'missing'}: names must differ, and include {fallback}")
    scores = {c.name: estimated_miou(_flat_labels(c, reference), reference.posteriors) for c in candidates}
    kept = max(names, key=lambda name: scores[name])
    worse = [name for name in names if name not in UNTRAINED and scores[name] < scores[fallback]]
    return Verdict(kept, scores, _reason(kept, scores), _warning(worse, scores, fallback))


def _flat_labels(candidate: Candidate, reference: Reference) -> Tensor:
    """Labels ``(n,)`` of all patches, in the reference's order."""
    grids = tuple(tuple(labels.shape) for labels in candidate.labels)
    if grids != reference.grids:
        raise ReclipError(f"the label maps of {candidate.name} do not have the patch grids of the judged images")
    return torch.cat([labels.flatten().long().cpu() for labels in candidate.labels])


def _reason(kept: str, scores: dict[str, float]) -> str:
    others = [f"{name} {score:.1f}" for name, score in scores.items() if name != kept]
    compared = f", against {', '.join(others)}" if others else ""
    return f"kept the masks of {kept}: their mIoU, estimated without labels, is {scores[kept]:.1f}{compared}"


def _warning(worse: Sequence[str], scores: dict[str, float], fallback: str) -> str | None:
    if not worse:
        return None
    listed = " and ".join(f"{name} ({scores[name]:.1f})" for name in worse)
    return f"training probably hurt here: the estimated mIoU of {listed} is below {fallback}'s ({scores[fallback]:.1f})"


def judged_images(store: FeatureStore, max_patches: int = MAX_PATCHES) -> list[int]:
    """Indices of the images to judge: all, or an even selection with about ``max_patches`` patches.

    Args:
        store: complete, of views whose first is the whole image.
    """
    count = len(store.views.records)
    height, width = _view(store, 0)[0].shape[:2]
    return list(range(0, count, max(1, math.ceil(count * height * width / max_patches))))


def reference_from_store(
    store: FeatureStore, query_features: Tensor, logit_scale: float, max_patches: int = MAX_PATCHES
) -> Reference:
    """:func:`fit_reference` on images of a feature store.

    Args:
        store: complete, of views whose first is the whole image (``FEATURE_STORE.KIND whole``).
    """
    images = judged_images(store, max_patches)
    return fit_reference([_view(store, image)[0] for image in images], query_features, logit_scale, images)


def judge_score(model: LanguageSegmentor, store: FeatureStore, reference: Reference) -> float:
    """A model's :func:`estimated_miou` on the images of a reference; the model's mode is restored afterwards.

    Args:
        store: of the reference.
    """
    training = model.training
    model.eval()
    try:
        labels = predicted_labels(model, store, reference.images)
    finally:
        model.train(training)
    return estimated_miou(_flat_labels(Candidate("the model", labels), reference), reference.posteriors)


@torch.no_grad()
def predicted_labels(model: LanguageSegmentor, store: FeatureStore, images: Sequence[int]) -> list[Tensor]:
    """A model's label maps ``(h, w)`` of images on the patch grid: a :class:`Candidate`'s labels.

    Models with CLIP's image tower read the stored features; others (the student) read the images.

    Args:
        model: in eval mode.
        store: of the reference.
        images: the reference's.
    """
    with use_kernels(model.kernels):
        return [_labels(model, store, image) for image in images]


def _labels(model: LanguageSegmentor, store: FeatureStore, image: int) -> Tensor:
    features, size = _view(store, image)
    grid = (features.shape[0], features.shape[1])
    if isinstance(model, CLIPSegmentor):
        return model.segment_views(batch_views([features], [size], model.device, model.padding_mode))[0].argmax(0).cpu()
    batch = model.preprocess_image([store.views.sample(image * store.views.plan.number)])
    padded = (batch.tensor.shape[-2], batch.tensor.shape[-1])
    logits = model.mask_logits(batch.tensor, batch.image_sizes)
    return upsample_logits(logits, padded, batch.image_sizes[0], grid)[0].argmax(0).cpu()


def _view(store: FeatureStore, image: int) -> tuple[Tensor, tuple[int, int]]:
    """Features ``(h, w, D)`` float32 of an image's first view, without patches of padding, and its (H, W)."""
    stored = store.read(image * store.views.plan.number)
    return inside_image(stored.features, stored.size, store.patch_size).float(), stored.size
