"""Objects of a label map, with their places and IoUs (supplement of ReCLIP, section 6.2).

Shape letters: (H, W) size in pixels, N objects of an image.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import ndimage

_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)


class Objects(NamedTuple):
    """Objects of one image."""

    regions: np.ndarray
    """``(H, W)`` int64: 1 to N where a pixel belongs to an object, 0 elsewhere."""
    class_ids: np.ndarray
    """``(N,)`` int64, classes of objects 1 to N."""


def find_objects(labels: np.ndarray, ignore_label: int, instances: np.ndarray | None = None) -> Objects:
    """Objects of a label map: the connected regions of each class, or the instances of the data set.

    Pixels of a class that touch along a side or at a corner (8-connectivity) are connected. Without instances,
    two touching things of one class are therefore one object, and a thing that another cuts in two is two objects.

    Args:
        labels: ``(H, W)`` class ids, or ``ignore_label`` for pixels that belong to no object.
        instances: ``(H, W)`` instance ids, if the data set has them: pixels with the same class and id above 0 are one
            object, connected or not. Pixels with id 0 (classes without instances) form connected regions.
    """
    regions = np.zeros(labels.shape, dtype=np.int64)
    class_ids: list[int] = []
    for class_id in np.unique(labels[labels != ignore_label]).tolist():
        mask = labels == class_id
        if instances is not None:
            for instance in np.unique(instances[mask]).tolist():
                if instance > 0:
                    class_ids.append(class_id)
                    regions[mask & (instances == instance)] = len(class_ids)
            mask &= instances <= 0
        connected, count = ndimage.label(mask, structure=_EIGHT_NEIGHBOURS)
        regions[mask] = connected[mask] + len(class_ids)
        class_ids.extend([class_id] * count)
    return Objects(regions, np.array(class_ids, dtype=np.int64))


def object_areas(objects: Objects) -> np.ndarray:
    """Pixels of each object, ``(N,)`` int64."""
    return np.bincount(objects.regions.ravel(), minlength=len(objects.class_ids) + 1)[1:]


def object_ious(objects: Objects, prediction: np.ndarray, labels: np.ndarray, ignore_label: int) -> np.ndarray:
    """IoU of each object, from a semantic prediction.

    For an object O of class c, with P_c the pixels predicted as c and G_c all pixels labelled c, the prediction of the
    object is P_c without G_c \\ O, since pixels on other objects of the class belong to those::

        IoU(O) = |O ∩ P_c| / (|O| + |P_c \\ G_c|)

    Pixels that are wrongly predicted as c count against every object of c in the image, wherever they are. If
    the class has one object in the image, this is the class's IoU there. Ignored pixels do not count.

    Args:
        prediction, labels: ``(H, W)`` class ids.

    Returns:
        ``(N,)`` float64 in [0, 1].
    """
    count = len(objects.class_ids)
    valid = labels != ignore_label
    hits = np.bincount(objects.regions[valid & (prediction == labels)], minlength=count + 1)[1:]
    size = 1 + max(int(prediction.max(initial=0)), int(objects.class_ids.max(initial=0)))
    wrong = np.bincount(prediction[valid & (prediction != labels)], minlength=size)
    return hits / (object_areas(objects) + wrong[objects.class_ids])


def centroid_distances(objects: Objects) -> np.ndarray:
    """Distance of each object's centroid from the image's, ``(N,)`` float64 in pixels."""
    count = len(objects.class_ids)
    flat = objects.regions.ravel()
    squared = np.zeros(count)
    for axis, length in enumerate(objects.regions.shape):
        places = np.indices(objects.regions.shape)[axis].ravel()
        sums = np.bincount(flat, weights=places, minlength=count + 1)[1:]
        squared += (sums / object_areas(objects) - (length - 1) / 2) ** 2
    return np.sqrt(squared)
