"""ONNX files, opset 17: written by PyTorch's exporter, run by onnxruntime."""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from reclip_d2.errors import ReclipError
from reclip_d2.export.module import ExportModule

SUFFIXES = (".onnx",)
OPSET = 17
# In the model's metadata: the content of classes.json.
DESCRIPTION = "classes.json"
INPUT = "image"


def output_name(labels: bool) -> str:
    """Name of the graph's output."""
    return "labels" if labels else "logits"


def missing_packages() -> list[str]:
    """Packages to install before files of this format can be written and checked."""
    return [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]


def write(module: ExportModule, example: Tensor, path: Path, description: str) -> None:
    """Export ``module`` with ``example`` and write the file.

    Args:
        description: stored in the file's metadata as ``classes.json``.

    Raises:
        ReclipError: the model has an operator that ONNX lacks, or is larger than the 2 GiB that one file can hold.
    """
    import onnx

    name = output_name(module.labels)
    sides = {2: "height", 3: "width"}
    output_sides = {1: "height", 2: "width"} if module.labels else sides
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # see torchscript_file.write
            # The exporter by tracing: the newer one (dynamo=True) gives the same graphs, but takes twenty times as
            # long, needs two more packages, and ties their versions to PyTorch's.
            torch.onnx.export(
                module,
                (example,),
                buffer,
                dynamo=False,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[name],
                dynamic_axes={INPUT: sides, name: output_sides} if module.size is None else None,
            )
    except torch.onnx.errors.UnsupportedOperatorError as error:
        operator = " ".join(str(error).split())[:120]
        raise ReclipError(
            f"{path.name}: the model cannot be expressed in ONNX ({operator}): use torchscript"
        ) from error
    except RuntimeError as error:
        if "2GiB" not in str(error) and "2GB" not in str(error):
            raise
        raise ReclipError(f"{path.name}: the model is too large for an ONNX file (2 GiB): use torchscript") from error
    model = onnx.load_model_from_string(buffer.getvalue())
    _name_sizes(model.graph.output[0], module)
    onnx.helper.set_model_props(model, {DESCRIPTION: description})
    onnx.checker.check_model(model)
    onnx.save_model(model, str(path))


def _name_sizes(output: object, module: ExportModule) -> None:
    """Set the output's known sizes in the graph: the exporter leaves them open after a slice."""
    classes = [] if module.labels else [len(module.label_ids)]
    sides = ["height", "width"] if module.size is None else list(module.size)
    for dimension, size in zip(output.type.tensor_type.shape.dim, [1, *classes, *sides], strict=True):
        if isinstance(size, int):
            dimension.dim_value = size
        else:
            dimension.dim_param = size


def load(path: Path) -> Callable[[Tensor], Tensor]:
    """The file as a function of an image ``(1, 3, H, W)``, run by onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(None, {INPUT: image.numpy()})[0])
