"""Features of fixed views without a store: encoded each time they are read."""

from __future__ import annotations

import torch

from reclip_d2.features.shards import StoredView
from reclip_d2.features.views import Views
from reclip_d2.modeling.view_batch import ViewEncoder


class RecomputedFeatures:
    """Reads like a :class:`~reclip_d2.features.store.FeatureStore` that was too large to make; same values, slower.

    Attributes:
        views: the views of the data set.
        patch_size: pixels per patch of the features.
    """

    def __init__(self, views: Views, patch_size: int, encode: ViewEncoder) -> None:
        """
        Args:
            views, patch_size: those of the store.
            encode: the encoder of a frozen backbone.
        """
        self.views = views
        self.patch_size = patch_size
        self._encode = encode

    def read(self, number: int) -> StoredView:
        """Encode a view, by its number."""
        sample = self.views.sample(number)
        features, size = self._encode(sample["image"])
        return StoredView(features.cpu().to(torch.float16), size, sample["placement"])
