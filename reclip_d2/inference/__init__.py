"""The one way from an image of any size to its labels, for evaluation and for ``reclip``, with bounded memory."""

from reclip_d2.inference.dataset_predictor import DatasetPredictor
from reclip_d2.inference.predictor import Band, ImagePredictor, Turn

__all__ = ["Band", "DatasetPredictor", "ImagePredictor", "Turn"]
