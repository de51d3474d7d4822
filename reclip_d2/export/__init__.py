"""Trained models as files that run without this package: ONNX and TorchScript.

::

    LanguageSegmentor -> ExportModule (module.py: a graph from RGB pixels to logits or labels)
        -> onnx_file.py or torchscript_file.py (write, and run what was written)
        -> parity.py (is it what the model computes?)
        -> description.py (classes.json next to the file: what goes in, and what comes out)
"""

from reclip_d2.export.description import DescribedFile
from reclip_d2.export.export import FORMATS, ExportOptions, export_model
from reclip_d2.export.parity import Agreement

__all__ = ["FORMATS", "Agreement", "DescribedFile", "ExportOptions", "export_model"]
