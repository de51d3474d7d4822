"""The distillation stage: a student learns from a frozen teacher (section III-E, Fig. 2b).

Shape letters: B images, n = h*w positions of the student's grid, C classes, D width of the joint embedding, (H, W)
size of the padded batch in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from reclip_d2.backbones.interface import valid_patches
from reclip_d2.errors import ReclipError
from reclip_d2.layers import upsample_argmax, use_kernels
from reclip_d2.modeling.checkpoint import ReclipCheckpointer, training_resolution
from reclip_d2.modeling.losses import (
    NO_PSEUDO_LABEL,
    contrastive_loss,
    distillation_losses,
    feature_guided_loss,
    mask_guided_loss,
    valid_pixels,
)
from reclip_d2.modeling.meta_arch.mask_folder import MaskFolder
from reclip_d2.modeling.meta_arch.rectified_clip import RectifiedCLIP
from reclip_d2.modeling.meta_arch.segmentor import CLIPSegmentor
from reclip_d2.modeling.meta_arch.student import Student, bias_grid
from reclip_d2.modeling.numerics import check_finite
from reclip_d2.modeling.pooling import MaskLogits, pool_hypotheses
from reclip_d2.modeling.student.inherited import HEADS_WITH_BIAS, InheritedHead
from reclip_d2.modeling.student.weights import load_backbone_weights
from reclip_d2.modeling.training_panel import label_panel
from reclip_d2.modeling.training_step import StepInputs, StepOutputs, hypothesis_tensors, padding_tensors
from reclip_d2.modeling.view_batch import has_fixed_views


@META_ARCH_REGISTRY.register()
class Distillation(nn.Module):
    """Trains the student on the teacher's masks (Eq. 8) and features (Eq. 9) and on the class names (Eq. 7).

    State, identity and inference are the student's: its checkpoints are checkpoints of :class:`Student`. The teacher
    needs no gradient and is always in eval mode. Images are normalised for each model separately.

    With ``ema_decay`` (not in the paper), state and inference are those of an exponential moving average of the
    student's weights and of the running statistics of its batch norms; :meth:`update_average` advances it. The weights
    that train are in the checkpoint, too: see :class:`TrainedStudent`.
    """

    @configurable
    def __init__(
        self,
        *,
        teacher: CLIPSegmentor,
        student: Student,
        mask_weight: float = 1.0,
        feature_weight: float = 0.5,
        text_weight: float = 0.5,
        feature_size: str = "image",
        gumbel_tau: float = 0.0,
        gumbel_hard: bool = True,
        loss_tau: float = 0.0,
        ema_decay: float = 0.0,
        vis_period: int = 0,
    ) -> None:
        """
        Args:
            mask_weight, feature_weight, text_weight: weights of Eq. (10); losses of weight 0 are not computed.
            feature_size: resolution at which Eq. (9) compares features: ``image``, or the student's ``grid``.
            gumbel_tau: tau_1 of the student's masks; 0 for the inverse of CLIP's logit scale. It is meant for the mask
                logits of the teacher: a student that does not inherit the teacher's decoder uses the inverse scale.
            gumbel_hard: one-hot masks with the straight-through gradient; otherwise soft masks.
            loss_tau: tau of Eq. (7); 0 for the inverse of CLIP's logit scale.
            ema_decay: decay of the average per iteration, in [0, 1); 0 for no average.
            vis_period: iterations between images in TensorBoard; 0 for none.
        """
        super().__init__()
        if student.inherited.classifier is not None and not (mask_weight or text_weight):
            raise ReclipError(
                "MODEL.STUDENT.HEAD original learns its classifier from the mask-guided and text-guided losses, but"
                " MODEL.DISTILLATION.MASK_WEIGHT and TEXT_WEIGHT are both 0: raise one"
            )
        self.teacher = teacher.requires_grad_(False)
        if teacher.training:  # otherwise not: eval() invalidates the teacher's caches
            teacher.eval()
        self.student = student
        self.average: AveragedModel | None = None
        if ema_decay:
            # The buffers, too: batch norm's statistics belong to the weights that they were collected with.
            self.average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(ema_decay), use_buffers=True)
            self.average.requires_grad_(False).eval()
        self.weights = {"mask_weight": mask_weight, "alpha": feature_weight, "beta": text_weight}
        self.feature_size = feature_size
        scale = teacher.backbone.logit_scale
        self.gumbel_tau = gumbel_tau or 1 / scale
        if student.inherited.gives_cosines:  # times the logit scale, which tau_1 has to undo
            has_decoder = getattr(teacher, "mask_decoder", None) is not None
            self.gumbel_tau = 1.0 if has_decoder else self.gumbel_tau * scale
        self.gumbel_hard = gumbel_hard
        self.loss_tau = loss_tau or 1 / scale
        self.vis_period = vis_period
        self.divisibility = math.lcm(teacher.size_divisibility, student.size_divisibility)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        teacher = build_teacher(cfg)
        student = Student(cfg)
        if cfg.MODEL.STUDENT.WEIGHTS:
            load_backbone_weights(student.backbone, cfg.MODEL.STUDENT.WEIGHTS)
        inherited = inherit(teacher, cfg.MODEL.STUDENT.HEAD, bias_grid(cfg))
        student.inherited.load_state_dict({**student.inherited.state_dict(), **inherited})
        return {
            "teacher": teacher,
            "student": student,
            "mask_weight": cfg.MODEL.DISTILLATION.MASK_WEIGHT,
            "feature_weight": cfg.MODEL.DISTILLATION.FEATURE_WEIGHT,
            "text_weight": cfg.MODEL.DISTILLATION.TEXT_WEIGHT,
            "feature_size": cfg.MODEL.DISTILLATION.FEATURE_SIZE,
            "gumbel_tau": cfg.MODEL.GUMBEL.TAU,
            "gumbel_hard": cfg.MODEL.GUMBEL.HARD,
            "loss_tau": cfg.MODEL.LOSS.TAU,
            "ema_decay": cfg.MODEL.DISTILLATION.EMA_DECAY,
            "vis_period": cfg.VIS_PERIOD,
        }

    @property
    def device(self) -> torch.device:
        return self.student.device

    def train(self, mode: bool = True) -> Distillation:
        """Set the student's mode. The teacher stays in eval mode and keeps its caches; the average is for inference."""
        self.training = mode
        self.student.train(mode)
        if self.average is not None:
            self.average.eval()
        return self

    @property
    def final_student(self) -> Student:
        """The student that is evaluated and saved: the average, if there is one."""
        return self.student if self.average is None else self.average.module

    def update_average(self) -> None:
        """Add the student's weights after an optimizer step to their average."""
        self.average.update_parameters(self.student)

    def identity(self) -> dict[str, Any]:
        return self.student.identity()

    def former_identity(self) -> dict[str, Any]:
        return self.student.former_identity()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The state of the final student."""
        return self.final_student.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a student's state, as the weights to train and as their average."""
        if self.average is not None:
            self.average.module.load_state_dict(state_dict, *args, **kwargs)
        return self.student.load_state_dict(state_dict, *args, **kwargs)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]] | dict[str, Tensor]:
        """Training: a dict of losses, with inputs as for :class:`RectifiedCLIP`; inference: see :class:`Student`."""
        if not self.training:
            return self.final_student(batched_inputs)
        with use_kernels(self.student.kernels):
            return self.losses(batched_inputs)

    @torch.no_grad()
    def teach(self, batched_inputs: list[dict[str, Any]]) -> tuple[Tensor | None, Tensor]:
        """The teacher's features Z ``(B, D, h', w')`` and pseudo labels ``(B, H, W)`` int64, -1 on padding.

        One forward pass computes both. The teacher caches what does not depend on the images (text features, bias
        logits). The pseudo labels of a :class:`MaskFolder` come with the inputs; its features are None if no loss needs
        them.
        """
        image_sizes = [(x["image"].shape[-2], x["image"].shape[-1]) for x in batched_inputs]
        largest = (max(sides) for sides in zip(*image_sizes, strict=True))
        size = tuple(math.ceil(side / self.divisibility) * self.divisibility for side in largest)
        given = isinstance(self.teacher, MaskFolder)
        if given and not self.weights["alpha"]:
            return None, self._given_labels(batched_inputs, size)
        if has_fixed_views(batched_inputs):
            grid = size[0] // self.teacher.backbone.stride, size[1] // self.teacher.backbone.stride
            batch = self.teacher.view_batch(batched_inputs, smallest=grid)
            features, logits = batch.features, self.teacher.segment_views(batch)
        else:
            images = self.teacher.preprocess_image(batched_inputs, self.divisibility)
            features, logits = self.teacher.segment(images.tensor, images.image_sizes)
        if given:
            return features, self._given_labels(batched_inputs, size)
        labels = upsample_argmax(logits, size)
        return features, labels.masked_fill(~valid_pixels(image_sizes, size, self.device), NO_PSEUDO_LABEL)

    def _given_labels(self, batched_inputs: list[dict[str, Any]], size: tuple[int, int]) -> Tensor:
        """Pseudo labels ``(B, H, W)`` that come with the inputs, padded with -1."""
        labels = torch.full((len(batched_inputs), *size), NO_PSEUDO_LABEL)
        for padded, x in zip(labels, batched_inputs, strict=True):
            height, width = x["pseudo_labels"].shape
            padded[:height, :width] = x["pseudo_labels"]
        return labels.to(self.device)

    def losses(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Weighted losses of a batch, summing to Eq. (10).

        Raises:
            ReclipError: a loss is not finite; the message names the likely key.
        """
        inputs = self.step_inputs(batched_inputs)
        outputs = self.step(inputs)
        self.check_step(inputs, outputs)
        if self.vis_period and get_event_storage().iter % self.vis_period == 0:
            self.visualize(batched_inputs[0], outputs.logits.logits[0], inputs.tensors["pseudo_labels"][0])
        return outputs.losses

    def step_inputs(self, batched_inputs: list[dict[str, Any]], rows: int = 0) -> StepInputs:
        """Inputs of :meth:`step`: the teacher runs here.

        Args:
            rows: number of hypothesis rows, padding included; 0 for no padding.
        """
        teacher_features, pseudo_labels = self.teach(batched_inputs)
        images = self.student.preprocess_image(batched_inputs, self.divisibility)
        height, width = images.tensor.shape[-2:]
        grid = (height // self.student.output_stride, width // self.student.output_stride)
        sizes = tuple((int(h), int(w)) for h, w in images.image_sizes)
        tensors = {"images": images.tensor, "pseudo_labels": pseudo_labels}
        if teacher_features is not None:
            tensors["teacher_features"] = teacher_features
        if self.weights["beta"]:
            tensors |= hypothesis_tensors(batched_inputs, rows)
            tensors |= padding_tensors(sizes, grid, self.student.output_stride, self.device)
        return StepInputs(tensors, sizes)

    def encode(self, inputs: StepInputs) -> StepInputs:
        """The inputs as they are: :meth:`step_inputs` has run the teacher."""
        return inputs

    def step(self, inputs: StepInputs) -> StepOutputs:
        """Losses of a batch as a function of tensors: see :mod:`~reclip_d2.modeling.training_step`."""
        features, logits = self.student.segment(inputs.tensors["images"])
        pseudo_labels = inputs.tensors["pseudo_labels"]
        terms = {}
        if self.weights["mask_weight"]:
            terms["mask"] = mask_guided_loss(logits, pseudo_labels)
        if self.weights["alpha"]:
            teacher_features = inputs.tensors["teacher_features"]
            terms["feature"] = self._feature_loss(features, teacher_features, inputs.layout, pseudo_labels.shape)
        if self.weights["beta"]:  # Eq. (7) on the student's features and masks
            mask_logits = MaskLogits(logits.float())
            pooled = pool_hypotheses(
                mask_logits, features, inputs.hypotheses, inputs.valid, self.gumbel_tau, self.gumbel_hard, inputs.noise
            )
            terms["text"] = contrastive_loss(pooled, self.student.inherited.query_features, self.loss_tau)
        return StepOutputs(distillation_losses(terms, **self.weights), MaskLogits(logits))

    def check_step(self, inputs: StepInputs, outputs: StepOutputs) -> None:
        """Raise :class:`ReclipError` if a loss is not finite; the message names the likely key."""
        check_finite(
            outputs.losses,
            trained=self.student,
            frozen_features=inputs.tensors.get("teacher_features", inputs.tensors["pseudo_labels"]),
            logits=outputs.logits.tensor,
            temperatures={"MODEL.GUMBEL.TAU": self.gumbel_tau, "MODEL.LOSS.TAU": self.loss_tau},
        )

    def _feature_loss(
        self, features: Tensor, teacher_features: Tensor, sizes: Sequence[tuple[int, int]], padded: torch.Size
    ) -> Tensor:
        """Eq. (9), at the image's size or on the student's grid."""
        if self.feature_size == "image":
            size = (padded[-2], padded[-1])
            valid = valid_pixels(sizes, size, self.device)
        else:
            size = (features.shape[-2], features.shape[-1])
            valid = valid_patches(sizes, size, self.student.output_stride, self.device).unflatten(1, size)
        return feature_guided_loss(features, teacher_features, valid)

    @torch.no_grad()
    def visualize(self, record: dict[str, Any], logits: Tensor, pseudo_labels: Tensor) -> None:
        """Put input, prediction and pseudo labels of one training image into the event storage (TensorBoard)."""
        height, width = record["image"].shape[-2:]
        size = (pseudo_labels.shape[-2], pseudo_labels.shape[-1])
        prediction = upsample_argmax(logits[None].float(), size)[0]
        panel = label_panel(
            record["image"], [x[:height, :width] for x in (prediction, pseudo_labels)], self.student.num_classes
        )
        get_event_storage().put_image("image | student | teacher", panel)


class TrainedStudent:
    """The weights that train, next to their average, for the checkpoint: a resumed run needs both."""

    def __init__(self, model: Distillation) -> None:
        """
        Args:
            model: with an average.
        """
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        return {"student": self.model.student.state_dict(), "averaged": int(self.model.average.n_averaged)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.student.load_state_dict(state["student"])
        self.model.average.n_averaged.fill_(state["averaged"])


def build_teacher(cfg: CfgNode) -> CLIPSegmentor:
    """Build the teacher and load its checkpoint, on ``MODEL.DEVICE``.

    Raises:
        ReclipError: there is no checkpoint, or it has another class list, CLIP or training resolution.
    """
    keys = cfg.MODEL.TEACHER
    architecture = META_ARCH_REGISTRY.get(keys.META_ARCHITECTURE)
    if not (isinstance(architecture, type) and issubclass(architecture, CLIPSegmentor)):
        raise ReclipError(
            f"MODEL.TEACHER.META_ARCHITECTURE {keys.META_ARCHITECTURE!r} cannot be a teacher: use RectifiedCLIP,"
            " MaskCLIP or MaskFolder"
        )
    rectified = issubclass(architecture, RectifiedCLIP)
    if keys.WEIGHTS and not rectified:
        raise ReclipError(
            f"MODEL.TEACHER.WEIGHTS is {keys.WEIGHTS}, but {keys.META_ARCHITECTURE} has no weights: remove the key"
        )
    if not rectified and cfg.MODEL.MASKCLIP.CALIBRATION != "none":
        raise ReclipError("MODEL.MASKCLIP.CALIBRATION is for evaluation only: set it to none for a teacher")
    if rectified and not keys.WEIGHTS:
        raise ReclipError(
            "MODEL.TEACHER.WEIGHTS is empty: train the rectification stage first and give its model_final.pth"
        )
    if rectified and "://" not in keys.WEIGHTS and not Path(keys.WEIGHTS).is_file():
        raise ReclipError(
            f"MODEL.TEACHER.WEIGHTS {keys.WEIGHTS} does not exist: train the rectification stage, or check the path"
        )
    teacher = architecture(cfg).to(cfg.MODEL.DEVICE).eval()
    if not rectified:
        return teacher
    found = ReclipCheckpointer(teacher).load(keys.WEIGHTS).get("resolution", "")
    expected = training_resolution(cfg)
    if found and found != expected:
        raise ReclipError(
            f"the teacher {keys.WEIGHTS} was trained at another resolution: {found} instead of {expected};"
            " use the INPUT keys that it was trained with"
        )
    return teacher


@torch.no_grad()
def inherit(teacher: CLIPSegmentor, head: str, grid: tuple[int, int]) -> dict[str, Tensor]:
    """State of the :class:`InheritedHead` that a student inherits from this teacher."""
    arguments: dict[str, Any] = {"head": head, "logit_scale": teacher.backbone.logit_scale}
    if isinstance(teacher, RectifiedCLIP):
        arguments |= {"mask_decoder": teacher.mask_decoder, "rectification": teacher.rectification}
        if head in HEADS_WITH_BIAS:
            shared, class_bias = teacher.affine_bias(grid)
            arguments |= {"bias_map": shared.T.unflatten(1, grid), "class_bias": class_bias}
    inherited = InheritedHead(teacher.query_features, **arguments)
    # The student's own classifier ("original") is not inherited.
    return {key: value for key, value in inherited.state_dict().items() if not key.startswith("classifier.")}
