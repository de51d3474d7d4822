"""The bias head of ReCLIP, the conference model (CVPR 2024), with which ReCLIP++ compares (section III-B).

Shape letters: B images, (h, w) patch grid, n = h*w patches, C classes, D width of the joint embedding, E width of the
image transformer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from reclip_d2.backbones.interface import VisionLanguageBackbone
from reclip_d2.backbones.reference import ReferencePrompt
from reclip_d2.modeling.bias_head import BIAS_HEAD_REGISTRY, BiasHead, build_reference_prompt
from reclip_d2.modeling.build import build_norm
from reclip_d2.modeling.numerics import at_least_float32


class SpaceProjection(nn.Module):
    """Space-preference bias of ReCLIP: 3x3 convolutions map the positional embedding to one logit per class.

    Norm and ReLU follow every convolution, including the last, so the logits are non-negative. The convolutions pad
    with zeros, as in the public code: a border effect does no harm, since the output depends on the position only.

    PE is one map for the whole batch, so batch norm computes its statistics over the positions of that map. They depend
    on weights and resolution, never on images. Evaluation uses the running statistics of the training resolutions,
    which lag about ten iterations behind the weights; the lag vanishes as the learning rate decays. They remain valid
    at other resolutions, since resizing the embedding hardly changes its distribution.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        channels: Sequence[int] = (512, 256),
        *,
        norm: str = "BN",
        init: str = "default",
    ) -> None:
        """
        Args:
            width: E.
            num_classes: C.
            channels: channels of the hidden layers.
            norm: a name for Detectron2's ``get_norm``, or "".
            init: ``default`` (the public code's), or ``zero``, for no preference before training: all logits are then
                1, which does not change the masks; at 0 the ReLU would pass no gradient.
        """
        super().__init__()
        widths = [width, *channels, num_classes]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, kernel_size=3, padding=1) for a, b in itertools.pairwise(widths))
        self.norms = nn.ModuleList(build_norm(norm, b, "MODEL.BIAS_HEAD.NORM") for b in widths[1:])
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        if init == "zero":
            last = self.norms[-1]
            if not isinstance(getattr(last, "weight", None), nn.Parameter):  # no norm, or one that does not train
                last = self.convs[-1]
            nn.init.zeros_(last.weight)
            nn.init.ones_(last.bias)

    def forward(self, positional_embedding: Tensor) -> Tensor:
        """Logits ``(n, C)`` for a positional embedding ``(E, h, w)``."""
        x = positional_embedding[None]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = conv(x)
            # Statistics and P in float32, even under autocast.
            x = F.relu(norm(at_least_float32(x)))
        return x.flatten(2)[0].T


@BIAS_HEAD_REGISTRY.register()
class ReCLIPBiasHead(BiasHead):
    """Bias head of ReCLIP: ``M_b = Z W_r^T + P``.

    The class preference is the similarity of image features and Reference features, the space preference P a projection
    of the positional embedding. Z contains positional information too, since CLIP adds PE to its input: the two biases
    are not encoded independently, which ReCLIP++ corrects. M_b depends on the image.
    """

    image_dependent = True

    @configurable
    def __init__(
        self, reference_prompt: ReferencePrompt, space_projection: SpaceProjection, *, reference_norm: str = "row"
    ) -> None:
        """
        Args:
            reference_norm: ``row`` or ``matrix``, see :func:`~reclip_d2.backbones.reference.normalize_reference`.
        """
        super().__init__(reference_prompt, reference_norm)
        self.space_projection = space_projection

    @classmethod
    def from_config(
        cls, cfg: CfgNode, backbone: VisionLanguageBackbone, class_names: Sequence[str]
    ) -> dict[str, object]:
        keys = cfg.MODEL.BIAS_HEAD
        width = backbone.positional_width
        return {
            "reference_prompt": build_reference_prompt(cfg, backbone, class_names),
            "space_projection": SpaceProjection(
                width, len(class_names), keys.SPACE_CHANNELS, norm=keys.NORM, init=keys.PROJECTION_INIT
            ),
            "reference_norm": keys.REFERENCE_NORM,
        }

    def shared_bias(self, positional_embedding: Tensor, reference_features: Tensor) -> Tensor:
        """P ``(n, C)``."""
        return self.space_projection(positional_embedding)

    def class_bias(self, reference_features: Tensor) -> Tensor:
        """W_r ``(C, D)``: the image-dependent part of M_b is ``Z W_r^T``."""
        return reference_features
