"""Export a model: trace it, write the file, check it, and only then rename it to its final name."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from reclip_d2.errors import ReclipError
from reclip_d2.export import int8, onnx_file, torchscript_file
from reclip_d2.export.calibration import CalibrationImages
from reclip_d2.export.int8 import Int8Agreement, Int8Options
from reclip_d2.export.module import ExportModule, maps_on_grid, trace_size
from reclip_d2.export.parity import Agreement, agreement, check_image, check_sizes, reference_logits
from reclip_d2.layers import use_kernels
from reclip_d2.modeling.meta_arch.base import LanguageSegmentor
from reclip_d2.modeling.meta_arch.student import Student
from reclip_d2.utils.io import atomic_write

FORMATS: dict[str, ModuleType] = {"onnx": onnx_file, "torchscript": torchscript_file}
INPUT_TYPES = {"uint8": torch.uint8, "float32": torch.float32}


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        format: a key of :data:`FORMATS`.
        size: (H, W) of all images; None for any.
        labels: output labels instead of logits.
        label_ids: label id of each class; by default 0 to C - 1.
        input_type: type of the input image, a key of :data:`INPUT_TYPES`. TorchScript accepts both.
        tolerance: largest difference of logits, as a fraction of their span.
        int8: quantise the file; None for float32.
    """

    format: str = "onnx"
    size: tuple[int, int] | None = None
    labels: bool = False
    label_ids: Sequence[int] | None = None
    input_type: str = "uint8"
    tolerance: float = 1e-3
    int8: Int8Options | None = None

    def check(self) -> None:
        """Raise :class:`ReclipError` for a format that needs other packages, or for invalid values."""
        if missing := FORMATS[self.format].missing_packages():
            raise ReclipError(f"{self.format} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
        if self.size is not None and min(self.size) < 1:
            raise ReclipError(f"size {self.size[0]}x{self.size[1]}: height and width must be at least 1")
        if not self.tolerance > 0:
            raise ReclipError(f"tolerance {self.tolerance}: give a number above 0")
        if self.int8 is not None:
            if self.format != "onnx":
                raise ReclipError(f"--int8 is for --format onnx: a {self.format} file is not quantised")
            self.int8.check()


def export_model(
    model: LanguageSegmentor,
    path: str | Path,
    options: ExportOptions,
    description: str = "",
    report: Callable[[Agreement | Int8Agreement], None] = lambda _: None,
    calibration: CalibrationImages | None = None,
) -> list[Agreement]:
    """Write a model to a file that runs without this package.

    The file takes an image ``(1, 3, H, W)``, RGB in [0, 255], and returns the output of :meth:`ExportModule.forward`.
    It is compared with the model on two images; if exported for any size, with two sizes other than the trace's. With
    ``options.int8`` it is then quantised, and the INT8 file is compared with the model on the calibration images.

    Args:
        model: the model, on the CPU, in eval mode and float32.
        path: the file, which is written atomically; an existing file is replaced.
        description: text to embed in the file.
        report: called with each comparison.
        calibration: images for ``options.int8``.

    Raises:
        ReclipError: a package is missing, the file does not compute what the model does, or the model has no INT8 form.
    """
    options.check()
    if options.int8 is not None:
        check_int8(model)
    path = Path(path)
    target = FORMATS[options.format]
    sizes = check_sizes(model) if options.size is None else [options.size] * 2
    # Before tracing, with the unchanged model.
    images = [check_image(seed, size).to(INPUT_TYPES[options.input_type]) for seed, size in enumerate(sizes)]
    references = [reference_logits(model, image) for image in images]
    example = torch.zeros(1, 3, *(options.size or trace_size(model)), dtype=INPUT_TYPES[options.input_type])
    module = ExportModule(model, size=options.size, labels=options.labels, label_ids=options.label_ids).eval()
    results = []
    with atomic_write(path) as temporary:
        with torch.no_grad(), _public_operators(), maps_on_grid(model, options.size):
            target.write(module, example, temporary, description)
        run = target.load(temporary)
        for image, reference in zip(images, references, strict=True):
            results.append(agreement(reference, _run(run, image), options.label_ids))
            report(results[-1])
        if wrong := [result for result in results if not result.within(options.tolerance)]:
            raise ReclipError(
                f"the {options.format} file does not compute what the model does, and was removed ({wrong[0]}):"
                f" the tolerance is {options.tolerance:g} of the span"
            )
        if options.int8 is not None and calibration is not None:
            report(_quantize(model, temporary, options, options.int8, calibration))
    return results


def check_int8(model: LanguageSegmentor) -> None:
    """Raise :class:`ReclipError` unless the model has an INT8 form."""
    if not isinstance(model, Student):
        raise ReclipError(
            "--int8 is for students, which are convolutional: train one with reclip segment --student, or omit --int8"
            " (a CLIP's transformer is exported in float32 only)"
        )


def _quantize(
    model: LanguageSegmentor, path: Path, options: ExportOptions, int8_options: Int8Options, images: CalibrationImages
) -> Int8Agreement:
    """Make the file INT8, and compare it with the model."""
    int8.quantize(path, images, INPUT_TYPES[options.input_type], int8_options)
    run = onnx_file.load(path)
    result = int8.compare(
        lambda image: _run(run, image.to(INPUT_TYPES[options.input_type])),
        lambda image, output: agreement(reference_logits(model, image), output, options.label_ids),
        images,
    )
    if result.equal < int8_options.min_agreement and not int8_options.force:
        raise ReclipError(
            f"the INT8 file was removed ({result}): the bound is {100 * int8_options.min_agreement:g} % equal labels;"
            " try another --calibration or more images, lower --min-agreement, or give --force"
        )
    return result


@contextlib.contextmanager
def _public_operators() -> Iterator[None]:
    """Context without our kernels and without the fast path of PyTorch's attention, a private operator that ONNX and
    other versions of PyTorch may not support."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with use_kernels(False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@torch.no_grad()
def _run(run: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """The file's output for an image ``(3, H, W)``, without its first axis."""
    try:
        return run(image[None])[0]
    except Exception as error:  # runtimes have their own errors
        cause = " ".join(str(error).split())[:200]
        raise ReclipError(
            f"the file cannot be run on an image of {image.shape[-2]} x {image.shape[-1]}, and was removed ({cause})"
        ) from error
