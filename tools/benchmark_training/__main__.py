"""Time and memory of training, of ``reclip segment`` and of their growth, with a random ViT-B/16 and generated images.

    python -m tools.benchmark_training --json benchmark.json --report docs/speed.md
    python -m tools.benchmark_training --json benchmark.json --part a c
    python -m tools.benchmark_training --json benchmark.json --only b/12 b/12-fast

Parts:
- a: an iteration of rectification for each data set's config, with fresh crops and from the feature store;
- b: the whole of ``reclip segment``, by stage, and ``--fast``;
- c: growth with classes, with the side of an image, and with the number of images;
- d: an iteration of distillation, with fresh crops and from the store;
- paper: operations and launches of a rectification, and the time that they take on an H100 on paper.

Variants take turns within each repetition, so that drifts of the machine affect all of them: a ratio is the median of
the repetitions' ratios. Runs and predictions have a fresh process and an empty cache. Precisions
are the configs' own: on CUDA the frozen image tower is in bfloat16. There, times are of device events, and memory is
the growth of the allocator's peak.

Figures are written after each measurement, and those of the file are not measured again without --fresh.
"""

from __future__ import annotations

import reclip_d2.utils.program_start  # noqa: F401  isort: skip  (first: see there)
import argparse
import dataclasses
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from reclip_d2.errors import ReclipError, exit_on_error
from reclip_d2.utils.output_paths import check_output_path
from reclip_d2.utils.progress import report_to
from tools.benchmark_training import growth, paper_sum, runs, steps
from tools.benchmark_training.bars import all_bars
from tools.benchmark_training.inputs import Settings
from tools.benchmark_training.report import markdown, write_report
from tools.benchmark_training.results import QUIET_LOAD, Results

PARTS = ("a", "b", "c", "d", "paper")
Measurements = dict[str, Callable[[], dict[str, Any]]]
# Classes of a run of so many photographs; 20 for other numbers.
CLASSES = {12: 11}


def measurements(settings: Settings, photographs: list[int], ceilings: paper_sum.Ceilings) -> Measurements:
    """All measurements by name, ``part/rest``, in the order in which they are made: what goals depend on first, the
    longest run last."""
    quick = settings.quick
    counts, sides, images = ([4, 12], [128, 256], [10, 40]) if quick else (
        [20, 150, 1000], [512, 1024, 2048, 4096, 8192], [10, 100, 1000, 10_000]
    )  # fmt: skip
    cases = steps.step_cases(settings)
    first = next(iter(cases))
    numbers = sorted(set(photographs))

    def run(number: int, fast: bool = False) -> Callable[[], dict[str, Any]]:
        return lambda: runs.segment_run(settings, number, 4 if quick else CLASSES.get(number, 20), fast)

    def step(name: str) -> Callable[[], dict[str, Any]]:
        return lambda: steps.rectification(settings, cases[name]())

    return {
        f"b/{numbers[0]}": run(numbers[0]),
        f"b/{numbers[0]}-fast": run(numbers[0], fast=True),
        **{f"a/{name}": step(name) for name in cases},
        "c/classes": lambda: steps.class_growth(settings, counts),
        "c/classes-fresh": lambda: steps.class_growth(settings, counts[-2:], store=False),
        "c/sides": lambda: growth.image_sides(settings, sides),
        "c/images": lambda: growth.store_sizes(settings, images, draws=5 if quick else 200),
        f"paper/{first}": lambda: on_paper(settings, cases[first](), ceilings),
        f"d/{first}": lambda: steps.distillation(settings),
        **{f"b/{number}": run(number) for number in numbers[1:]},
    }


def on_paper(settings: Settings, case: steps.StepCase, ceilings: paper_sum.Ceilings) -> dict[str, Any]:
    """The sum for VOC 2012, 1,464 images. Counting is done on the CPU."""
    settings = dataclasses.replace(settings, device=torch.device("cpu"))
    work = paper_sum.count_rectification(settings, case, images=1464)
    seconds = {
        name: paper_sum.rectification_seconds(work, ceilings, graph)
        for name, graph in (("eager", False), ("CUDA graph", True))
    }
    return {
        "work": dataclasses.asdict(work),
        "ceilings": dataclasses.asdict(ceilings),
        "seconds": seconds,
        "totals": {name: sum(parts.values()) for name, parts in seconds.items()},
    }


def chosen(found: Measurements, parts: list[str], only: list[str]) -> Measurements:
    """The measurements of ``--part`` and ``--only``.

    Raises:
        ReclipError: a name of ``--only`` is unknown.
    """
    for name in only:
        if name not in found:
            raise ReclipError(f"--only {name} is unknown: choose from {', '.join(found)}")
    if only:
        return {name: found[name] for name in only}
    return {name: measure for name, measure in found.items() if name.partition("/")[0] in parts}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m tools.benchmark_training", description=__doc__.splitlines()[0])
    result.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure (default: all)")
    result.add_argument("--only", nargs="+", default=[], metavar="NAME", help="single measurements, such as a/voc20")
    result.add_argument("--json", type=Path, metavar="FILE", help="the figures; those that it has are kept")
    result.add_argument("--report", type=Path, metavar="PAGE", help="write the tables between the marks of this page")
    result.add_argument("--fresh", action="store_true", help="measure again what the file has")
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    result.add_argument("--photographs", nargs="+", type=int, default=[12, 100], help="sizes of the runs of part b")
    result.add_argument("--repeats", type=int, default=3, help="repetitions of steps")
    result.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    result.add_argument("--ceilings", type=Path, metavar="FILE", help="ceilings of a GPU, JSON: see paper_sum.Ceilings")
    result.add_argument("--folder", type=Path, help="working folder, about 3 GB (default: a temporary one)")
    result.add_argument("--quick", action="store_true", help="the tiny CLIP and few images: tests the program")
    return result


def read_ceilings(path: Path | None) -> paper_sum.Ceilings:
    """The default ceilings, with those of a JSON file in their place.

    Raises:
        ReclipError: the file cannot be read, or has a value that is no number above 0.
    """
    if path is None:
        return paper_sum.Ceilings()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        names = [field.name for field in dataclasses.fields(paper_sum.Ceilings)]
        given = {name: float(values[name]) for name in names if name in values}
    except (OSError, ValueError, TypeError) as error:
        raise ReclipError(f"--ceilings {path} is no JSON object of numbers: {error}") from error
    if not given or min(given.values()) <= 0:
        raise ReclipError(f"--ceilings {path} needs some of {', '.join(names)}, above 0")
    return paper_sum.Ceilings(**given)


def run_all(wanted: Measurements, results: Results, report: Path | None) -> list[str]:
    """Measure what the results lack; returns the names of measurements that failed."""
    failed = []
    for name, measure in wanted.items():
        if name in results.figures:
            print(f"{name}: measured before", file=sys.stderr)
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        begin = time.perf_counter()
        try:
            with report_to(None):
                figures = measure()
        except Exception as error:  # the others are still worth measuring
            traceback.print_exc()
            print(f"{name} failed: {error}", file=sys.stderr)
            failed.append(name)
            continue
        seconds = time.perf_counter() - begin
        results.add(name, {**figures, "measured_in": seconds})
        print(f"{name}: done in {seconds:.0f} s", file=sys.stderr, flush=True)
        if report is not None:
            write_report(report, markdown(results))
    return failed


@exit_on_error
def main() -> int:
    """Run the benchmark."""
    arguments = parser().parse_args()
    for name in ("repeats", "threads"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise ReclipError(f"--{name} {value}: give a number above 0")
    if min(arguments.photographs) < 1:
        raise ReclipError(f"--photographs {min(arguments.photographs)}: give numbers above 0")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ReclipError("--device cuda: no CUDA device is visible; use --device cpu")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    path = None if arguments.json is None else check_output_path(arguments.json, "--json")
    device = torch.device(arguments.device)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
        folder = arguments.folder or Path(temporary)
        settings = Settings(device, folder.resolve(), arguments.quick, arguments.repeats)
        found = measurements(settings, arguments.photographs, read_ceilings(arguments.ceilings))
        wanted = chosen(found, arguments.part, arguments.only)
        results = Results(path, device, arguments.quick)
        if arguments.fresh:
            results.drop(list(wanted))
        if (load := results.runs[-1]["load"]) > QUIET_LOAD:
            print(f"warning: the machine is busy (load average {load:.2f}): only ratios will mean something")
        if arguments.report is not None:
            write_report(arguments.report, markdown(results))
        failed = run_all(wanted, results, arguments.report)
    print(markdown(results))
    missed = [bar.text for bar in all_bars(results) if bar.verdict == "FAIL"]
    if missed and not arguments.quick:
        print(f"missed: {'; '.join(missed)}", file=sys.stderr)
    if failed:
        raise ReclipError(f"{len(failed)} measurements failed: {', '.join(failed)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
