"""The embedded world: a procedurally generated data set of "material scenes" that needs no download.

Every pixel belongs to one of 12 materials in six confusable pairs. ``vocabulary`` says what there is and what
it is called, ``noise`` and the two ``textures_*`` modules paint it, ``scenes`` composes pictures,
``captions`` describes them for the pretraining of the tiny CLIP, and ``dataset`` writes the task's pictures
to disk.
"""

from reclip_d2.data.embedded.dataset import DATASET_VERSION, SPLIT_COUNTS, ensure_dataset, list_split
from reclip_d2.data.embedded.vocabulary import EMBEDDED_CLASSES, EMBEDDED_COLORS

__all__ = [
    "DATASET_VERSION",
    "EMBEDDED_CLASSES",
    "EMBEDDED_COLORS",
    "SPLIT_COUNTS",
    "ensure_dataset",
    "list_split",
]
