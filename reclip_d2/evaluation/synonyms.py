"""How much masks depend on the words for the classes: predictions under other names of the same things.

Shape letters: C classes, D width of the joint embedding, (H, W) size in pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from reclip_d2.backbones.query import check_class_names, get_templates
from reclip_d2.data.class_file import ClassList
from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.scores import segmentation_scores
from reclip_d2.modeling.meta_arch.base import LanguageSegmentor
from reclip_d2.modeling.meta_arch.segmentor import CLIPSegmentor
from reclip_d2.utils.text import number


@dataclasses.dataclass(frozen=True)
class Variant:
    """Class names in place of a model's own.

    Attributes:
        title: what is replaced, for the report.
        names: for each class its name and any synonyms.
        changed: indices of the classes with other names.
    """

    title: str
    names: list[list[str]]
    changed: tuple[int, ...]


def synonym_variants(own: Sequence[Sequence[str]], synonyms: ClassList) -> list[Variant]:
    """Each synonym alone in place of its class's names, then all first ones at once, all second ones, and so on.

    Args:
        own: the model's classes, each with its name and any synonyms.
        synonyms: one line for each class of the model, in its order; its names are the synonyms to try.

    Raises:
        ReclipError: the numbers of classes differ, or no name differs from the model's.
    """
    given = synonyms.model_classes
    if len(given) != len(own):
        raise ReclipError(
            f"class file {synonyms.path} has {len(given)} classes, but the model has {len(own)}: write one line for"
            f" each, in this order: {', '.join(names[0] for names in own)}"
        )
    own = [list(names) for names in own]
    others = [[name for name in names if [name] != mine] for names, mine in zip(given, own, strict=True)]
    if not any(others):
        raise ReclipError(f"class file {synonyms.path} has the model's own names alone: add synonyms after commas")
    variants = []
    for index, names in enumerate(others):
        for name in names:
            title = f"{own[index][0]} → {name}"
            variants.append(Variant(title, [*own[:index], [name], *own[index + 1 :]], (index,)))
    for turn in range(max(map(len, others))):
        changed = tuple(index for index, names in enumerate(others) if len(names) > turn)
        names = [[others[index][turn]] if index in changed else mine for index, mine in enumerate(own)]
        variants.append(Variant(f"all, synonym {turn + 1}", names, changed))
    return variants


def rename_queries(model: LanguageSegmentor, names: list[list[str]]) -> None:
    """Give a model, in eval mode, the Query features of other names. All that it has learned stays.

    Raises:
        ReclipError: the model has no fixed Query features, or two classes share a name.
    """
    if not isinstance(model, CLIPSegmentor) or getattr(model, "query_head", None) is not None:
        raise ReclipError("synonyms need a model whose Query features come from the templates: a student has none")
    check_class_names(names, model.backbone.name_tokens)
    features = model.backbone.query_features(names, get_templates(model.templates))
    model.template_query_features = features.to(model.device)
    model.eval()  # drops what was computed from the former features


class Agreement:
    """Counts how two predictions of the same images differ."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.counts = np.zeros((num_classes, num_classes), np.int64)

    def add(self, before: np.ndarray, after: np.ndarray) -> None:
        """Count an image: label maps ``(H, W)`` of class ids."""
        joint = before.astype(np.int64).ravel() * self.num_classes + after.ravel()
        self.counts += np.bincount(joint, minlength=self.num_classes**2).reshape(self.counts.shape)

    @property
    def pixels(self) -> float:
        """Share of the pixels with the same label, in percent."""
        return 100 * float(self.counts.trace() / self.counts.sum())

    @property
    def class_ious(self) -> np.ndarray:
        """IoU of each class's masks before and after, in percent ``(C,)``; NaN for a class in neither."""
        hits = self.counts.diagonal()
        union = self.counts.sum(0) + self.counts.sum(1) - hits
        return 100 * np.divide(hits, union, out=np.full(self.num_classes, np.nan), where=union > 0)

    @property
    def mean_iou(self) -> float:
        """Mean of :attr:`class_ious` over the classes in either prediction, in percent."""
        return float(np.nanmean(self.class_ious))


@dataclasses.dataclass
class VariantResult:
    """The comparison of one variant's masks with those under the model's own names.

    Attributes:
        agreement: with the masks under the model's own names.
        confusion: ``(L, L + 1)`` by label id and prediction, see
            :func:`~reclip_d2.evaluation.scores.iou_per_class`; None without labels.
    """

    variant: Variant
    agreement: Agreement
    confusion: np.ndarray | None = None

    @property
    def miou(self) -> float | None:
        """mIoU with the labels, in percent; None without labels."""
        return None if self.confusion is None else segmentation_scores(self.confusion)["mIoU"]

    @property
    def changed_iou(self) -> float | None:
        """Mean IoU, before and after, of the classes with other names, in percent; None if no image has them."""
        ious = self.agreement.class_ious[list(self.variant.changed)]
        return None if np.isnan(ious).all() else float(np.nanmean(ious))


def count_labelled(confusion: np.ndarray, labels: np.ndarray, prediction: np.ndarray, ignore_label: int) -> None:
    """Add an image to a confusion matrix ``(L, L + 1)``: label ids and predicted label ids ``(H, W)``."""
    valid = labels != ignore_label
    joint = labels[valid].astype(np.int64) * confusion.shape[1] + prediction[valid]
    confusion += np.bincount(joint, minlength=confusion.size).reshape(confusion.shape)


def table_lines(results: Sequence[VariantResult], own_miou: float | None) -> Iterator[str]:
    """The report as a Markdown table.

    Args:
        own_miou: mIoU under the model's own names, in percent; None without labels.
    """
    labelled = own_miou is not None
    yield "| names | pixels with the same label | IoU of the renamed classes | mean IoU, all classes |" + (
        " mIoU with labels |" if labelled else ""
    )
    yield "|---|---|---|---|" + ("---|" if labelled else "")
    if labelled:
        yield f"| the model's own | 100.0 | 100.0 | 100.0 | {number(own_miou)} |"
    for result in results:
        agreement = result.agreement
        cells = [result.variant.title, number(agreement.pixels), number(result.changed_iou), number(agreement.mean_iou)]
        yield f"| {' | '.join(cells + ([number(result.miou)] if labelled else []))} |"


def own_names(model: LanguageSegmentor) -> Variant:
    """The model's own names as a variant."""
    return Variant("the model's own", [list(names) for names in model.class_names], ())
