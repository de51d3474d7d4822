"""Linear probing (Table I): how well a linear classifier of a model's frozen pixel embeddings separates the classes.

**The classifier is trained with labels**, unlike everything else except the embedded worlds' tiny CLIPs and the judge's
validation runs with true hypotheses (``reclip_d2.experiments.judge_runs``). Its mIoU is therefore not a result of
unsupervised segmentation, and must be marked when it is listed with such results.
The unsupervised path never imports this module; only ``tools/linear_probe.py`` does, and ``tools/reproduce.py`` through
it.

The probe uses a model's ``pixel_embedding``: for MaskCLIP the image features Z; for a rectified CLIP Z and the mask
logits M_o, concatenated, since its Z comes from the same frozen CLIP and only M_o shows the rectification; for a
student likewise Z^ and M^D.

Shape letters: B images, F width of the embedding, C classes, (h, w) grid of the embedding, (H, W) size in pixels.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import Tensor, nn

from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.labelled_data import probe_datasets
from reclip_d2.modeling.checkpoint import ReclipCheckpointer
from reclip_d2.modeling.meta_arch.base import ImageSizes, LanguageSegmentor
from reclip_d2.modeling.view_batch import has_fixed_views
from reclip_d2.utils.io import atomic_write

SUPERVISION = "labels (linear probe)"
FOLDER, RESULTS = "linear_probe", "linear_probe.json"
"""The folder of a probe below the probed model's folder, and its results file."""
UNLABELLED = -1  # in the targets, for any ignore label of the data set


class LinearProbe(LanguageSegmentor):
    """A frozen model and a linear classifier of its pixel embeddings, trained with cross-entropy on labels.

    The embeddings are first standardised by a batch norm without weights, which is part of the linear map at test time.
    Logits are resized bilinearly to the pixels, in training and test. The state contains the norm and the classifier;
    :meth:`identity` names the model that they belong to.
    """

    def __init__(self, model: LanguageSegmentor, *, batch_norm: bool = True) -> None:
        """
        Args:
            model: has ``pixel_embedding(images, image_sizes) -> (B, F, h, w)`` of normalised, padded images. It is
                frozen, in eval mode, and always runs in its own precision, never under a trainer's autocast.
            batch_norm: standardise the embeddings.
        """
        super().__init__(
            model.class_names,
            templates=model.templates,
            pixel_mean=model.pixel_mean.flatten().tolist(),
            pixel_std=model.pixel_std.flatten().tolist(),
            kernels=model.kernels,
        )
        self.model = model.requires_grad_(False).eval()
        self.model_digest = weights_digest(model)
        side = 4 * model.size_divisibility
        width = self.pixel_embedding(torch.zeros(1, 3, side, side, device=model.device)).shape[1]
        # The embeddings do not change, so a mean over all batches is better than one over the last few.
        norm = nn.BatchNorm2d(width, affine=False, momentum=None)
        self.norm = norm.to(model.device) if batch_norm else nn.Identity()
        self.classifier = nn.Conv2d(width, model.num_classes, kernel_size=1, device=model.device)
        nn.init.zeros_(self.classifier.weight)  # the problem is convex: no random initialisation needed
        nn.init.zeros_(self.classifier.bias)
        self.register_state_dict_post_hook(_leave_out_model)
        self.register_load_state_dict_post_hook(_expect_no_model)

    @property
    def embedding_width(self) -> int:
        """F."""
        return self.classifier.in_channels

    @property
    def size_divisibility(self) -> int:
        return self.model.size_divisibility

    def identity(self) -> dict[str, Any]:
        return {**self.model.identity(), "probed model": self.model_digest}

    def former_identity(self) -> dict[str, Any]:
        return self.model.former_identity()

    def train(self, mode: bool = True) -> LinearProbe:
        super().train(mode)
        self.model.eval()
        return self

    def normalize(self, image: Tensor) -> Tensor:
        return self.model.normalize(image)

    @torch.no_grad()
    def pixel_embedding(self, images: Tensor, image_sizes: ImageSizes | None = None) -> Tensor:
        """Frozen pixel embeddings ``(B, F, h, w)``. Arguments: see :meth:`mask_logits`."""
        with torch.autocast(images.device.type, enabled=False):
            return self.model.pixel_embedding(images, image_sizes)

    def mask_logits(self, images: Tensor, image_sizes: ImageSizes | None = None) -> Tensor:
        """The classifier's logits ``(B, C, h, w)``. Arguments: see :meth:`LanguageSegmentor.mask_logits`."""
        with torch.autocast(images.device.type, enabled=False):
            return self.classifier(self.norm(self.pixel_embedding(images, image_sizes)))

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]] | dict[str, Tensor]:
        """Training: the loss of inputs with ``sem_seg`` ``(H, W)`` int64 next to the image, -1 where there is no label.
        Inference: as for every model."""
        if not self.training:
            return super().forward(batched_inputs)
        if has_fixed_views(batched_inputs):
            logits, size = self._view_logits(batched_inputs)
        else:
            batch = self.preprocess_image(batched_inputs)
            logits, size = self.mask_logits(batch.tensor, batch.image_sizes), batch.tensor.shape[-2:]
        labels = torch.full((len(logits), *size), UNLABELLED, dtype=torch.int64, device=logits.device)
        for target, record in zip(labels, batched_inputs, strict=True):
            height, width = record["sem_seg"].shape
            target[:height, :width] = record["sem_seg"]
        return {"loss_linear_probe": probe_loss(logits, labels)}

    def _view_logits(self, batched_inputs: list[dict[str, Any]]) -> tuple[Tensor, tuple[int, int]]:
        """The classifier's logits ``(B, C, h, w)`` of fixed views of a CLIP, and the pixels (H, W) of their grid."""
        with torch.autocast(self.device.type, enabled=False):
            with torch.no_grad():
                embedding = self.model.view_embedding(self.model.view_batch(batched_inputs))
            stride = self.model.backbone.stride
            size = embedding.shape[-2] * stride, embedding.shape[-1] * stride
            return self.classifier(self.norm(embedding)), size


def probe_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the labelled pixels; 0 if there are none.

    Args:
        logits: ``(B, C, h, w)``, resized bilinearly to the labels.
        labels: ``(B, H, W)`` int64, -1 where there is none.
    """
    logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="sum")
    return total / (labels != UNLABELLED).sum().clamp(min=1)


def weights_digest(model: nn.Module) -> str:
    """Hash of a model's state, to tell apart models of the same identity with different weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _leave_out_model(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any]) -> None:
    """State-dict hook: omit the probed model, which has its own checkpoint."""
    for key in [key for key in state if key.startswith(f"{prefix}model.")]:
        del state[key]


def _expect_no_model(module: nn.Module, incompatible_keys: Any) -> None:
    """Load-state-dict hook: the probed model's weights are not missing."""
    keys = incompatible_keys.missing_keys
    keys[:] = [key for key in keys if not key.startswith("model.") and ".model." not in key]


# ---- a run: its config, derived from the probed model's, and its results file ----------------------------------


def probe_overrides(cfg: CfgNode) -> list[str]:
    """``KEY VALUE`` overrides that turn a model's config into its probe's.

    Raises:
        ReclipError: there is no checkpoint to probe.
    """
    keys = cfg.LINEAR_PROBE
    weights = keys.WEIGHTS
    if weights and not Path(weights).is_file():
        raise ReclipError(f"checkpoint {weights} does not exist: check LINEAR_PROBE.WEIGHTS")
    if not weights and cfg.MODEL.META_ARCHITECTURE != "MaskCLIP":
        trained = ReclipCheckpointer(None, cfg.OUTPUT_DIR)
        if not trained.has_checkpoint():
            raise ReclipError(
                f"{cfg.OUTPUT_DIR} contains no trained model to probe: run train_net.py, or set LINEAR_PROBE.WEIGHTS"
            )
        weights = trained.get_checkpoint_file()
    overrides = {
        "LINEAR_PROBE.WEIGHTS": weights,
        "MODEL.WEIGHTS": "",
        "OUTPUT_DIR": str(Path(cfg.OUTPUT_DIR) / FOLDER),
        "SOLVER.MAX_ITER": keys.MAX_ITER,
        "SOLVER.IMS_PER_BATCH": keys.IMS_PER_BATCH,
        "SOLVER.BASE_LR": keys.BASE_LR,
        "SOLVER.WEIGHT_DECAY": keys.WEIGHT_DECAY,
        "SOLVER.OPTIMIZER": "SGD",
        "SOLVER.LR_SCHEDULER_NAME": "WarmupPolyLR",
        "SOLVER.WARMUP_ITERS": 0,
        "SOLVER.PLATEAU.ENABLED": False,
        "SOLVER.AMP.ENABLED": False,  # the same embeddings as in the test
        "VIS_PERIOD": 0,
    }
    return [str(part) for item in overrides.items() for part in item]


def write_results(cfg: CfgNode, model: LinearProbe, results: dict[str, Any]) -> Path:
    """Write ``linear_probe.json``.

    Args:
        results: results of ``Trainer.test``, by data set.
    """
    scores = {}
    for name, result in results.items():
        values = result["sem_seg"]
        scores[name] = {
            "protocol": MetadataCatalog.get(name).get("reclip_protocol", ""),
            "mIoU": float(values["mIoU"]),
            "IoU": {key[4:]: float(value) for key, value in values.items() if key.startswith("IoU-")},
        }
    report = {
        "supervision": SUPERVISION,
        "trained_on_labels_of": list(probe_datasets(cfg)),
        "probed": {
            "model": type(model.model).__name__,
            "weights": cfg.LINEAR_PROBE.WEIGHTS,
            "embedding_width": model.embedding_width,
            **model.identity(),
        },
        "settings": {
            "iterations": cfg.SOLVER.MAX_ITER,
            "images_per_batch": cfg.SOLVER.IMS_PER_BATCH,
            "base_lr": cfg.SOLVER.BASE_LR,
            "weight_decay": cfg.SOLVER.WEIGHT_DECAY,
            "batch_norm": cfg.LINEAR_PROBE.BATCH_NORM,
            "seed": cfg.SEED,
        },
        "results": scores,
    }
    path = Path(cfg.OUTPUT_DIR) / RESULTS
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")
    return path
