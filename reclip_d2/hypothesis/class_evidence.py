"""What unlabelled images say about which classes they show: estimated shares and confidences (not in the papers).

It is collected once, from CLIP's features of whole images, and kept in a JSON file.

Shape letters: n patches, D width of the joint embedding, C classes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor

from reclip_d2.backbones.precision import tower_precision
from reclip_d2.backbones.query import get_templates
from reclip_d2.errors import ReclipError
from reclip_d2.features.parts import view_encoder
from reclip_d2.features.whole_images import whole_images
from reclip_d2.hypothesis.training_records import TrainingImages
from reclip_d2.modeling.build import build_clip_backbone
from reclip_d2.modeling.class_shares import MAX_SAMPLES, estimate_class_shares
from reclip_d2.utils.io import atomic_write, cache_dir
from reclip_d2.utils.json_files import read_json
from reclip_d2.utils.one_maker import one_maker
from reclip_d2.utils.progress import count_steps

logger = logging.getLogger(__name__)

FORMAT = "reclip_d2 class evidence 1"
MAX_IMAGES = 2000
"""Most images to look at, spread evenly."""
_REMEDY = "remove it, and the next run makes it again"
_SHARES = {"type": "array", "minItems": 1, "items": {"type": "number", "minimum": 0, "maximum": 1}}
_SCHEMA = {
    "type": "object",
    "required": ["format", "class_names", "images", "shares", "confidences"],
    "properties": {
        "format": {"const": FORMAT},
        "class_names": {"type": "array", "items": {"type": "array", "items": {"type": "string"}, "minItems": 1}},
        "images": {"type": "integer", "minimum": 1},
        "shares": _SHARES,
        "confidences": _SHARES,
    },
}


@dataclasses.dataclass(frozen=True)
class ClassEvidence:
    """Evidence for each class of a list.

    Attributes:
        class_names: for each class its name and any synonyms.
        images: number of images that were looked at.
        shares: estimated share of the patches of all images, see :mod:`reclip_d2.modeling.class_shares`.
        confidences: the largest over the images of :func:`region_confidences`.
    """

    class_names: list[list[str]]
    images: int
    shares: list[float]
    confidences: list[float]

    def write(self, path: Path) -> None:
        """Write the file, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            text = json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1, ensure_ascii=False)
            temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path, class_names: Sequence[Sequence[str]]) -> ClassEvidence:
        """Read a file.

        Args:
            class_names: those that it must be for.

        Raises:
            ReclipError: it is missing or damaged, or was made for other classes.
        """
        content = read_json(path, _SCHEMA, "class evidence", _REMEDY)
        del content["format"]
        evidence = cls(**{field.name: content[field.name] for field in dataclasses.fields(cls)})
        if evidence.class_names != [list(names) for names in class_names]:
            raise ReclipError(f"class evidence {path} was made for other classes: {_REMEDY}")
        if not len(evidence.shares) == len(evidence.confidences) == len(evidence.class_names):
            raise ReclipError(f"class evidence {path} is damaged: {_REMEDY}")
        return evidence


def region_confidences(posteriors: Tensor) -> Tensor:
    """For each class the mean posterior of its region in an image, ``(C,)``; 0 for a class without one.

    ``q_c = mean_{n in R_c} p_nc`` with ``R_c = {n: argmax_k p_nk = c}``. MaskCLIP's prompt denoising asks for the
    largest p_nc of an image instead, which a single patch can decide.

    Args:
        posteriors: p ``(n, C)``.
    """
    largest, labels = posteriors.max(dim=1)
    sums = torch.zeros_like(posteriors[0]).index_add(0, labels, largest)
    return sums / torch.bincount(labels, minlength=posteriors.shape[1]).clamp(min=1)


@torch.no_grad()
def collect_evidence(
    images: Sequence[Tensor], query_features: Tensor, logit_scale: float, max_images: int = MAX_IMAGES
) -> tuple[int, Tensor, Tensor]:
    """Number of images, shares ``(C,)`` and confidences ``(C,)``: see :class:`ClassEvidence`.

    Images that cannot be read are left out.

    Args:
        images: Z ``(h, w, D)`` of each image, such as :class:`~reclip_d2.features.whole_images.WholeImages`.
        query_features: W_q ``(C, D)``.
        logit_scale: CLIP's; posteriors are the soft-max of the cosines times this.

    Raises:
        ReclipError: no image can be read.
    """
    chosen = range(0, len(images), max(1, -(-len(images) // max_images)))
    confidences = torch.zeros(len(query_features))
    patches: list[Tensor] = []
    with count_steps("class evidence", len(chosen)) as steps:
        for image in chosen:
            steps.advance()
            try:
                features = images[image].flatten(0, 1)
            except ReclipError as error:
                logger.warning("class evidence without an image: %s", error)
                continue
            posteriors = (logit_scale * (features @ query_features.T)).softmax(dim=1)
            confidences = torch.maximum(confidences, region_confidences(posteriors))
            patches.append(features[:: -(-len(features) * len(chosen) // MAX_SAMPLES)].clone())
    if not patches:
        raise ReclipError("class evidence needs images: none could be read")
    return len(patches), estimate_class_shares(torch.cat(patches), query_features, logit_scale), confidences


def load_or_make_evidence(cfg: CfgNode, class_names: Sequence[Sequence[str]]) -> ClassEvidence:
    """The evidence of ``TEST.CLASS_EVIDENCE``, or of the images of ``DATASETS.TRAIN``, collected if the file is
    missing; without the key it is kept in the cache. Called by all processes. Reads no labels.

    Args:
        class_names: for each class of the model its name and any synonyms.

    Raises:
        ReclipError: there are no images, or the file is damaged or was made for other classes.
    """
    path = Path(cfg.TEST.CLASS_EVIDENCE) if cfg.TEST.CLASS_EVIDENCE else None
    if path is None or not _exists(path):
        images = _training_images(cfg, digest=path is None)
        backbone = build_clip_backbone(cfg)
        encode = view_encoder(cfg, backbone)
        path = path or _cached(cfg, images, backbone.identity(), class_names)
        if not _exists(path):
            with one_maker(path, "class evidence"):
                if not _exists(path):
                    features = whole_images(cfg, backbone, images.records, encode)
                    if comm.is_main_process():
                        queries = backbone.query_features(class_names, get_templates(cfg.MODEL.CLIP.TEMPLATES)).cpu()
                        number, *found = collect_evidence(features, queries, backbone.logit_scale)
                        shares, confidences = ([round(value, 6) for value in part.tolist()] for part in found)
                        names = [list(synonyms) for synonyms in class_names]
                        ClassEvidence(names, number, shares, confidences).write(path)
    comm.synchronize()
    return ClassEvidence.read(path, class_names)


def _training_images(cfg: CfgNode, digest: bool) -> TrainingImages:
    try:
        return TrainingImages.of(cfg, digest)
    except ReclipError as error:
        raise ReclipError(
            f"{error}: TEST.MIN_CLASS_SHARE and TEST.MIN_CLASS_CONFIDENCE look at these; set them to 0, or"
            " TEST.CLASS_EVIDENCE to a file made from other images"
        ) from error


def _exists(path: Path) -> bool:
    """Whether the main process sees the file, so that all processes take the same branch."""
    return comm.all_gather(path.exists())[0]


def _cached(
    cfg: CfgNode, images: TrainingImages, backbone: dict[str, Any], class_names: Sequence[Sequence[str]]
) -> Path:
    """A file in the cache, named by a hash of all that the evidence depends on.

    Args:
        backbone: the backbone's identity.
    """
    fields = {
        "format": FORMAT,
        "class_names": [list(names) for names in class_names],
        "backbone": backbone,
        "templates": cfg.MODEL.CLIP.TEMPLATES,
        "precision": tower_precision(cfg),
        "input": cfg.INPUT.dump(),
        "statistics": [list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD)],
        "images": images.digest,
    }
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / "class_evidence" / f"{'+'.join(cfg.DATASETS.TRAIN)}-{digest}.json"
