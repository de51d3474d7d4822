"""Reduced copies of images and labels."""

import numpy as np

from reclip_d2.visualization.reduced import reduce_image, reduce_labels, reduced_size


def test_reduced_size():
    assert reduced_size((100, 200)) == (100, 200)
    assert reduced_size((3200, 1000)) == (1600, 500)
    assert reduced_size((4, 40000)) == (1, 1600)


def test_image_and_labels_are_reduced_alike():
    """A picture of two halves and its label map keep their border at the same place."""
    labels = np.zeros((2000, 3200), np.uint8)
    labels[:, 1200:] = 7
    image = np.repeat(labels[..., None] * 30, 3, axis=2)
    small, small_labels = reduce_image(image), reduce_labels(labels)
    assert small.shape == (1000, 1600, 3) and small_labels.shape == (1000, 1600)
    np.testing.assert_array_equal(small[..., 0], small_labels * 30)
    assert (small_labels[:, 600:] == 7).all() and not small_labels[:, :600].any()
