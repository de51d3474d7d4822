"""Operators of the method: compiled C++/CUDA kernels (``csrc``) and their plain-PyTorch twins.

Each module of a compiled operator holds the public function, its twin ``*_reference``, the fake kernel and the
gradient. The twins run if the extension is not built, or after ``use_kernels(False)``; kernels and twins draw the same
noise.
"""

from reclip_d2.layers._extension import kernels_available, kernels_enabled, use_kernels
from reclip_d2.layers.frozen_linear import frozen_linear
from reclip_d2.layers.frozen_weights import autocast_copy
from reclip_d2.layers.gumbel_softmax import gumbel_softmax, gumbel_softmax_reference
from reclip_d2.layers.masked_average_pool import (
    masked_average_pool,
    masked_average_pool_reference,
    nonfinite_images,
)
from reclip_d2.layers.philox import NoiseCounter, draw_seed, gumbel_noise, philox4x32
from reclip_d2.layers.rectify_and_pool import rectify_and_pool, rectify_and_pool_reference
from reclip_d2.layers.resize_bicubic import bicubic_matrix, resize_bicubic
from reclip_d2.layers.upsample_argmax import upsample_argmax, upsample_argmax_reference
from reclip_d2.layers.upsample_cross_entropy import upsample_cross_entropy, upsample_cross_entropy_reference
from reclip_d2.layers.upsample_l1 import upsample_l1, upsample_l1_reference

__all__ = [
    "NoiseCounter",
    "autocast_copy",
    "bicubic_matrix",
    "draw_seed",
    "frozen_linear",
    "gumbel_noise",
    "gumbel_softmax",
    "gumbel_softmax_reference",
    "kernels_available",
    "kernels_enabled",
    "masked_average_pool",
    "masked_average_pool_reference",
    "nonfinite_images",
    "philox4x32",
    "rectify_and_pool",
    "rectify_and_pool_reference",
    "resize_bicubic",
    "upsample_argmax",
    "upsample_argmax_reference",
    "upsample_cross_entropy",
    "upsample_cross_entropy_reference",
    "upsample_l1",
    "upsample_l1_reference",
    "use_kernels",
]
