"""The figures as Markdown tables, printed and written between two marks of a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from reclip_d2.errors import ReclipError
from reclip_d2.utils.files import format_bytes
from reclip_d2.utils.io import atomic_write
from tools.benchmark_training.bars import all_bars
from tools.benchmark_training.results import QUIET_LOAD, Results

BEGIN, END = "<!-- training benchmark: begin -->", "<!-- training benchmark: end -->"


def markdown(results: Results) -> str:
    """All tables."""
    sections = [_machines(results), _bars(results)] if results.figures else ["Not measured yet."]
    if steps := results.of_part("a"):
        sections.append("### Step of rectification\n\n" + _steps(steps))
    if runs := results.of_part("b"):
        sections.append("### `reclip segment`\n\n" + _runs(runs))
    growth = results.of_part("c")
    for name, source in (("classes", "From the store"), ("classes-fresh", "With fresh crops")):
        if name in growth:
            title = "### Growth with classes\n\n" if name == "classes" else ""
            sections.append(title + _classes(growth[name], source))
    if "sides" in growth:
        sections.append("### Growth with the image\n\n" + _sides(growth["sides"]))
    if "images" in growth:
        sections.append("### Growth of the feature store\n\n" + _store(growth["images"]))
    if steps := results.of_part("d"):
        sections.append("### Step of distillation\n\n" + _steps(steps))
    for figures in results.of_part("paper").values():
        sections.append("### Rectification on a GPU, on paper\n\n" + _paper(figures))
    return "\n\n".join(sections) + "\n"


def write_report(page: Path, text: str) -> None:
    """Replace what is between the marks of a page.

    Raises:
        ReclipError: the page has no marks.
    """
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ReclipError(f"--report {page} has no lines {BEGIN} and {END}: add them where the tables belong")
    with atomic_write(page) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def duration(seconds: float) -> str:
    """Three digits, in a readable unit."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds / 60:.0f} min"


def _machines(results: Results) -> str:
    used = {figures["run"] for figures in results.figures.values()}
    lines = []
    for number in sorted(used):
        run = results.runs[number]
        cores = f", {run['cores']} cores, {run['threads']} threads" if "cores" in run else ""
        names = ", ".join(name for name, figures in results.figures.items() if figures["run"] == number)
        lines.append(
            f"- {run['began']} UTC: {run['processor']}{cores}, torch {run['torch']}, load average at the start"
            f" {run['load']:.2f}: {names}"
        )
    if results.busy_runs():
        lines += [
            "",
            f"**The machine was busy** (load above {QUIET_LOAD:g} at the start of a run): trust ratios of variants that"
            " took turns, not seconds.",
        ]
    return "\n".join(lines)


def _bars(results: Results) -> str:
    rows = []
    for bar in all_bars(results):
        value = "" if bar.value is None else f"{bar.value:.3g} {bar.unit}"
        sign = "at least" if bar.at_least else "at most"
        rows.append([bar.text, value, f"{sign} {bar.limit:g} {bar.unit}", bar.verdict])
    return table(["goal", "measured", "limit", ""], rows)


def _steps(parts: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, figures in parts.items():
        for variant, row in figures["variants"].items():
            low, high = min(row["seconds"]), max(row["seconds"])
            rows.append(
                [
                    name, str(figures["classes"]), str(figures["images"]), variant, duration(row["median_seconds"]),
                    f"{duration(low)} to {duration(high)}", f"{row['images_per_second']:.3g}",
                    format_bytes(row["peak_bytes"]), f"{row['ratio']:.3g}x",
                ]
            )  # fmt: skip
    head = ["config", "classes", "batch", "images from", "step", "range", "images/s", "memory of a step", "faster"]
    return table(head, rows)


def _runs(parts: dict[str, dict[str, Any]]) -> str:
    names = list(dict.fromkeys(stage for figures in parts.values() for stage in figures["stages"]))
    rows = []
    for figures in parts.values():
        ratio = figures.get("estimate_ratio")
        rows.append(
            [
                f"{figures['photographs']}{', `--fast`' if figures['fast'] else ''}", str(figures["classes"]),
                duration(figures["seconds"]),
                *(duration(figures["stages"][name]) if name in figures["stages"] else "" for name in names),
                f"{ratio:.2f}" if ratio else "", format_bytes(figures["peak_bytes"]),
            ]
        )  # fmt: skip
    return table(["photographs", "classes", "total", *names, "estimate / truth", "peak memory"], rows)


def _classes(figures: dict[str, Any], source: str) -> str:
    variants = figures["variants"]
    rows = [
        [f"{int(count):,}", duration(row["median_seconds"]), f"{row['images_per_second']:.3g}",
         f"{1 / row['ratio']:.3g}x", format_bytes(row["peak_bytes"])]
        for count, row in variants.items()
    ]  # fmt: skip
    first = f"over {next(iter(variants))} classes"
    return f"{source}, batch {figures['images']}.\n\n" + table(
        ["classes", "step", "images/s", first, "memory of a step"], rows
    )


def _sides(figures: dict[str, Any]) -> str:
    rows = [
        [f"{int(side):,} x {int(side):,}", duration(row["seconds"]), format_bytes(row["peak_bytes"])]
        for side, row in figures["sides"].items()
    ]
    return f"`reclip predict` on one image, {figures['classes']} classes, a fresh process each.\n\n" + table(
        ["image", "total", "peak memory of the process"], rows
    )


def _store(figures: dict[str, Any]) -> str:
    rows = [
        [f"{int(count):,}", duration(row["make_seconds"]), format_bytes(row["bytes_on_disk"]),
         duration(row["open_seconds"]), duration(row["batch_seconds"]), format_bytes(row["memory_bytes"])]
        for count, row in figures["counts"].items()
    ]  # fmt: skip
    return (
        f"One view of {figures['side']} px an image, {figures['width']} channels, features from a random generator in"
        f" place of CLIP, batches of {figures['batch']}. Views of 512 px have 16 times the bytes.\n\n"
        + table(["images", "make", "on disk", "open", "read a batch", "memory of the process"], rows)
    )


def _paper(figures: dict[str, Any]) -> str:
    work, ceilings = figures["work"], figures["ceilings"]
    inputs = table(
        ["input", "value"],
        [
            ["images, views of each, iterations", f"{work['images']:,}, {work['views']}, {work['iterations']:,}"],
            ["hypothesis of an image (all windows)", _cost(work["hypothesis"])],
            ["a view", _cost(work["view"])],
            ["an iteration from the store", f"{_cost(work['step'])}, {work['step_bytes'] / 1e6:.0f} MB moved"],
            ["decode and resize an image, one core of this machine", duration(work["reading_seconds"])],
            ["products in bfloat16, float32",
             f"{ceilings['bfloat16_flops'] / 1e12:.0f}, {ceilings['float32_flops'] / 1e12:.0f} TFLOP/s"],
            ["copy", f"{ceilings['copy_bytes_per_second'] / 1e12:.2g} TB/s"],
            ["an operator from the host, in a CUDA graph",
             f"{ceilings['launch_seconds'] * 1e6:g}, {ceilings['graph_launch_seconds'] * 1e6:g} us"],
        ],
    )  # fmt: skip
    sums = figures["seconds"]
    names = list(next(iter(sums.values())))
    rows = [[name, *(f"{parts[name]:.1f}" for parts in sums.values())] for name in names]
    rows.append(["**total**", *(f"**{figures['totals'][kind]:.0f}**" for kind in sums)])
    return f"{inputs}\n\n{table(['seconds', *sums], rows)}"


def _cost(cost: dict[str, float]) -> str:
    return f"{cost['flops'] / 1e9:,.1f} GFLOP, {cost['launches']:,} operators"
