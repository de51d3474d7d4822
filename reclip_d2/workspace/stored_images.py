"""Features of a run's images in its store, to predict masks without running the network again."""

from __future__ import annotations

from detectron2.config import CfgNode

from reclip_d2.data.image_folder import ImageFile
from reclip_d2.features.shards import StoredView
from reclip_d2.features.store import FeatureStore
from reclip_d2.features.views import WHOLE
from reclip_d2.inference import ImagePredictor
from reclip_d2.modeling.meta_arch.segmentor import CLIPSegmentor
from reclip_d2.workspace.stores import training_stores


class StoredImages:
    """The images whose first view in a store is what the network would see.

    Others are encoded again: images that the training reads as smaller copies or tiles, and images that came later.
    """

    def __init__(self, store: FeatureStore) -> None:
        """
        Args:
            store: complete, of whole images.
        """
        self._store = store
        self._numbers = {record["file_name"]: number for number, record in enumerate(store.views.records)}

    @classmethod
    def find(cls, cfg: CfgNode, predictor: ImagePredictor) -> StoredImages | None:
        """The complete store of a run's training images; None if there is none, or the predictor does not see whole
        images, or reads more than their features.

        Args:
            cfg: config of the training, whose data set is registered.
            predictor: of a model with the same CLIP.
        """
        model = predictor.model
        if not isinstance(model, CLIPSegmentor) or not model.half_features or predictor.sliding_window is not None:
            return None
        if predictor.refines or predictor.stretch_padding:
            return None
        if getattr(model, "key_smoothing", 0) > 0:
            return None
        for store in training_stores(cfg, model.backbone):
            if store.views.plan.kind == WHOLE and not store.shards.missing():
                return cls(store)
        return None

    def view(self, image: ImageFile) -> StoredView | None:
        """The view of an image; None if it is not in the store."""
        number = self._numbers.get(str(image.path))
        return None if number is None else self._store.read(number * self._store.views.plan.number)
