"""Segmenting images of any size with bounded memory."""

from reclip_d2.inference.predictor import ImagePredictor, Turn

__all__ = ["ImagePredictor", "Turn"]
