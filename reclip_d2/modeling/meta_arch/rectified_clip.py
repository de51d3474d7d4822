"""The rectification stage: CLIP with its biases modelled and subtracted (sections III-B to III-D).

Shape letters: B images, n = h*w patches, C classes, D width of the joint embedding, (h, w) patch grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import get_event_storage
from torch import Tensor

from reclip_d2.layers import use_kernels
from reclip_d2.modeling.bias_head import BiasHead, bias_to_subtract, build_bias_head, query_logits, rectified_logits
from reclip_d2.modeling.losses import (
    anchor_loss,
    contrastive_loss,
    coverage_loss,
    hypothesis_mask,
    outside_hypothesis_penalty,
)
from reclip_d2.modeling.mask_decoder import MaskDecoder
from reclip_d2.modeling.meta_arch.base import ImageSizes
from reclip_d2.modeling.meta_arch.segmentor import CLIPSegmentor
from reclip_d2.modeling.numerics import check_finite
from reclip_d2.modeling.pooling import MaskLogits, pool_hypotheses
from reclip_d2.modeling.query_head import LearnableQuery
from reclip_d2.modeling.training_panel import training_panel
from reclip_d2.modeling.training_step import StepInputs, StepOutputs, hypothesis_tensors, padding_tensors
from reclip_d2.modeling.view_batch import ViewBatch, has_fixed_views, pad_grid


@META_ARCH_REGISTRY.register()
class RectifiedCLIP(CLIPSegmentor):
    """CLIP's Query logits, minus the bias logits, through the mask decoder.

    ::

        image --DenseCLIP--> Z --W_q--> M_q --(3)--> M --decoder (4)--> M_o --Gumbel (5), pool--> Z_g --loss (7)
        R (1) --text encoder--> W_r --\\    ^
        PE --1x1 convolution--> W_p ---(2)-- M_b

    This is ReCLIP++. ReCLIP is another configuration (``MODEL.BIAS_HEAD.NAME``, ``MODEL.MASK_DECODER.ENABLED``,
    ``HYPOTHESIS.METHOD``): M_b depends on the image, and there is no decoder. Only the bias head and the decoder train;
    in the ablations of Tables IV and VI, the Query's prompt (``MODEL.CLIP.LEARNABLE_QUERY``) or CLIP's image tower
    (``MODEL.CLIP.FINE_TUNE``) train too.

    If all images share the bias, and the decoder's norm allows it, Eqs. (3) and (4) are computed in folded form where
    that is faster: see :class:`~reclip_d2.modeling.mask_decoder.MaskDecoder`.
    """

    @configurable
    def __init__(
        self,
        *,
        bias_head: BiasHead,
        mask_decoder: MaskDecoder | None,
        query_head: LearnableQuery | None = None,
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
            bias_head: computes M_b, ``(n, C)`` or ``(B, n, C)``.
            mask_decoder: F_dec; None to use M as the mask logits.
            query_head: computes W_q in place of the fixed one; None for the fixed one.
            rectification: ``subtract``, ``add`` or ``none``, Eq. (3).
            gumbel_tau: tau_1 of Eq. (5); 0 for the inverse of CLIP's logit scale.
            gumbel_hard: one-hot masks with the straight-through gradient; otherwise soft masks.
            loss_tau: tau of Eq. (7); 0 for the inverse of CLIP's logit scale.
            loss_weights: weights of ``contrastive``, ``coverage``, ``outside`` and ``anchor``; losses of weight 0 are
                not computed.
            vis_period: iterations between images in TensorBoard; 0 for none.
            segmentor: arguments of :class:`CLIPSegmentor`.
        """
        super().__init__(**segmentor)
        self.bias_head = bias_head
        if rectification == "none":  # distributed training fails on trained parameters without gradient
            self.bias_head.requires_grad_(False)
        self.mask_decoder = mask_decoder
        self.query_head = query_head
        self.rectification = rectification
        self.logit_scale = self.backbone.logit_scale  # read once: it may be on a GPU
        self.gumbel_tau = gumbel_tau or 1 / self.logit_scale
        self.gumbel_hard = gumbel_hard
        self.loss_tau = loss_tau or 1 / self.logit_scale
        self.loss_weights = {
            "contrastive": 1.0,
            "coverage": 0.0,
            "outside": 0.0,
            "anchor": 0.0,
            **(loss_weights or {}),
        }
        self.vis_period = vis_period
        self._bias_cache: dict[tuple[int, int], Tensor] = {}
        self._reference_cache: Tensor | None = None
        self._query_cache: Tensor | None = None
        self._decoded_bias_cache: dict[tuple[int, int], Tensor] = {}
        self._decoder_cache: Tensor | None = None
        self.register_load_state_dict_post_hook(_clear_caches)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        args = super().from_config(cfg)
        backbone, class_names = args["backbone"], args["class_names"]
        decoder = MaskDecoder(cfg, backbone.embed_dim, len(class_names)) if cfg.MODEL.MASK_DECODER.ENABLED else None
        first_names = [names[0] for names in class_names]
        learnable = cfg.MODEL.CLIP.LEARNABLE_QUERY
        return {
            **args,
            "bias_head": build_bias_head(cfg, backbone, first_names),
            "mask_decoder": decoder,
            "query_head": LearnableQuery(backbone, first_names) if learnable else None,
            "rectification": cfg.MODEL.BIAS_HEAD.RECTIFICATION,
            "gumbel_tau": cfg.MODEL.GUMBEL.TAU,
            "gumbel_hard": cfg.MODEL.GUMBEL.HARD,
            "loss_tau": cfg.MODEL.LOSS.TAU,
            "loss_weights": {
                "contrastive": cfg.MODEL.LOSS.CONTRASTIVE_WEIGHT,
                "coverage": cfg.MODEL.LOSS.COVERAGE_WEIGHT,
                "outside": cfg.MODEL.LOSS.OUTSIDE_WEIGHT,
                "anchor": cfg.MODEL.LOSS.ANCHOR_WEIGHT,
            },
            "vis_period": cfg.VIS_PERIOD,
        }

    def train(self, mode: bool = True) -> RectifiedCLIP:
        self._clear_caches()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RectifiedCLIP:
        self._clear_caches()  # they have the old device and dtype
        return super()._apply(fn, recurse)

    @property
    def _caching(self) -> bool:
        """Whether to cache what does not depend on the images: in eval mode, unless gradients are enabled."""
        return not self.training and not torch.is_grad_enabled()

    def _clear_caches(self) -> None:
        """Invalidate the caches of eval mode after the weights change."""
        self._bias_cache.clear()
        self._decoded_bias_cache.clear()
        self._reference_cache = self._query_cache = self._decoder_cache = None

    def identity(self) -> dict[str, Any]:
        learnable = {} if self.query_head is None else {"MODEL.CLIP.LEARNABLE_QUERY": True}
        return {**super().identity(), **learnable}

    @property
    def query_features(self) -> Tensor:
        """Query text features W_q ``(C, D)``: fixed, or from the learnable prompt (cached in eval mode)."""
        if self.query_head is None:
            return self.template_query_features
        if not self._caching:
            return self.query_head(self.backbone)
        if self._query_cache is None:
            self._query_cache = self.query_head(self.backbone)
        return self._query_cache

    def _shared_bias(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The shared bias A ``(n, C)`` on the grid (h, w), and W_r ``(C, D)``; cached in eval mode."""
        head = self.bias_head
        if not self._caching:
            embedding = self.backbone.positional_embedding(size)
            reference = head.reference_features(self.backbone)
            return head.shared_bias(embedding, reference), reference
        if self._reference_cache is None:
            self._reference_cache = head.reference_features(self.backbone)
        if size not in self._bias_cache:
            embedding = self.backbone.positional_embedding(size)
            self._bias_cache[size] = head.shared_bias(embedding, self._reference_cache)
        return self._bias_cache[size], self._reference_cache

    def bias_logits(self, size: tuple[int, int], features: Tensor | None = None) -> Tensor:
        """Bias logits M_b on the grid (h, w).

        Args:
            features: Z ``(B, D, h, w)``; may be None unless the bias head is ``image_dependent``.

        Returns:
            ``(n, C)``, or ``(B, n, C)`` for an ``image_dependent`` bias head.
        """
        return self.bias_head.add_image_bias(*self._shared_bias(size), features)

    def affine_bias(self, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """A ``(n, C)`` on the grid (h, w), and S ``(C, D)`` or None for zero, of the bias logits ``M_b = A + Z S^T``.

        Raises:
            ReclipError: the bias head is not affine in the image features.
        """
        shared, reference = self._shared_bias(size)
        self.bias_head.check_affine(reference)
        return shared, self.bias_head.class_bias(reference)

    def bias_to_rectify(self, features: Tensor, grids: Sequence[tuple[int, int]] | None = None) -> Tensor | None:
        """M_b for image features Z ``(B, D, h, w)``, see :meth:`bias_logits`; None without rectification.

        Args:
            grids: (h, w) of each image's features, see :class:`~reclip_d2.modeling.view_batch.ViewBatch`. Each image
                then gets the bias of its grid, padded: ``(B, n, C)``.
        """
        if self.rectification == "none":
            return None
        size = (features.shape[-2], features.shape[-1])
        if grids is None:
            return self.bias_logits(size, features)
        reference = self.bias_head.reference_features(self.backbone)
        maps = {
            grid: pad_grid(self._shared_map(grid, reference), size, self.padding_mode).flatten(2)[0].T
            for grid in dict.fromkeys(grids)
        }
        return self.bias_head.add_image_bias(torch.stack([maps[grid] for grid in grids]), reference, features)

    def _shared_map(self, grid: tuple[int, int], reference: Tensor) -> Tensor:
        """The shared bias A as a map ``(1, C, h, w)``."""
        shared = self.bias_head.shared_bias(self.backbone.positional_embedding(grid), reference)
        return shared.T.unflatten(1, grid)[None]

    @property
    def padding_mode(self) -> str:
        return "replicate" if self.mask_decoder is None else self.mask_decoder.padding_mode

    def decode(self, features: Tensor, query_features: Tensor, bias: Tensor | None) -> MaskLogits:
        """Mask logits M_o: M_q, rectified by Eq. (3) and decoded by Eq. (4).

        Args:
            features: Z ``(B, D, h, w)``.
            query_features: W_q ``(C, D)``.
            bias: M_b from :meth:`bias_to_rectify`.
        """
        decoder, shared = self.mask_decoder, bias is None or bias.ndim == 2
        bias = bias_to_subtract(bias, self.rectification)
        if shared and decoder is not None and decoder.folds:
            images, patches = len(features), features.shape[-2] * features.shape[-1]
            if self._caching or decoder.folding_pays(images, patches):
                return self._decode_folded(features, query_features, bias)
        logits = query_logits(features, query_features)
        if shared and decoder is None:
            return MaskLogits(logits, bias)
        rectified = rectified_logits(logits, bias)
        return MaskLogits(rectified if decoder is None else decoder(rectified, features))

    def _decode_folded(self, features: Tensor, query_features: Tensor, bias: Tensor | None) -> MaskLogits:
        """:meth:`MaskDecoder.rectify_and_decode`; in eval mode, caches what does not depend on the images."""
        decoder, size = self.mask_decoder, (features.shape[-2], features.shape[-1])
        if not self._caching or decoder.takes_statistics:
            return decoder.rectify_and_decode(features, query_features, bias)
        if self._decoder_cache is None:
            self._decoder_cache = decoder.fold(query_features)
        if size not in self._decoded_bias_cache:
            self._decoded_bias_cache[size] = decoder.fold_bias(bias, size)
        return MaskLogits(decoder.decode_folded(features, self._decoder_cache), self._decoded_bias_cache[size])

    def segment(self, images: Tensor, image_sizes: ImageSizes | None = None) -> tuple[Tensor, Tensor]:
        features = self.predicting_features(self.backbone(images, image_sizes)["dense"])
        return features, self.decode(features, self.query_features, self.bias_to_rectify(features)).tensor()

    def segment_views(self, batch: ViewBatch) -> Tensor:
        bias = self.bias_to_rectify(batch.features, batch.grids)
        return self.decode(batch.features, self.query_features, bias).tensor()

    def pixel_embedding(self, images: Tensor, image_sizes: ImageSizes | None = None) -> Tensor:
        """Input of a linear probe: Z and M_o, ``(B, D + C, h, w)``. Z is the frozen CLIP's, as in MaskCLIP; M_o shows
        what this model has learned."""
        return torch.cat(self.segment(images, image_sizes), dim=1)

    def view_embedding(self, batch: ViewBatch) -> Tensor:
        return torch.cat([batch.features, self.segment_views(batch)], dim=1)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]] | dict[str, Tensor]:
        """Training: a dict of losses; inference: see :meth:`CLIPSegmentor.forward`.

        Training inputs have a ``hypothesis`` ``(|H|,)`` int64 besides the image; labels are not read.
        """
        if not self.training:
            return super().forward(batched_inputs)
        with use_kernels(self.kernels):
            return self.losses(batched_inputs)

    def losses(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Weighted losses of a batch.

        Raises:
            ReclipError: a loss is not finite; the message names the likely key.
        """
        inputs = self.encode(self.step_inputs(batched_inputs))
        outputs = self.step(inputs)
        self.check_step(inputs, outputs)
        if self.vis_period and get_event_storage().iter % self.vis_period == 0:
            self.visualize(batched_inputs[0], outputs.logits.tensor()[:1], outputs.bias)
        return outputs.losses

    def step_inputs(self, batched_inputs: list[dict[str, Any]], rows: int = 0) -> StepInputs:
        """Inputs of :meth:`encode`. Images of several sizes, of which there may be many combinations, are encoded here.

        Args:
            rows: number of hypothesis rows, padding included; 0 for no padding.
        """
        tensors = hypothesis_tensors(batched_inputs, rows)
        if not has_fixed_views(batched_inputs):
            images = self.preprocess_image(batched_inputs)
            if all(tuple(size) == tuple(images.tensor.shape[-2:]) for size in images.image_sizes):
                return StepInputs({"images": images.tensor, **tensors}, None)
        features, image_sizes, grids = self.view_batch(batched_inputs)
        size = (features.shape[-2], features.shape[-1])
        padding = padding_tensors(image_sizes, size, self.backbone.stride, self.device)
        return StepInputs({"features": features, **tensors, **padding}, None if grids is None else tuple(grids))

    def encode(self, inputs: StepInputs) -> StepInputs:
        """Inputs of :meth:`step`: the frozen tower runs on ``images``, unless there are ``features``."""
        tensors = dict(inputs.tensors)
        if "images" not in tensors:
            return inputs
        return inputs._replace(tensors={"features": self.backbone.dense(tensors.pop("images")), **tensors})

    def step(self, inputs: StepInputs) -> StepOutputs:
        """Losses of a batch as a function of tensors: see :mod:`~reclip_d2.modeling.training_step`."""
        features, grids = inputs.tensors["features"], inputs.layout
        query_features, bias = self.query_features, self.bias_to_rectify(features, grids)
        mask_logits = self.decode(features, query_features, bias)
        losses, valid = {}, inputs.valid
        if valid is None:
            valid = features.new_ones((len(features), features[0, 0].numel()), dtype=torch.bool)
        if weight := self.loss_weights["contrastive"]:
            pooled = pool_hypotheses(
                mask_logits, features, inputs.hypotheses, inputs.valid, self.gumbel_tau, self.gumbel_hard, inputs.noise
            )
            losses["loss_contrastive"] = weight * contrastive_loss(pooled, query_features, self.loss_tau)
        if self.loss_weights["coverage"] or self.loss_weights["outside"]:
            in_hypothesis = hypothesis_mask(*inputs.hypotheses, self.num_classes).to(self.device, non_blocking=True)
            patch_logits = mask_logits.tensor().flatten(2).transpose(1, 2)  # (B, n, C)
            for name, loss in (("coverage", coverage_loss), ("outside", outside_hypothesis_penalty)):
                if weight := self.loss_weights[name]:
                    losses[f"loss_{name}"] = weight * loss(patch_logits, in_hypothesis, valid, self.gumbel_tau)
        if weight := self.loss_weights["anchor"]:
            patch_logits = mask_logits.tensor().flatten(2).transpose(1, 2)  # (B, n, C)
            anchor = query_logits(features, query_features).flatten(2).transpose(1, 2)
            loss = anchor_loss(patch_logits, anchor, valid, self.gumbel_tau, self.logit_scale)
            losses["loss_anchor"] = weight * loss
        return StepOutputs(losses, mask_logits, bias)

    def check_step(self, inputs: StepInputs, outputs: StepOutputs) -> None:
        """Raise :class:`ReclipError` if a loss is not finite; the message names the likely key."""
        check_finite(
            outputs.losses,
            trained=self,
            frozen_features=inputs.tensors["features"],
            logits=outputs.logits.tensor,
            temperatures={"MODEL.GUMBEL.TAU": self.gumbel_tau, "MODEL.LOSS.TAU": self.loss_tau},
        )

    @torch.no_grad()
    def visualize(self, record: dict[str, Any], logits: Tensor, bias: Tensor | None) -> None:
        """Put input, prediction and bias map of a batch's first image into the event storage (TensorBoard).

        Args:
            record: input of the image.
            logits: its mask logits ``(1, C, h, w)``.
            bias: M_b ``(n, C)`` or ``(B, n, C)``; None without rectification: the map then shows a single class.
        """
        height, width = logits.shape[-2:]
        bias = logits.new_zeros(height * width, self.num_classes) if bias is None else bias
        first = bias if bias.ndim == 2 else bias[0]
        panel = training_panel(record["image"], logits[0], first.unflatten(0, (height, width)))
        get_event_storage().put_image("image | prediction | bias (largest class)", panel)


def _clear_caches(module: RectifiedCLIP, incompatible_keys: Any) -> None:
    """Load-state-dict hook: invalidate the caches."""
    module._clear_caches()
