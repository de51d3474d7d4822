"""What the meta-architectures share: the frozen CLIP, its Query head, inputs, inference and identity.

Shape letters: B images, C classes, D width of the joint embedding, (h, w) patch grid, (H, W) size in pixels.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import ImageList
from torch import Tensor, nn

from reclip_d2.clip.compat import OWN_IMAGE_TOWER
from reclip_d2.clip.dense import DenseCLIP
from reclip_d2.clip.prompts import get_templates
from reclip_d2.clip.text import cached_query_features, check_class_names
from reclip_d2.data.classes import class_names_from_config
from reclip_d2.layers import use_kernels
from reclip_d2.modeling.backbone import build_clip_backbone
from reclip_d2.modeling.postprocessing import sliding_window_logits, upsample_labels, upsample_logits


class CLIPSegmentor(nn.Module):
    """Base of the models that segment with a frozen CLIP and its Query features.

    Subclasses define :meth:`mask_logits`. The module's state holds trained parts only; the frozen CLIP and the
    class list are named by :meth:`identity`, which checkpoints carry and compare.
    """

    def __init__(
        self,
        backbone: DenseCLIP,
        query_features: Tensor,
        class_names: list[list[str]],
        *,
        templates: str,
        pixel_mean: list[float],
        pixel_std: list[float],
        sliding_window: tuple[tuple[int, int], tuple[int, int]] | None = None,
        label_maps: bool = True,
        kernels: bool = True,
    ) -> None:
        """
        Args:
            query_features: W_q ``(C, D)``, fixed.
            class_names: for each class its name and any synonyms.
            templates: name of the template set, for the identity.
            pixel_mean, pixel_std: CLIP's, RGB, in [0, 255].
            sliding_window: (window, stride), each (height, width) in pixels; None predicts the whole image.
            label_maps: give ``"sem_seg"`` as a label map instead of logits (see :meth:`forward`).
            kernels: use the compiled kernels if they are built.
        """
        super().__init__()
        self.backbone = backbone
        self.class_names = class_names
        self.templates = templates
        self.sliding_window = sliding_window
        self.label_maps = label_maps
        self.kernels = kernels
        self.register_buffer("query_features", query_features, persistent=False)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self.register_load_state_dict_post_hook(_expect_no_clip_weights)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        backbone = build_clip_backbone(cfg)
        class_names = class_names_from_config(cfg)
        check_class_names(class_names)
        window = cfg.TEST.SLIDING_WINDOW
        return {
            "backbone": backbone,
            "query_features": cached_query_features(
                backbone.text_encoder, class_names, get_templates(cfg.MODEL.CLIP.TEMPLATES), backbone.key
            ),
            "class_names": class_names,
            "templates": cfg.MODEL.CLIP.TEMPLATES,
            "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),
            "pixel_std": list(cfg.MODEL.PIXEL_STD),
            "sliding_window": (tuple(window.SIZE), tuple(window.STRIDE)) if window.ENABLED else None,
            "label_maps": cfg.TEST.LABEL_MAPS,
            "kernels": cfg.MODEL.USE_KERNELS,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def num_classes(self) -> int:
        return len(self.query_features)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint of this model belongs to, besides its weights."""
        return checkpoint_identity(self.backbone, self.class_names, self.templates, getattr(self, "bias_head", None))

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Normalise the images with CLIP's statistics and pad them to a common multiple of the patch."""
        images = [(x["image"].to(self.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)

    def mask_logits(self, images: Tensor) -> Tensor:
        """Mask logits M_o ``(B, C, h, w)`` of normalised, padded images ``(B, 3, H, W)``: what the argmax reads."""
        raise NotImplementedError

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """Inference, one image at a time, so that a prediction does not depend on its batch.

        Args:
            batched_inputs: dicts with ``image`` ``(3, H, W)``, RGB in [0, 255], and optionally ``height``, ``width``
                of the wanted output.

        Returns:
            for each image ``{"sem_seg": (C, height, width) logits}``, or ``{"sem_seg": (height, width) int64}``
            with ``label_maps``.
        """
        with use_kernels(self.kernels):
            return [{"sem_seg": self.predict(x)} for x in batched_inputs]

    @torch.no_grad()
    def predict(self, record: dict[str, Any]) -> Tensor:
        """Prediction of one image; see :meth:`forward`."""
        image = self.preprocess_image([record])
        size = tuple(image.image_sizes[0])
        output_size = (record.get("height", size[0]), record.get("width", size[1]))
        if self.sliding_window is None:
            logits, padded_size = self.mask_logits(image.tensor), tuple(image.tensor.shape[-2:])
        else:
            pixels = image.tensor[0, :, : size[0], : size[1]]
            logits, padded_size = sliding_window_logits(pixels, self._window_logits, *self.sliding_window)[None], size
        upsample = upsample_labels if self.label_maps else upsample_logits
        return upsample(logits, padded_size, size, output_size)[0]

    def _window_logits(self, window: Tensor) -> Tensor:
        size = (window.shape[-2], window.shape[-1])
        padded = ImageList.from_tensors([window], self.backbone.size_divisibility).tensor
        return upsample_logits(self.mask_logits(padded), tuple(padded.shape[-2:]), size, size)[0]


def checkpoint_identity(
    backbone: DenseCLIP, class_names: list[list[str]], templates: str, bias_head: nn.Module | None = None
) -> dict[str, Any]:
    """What a checkpoint belongs to: the frozen CLIP, the class list, and where they are not the usual ones, the changes
    of the image tower and the text and norm of the Reference prompt (none of which the weights show)."""
    changed = {} if backbone.image_tower == OWN_IMAGE_TOWER else {"image_tower": backbone.image_tower}
    identity = {
        "clip": backbone.name,
        **changed,
        "fingerprint": backbone.fingerprint,
        "class_names": class_names,
        "templates": templates,
    }
    prompt = getattr(bias_head, "reference_prompt", None)
    if prompt is not None:
        encoder = backbone.text_encoder
        usual = [t for names in class_names for t in (*encoder.name_tokens(names[0]), encoder.tokenizer.eot_token_id)]
        tokens, ends = prompt.name_tokens.tolist(), (prompt.ends - len(prompt.vectors)).tolist()
        if tokens != usual or bias_head.reference_norm != "row":
            digest = hashlib.sha256(f"{tokens} {ends}".encode()).hexdigest()
            identity["reference"] = f"{bias_head.reference_norm} {digest[:8]}"
    return identity


def _expect_no_clip_weights(module: nn.Module, incompatible_keys: Any) -> None:
    """Load-state-dict hook: the frozen CLIP's weights are not missing from a checkpoint, they are not in any."""
    keys = incompatible_keys.missing_keys
    keys[:] = [key for key in keys if not key.startswith("backbone.") and ".backbone." not in key]
