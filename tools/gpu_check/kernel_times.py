"""Times of the operators and of each kernel, against the roofline and against plain PyTorch.

For each case: forward and backward of the operator with rotating inputs, timed with device events; the same for an
eager loop over the images, an eager batched product, and the latter with torch.compile; the host time; both times for
replays of a CUDA graph of the call; and, when all cases are timed (the profiler slows what follows), the time of each
kernel from PyTorch's profiler. The roofline is the bytes that must move (every input read once per pass, every
output written once) over the copy bandwidth that the step `ceilings` measured in the same run.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from reclip_d2.layers import NoiseCounter, draw_seed, rectify_and_pool, use_kernels
from reclip_d2.utils.measuring import host_seconds, median_seconds, peak_bytes
from tools.benchmark_kernels import (
    TAU,
    Case,
    Inputs,
    Maps,
    bytes_to_move,
    copy_bandwidth,
    method,
    methods_of,
    new_inputs,
)
from tools.gpu_check.figures import MORE_TO_DO, Clock, read_ceilings, read_figures, write_figures

METHODS = ["ours", "eager", "batched", "compile-batched"]
# Most important first: case, type, layout of the logits ("cn": as from a convolution, "nc": classes contiguous), and
# whether to time torch.compile (it needs about ten seconds per case).
CUDA_CASES = [
    (Case("rectify_and_pool", "voc20", 20, 512, 12), "float32", "cn", True),
    (Case("rectify_and_pool", "ade150", 150, 512, 8), "float32", "cn", False),
    (Case("rectify_and_pool", "large1000", 1000, 1024, 64), "float32", "cn", True),
    (Case("upsample_argmax", "ade150", 150, 512, 1, 512, 683), "float32", "cn", False),
    (Case("upsample_l1", "any", 0, 512, 12, 512, 512), "float32", "cn", False),
    (Case("upsample_cross_entropy", "ade150", 150, 512, 12, 512, 512), "float32", "cn", False),
    (Case("rectify_and_pool", "large1000", 1000, 1024, 64), "bfloat16", "cn", False),
    (Case("rectify_and_pool", "ade150", 150, 512, 8), "bfloat16", "cn", False),
    (Case("rectify_and_pool", "voc20", 20, 512, 12), "float32", "nc", False),
    (Case("rectify_and_pool", "ade150", 150, 512, 8), "float32", "nc", False),
    (Case("rectify_and_pool", "large1000", 1000, 1024, 64), "float32", "nc", False),
    (Case("rectify_and_pool", "coco171", 171, 512, 8), "float32", "cn", False),
    (Case("rectify_and_pool", "coco171", 171, 512, 8), "bfloat16", "nc", False),
    (Case("upsample_argmax", "voc20", 20, 512, 1, 512, 683), "bfloat16", "cn", False),
    (Case("upsample_argmax", "coco171", 171, 512, 1, 512, 683), "float32", "cn", True),
]
CPU_CASES = [
    (Case("rectify_and_pool", "voc20", 20, 64, 2), "float32", "cn", False),
    (Case("rectify_and_pool", "ade150", 150, 64, 2), "bfloat16", "nc", False),
    (Case("upsample_argmax", "ade150", 150, 64, 1, 64, 85), "float32", "cn", False),
    (Case("upsample_l1", "any", 0, 64, 2, 64, 64), "float32", "cn", False),
    (Case("upsample_cross_entropy", "ade150", 150, 64, 2, 64, 64), "bfloat16", "nc", False),
]


def with_layout(inputs: Inputs | Maps | Tensor, layout: str) -> Inputs | Maps | Tensor:
    """The inputs with logits in the given layout."""
    if isinstance(inputs, Maps):
        if layout == "cn":
            return inputs
        student = inputs.student.detach().contiguous(memory_format=torch.channels_last)
        return inputs._replace(student=student.requires_grad_())
    if isinstance(inputs, Tensor):
        return inputs if layout == "cn" else inputs.contiguous(memory_format=torch.channels_last)
    if layout == "cn":
        return inputs
    return inputs._replace(logits=inputs.logits.detach().contiguous().requires_grad_())


def pass_seconds(sets: list[Inputs], device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds of our forward pass alone, and of our backward pass alone."""

    def forward(call: int) -> Tensor:
        return rectify_and_pool(*sets[call % len(sets)][:5], TAU, hard=True)[0]

    graphs = [forward(call) for call in range(len(sets))]

    def backward(call: int) -> None:
        inputs, pooled = sets[call % len(sets)], graphs[call % len(sets)]
        torch.autograd.grad(pooled, (inputs.logits, inputs.bias), inputs.gradient.to(pooled.dtype), retain_graph=True)

    return {
        "forward_seconds": median_seconds(forward, device, repeats),
        "backward_seconds": median_seconds(backward, device, repeats),
    }


def kernel_seconds(function: Any, device: torch.device, calls: int) -> dict[str, float]:
    """Mean seconds per call of each kernel, by name; empty if the profiler sees no kernels (on the CPU)."""
    if device.type != "cuda":
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for call in range(calls):
            function(call)
        torch.cuda.synchronize(device)
    totals = {event.key: event.self_device_time_total for event in recorded.key_averages()}
    return {
        name[:160]: total / 1e6 / calls for name, total in sorted(totals.items(), key=lambda item: -item[1]) if total
    }


def graph_seconds(sets: list[Inputs], device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds, and host seconds, of replays of a CUDA graph of both passes; rows and seed are on the GPU."""
    graphs, stream = [], torch.cuda.Stream(device)
    for inputs in sets:
        rows = [rows.to(device) for rows in inputs[3:5]]
        counter = NoiseCounter(draw_seed(), device)

        def call(inputs: Inputs = inputs, rows: list[Tensor] = rows, counter: NoiseCounter = counter) -> None:
            pooled = rectify_and_pool(*inputs[:3], *rows, TAU, hard=True, seed=counter)[0]
            torch.autograd.grad(pooled, (inputs.logits, inputs.bias), inputs.gradient.to(pooled.dtype))

        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream(device).wait_stream(stream)
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], stream=stream):
            call()

    def replay(number: int) -> None:
        graphs[number % len(graphs)].replay()

    return {
        "graph_seconds": median_seconds(replay, device, repeats),
        "graph_host_seconds": host_seconds(replay, device, repeats),
    }


def input_sets(
    case: Case, dtype_name: str, layout: str, device: torch.device
) -> list[Inputs] | list[Maps] | list[Tensor]:
    """Different inputs of a case, together larger than the caches."""
    dtype = getattr(torch, dtype_name)
    sets = [with_layout(new_inputs(case, device, dtype, seed), layout) for seed in (0, 1)]
    moved = bytes_to_move(case, sets[0])
    cache = 256 * 2**20 if device.type == "cuda" else 2**20
    while len(sets) < 8 and len(sets) * moved < cache:
        sets.append(with_layout(new_inputs(case, device, dtype, len(sets)), layout))
    return sets


def measure(case: Case, dtype_name: str, layout: str, compiled: bool, device: torch.device, bandwidth: float) -> dict:
    """The times of one case."""
    sets = input_sets(case, dtype_name, layout, device)
    moved = bytes_to_move(case, sets[0])
    repeats = 20 if device.type == "cuda" else 3
    result: dict[str, Any] = {
        **case._asdict(), "name": case.name, "dtype": dtype_name, "layout": layout, "input_sets": len(sets),
        "bytes_to_move": moved, "floor_seconds": moved / bandwidth, "methods": {},
    }  # fmt: skip
    wanted = [name for name in METHODS if compiled or not name.startswith("compile")]
    names = methods_of(case, wanted + ["compile"] * (compiled and case.operator != "rectify_and_pool"))
    for name in names:
        try:
            run = method(case, name, device)
            result["methods"][name] = {
                "median_seconds": median_seconds(lambda call, run=run: run(sets[call % len(sets)]), device, repeats),
                "peak_bytes": peak_bytes(lambda run=run: run(sets[0]), device),
            }
        except Exception as error:  # a method that fails or runs out of memory does not affect the others
            if name == "ours":
                raise
            result["methods"][name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            torch.compiler.reset()
    ours = method(case, "ours", device)
    result["roofline"] = result["floor_seconds"] / result["methods"]["ours"]["median_seconds"]
    result["host_seconds"] = host_seconds(lambda call: ours(sets[call % len(sets)]), device, repeats)
    if case.operator == "rectify_and_pool":
        with use_kernels(True):
            result.update(pass_seconds(sets, device, repeats))
            if device.type == "cuda":
                result.update(graph_seconds(sets, device, repeats))
    return result


def profile_case(case: Case, result: dict[str, Any], device: torch.device) -> None:
    """Add the times of the operator's kernels to a case, and their sums for it and the eager methods."""
    sets = input_sets(case, result["dtype"], result["layout"], device)
    for name in ("ours", "eager", "batched"):
        if "median_seconds" not in result["methods"].get(name, {}):
            continue
        run = method(case, name, device)
        kernels = kernel_seconds(lambda call, run=run: run(sets[call % len(sets)]), device, 3)
        result["methods"][name]["device_seconds"] = sum(kernels.values()) or None
        if name == "ours":
            result["kernels"] = kernels


def main() -> int:
    """Measure as many cases as time allows; figures are written after each. Finished cases are skipped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--seconds", type=float, default=100.0, help="no case is started after this time")
    options = parser.parse_args()
    device, clock = torch.device(options.device), Clock(options.seconds)
    bandwidth = read_ceilings().get("copy_bytes_per_second") or copy_bandwidth(device)
    cases = CUDA_CASES if device.type == "cuda" else CPU_CASES
    done = read_figures().get("cases", [])
    measured = {(result["operator"], result["name"], result["dtype"], result["layout"]) for result in done}
    figures = {"copy_bytes_per_second": bandwidth, "cases": done, "left_out": len(cases) - len(done)}
    for case, dtype, layout, compiled in cases:
        if (case.operator, case.name, dtype, layout) in measured:
            continue
        if clock.left() <= 0:
            break
        result = measure(case, dtype, layout, compiled, device, bandwidth)
        figures["cases"].append(result)
        figures["left_out"] -= 1
        write_figures(figures)
        microseconds = result["methods"]["ours"]["median_seconds"] * 1e6
        print(
            f"{case.operator} {case.name} {dtype} {layout}: {microseconds:.1f} us, {result['roofline']:.0%} of roofline"
        )
    by_name = {case.name: case for case, *_ in cases}
    for result in figures["cases"]:
        if "kernels" not in result and clock.left() > 0:
            profile_case(by_name[result["name"]], result, device)
            write_figures(figures)
    print(f"{len(figures['cases'])} cases, {figures['left_out']} skipped for lack of time")
    profiled = all("kernels" in result for result in figures["cases"])
    return MORE_TO_DO if figures["left_out"] or not profiled else 0


if __name__ == "__main__":
    sys.exit(main())
