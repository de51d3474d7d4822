"""The embedded worlds: generated data sets of "material scenes" that need no download.

Every pixel belongs to one of 12 materials in six confusable pairs. ``vocabulary`` says what there is and what
it is called, ``worlds`` how often and where, ``noise`` and the two ``textures_*`` modules paint it, ``scenes``
composes pictures, ``captions`` describes them for the pretraining of the tiny CLIP, and ``dataset`` writes the task's
pictures to disk.
"""

from reclip_d2.toy.dataset import DATASET_VERSION, ensure_dataset, list_split
from reclip_d2.toy.vocabulary import EMBEDDED_CLASSES, EMBEDDED_COLORS
from reclip_d2.toy.worlds import EMBEDDED, EMBEDDED_LONGTAIL, WORLDS, World

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
