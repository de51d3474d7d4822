#!/usr/bin/env python
"""Latency and mIoU of a student in each form in which it can be deployed, against the rectified CLIP that taught it.

    data=configs/datasets/embedded.yaml student=configs/methods/reclippp_shares_distill.yaml
    python tools/benchmark_deployment.py --config-file $data --config-file $student \\
        --weights output/embedded/reclippp_shares_distill/model_final.pth --calibrate datasets/embedded/images/train \\
        --datasets embedded_dev embedded_val --json deployment.json

Forms: PyTorch, TorchScript, ONNX in float32 and INT8 by onnxruntime and, if it is installed (pip install openvino),
by OpenVINO. Each takes an image as uint8 and returns logits of its size; batch 1. All take turns within each
repetition, and ratios are medians of the repetitions' ratios, which load on the machine disturbs less than times. With
one thread, times are CPU time of the process; with more, wall time.
"""

from __future__ import annotations

import reclip_d2.utils.program_start  # noqa: F401  isort: skip  (first: see there)
import argparse
import dataclasses
import importlib.util
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from torch import Tensor

import reclip_d2.data.datasets  # noqa: F401  (registers the data sets)
from reclip_d2.data.classes import check_registered
from reclip_d2.data.dataset_mapper import build_test_augmentations
from reclip_d2.data.images import read_image
from reclip_d2.errors import exit_on_error
from reclip_d2.evaluation.label_maps import LabelMapEvaluator
from reclip_d2.export import ExportOptions, Int8Options, onnx_file, torchscript_file
from reclip_d2.export.int8 import METHODS
from reclip_d2.export.onnx_file import INPUT
from reclip_d2.export.parity import check_image
from reclip_d2.inference.predictor import resized_pixels
from reclip_d2.modeling.meta_arch.base import LanguageSegmentor
from reclip_d2.utils.files import check_output_file
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.measuring import machine
from reclip_d2.workspace.export import Export, ExportSource

Run = Callable[[Tensor], Tensor]
"""Logits ``(1, C, H, W)`` of an image ``(1, 3, H, W)`` uint8."""

RECTIFIED, TORCH, TORCHSCRIPT = "rectified CLIP, PyTorch", "student, PyTorch", "student, TorchScript"
ORT32, ORT8 = "student, onnxruntime", "student, onnxruntime INT8"
OPENVINO32, OPENVINO8 = "student, OpenVINO", "student, OpenVINO INT8"
# Ratios of times that the table shows: how many times as fast the second is as the first.
RATIOS = ((ORT32, ORT8), (OPENVINO32, OPENVINO8), (TORCH, ORT8), (RECTIFIED, TORCH), (RECTIFIED, ORT8))
# Instructions by which INT8 is faster than float32.
_INSTRUCTIONS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8")


def argument_parser() -> argparse.ArgumentParser:
    """Arguments of the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config-file", action="append", required=True, help="the student's config; repeatable")
    parser.add_argument("--weights", required=True, help="the student's checkpoint")
    parser.add_argument(
        "--teacher", help="the teacher's checkpoint (default: MODEL.TEACHER.WEIGHTS; '' for no teacher)"
    )
    parser.add_argument("--calibrate", required=True, help="images to calibrate INT8 with, as for reclip export")
    parser.add_argument("--calibration", choices=list(METHODS), default="minmax")
    parser.add_argument("--calibration-images", type=int, default=100)
    parser.add_argument("--datasets", nargs="*", default=[], help="registered data sets with labels, for mIoU")
    parser.add_argument("--sizes", nargs="*", type=int, default=[96, 192, 320, 512], help="sides of square images")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="config overrides; must come last")
    return parser


# ---- forms of the model ------------------------------------------------------------------------------------------


def model_form(model: LanguageSegmentor) -> Run:
    """A model as it predicts, with its kernels."""

    @torch.no_grad()
    def run(image: Tensor) -> Tensor:
        return model([{"image": image[0]}])[0]["sem_seg"][None]

    return run


def openvino_form(path: Path, threads: int) -> Run:
    """An ONNX file as OpenVINO runs it on the CPU; without the hint, it may compute float32 layers in bfloat16."""
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    return lambda image: torch.from_numpy(compiled({INPUT: image.numpy()})[0])


def build_forms(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Run], dict[str, int], ExportSource, str]:
    """All forms by name, sizes of the exported files in bytes, the student's source, and the line of INT8's parity."""
    source = ExportSource.of_config(args.config_file, weights=args.weights, opts=args.opts)
    options = {
        "student.onnx": ExportOptions(),
        "student.pt": ExportOptions(format="torchscript"),
        "student_int8.onnx": ExportOptions(int8=Int8Options(args.calibration, force=True)),
    }
    lines: list[str] = []
    for name, option in options.items():
        calibrate = None if option.int8 is None else args.calibrate
        images = args.calibration_images
        export = Export(source, option, str(folder / name), calibrate=calibrate, calibration_images=images)
        export.write(lambda result: lines.append(str(result)))
    forms: dict[str, Run] = {}
    teacher = source.cfg.MODEL.TEACHER.WEIGHTS if args.teacher is None else args.teacher
    if teacher:
        opts = [*args.opts, "MODEL.META_ARCHITECTURE", "RectifiedCLIP"]
        forms[RECTIFIED] = model_form(ExportSource.of_config(args.config_file, weights=teacher, opts=opts).build())
    forms[TORCH] = model_form(source.build())
    scripted = torchscript_file.load(folder / "student.pt")
    forms[TORCHSCRIPT] = torch.no_grad()(lambda image: scripted(image))
    forms[ORT32], forms[ORT8] = onnx_file.load(folder / "student.onnx"), onnx_file.load(folder / "student_int8.onnx")
    if importlib.util.find_spec("openvino") is not None:
        forms[OPENVINO32] = openvino_form(folder / "student.onnx", args.threads)
        forms[OPENVINO8] = openvino_form(folder / "student_int8.onnx", args.threads)
    return forms, {name: (folder / name).stat().st_size for name in options}, source, lines[-1]


# ---- measurements ------------------------------------------------------------------------------------------------


def latencies(forms: dict[str, Run], side: int, repeats: int, threads: int) -> dict[str, list[float]]:
    """Seconds of each form on an image of ``side`` x ``side``, by repetition, after two that are not counted."""
    clock = time.process_time if threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for repetition in range(-2, repeats):
        image = check_image(repetition + 2, (side, side))[None]
        for name, run in forms.items():
            begin = clock()
            run(image)
            if repetition >= 0:
                seconds[name].append(clock() - begin)
    return seconds


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    """How many times as fast ``fast`` is: the median of the repetitions' ratios."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


def scores(forms: dict[str, Run], dataset: str, augmentations: list[T.Augmentation]) -> dict[str, dict[str, float]]:
    """mIoU of each form in percent, and the percentage of pixels with the label of the student in PyTorch.

    Logits of resized images are upsampled bilinearly to the image's size.
    """
    check_registered(dataset)
    resize = T.AugmentationList(augmentations)
    evaluators = {name: LabelMapEvaluator(dataset, distributed=False) for name in forms}
    for evaluator in evaluators.values():
        evaluator.reset()
    equal, pixels = dict.fromkeys(forms, 0), 0
    for record in DatasetCatalog.get(dataset):
        image = read_image(record["file_name"])
        size = image.shape[:2]
        resized = resized_pixels(image, resize)[None]
        labels = {}
        for name, run in forms.items():
            logits = run(resized)
            if logits.shape[-2:] != size:
                logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
            labels[name] = logits[0].argmax(0)
            evaluators[name].process([{"file_name": record["file_name"]}], [{"sem_seg": labels[name]}])
        pixels += labels[TORCH].numel()
        for name, found in labels.items():
            equal[name] += int((found == labels[TORCH]).sum())
    return {
        name: {"mIoU": float(evaluator.evaluate()["sem_seg"]["mIoU"]), "equal": 100 * equal[name] / pixels}
        for name, evaluator in evaluators.items()
    }


def machine_report(threads: int) -> dict[str, Any]:
    """Processor, its instructions for INT8, and versions of the runtimes."""
    flags: set[str] = set()
    if (info := Path("/proc/cpuinfo")).exists():
        flags = set(next((line for line in info.read_text().splitlines() if line.startswith("flags")), "").split())
    import onnxruntime

    versions = {"onnxruntime": onnxruntime.__version__}
    if importlib.util.find_spec("openvino") is not None:
        import openvino

        versions["openvino"] = openvino.__version__
    instructions = [name for name in _INSTRUCTIONS if name in flags]
    report = {**machine(torch.device("cpu")), "threads": threads, "system": platform.system()}
    return {**report, "instructions": instructions, **versions}


# ---- report ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Results:
    """What was measured.

    Attributes:
        machine: see :func:`machine_report`.
        bytes: sizes of the exported files.
        parity: agreement of the INT8 file on the calibration images, in words.
        seconds: seconds by side of the image, form and repetition.
        scores: mIoU and equal labels by data set and form.
    """

    machine: dict[str, Any]
    bytes: dict[str, int]
    parity: str
    seconds: dict[int, dict[str, list[float]]]
    scores: dict[str, dict[str, dict[str, float]]]

    def text(self) -> str:
        """Tables in Markdown."""
        lines = [", ".join(f"{key} {value}" for key, value in self.machine.items()), "", self.parity, ""]
        lines += [", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in self.bytes.items()), ""]
        if self.seconds:
            sides = list(self.seconds)
            forms = list(self.seconds[sides[0]])
            lines += [f"| ms | {' | '.join(f'{side} px' for side in sides)} |", "|---" * (len(sides) + 1) + "|"]
            for form in forms:
                cells = [f"{1e3 * statistics.median(self.seconds[side][form]):.1f}" for side in sides]
                lines.append(f"| {form} | {' | '.join(cells)} |")
            lines += ["", f"| times as fast | {' | '.join(f'{side} px' for side in sides)} |"]
            lines.append("|---" * (len(sides) + 1) + "|")
            for slow, fast in RATIOS:
                if slow in forms and fast in forms:
                    cells = [f"{ratio(self.seconds[side], slow, fast):.2f}" for side in sides]
                    lines.append(f"| {fast}, against {slow} | {' | '.join(cells)} |")
        if self.scores:
            names = list(self.scores)
            lines += [
                "",
                f"| mIoU (labels equal to PyTorch's) | {' | '.join(names)} |",
                "|---" * (len(names) + 1) + "|",
            ]
            for form in self.scores[names[0]]:
                found = [self.scores[name][form] for name in names]
                cells = [f"{score['mIoU']:.2f} ({score['equal']:.2f} %)" for score in found]
                lines.append(f"| {form} | {' | '.join(cells)} |")
        return "\n".join(lines)


@exit_on_error
def main(arguments: list[str] | None = None) -> None:
    """See the module."""
    args = argument_parser().parse_args(arguments)
    if args.json:
        check_output_file(args.json, "--json")
    for dataset in args.datasets:
        check_registered(dataset)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        forms, sizes, source, parity = build_forms(args, Path(folder))
        results = Results(
            machine=machine_report(args.threads),
            bytes=sizes,
            parity=parity,
            seconds={side: latencies(forms, side, args.repeats, args.threads) for side in args.sizes},
            scores={name: scores(forms, name, build_test_augmentations(source.cfg)) for name in args.datasets},
        )
    print(results.text())
    if args.json:
        with atomic_write(Path(args.json)) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(results), indent=1) + "\n")


if __name__ == "__main__":
    main()
