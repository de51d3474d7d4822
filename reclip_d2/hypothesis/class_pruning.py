"""Classes that are never predicted, because the unlabelled training images hardly show them (not in the papers).

A rule measures the support of each class; its key is the least support, 0 turns it off. A class is left out if it lacks
the support of any rule, or is named in ``TEST.LEAVE_OUT``. A new rule is a class with
``@CLASS_PRUNING_REGISTRY.register()`` and a key.
"""

from __future__ import annotations

import abc
import dataclasses
import logging
from collections.abc import Sequence
from typing import ClassVar

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry

from reclip_d2.config.checks import value_at
from reclip_d2.config.keys import KEYS
from reclip_d2.errors import ReclipError
from reclip_d2.hypothesis.class_evidence import load_or_make_evidence
from reclip_d2.hypothesis.support import class_support
from reclip_d2.utils.text import shorten

logger = logging.getLogger(__name__)

ClassNames = Sequence[Sequence[str]]
"""For each class of the model its name and any synonyms."""

CLASS_PRUNING_REGISTRY = Registry("CLASS_PRUNING")
CLASS_PRUNING_REGISTRY.__doc__ = """
Registry of :class:`PruningRule` classes.
"""


class PruningRule(abc.ABC):
    """Measures how much the training images support each class, without labels.

    Attributes:
        key: config key of the least support; 0: off.
        what: what the support is, for messages.
        uses_evidence: whether it reads the class evidence (:mod:`reclip_d2.hypothesis.class_evidence`).
    """

    key: ClassVar[str]
    what: ClassVar[str]
    uses_evidence: ClassVar[bool] = False

    @abc.abstractmethod
    def support(self, cfg: CfgNode, class_names: ClassNames) -> Sequence[float]:
        """Support of each class."""


@CLASS_PRUNING_REGISTRY.register()
class PruningByImages(PruningRule):
    """The number of images whose hypothesis has the class."""

    key = "TEST.MIN_CLASS_IMAGES"
    what = "images with the class in their hypothesis"

    def support(self, cfg: CfgNode, class_names: ClassNames) -> Sequence[float]:
        return class_support(cfg, class_names)


class PruningByEvidence(PruningRule):
    """A measure of the class evidence.

    Attributes:
        measure: attribute of :class:`~reclip_d2.hypothesis.class_evidence.ClassEvidence`.
    """

    measure: ClassVar[str]
    uses_evidence = True

    def support(self, cfg: CfgNode, class_names: ClassNames) -> Sequence[float]:
        return getattr(load_or_make_evidence(cfg, class_names), self.measure)


@CLASS_PRUNING_REGISTRY.register()
class PruningByShare(PruningByEvidence):
    """The class's estimated share of all patches."""

    key = "TEST.MIN_CLASS_SHARE"
    what = "estimated share of the patches"
    measure = "shares"


@CLASS_PRUNING_REGISTRY.register()
class PruningByConfidence(PruningByEvidence):
    """The largest mean posterior of the class over its region in an image."""

    key = "TEST.MIN_CLASS_CONFIDENCE"
    what = "largest mean posterior in an image"
    measure = "confidences"


@dataclasses.dataclass(frozen=True)
class Pruning:
    """Classes that are left out.

    Attributes:
        reasons: for each class that is left out, why, by its index; in ascending order.
        class_names: those of the model.
    """

    reasons: dict[int, str]
    class_names: ClassNames

    @property
    def dropped(self) -> list[int]:
        """Indices of the classes that are left out."""
        return list(self.reasons)

    def __str__(self) -> str:
        """``leaves out 2 of 14 classes: dog (TEST.MIN_CLASS_SHARE 0.01: 0.0021), ...``"""
        if not self.reasons:
            return f"leaves out none of {len(self.class_names)} classes"
        each = ", ".join(f"{self.class_names[index][0]} ({reason})" for index, reason in self.reasons.items())
        return f"leaves out {len(self.reasons)} of {len(self.class_names)} classes: {shorten(each, 2000)}"


def chosen_rules(cfg: CfgNode) -> list[PruningRule]:
    """The rules whose key is not 0."""
    rules = [rule() for _, rule in CLASS_PRUNING_REGISTRY]
    return [rule for rule in rules if value_at(cfg, rule.key)]


def prunes_classes(cfg: CfgNode) -> bool:
    """Whether the config may leave out classes."""
    return bool(cfg.TEST.LEAVE_OUT) or bool(chosen_rules(cfg))


def uses_evidence(cfg: CfgNode) -> bool:
    """Whether the config reads the class evidence."""
    return any(rule.uses_evidence for rule in chosen_rules(cfg))


def prune_classes(cfg: CfgNode, class_names: ClassNames) -> Pruning:
    """The classes to leave out; called by all processes. Reads no labels.

    Raises:
        ReclipError: these are all classes, ``TEST.LEAVE_OUT`` names a class that there is not, or the support cannot be
            measured.
    """
    first = [names[0] for names in class_names]
    if unknown := [name for name in cfg.TEST.LEAVE_OUT if name not in first]:
        raise ReclipError(f"TEST.LEAVE_OUT names {unknown[0]!r}, which is not the first name of a class: correct it")
    reasons: dict[int, list[str]] = {first.index(name): ["TEST.LEAVE_OUT"] for name in cfg.TEST.LEAVE_OUT}
    for rule in chosen_rules(cfg):
        least = value_at(cfg, rule.key)
        support = rule.support(cfg, class_names)
        unsupported = lacking(support, least)
        if len(unsupported) == len(support):
            raise ReclipError(
                f"{rule.key} {least:g} would leave out all classes: the most for a class is {max(support):g}"
                f" ({rule.what}); lower it"
            )
        for index in unsupported:
            reasons.setdefault(index, []).append(f"{rule.key} {least:g}: {support[index]:.4g}")
    if len(reasons) == len(first):
        keys = [*(["TEST.LEAVE_OUT"] if cfg.TEST.LEAVE_OUT else []), *(rule.key for rule in chosen_rules(cfg))]
        raise ReclipError(f"{' and '.join(keys)} would together leave out all classes: lower one")
    return Pruning({index: "; ".join(reasons[index]) for index in sorted(reasons)}, class_names)


def with_left_out(cfg: CfgNode, pruning: Pruning) -> CfgNode:
    """A copy of the config that names the classes to leave out, and needs no files to find them."""
    cfg = cfg.clone()
    cfg.defrost()
    named = [part for rule in chosen_rules(cfg) for part in (rule.key, KEYS[rule.key].default)]
    cfg.merge_from_list(named)
    cfg.TEST.LEAVE_OUT = [pruning.class_names[index][0] for index in pruning.dropped]
    return cfg


def lacking(support: Sequence[float], least: float) -> list[int]:
    """Classes whose support is below ``least``."""
    return [index for index, value in enumerate(support) if value < least]
