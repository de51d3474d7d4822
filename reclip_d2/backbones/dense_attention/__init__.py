"""Dense attentions: replacements of an image tower's last block for dense features (``MODEL.CLIP.DENSE_ATTENTION``).

To add one, put a file with a registered :class:`DenseAttention` into this folder and set the key to its ``name``. All
files of this folder are imported with the package. :mod:`~reclip_d2.backbones.dense_attention.base` defines inputs and
outputs, :mod:`~reclip_d2.backbones.dense_attention.rows` attends in bounded memory, and
:mod:`~reclip_d2.backbones.dense_attention.clearclip` is an example.
"""

import importlib
import pkgutil

from reclip_d2.backbones.dense_attention.base import (
    DENSE_ATTENTION_REGISTRY,
    AttentionInput,
    BlockInput,
    DenseAttention,
    EarlierBlocks,
    TransformerBlock,
    build_dense_attention,
    dense_attention_class,
)
from reclip_d2.backbones.dense_attention.value import ValueAttention

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "DENSE_ATTENTION_REGISTRY",
    "AttentionInput",
    "BlockInput",
    "DenseAttention",
    "EarlierBlocks",
    "TransformerBlock",
    "ValueAttention",
    "build_dense_attention",
    "dense_attention_class",
]
