"""Prediction for images of any size with bounded memory, used by evaluation and by ``reclip``."""

from reclip_d2.inference.dataset_predictor import DatasetPredictor
from reclip_d2.inference.predictor import Band, ImagePredictor, Turn

__all__ = ["Band", "DatasetPredictor", "ImagePredictor", "Turn"]
