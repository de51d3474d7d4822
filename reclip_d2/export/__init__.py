"""Trained models as files that run without this package: ONNX and TorchScript.

::

    LanguageSegmentor -> ExportModule (module.py: a graph from RGB pixels to logits or labels)
        -> onnx_file.py or torchscript_file.py (write the file, and run it)
        -> parity.py (compare it with the model)
        -> int8.py (a student: quantise the ONNX file with the images of calibration.py, and compare again)
        -> description.py (classes.json next to the file: inputs and outputs)
"""

from reclip_d2.export.calibration import CalibrationImages
from reclip_d2.export.description import DescribedFile
from reclip_d2.export.export import FORMATS, ExportOptions, export_model
from reclip_d2.export.int8 import Int8Agreement, Int8Options
from reclip_d2.export.parity import Agreement

__all__ = [
    "FORMATS",
    "Agreement",
    "CalibrationImages",
    "DescribedFile",
    "ExportOptions",
    "Int8Agreement",
    "Int8Options",
    "export_model",
]
