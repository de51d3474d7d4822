"""Evaluation. The mIoU itself is Detectron2's ``SemSegEvaluator``."""
