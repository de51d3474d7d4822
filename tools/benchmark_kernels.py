"""Time and peak memory of the operators in ``reclip_d2.layers`` against eager PyTorch and ``torch.compile``.

    python tools/benchmark_kernels.py --device cpu --json benchmark.json

Shapes: B images, n = h*w patches, D embedding width, C classes, K hypothesis rows.

Method:
- The implementations take turns within every repetition, each on the next of several input sets (together larger than
  the caches), so that drifts of the machine affect all of them: a ratio is the median of the repetitions' ratios.
- "eager" is the straightforward version in plain PyTorch, with PyTorch's random numbers, which pools only the
  hypothesis rows, image by image; "batched" uses one product for all images, with padded rows; "compile" and
  "compile-batched" are the two with torch.compile. "twin" draws Philox noise in plain PyTorch, like the kernels, and is
  not meant to be fast.
- The floor is the bytes that must move (every input read once per pass, every output written once) over the bandwidth
  of a large copy, measured in the same run.
- Peak memory is what a pass adds to the memory of the inputs: on the CPU the growth of the peak resident set of a fresh
  process, on CUDA the growth of the allocator's peak.
"""

from __future__ import annotations

import reclip_d2.utils.program_start  # noqa: F401  isort: skip  (first: see there)
import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from reclip_d2.errors import ReclipError, exit_on_error
from reclip_d2.layers import (
    kernels_available,
    rectify_and_pool,
    upsample_argmax,
    upsample_cross_entropy,
    upsample_l1,
    use_kernels,
)
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.measuring import machine, peak_bytes, resident_peak_bytes, take_turns
from reclip_d2.utils.output_paths import check_output_path
from reclip_d2.utils.timing import timed

# Vocabulary: number of classes, and mean number of classes per image.
VOCABULARIES = {
    "voc20": (20, 1.85),
    "context59": (59, 12.8),
    "ade150": (150, 22.3),
    "coco171": (171, 19.0),
    "large1000": (1000, 22.3),
}
PATCH = 16
WIDTH = 512
TAU = 0.01
LOSSES = ("upsample_cross_entropy", "upsample_l1")
OPERATORS = ("rectify_and_pool", "upsample_argmax", *LOSSES)
METHODS = ("ours", "eager", "batched", "compile", "compile-batched", "twin")


class Case(NamedTuple):
    """One row of the table."""

    operator: str
    vocabulary: str
    classes: int
    pixels: int
    images: int
    height: int = 0
    width: int = 0

    @property
    def name(self) -> str:
        """Readable name."""
        if self.operator == "upsample_argmax":
            return f"{self.classes} classes, {self.grid}x{self.grid} to {self.height}x{self.width}, batch {self.images}"
        if self.operator == "upsample_cross_entropy":
            grid = f"{self.student_grid}x{self.student_grid}"
            return f"{self.classes} classes, {grid} to {self.height}x{self.width}, batch {self.images}"
        if self.operator == "upsample_l1":
            grids = f"{self.student_grid}x{self.student_grid} and {self.grid}x{self.grid}"
            return f"{WIDTH} channels, {grids} to {self.height}x{self.width}, batch {self.images}"
        return f"{self.vocabulary}, {self.pixels} px, batch {self.images}"

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.pixels // PATCH

    @property
    def student_grid(self) -> int:
        """Positions per side of the student, whose stride is half of CLIP's patch."""
        return 2 * self.grid


class Inputs(NamedTuple):
    """Tensors of one call of rectify_and_pool, and a gradient of its result."""

    logits: Tensor
    bias: Tensor
    features: Tensor
    class_ids: Tensor
    offsets: Tensor
    gradient: Tensor


class Maps(NamedTuple):
    """A call of a loss of distillation: the student's map, the teacher's or None; valid pixels or labels."""

    student: Tensor
    teacher: Tensor | None
    pixels: Tensor


def make_maps(case: Case, device: torch.device, dtype: torch.dtype, seed: int) -> Maps:
    """Random maps; the teacher's with channels together, as a transformer leaves them."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    size, side = (case.images, case.height, case.width), case.student_grid
    if case.operator == "upsample_cross_entropy":
        labels = torch.randint(-1, case.classes, size, generator=generator, device=device)
        return Maps(normal(case.images, case.classes, side, side).requires_grad_(), None, labels)
    teacher = normal(case.images, case.grid, case.grid, WIDTH).permute(0, 3, 1, 2)
    valid = torch.ones(size, dtype=torch.bool, device=device)
    return Maps(normal(case.images, WIDTH, side, side).requires_grad_(), teacher, valid)


def make_inputs(case: Case, device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
    """Random inputs; logits in the layout of a convolution's output, and as large as cosines."""
    generator, on_device = torch.Generator().manual_seed(seed), torch.Generator(device).manual_seed(seed)
    patches, per_image = case.grid**2, VOCABULARIES[case.vocabulary][1]
    counts = [max(1, min(case.classes, round(per_image * (b + 1)) - round(per_image * b))) for b in range(case.images)]
    ids = torch.cat([torch.randperm(case.classes, generator=generator)[:count] for count in counts])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=on_device, device=device)

    return Inputs(
        (normal(case.images, case.classes, patches) * 0.05).to(dtype).transpose(1, 2).requires_grad_(),
        (normal(case.classes, patches) * 0.01).t().requires_grad_(),
        F.normalize(normal(case.images, patches, WIDTH), dim=-1).to(dtype),
        ids,
        torch.tensor([0, *counts]).cumsum(0),
        normal(len(ids), WIDTH),
    )


def eager_rectify_and_pool(
    logits: Tensor, bias: Tensor, features: Tensor, class_ids: Tensor, bounds: list[int]
) -> Tensor:
    """Plain PyTorch: rectify, sample one-hot masks, pool the hypothesis rows of each image."""
    masks = F.gumbel_softmax((logits - bias) / TAU, tau=1.0, hard=True, dim=-1)
    pooled = []
    for image, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        rows = masks[image].index_select(1, class_ids[start:stop]).t()
        area = rows.sum(1, keepdim=True)
        pooled.append((rows.to(features.dtype) @ features[image]) / area.clamp(min=1.0))
    return torch.cat(pooled)


def padded_rows(class_ids: Tensor, bounds: list[int]) -> tuple[Tensor, Tensor]:
    """The hypothesis rows as ``(B, R)`` class ids, padded with class 0 to the longest row, and the indices ``(K,)`` of
    the true ids among all B·R."""
    counts = [stop - start for start, stop in pairwise(bounds)]
    most = max(counts, default=0)
    index = torch.cat([torch.arange(count) + image * most for image, count in enumerate(counts)])
    padded = torch.zeros(len(counts) * most, dtype=torch.int64).index_copy(0, index, class_ids)
    return padded.view(len(counts), most), index


def eager_batched(logits: Tensor, bias: Tensor, features: Tensor, padded: Tensor, index: Tensor) -> Tensor:
    """Like :func:`eager_rectify_and_pool`, with one product for all images; see :func:`padded_rows`."""
    masks = F.gumbel_softmax((logits - bias) / TAU, tau=1.0, hard=True, dim=-1)
    rows = masks.gather(2, padded[:, None, :].expand(-1, masks.shape[1], -1)).transpose(1, 2)
    pooled = torch.bmm(rows.to(features.dtype), features) / rows.sum(2, keepdim=True).clamp(min=1.0)
    return pooled.flatten(0, 1)[index]


def eager_upsample_argmax(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Plain PyTorch: interpolate, then argmax."""
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False).argmax(1)


def eager_upsample_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Plain PyTorch: interpolate, then cross entropy, averaged image by image."""
    logits = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    loss = F.cross_entropy(logits.float(), labels, ignore_index=-1, reduction="none")
    return loss.sum((1, 2)) / (labels >= 0).sum((1, 2)).clamp(min=1)


def eager_upsample_l1(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Plain PyTorch: interpolate both, then their distance, averaged image by image."""
    size = valid.shape[1:]
    student, teacher = (F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in (student, teacher))
    distance = (student.float() - teacher.float()).abs().sum(1)
    return (distance * valid).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)


def loss_method(case: Case, name: str) -> Callable[[Maps], None]:
    """The function to time for a loss: its forward and backward pass."""
    cross_entropy = case.operator == "upsample_cross_entropy"
    eager = eager_upsample_cross_entropy if cross_entropy else eager_upsample_l1
    ours = upsample_cross_entropy if cross_entropy else upsample_l1
    if name.startswith("compile"):
        eager = torch.compile(eager, dynamic=False)

    def train(maps: Maps) -> None:
        with use_kernels(name == "ours"):
            function = ours if name in ("ours", "twin") else eager
            loss = function(*(tensor for tensor in maps if tensor is not None)).mean()
        torch.autograd.grad(loss, maps.student)

    return train


def method(case: Case, name: str, device: torch.device) -> Callable[[Inputs | Maps | Tensor], None]:
    """The function to time: a forward and backward pass, or a label map."""
    if case.operator in LOSSES:
        return loss_method(case, name)
    if case.operator == "upsample_argmax":
        size = (case.height, case.width)
        compiled = torch.compile(eager_upsample_argmax, dynamic=False) if name.startswith("compile") else None

        def label(logits: Tensor) -> None:
            if compiled or name in ("eager", "batched"):
                (compiled or eager_upsample_argmax)(logits, size)
            else:
                with use_kernels(name == "ours"):
                    upsample_argmax(logits, size)

        return torch.no_grad()(label)

    eager = eager_batched if name.endswith("batched") else eager_rectify_and_pool
    if name.startswith("compile"):
        eager = torch.compile(eager, dynamic=False)

    def train(inputs: Inputs) -> None:
        if name in ("batched", "compile-batched"):
            rows = (tensor.to(device) for tensor in padded_rows(inputs.class_ids, inputs.offsets.tolist()))
            pooled = eager(inputs.logits, inputs.bias, inputs.features, *rows)
        elif name in ("eager", "compile"):
            ids = inputs.class_ids.to(device)
            pooled = eager(inputs.logits, inputs.bias, inputs.features, ids, inputs.offsets.tolist())
        else:
            with use_kernels(name == "ours"):
                pooled, _ = rectify_and_pool(*inputs[:5], TAU, hard=True)
        torch.autograd.grad(pooled, (inputs.logits, inputs.bias), inputs.gradient.to(pooled.dtype))

    return train


def new_inputs(case: Case, device: torch.device, dtype: torch.dtype, seed: int) -> Inputs | Maps | Tensor:
    """One input set."""
    if case.operator in LOSSES:
        return make_maps(case, device, dtype, seed)
    if case.operator == "upsample_argmax":
        shape = (case.images, case.classes, case.grid, case.grid)
        return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)
    return make_inputs(case, device, dtype, seed)


def bytes_to_move(case: Case, inputs: Inputs | Maps | Tensor) -> int:
    """Bytes that a perfect implementation moves: each input read once per pass, each output written once."""
    if isinstance(inputs, Maps):
        return 2 * sum(tensor.nbytes for tensor in inputs if tensor is not None) + inputs.student.nbytes
    if isinstance(inputs, Tensor):
        return inputs.nbytes + 8 * case.images * case.height * case.width
    read = inputs.logits.nbytes + inputs.bias.nbytes + inputs.features.nbytes
    outputs = inputs.gradient.nbytes
    return 2 * read + inputs.logits.nbytes + inputs.bias.nbytes + 3 * outputs


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written, of a copy larger than all caches."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = [timed(lambda: target.copy_(source), device) for _ in range(10)]
    return 2 * source.nbytes / min(seconds)


def peak_here(case: Case, name: str, device: torch.device, dtype: torch.dtype) -> int:
    """Bytes that a pass adds to the peak of PyTorch's CUDA allocations or, on the CPU, of this process's resident set:
    call it in a fresh process there."""
    run = method(case, name, device)
    run(new_inputs(case, device, dtype, 1))  # so that compiled code, libraries and thread pools are not counted
    inputs = new_inputs(case, device, dtype, 0)
    peak = peak_bytes(lambda: run(inputs), device)
    return resident_peak_bytes(lambda: run(inputs)) if peak is None else peak


def resident_peak(case: Case, name: str, dtype: torch.dtype) -> int:
    """:func:`peak_here` on the CPU, in a separate process."""
    request = json.dumps({"case": case, "method": name, "dtype": str(dtype).removeprefix("torch.")})
    command = [sys.executable, str(Path(__file__).resolve()), "--memory-of", request]
    # A small mmap threshold: freed memory returns to the system, as with large inputs.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise ReclipError(f"measuring memory of {name} failed: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout.split()[-1])


def methods_of(case: Case, methods: list[str]) -> list[str]:
    """The methods of a case: upsampling has no rows to batch."""
    return [name for name in methods if case.operator == "rectify_and_pool" or not name.endswith("batched")]


def benchmark(case: Case, arguments: argparse.Namespace, bandwidth: float) -> dict:
    """Measure one case."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    first = new_inputs(case, device, dtype, 0)
    moved = bytes_to_move(case, first)
    sets = [first]
    cache = 512 * 2**20 if device.type == "cuda" else 128 * 2**20
    while len(sets) < 8 and len(sets) * moved < cache:
        sets.append(new_inputs(case, device, dtype, len(sets)))
    runs = {name: method(case, name, device) for name in methods_of(case, arguments.methods)}
    for run in runs.values():
        for _ in range(2):
            run(sets[0])
    turns = {name: lambda turn, run=run: run(sets[turn % len(sets)]) for name, run in runs.items()}
    seconds = take_turns(turns, device, arguments.repeats)
    result = {**case._asdict(), "name": case.name, "dtype": arguments.dtype, "bytes_to_move": moved}
    result["floor_seconds"] = moved / bandwidth
    result["methods"] = {}
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds["ours"], strict=True)]
        on_cuda = device.type == "cuda"
        peak = peak_here(case, name, device, dtype) if on_cuda else resident_peak(case, name, dtype)
        result["methods"][name] = {
            "median_seconds": statistics.median(values),
            "min_seconds": min(values),
            "over_ours": statistics.median(ratios),
            "over_floor": statistics.median(values) / result["floor_seconds"],
            "peak_bytes": peak,
        }
    return result


def cases(arguments: argparse.Namespace) -> list[Case]:
    """The cases asked for."""
    found = [
        Case("rectify_and_pool", vocabulary, VOCABULARIES[vocabulary][0], pixels, images)
        for vocabulary in arguments.vocabularies
        for pixels in arguments.pixels
        for images in arguments.batches
    ]
    if not arguments.no_upsample:
        found += [
            Case("upsample_argmax", name, classes, 512, 1, 512, 683)
            for name, classes in (("voc20", 20), ("ade150", 150), ("coco_stuff171", 171))
        ]
        found += [
            Case("upsample_cross_entropy", name, classes, 512, 1, 512, 512)
            for name, classes in (("voc20", 20), ("ade150", 150))
        ]
        found.append(Case("upsample_l1", "any", 0, 512, 1, 512, 512))
    return found


def table(results: list[dict]) -> str:
    """The results of one operator as a Markdown table."""
    others = [name for name in results[0]["methods"] if name != "ours"]
    head = ["case", "ours (ms)", *(f"{name} (ms)" for name in others), *(f"{name} / ours" for name in others)]
    head += ["ours / floor", "peak ours (MiB)", *(f"peak {name}" for name in others)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for result in results:
        rows = result["methods"]
        cells = [result["name"], f"{rows['ours']['median_seconds'] * 1e3:.2f}"]
        cells += [f"{rows[name]['median_seconds'] * 1e3:.1f}" for name in others]
        cells += [f"{rows[name]['over_ours']:.1f}x" for name in others]
        cells += [f"{rows['ours']['over_floor']:.1f}x", f"{rows['ours']['peak_bytes'] / 2**20:.1f}"]
        cells += [f"{rows[name]['peak_bytes'] / 2**20:.1f}" for name in others]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    result.add_argument("--json", metavar="FILE", help="write all figures there")
    result.add_argument("--vocabularies", nargs="+", choices=sorted(VOCABULARIES), default=list(VOCABULARIES))
    result.add_argument("--pixels", nargs="+", type=int, default=[336, 512, 1024], help="side of the input images")
    result.add_argument("--batches", nargs="+", type=int, default=[1, 12, 16])
    result.add_argument("--methods", nargs="+", choices=METHODS, default=["ours", "eager", "batched", "compile"])
    result.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    result.add_argument("--repeats", type=int, default=15)
    result.add_argument("--threads", type=int, help="CPU threads")
    result.add_argument("--no-upsample", action="store_true", help="skip the operators that upsample")
    result.add_argument("--memory-of", help=argparse.SUPPRESS)
    return result


@exit_on_error
def main() -> None:
    """Run the benchmark."""
    arguments = parser().parse_args()
    for name in ("pixels", "batches", "repeats", "threads"):
        values = getattr(arguments, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < (16 if name == "pixels" else 1):
                raise ReclipError(f"--{name} {value}: give a larger number")
    if arguments.json is not None:
        arguments.json = check_output_path(arguments.json, "--json")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        request = json.loads(arguments.memory_of)
        dtype, cpu = getattr(torch, request["dtype"]), torch.device("cpu")
        print(peak_here(Case(*request["case"]), request["method"], cpu, dtype))
        return
    if "ours" not in arguments.methods:
        raise ReclipError("--methods must name ours: the ratios are over it")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ReclipError("--device cuda: no CUDA device is visible; use --device cpu")
    if not kernels_available(arguments.device):
        raise ReclipError(
            f"the extension has no {arguments.device} kernels: build it with pip install -e . --no-build-isolation"
        )
    device = torch.device(arguments.device)
    bandwidth = copy_bandwidth(device)
    report = {"command": sys.argv[1:], **machine(device), "copy_bytes_per_second": bandwidth, "results": []}
    for case in cases(arguments):
        print(f"measuring {case.operator}: {case.name}", file=sys.stderr)
        torch.compiler.reset()
        report["results"].append(benchmark(case, arguments, bandwidth))
        if arguments.json:  # after every case, so that an interrupted run keeps its results
            with atomic_write(arguments.json) as path:
                path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{report['processor']}, copy {bandwidth / 1e9:.1f} GB/s, {arguments.dtype}")
    for operator in OPERATORS:
        chosen = [result for result in report["results"] if result["operator"] == operator]
        if chosen:
            print(f"\n{operator}\n\n{table(chosen)}")


if __name__ == "__main__":
    main()
