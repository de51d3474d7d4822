#!/usr/bin/env python
"""Summarise demo reports of several seeds as a Markdown table: mean and sample standard deviation.

for seed in 0 1 2; do python tools/demo.py --seed $seed --output-dir output/demo_$seed; done
python tools/summarize_demo.py output/demo_0 output/demo_1 output/demo_2 --output docs/results.md
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from reclip_d2.errors import ReclipError, exit_on_error  # noqa: E402
from reclip_d2.io import atomic_write  # noqa: E402
from reclip_d2.reproduction.machine import machine, versions  # noqa: E402
from reclip_d2.reproduction.verdicts import spread  # noqa: E402

# Row of the table: title, path in report.json.
ROWS = (
    ("MaskCLIP", ("maskclip", "mIoU")),
    ("control: 3x3 mean filter on its logits", ("mean_filter", "3x3")),
    ("control: 5x5 mean filter on its logits", ("mean_filter", "5x5")),
    ("control: mean-probability calibration by class", ("calibration", "class")),
    ("control: mean-probability calibration by position and class", ("calibration", "position_class")),
    ("ReCLIP++ (rectified, as published)", ("reclippp", "mIoU")),
    ("ReCLIP++ (the same, but M = M_q: no bias subtracted)", ("reclippp_no_bias", "mIoU")),
    ("ReCLIP++ (rectified, our extensions)", ("reclippp_ext", "mIoU")),
)


def read_report(folder: Path) -> dict[str, Any]:
    """``report.json`` of a demo's folder."""
    try:
        return json.loads((folder / "report.json").read_text())
    except (OSError, ValueError) as error:
        raise ReclipError(f"{folder}/report.json cannot be read ({error}): run tools/demo.py first") from error


def value(report: dict[str, Any], path: tuple[str, str]) -> float:
    """Entry of a report."""
    return report[path[0]][path[1]]


def markdown(reports: list[dict[str, Any]], folders: list[Path]) -> str:
    """The page."""
    reports = sorted(reports, key=lambda report: report["seed"])
    baseline = [value(report, ("maskclip", "mIoU")) for report in reports]
    best_control = [max(report["mean_filter"]["mIoU"], report["calibration"]["mIoU"]) for report in reports]
    seeds = " ".join(str(report["seed"]) for report in reports)
    lines = [
        "# Results on the embedded data set",
        "",
        f"mIoU in percent on `{reports[0]['dataset']}` (Detectron2's SemSegEvaluator), seeds {seeds}, mean ± sample",
        "standard deviation; the world and the CLIP are the ones that ship with the package, so the spread is that of",
        "the rectification alone. Hyper-parameters were chosen on `embedded_dev`.",
        "",
        "| model | mIoU | against MaskCLIP | against the best control | seconds of training |",
        "|---|---|---|---|---|",
    ]
    for title, path in ROWS:
        values = [value(report, path) for report in reports]
        gain = spread([a - b for a, b in zip(values, baseline, strict=True)])
        margin = spread([a - b for a, b in zip(values, best_control, strict=True)])
        seconds = [report[path[0]].get("train_seconds") for report in reports]
        took = spread(seconds) if all(s is not None for s in seconds) else "none"
        lines.append(f"| {title} | {spread(values)} | {gain} | {margin} | {took} |")
    bias = [value(r, ("reclippp", "mIoU")) - value(r, ("reclippp_no_bias", "mIoU")) for r in reports]
    lines += ["", f"What subtracting M_b adds to the published model, seed by seed: {spread(bias)} points."]
    lines += [
        "",
        "| hypotheses of the training images | precision | recall | classes | classes in truth |",
        "|---|---|---|---|---|",
    ]
    for title, key in (("Eq. (6), as published", "hypothesis"), ("calibrated (ours)", "hypothesis_ext")):
        quality = reports[0][key]
        keys = ("precision", "recall", "classes_in_hypothesis", "classes_per_image")
        lines.append(" | ".join([f"| {title}", *(f"{quality[k]:.2f}" for k in keys)]) + " |")
    names = " ".join(str(folder) for folder in folders)
    lines += [
        "",
        "Commands:",
        "",
        "```",
        f"for seed in {seeds}; do python tools/demo.py --seed $seed --output-dir output/demo_$seed; done",
        f"python tools/summarize_demo.py {names} --output docs/results.md",
        "```",
        "",
        f"Machine: {machine('cpu')}, {', '.join(f'{name} {version}' for name, version in versions().items())}.",
    ]
    return "\n".join(lines) + "\n"


@exit_on_error
def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="output folders of tools/demo.py")
    parser.add_argument("--output", type=Path, required=True, help="Markdown file")
    args = parser.parse_args()
    page = markdown([read_report(folder) for folder in args.folders], args.folders)
    with atomic_write(args.output) as temporary:
        temporary.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
