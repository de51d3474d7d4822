"""INT8 students: static post-training quantisation of an ONNX file by onnxruntime.

The convolutional network is quantised: 8-bit weights with one scale per output channel, and 8-bit activations whose
ranges are those seen on calibration images. What follows is computed in float32: normalisation, Query features, bias,
mask decoder, the student's own classifier, and upsampling. It takes little of the time, and its errors would change
labels directly.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reclip_d2.errors import ReclipError
from reclip_d2.export.onnx_file import INPUT
from reclip_d2.export.parity import Agreement

if TYPE_CHECKING:
    import onnx

    from reclip_d2.export.calibration import CalibrationImages

# How the range of an activation is chosen: onnxruntime's CalibrationMethod. The range seen; the one that keeps 99.999 %
# of the values; the one whose quantised histogram has the least relative entropy.
METHODS = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}
# Operators to quantise, by the beginning of the exporter's names of nodes, which is the module's path in ExportModule.
# In the backbone also what lies between convolutions, so that activations stay in 8 bits from one to the next. The
# feature head's branches are added in float32: each of three sums would round once more.
_NETWORK = {
    "/mask_logits/backbone/": ("Conv", "Relu", "Add", "MaxPool"),
    "/mask_logits/feature_head/": ("Conv",),
}


@dataclasses.dataclass(frozen=True)
class Int8Options:
    """Options of the quantisation.

    Attributes:
        method: a key of :data:`METHODS`.
        reduce_range: weights of 7 bits, for x86 CPUs without VNNI, whose 16-bit sums of products would saturate.
        min_agreement: smallest fraction of pixels of the calibration images with the float32 model's label.
        force: keep a file below ``min_agreement``.
    """

    method: str = "minmax"
    reduce_range: bool = False
    min_agreement: float = 0.98
    force: bool = False

    def check(self) -> None:
        """Raise :class:`ReclipError` for invalid values."""
        if self.method not in METHODS:
            raise ReclipError(f"calibration {self.method!r}: choose one of {', '.join(METHODS)}")
        if not 0 <= self.min_agreement <= 1:
            raise ReclipError(f"--min-agreement {self.min_agreement}: give a fraction from 0 to 1")


@dataclasses.dataclass(frozen=True)
class Int8Agreement:
    """Agreement of an INT8 file with the float32 model on its calibration images.

    Attributes:
        images: number of images.
        equal: fraction of all pixels with the model's label.
        worst: the smallest fraction of an image.
        difference: largest difference of logits over all images; see :class:`Agreement`.
        mean_difference: mean over the images of their largest differences.
        span: the model's largest logit minus its smallest, over all images.
        of_labels: whether the file outputs labels.
    """

    images: int
    equal: float
    worst: float
    difference: float
    mean_difference: float
    span: float
    of_labels: bool

    @classmethod
    def of(cls, results: Sequence[Agreement]) -> Int8Agreement:
        """Sum up the agreement on each image; images count by their pixels."""
        pixels = [result.size[0] * result.size[1] for result in results]
        equal = sum(result.equal * count for result, count in zip(results, pixels, strict=True)) / sum(pixels)
        differences = torch.tensor([result.difference for result in results], dtype=torch.float64)
        return cls(
            images=len(results),
            equal=equal,
            worst=min(result.equal for result in results),
            difference=differences.max().item(),  # NaN if one is
            mean_difference=differences.mean().item(),
            span=max(result.span for result in results),
            of_labels=results[0].of_labels,
        )

    def __str__(self) -> str:
        what = "logit below the largest" if self.of_labels else "largest difference"
        return (
            f"INT8 on {self.images:,} calibration images: labels equal {100 * self.equal:.2f} %"
            f" (worst image {100 * self.worst:.2f} %), {what} {self.difference:.2g}"
            f" (mean over images {self.mean_difference:.2g}) of logits that span {self.span:.3g}"
        )


def quantize(path: Path, images: CalibrationImages, input_type: torch.dtype, options: Int8Options) -> None:
    """Replace the float32 ONNX file of a student by its INT8 file.

    The result is the same for the same file and images. Activations of one image at a time are in memory.

    Args:
        path: the file, which keeps its metadata.
        images: calibration images, whose ranges the activations get.
        input_type: pixel type of the graph's input.

    Raises:
        ReclipError: an image cannot be read, or the graph has no convolution to quantise.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    model = onnx.load(str(path))
    _own_parameters(model.graph)
    nodes = network_nodes(model.graph)
    if not any(node.op_type == "Conv" for node in nodes):
        raise ReclipError(f"{path.name} has no convolution to quantise: omit --int8")
    # In a folder of its own: onnxruntime writes intermediate files next to the source.
    with tempfile.TemporaryDirectory() as folder, _quietly():
        source, target = Path(folder, "float32.onnx"), Path(folder, "int8.onnx")
        onnx.save_model(model, str(source))
        quantize_static(
            str(source),
            str(target),
            _reader(images, input_type),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=sorted({operator for operators in _NETWORK.values() for operator in operators}),
            nodes_to_quantize=[node.name for node in nodes],
            per_channel=True,
            reduce_range=options.reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=getattr(CalibrationMethod, METHODS[options.method]),
            extra_options={"CalibStridedMinMax": 1},  # of all methods: ranges are merged after each image
        )
        quantized = onnx.load(str(target))
    del quantized.metadata_props[:]
    quantized.metadata_props.extend(model.metadata_props)
    onnx.checker.check_model(quantized)
    onnx.save_model(quantized, str(path))


def network_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Nodes to quantise: those of the student's backbone and feature head."""
    return [
        node
        for node in graph.node
        if any(node.name.startswith(part) and node.op_type in operators for part, operators in _NETWORK.items())
    ]


def compare(
    run: Callable[[Tensor], Tensor], reference: Callable[[Tensor, Tensor], Agreement], images: CalibrationImages
) -> Int8Agreement:
    """Run an INT8 file on the calibration images and compare it with the float32 model.

    Args:
        run: the file's output for an image ``(3, H, W)``.
        reference: compares the model with that output, given the image and the output.
    """
    return Int8Agreement.of([reference(image, run(image)) for image in images])


def _own_parameters(graph: onnx.GraphProto) -> None:
    """Give each node its own copy of a parameter: the exporter shares equal ones by ``Identity`` nodes. A convolution
    with a shared bias would stay in float32, since the quantised bias has the scale of one convolution."""
    import onnx

    parameters = {parameter.name: parameter for parameter in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "Identity" and node.input[0] in parameters]:
        copy = onnx.TensorProto()
        copy.CopyFrom(parameters[node.input[0]])
        copy.name = node.output[0]
        graph.initializer.append(copy)
        graph.node.remove(node)


def _reader(images: CalibrationImages, input_type: torch.dtype) -> Any:
    """onnxruntime's CalibrationDataReader for the images."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._numbers = iter(range(len(images)))

        def __len__(self) -> int:
            return len(images)

        def set_range(self, start_index: int, end_index: int) -> None:
            self._numbers = iter(range(start_index, end_index))

        def get_next(self) -> dict[str, Any] | None:
            number = next(self._numbers, None)
            return None if number is None else {INPUT: images[number][None].to(input_type).numpy()}

    return Reader()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Context without onnxruntime's reports: it prints a line per image, and recommends a preprocessing of which our
    graph needs nothing, as PyTorch's exporter has folded the batch norms."""
    root = logging.getLogger()

    def other(record: logging.LogRecord) -> bool:
        return "pre-processing" not in record.getMessage()

    root.addFilter(other)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.removeFilter(other)
