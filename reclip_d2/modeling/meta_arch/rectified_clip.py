"""The rectification stage: CLIP with its biases modelled and subtracted (sections III-B to III-D).

Shape letters: B images, n = h*w patches, C classes, D width of the joint embedding, (h, w) patch grid, K hypothesis
rows (all images together).
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from reclip_d2.errors import ReclipError
from reclip_d2.layers import rectify_and_pool, use_kernels
from reclip_d2.modeling.bias_head import build_bias_head, query_logits, rectified_logits
from reclip_d2.modeling.losses import (
    contrastive_loss,
    coverage_loss,
    hypothesis_mask,
    outside_hypothesis_penalty,
)
from reclip_d2.modeling.mask_decoder import MaskDecoder
from reclip_d2.modeling.meta_arch.segmentor import CLIPSegmentor
from reclip_d2.modeling.postprocessing import valid_patches
from reclip_d2.visualization import training_panel


@META_ARCH_REGISTRY.register()
class RectifiedCLIP(CLIPSegmentor):
    """CLIP's Query logits, minus the bias logits, through the mask decoder.

    ::

        image --DenseCLIP--> Z --W_q--> M_q --(3)--> M --decoder (4)--> M_o --Gumbel (5), pool--> Z_g --loss (7)
        R (1) --text encoder--> W_r --\\    ^
        PE --1x1 convolution--> W_p ---(2)-- M_b

    ReCLIP++ and ReCLIP are configurations of it (``MODEL.BIAS_HEAD.NAME``, ``MODEL.MASK_DECODER.ENABLED``,
    ``HYPOTHESIS.METHOD``). Only the bias head and the decoder train.
    """

    @configurable
    def __init__(
        self,
        *,
        bias_head: nn.Module,
        mask_decoder: MaskDecoder | None,
        rectification: str = "subtract",
        gumbel_tau: float = 0.0,
        gumbel_hard: bool = True,
        loss_tau: float = 0.0,
        loss_weights: dict[str, float] | None = None,
        vis_period: int = 0,
        **segmentor: Any,
    ) -> None:
        """
        Args:
            bias_head: maps (backbone, grid size) to M_b ``(n, C)``.
            mask_decoder: F_dec; None takes M itself as the mask logits.
            rectification: ``subtract``, ``add`` or ``none``, Eq. (3).
            gumbel_tau: tau_1 of Eq. (5); 0 for the inverse of CLIP's logit scale.
            gumbel_hard: one-hot masks with the straight-through gradient.
            loss_tau: tau of Eq. (7); 0 for the inverse of CLIP's logit scale.
            loss_weights: of ``contrastive``, ``coverage`` and ``outside``; a loss of weight 0 is not computed.
            vis_period: iterations between pictures in TensorBoard; 0 for none.
            segmentor: arguments of :class:`CLIPSegmentor`.
        """
        super().__init__(**segmentor)
        self.bias_head = bias_head
        self.mask_decoder = mask_decoder
        self.rectification = rectification
        self.gumbel_tau = gumbel_tau or 1 / self.backbone.logit_scale
        self.gumbel_hard = gumbel_hard
        self.loss_tau = loss_tau or 1 / self.backbone.logit_scale
        self.loss_weights = {"contrastive": 1.0, "coverage": 0.0, "outside": 0.0, **(loss_weights or {})}
        self.vis_period = vis_period
        self._bias_cache: dict[tuple[int, int], Tensor] = {}
        self.register_load_state_dict_post_hook(_forget_bias)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        args = super().from_config(cfg)
        backbone, class_names = args["backbone"], args["class_names"]
        decoder = MaskDecoder(cfg, backbone.embed_dim, len(class_names)) if cfg.MODEL.MASK_DECODER.ENABLED else None
        return {
            **args,
            "bias_head": build_bias_head(cfg, backbone, [names[0] for names in class_names]),
            "mask_decoder": decoder,
            "rectification": cfg.MODEL.BIAS_HEAD.RECTIFICATION,
            "gumbel_tau": cfg.MODEL.GUMBEL.TAU,
            "gumbel_hard": cfg.MODEL.GUMBEL.HARD,
            "loss_tau": cfg.MODEL.LOSS.TAU,
            "loss_weights": {
                "contrastive": cfg.MODEL.LOSS.CONTRASTIVE_WEIGHT,
                "coverage": cfg.MODEL.LOSS.COVERAGE_WEIGHT,
                "outside": cfg.MODEL.LOSS.OUTSIDE_WEIGHT,
            },
            "vis_period": cfg.VIS_PERIOD,
        }

    def train(self, mode: bool = True) -> RectifiedCLIP:
        self._bias_cache.clear()
        return super().train(mode)

    def bias_logits(self, size: tuple[int, int]) -> Tensor:
        """Bias logits M_b ``(n, C)`` on the grid (h, w): the same for all images, so in eval mode kept."""
        if self.training:
            return self.bias_head(self.backbone, size)
        if size not in self._bias_cache:
            self._bias_cache[size] = self.bias_head(self.backbone, size)
        return self._bias_cache[size]

    def rectify(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits before the argmax, and the bias that is still to be taken off them.

        With a decoder the bias is subtracted before it, and the third value is None. Without one the subtraction
        is left to ``rectify_and_pool``, which does it on the fly.

        Args:
            features: Z ``(B, D, h, w)``.

        Returns:
            M_q ``(B, C, h, w)``; M_o, or M_q without a decoder, ``(B, C, h, w)``; None, or M_b ``(n, C)``.
        """
        logits = query_logits(features, self.query_features)
        bias = None if self.rectification == "none" else self.bias_logits(tuple(features.shape[-2:]))
        if self.mask_decoder is None:
            return logits, logits, -bias if bias is not None and self.rectification == "add" else bias
        return logits, self.mask_decoder(rectified_logits(logits, bias, self.rectification), features), None

    def mask_logits(self, images: Tensor) -> Tensor:
        features = self.backbone(images)["dense"]
        _, logits, bias = self.rectify(features)
        return rectified_logits(logits, bias)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]] | dict[str, Tensor]:
        """Training: a dict of losses; inference: see :meth:`CLIPSegmentor.forward`.

        Training inputs carry ``hypothesis`` ``(|H|,)`` int64 beside the image; no label is read.
        """
        if not self.training:
            return super().forward(batched_inputs)
        with use_kernels(self.kernels):
            return self.losses(batched_inputs)

    def losses(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Weighted losses of a batch.

        Raises:
            ReclipError: a loss is not finite; the message names the images.
        """
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)["dense"]
        size = (features.shape[-2], features.shape[-1])
        valid = valid_patches(images.image_sizes, size, self.backbone.patch_size, self.device)
        class_ids, offsets = pack_hypotheses([x["hypothesis"] for x in batched_inputs])
        ids, bounds = class_ids.to(self.device), offsets.to(self.device)  # the pool wants them on the CPU

        _, logits, bias = self.rectify(features)
        patch_logits = logits.flatten(2).transpose(1, 2)  # (B, n, C), as it lies
        patch_features = features.flatten(2).transpose(1, 2)  # (B, n, D), contiguous
        if not bool(valid.all()):  # padding has no part in a mask's mean
            patch_features = patch_features * valid[..., None]

        losses = {}
        if self.loss_weights["contrastive"]:
            pooled, area = rectify_and_pool(
                patch_logits, bias, patch_features, class_ids, offsets, self.gumbel_tau, self.gumbel_hard
            )
            losses["loss_contrastive"] = self.loss_weights["contrastive"] * contrastive_loss(
                pooled, area, self.query_features, ids, bounds, self.loss_tau
            )
        if self.loss_weights["coverage"] or self.loss_weights["outside"]:
            in_hypothesis = hypothesis_mask(ids, bounds, self.num_classes)
            rectified = patch_logits if bias is None else patch_logits - bias
            for name, loss in (("coverage", coverage_loss), ("outside", outside_hypothesis_penalty)):
                if weight := self.loss_weights[name]:
                    losses[f"loss_{name}"] = weight * loss(rectified, in_hypothesis, valid, self.gumbel_tau)

        for name, value in losses.items():
            if not torch.isfinite(value):
                files = ", ".join(str(x.get("file_name", "?")) for x in batched_inputs)
                raise ReclipError(f"{name} is not finite on {files}: lower SOLVER.BASE_LR or check the images")
        if self.vis_period and get_event_storage().iter % self.vis_period == 0:
            self.visualize(batched_inputs[0], rectified_logits(logits[:1], bias))
        return losses

    @torch.no_grad()
    def visualize(self, record: dict[str, Any], logits: Tensor) -> None:
        """Put input, prediction and bias map of one training image into the event storage (TensorBoard)."""
        bias = self.bias_head(self.backbone, tuple(logits.shape[-2:])).unflatten(0, logits.shape[-2:])
        panel = training_panel(record["image"], logits[0], bias)
        get_event_storage().put_image("image | prediction | bias (largest class)", panel)


def pack_hypotheses(hypotheses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Ragged lists of class ids as ``class_ids`` ``(K,)`` and ``offsets`` ``(B + 1,)``, both int64 on the CPU."""
    lengths = torch.tensor([0, *(len(h) for h in hypotheses)])
    return torch.cat([h.to("cpu", torch.int64) for h in hypotheses]), lengths.cumsum(0)


def _forget_bias(module: RectifiedCLIP, incompatible_keys: Any) -> None:
    """Load-state-dict hook: bias logits kept from other weights are stale."""
    module._bias_cache.clear()
