"""The Markdown summary of a check's JSON state."""

from __future__ import annotations

from typing import Any

GOALS = """\
Goals on an H100 or H200: `rectify_and_pool` forward and backward at least 5 times as fast as the eager loop, 2 times as
fast as the eager batched product, 1.5 times as fast as torch.compile, and at 60 % of the roofline for B = 64, 64 x 64
patches, C = 1,000; at most 60 us of host time per call at voc20's size; `upsample_argmax` 10 times as fast as eager, in
a tenth of the memory."""


def markdown(state: dict[str, Any]) -> str:
    """The summary: the steps, then their measurements."""
    steps = state["steps"]
    ceilings = steps.get("ceilings", {}).get("figures", {})
    lines = [f"# GPU check: {ceilings.get('device_name', state['device'])}", ""]
    if state["device"] == "cpu":
        lines += ["***A dry run on the CPU.** Every step was small; the figures say nothing about a GPU.", ""]
    lines += [_ceilings_line(ceilings), ""] if ceilings else []
    if state["runs"]:
        lines += [
            f"{len(state['runs'])} run(s), the last on {state['runs'][-1]['began']}; sources {state['sources']}.",
            "",
        ]
    lines += ["| step | result | seconds | last line |", "|---|---|---|---|"]
    for name, step in steps.items():
        lines.append(f"| {name} | {step['status']} | {step.get('seconds', '')} | {_cell(step.get('last_line', ''))} |")
    for name, step in steps.items():
        if step.get("tail"):
            lines += ["", f"## {name}: {step['status']}", "", "```", *step["tail"], "```"]
    lines += _kernels(steps.get("kernels", {}).get("figures", {}))
    lines += _whole_step(steps.get("whole_step", {}).get("figures", {}))
    return "\n".join(lines)


def _ceilings_line(figures: dict[str, Any]) -> str:
    return (
        f"torch {figures['torch']}, CUDA {figures['cuda']}; copy {figures['copy_bytes_per_second'] / 1e9:.0f} GB/s"
        f" (read and written), products {figures['bfloat16_flops'] / 1e12:.1f} TFLOP/s in bfloat16,"
        f" {figures['float32_flops'] / 1e12:.1f} in float32."
    )


def _kernels(figures: dict[str, Any]) -> list[str]:
    if not figures.get("cases"):
        return []
    lines = ["", "## Operators", "", GOALS, ""]
    head = ["case", "type, layout", "ours (us)", "roofline", "kernels (us)", "host (us)", "graph (us)"]
    head += ["host of graph (us)", "eager / ours", "batched / ours", "compile / ours", "kernels, eager / ours"]
    head += ["memory, eager / ours"]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for case in figures["cases"]:
        ours = case["methods"]["ours"]
        compiled = case["methods"].get("compile-batched") or case["methods"].get("compile")
        eager = case["methods"].get("eager")
        cells = [
            f"{case['operator']}: {case['name']}",
            f"{case['dtype']}, {case['layout']}",
            f"{ours['median_seconds'] * 1e6:.1f}",
            f"{case['roofline']:.0%}",
            _microseconds(ours.get("device_seconds"), 1),
            _microseconds(case["host_seconds"]),
            _microseconds(case.get("graph_seconds"), 1),
            _microseconds(case.get("graph_host_seconds"), 1),
            *(_ratio(method, ours, "median_seconds") for method in (eager, case["methods"].get("batched"), compiled)),
            _ratio(eager, ours, "device_seconds"),
            _ratio(eager, ours, "peak_bytes"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if figures.get("left_out"):
        lines += ["", f"{figures['left_out']} cases were skipped for lack of time."]
    for case in figures["cases"]:
        if case.get("kernels"):
            lines += ["", f"{case['operator']}: {case['name']}, {case['dtype']}, {case['layout']}, by kernel:", ""]
            lines += [
                f"- {seconds * 1e6:.1f} us `{_cell(name)}`" for name, seconds in list(case["kernels"].items())[:12]
            ]
    return lines


def _microseconds(seconds: float | None, digits: int = 0) -> str:
    return f"{seconds * 1e6:.{digits}f}" if seconds else ""


def _ratio(other: dict[str, Any] | None, ours: dict[str, Any], key: str) -> str:
    if not other:
        return ""
    if "error" in other:
        return _cell(other["error"])[:60] if key == "median_seconds" else ""
    return f"{other[key] / ours[key]:.1f}x" if other.get(key) and ours.get(key) else ""


def _whole_step(figures: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, part in figures.items():
        if isinstance(part, dict) and "variants" in part:
            lines += [
                "",
                f"## {name}",
                "",
                "| variant | images/s | ms | kernels (ms) | host (ms) | peak (MiB) |",
                "|---|---|---|---|---|---|",
            ]
            lines += ["| " + " | ".join(_variant_cells(*item)) + " |" for item in part["variants"].items()]
            if part.get("left_out"):
                lines += ["", f"{part['left_out']} variants were skipped for lack of time."]
            if "error" in part:
                lines += ["", _cell(part["error"])]
        elif isinstance(part, dict) and "error" in part:
            lines += ["", f"## {name}", "", f"failed: {_cell(part['error'])}"]
        elif isinstance(part, dict):
            peak = f", {part['of_bfloat16_peak']:.0%} of the bfloat16 peak" if "of_bfloat16_peak" in part else ""
            lines += ["", f"## {name}", "", f"{part['crops_per_second']:.0f} crops/s{peak}."]
        else:
            lines += ["", f"## {name}", "", str(part)]
    return lines


def _variant_cells(variant: str, row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [variant, _cell(row["error"]), "", "", "", ""]
    milliseconds = [f"{row[key] * 1e3:.2f}" if row.get(key) else "" for key in ("kernel_seconds", "host_seconds")]
    peak = f"{row['peak_bytes'] / 2**20:.0f}" if row.get("peak_bytes") else ""
    return [variant, f"{row['images_per_second']:.1f}", f"{row['seconds'] * 1e3:.2f}", *milliseconds, peak]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")[:160]
