"""The embedded worlds: generated data sets of "material scenes" that need no download.

In reading order:

- ``worlds``: the 12 materials, their names, and how often and where each world shows them;
- ``noise`` and ``textures``: how a material looks;
- ``scenes``: pictures with the material of each pixel, from a seed and an index;
- ``dataset``: the task's pictures on disk, written on first use (registered by ``reclip_d2.data.datasets``);
- ``pretraining``: the pictures, captions and boxes that the tiny CLIP learns from. The program is
  ``tools/pretrain_embedded_clip.py``; the CLIP itself is in ``reclip_d2.backbones``.
"""

from reclip_d2.toy.dataset import DATASET_VERSION, ensure_dataset, list_split
from reclip_d2.toy.worlds import EMBEDDED, EMBEDDED_CLASSES, EMBEDDED_COLORS, EMBEDDED_LONGTAIL, WORLDS, World

__all__ = [
    "DATASET_VERSION",
    "EMBEDDED",
    "EMBEDDED_CLASSES",
    "EMBEDDED_COLORS",
    "EMBEDDED_LONGTAIL",
    "WORLDS",
    "World",
    "ensure_dataset",
    "list_split",
]
