#!/usr/bin/env python
"""Reproduce the papers' tables and figures on one data set: all runs, then a report that checks each claimed ordering.

    python tools/reproduce.py --suite embedded --seeds 0 1 2 --out output/reproduce          # both embedded worlds
    python tools/reproduce.py --suite voc20 --tables II V --out output/reproduce_voc20    # real data and weights

The runs are listed in configs/ablations/paper.yaml, with the papers' numbers. Results are kept in DIR/runs; an
interrupted suite resumes when you repeat the command. Further CLIPs are pretrained to DIR/clips, unless they are there:
<world>-seed1.safetensors, as tools/pretrain_embedded_clip.py writes it. DIR/REPORT.md is written at the end;
--report-only writes it from the finished runs.
"""

from __future__ import annotations

import reclip_d2.utils.program_start  # noqa: F401  isort: skip  (first: see there)
import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from reclip_d2.config import load_config
from reclip_d2.data.classes import class_names_from_config
from reclip_d2.engine.calibration import calibrate
from reclip_d2.engine.logs import logging_to
from reclip_d2.engine.trainer import build_evaluation_model
from reclip_d2.errors import ReclipError, exit_on_error
from reclip_d2.experiments import execute
from reclip_d2.experiments.across import AcrossConditions
from reclip_d2.experiments.plan import Job, Runs, Settings
from reclip_d2.experiments.process import Processes
from reclip_d2.experiments.report import write_report
from reclip_d2.experiments.runner import estimated_time, run_pending
from reclip_d2.experiments.suite import PRETRAIN
from reclip_d2.experiments.suite_file import load_suite, suite_names
from reclip_d2.features.whole_images import whole_images
from reclip_d2.hypothesis.training_records import build_training_records, unlabelled_records
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.output_paths import check_output_folder, check_output_path
from reclip_d2.utils.tensor_files import read_tensor_file

ROOT = Path(__file__).resolve().parents[1]
SUITE_FILE = ROOT / "configs" / "ablations" / "paper.yaml"
REPORT = "REPORT.md"
PRELOAD = ("reclip_d2.experiments.execute", "torch.utils.tensorboard")


def argument_parser() -> argparse.ArgumentParser:
    """Arguments of the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", required=True, help="a suite in the suite file, such as embedded or voc20")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the training runs")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the runs and the report")
    parser.add_argument("--tables", nargs="+", metavar="KEY", help="tables to run and report, such as II IX Fig3")
    parser.add_argument("--experiments", nargs="+", default=[], metavar="KEY", help="run only these, see --list")
    parser.add_argument(
        "--dataset",
        default="",
        help="where to evaluate, with * for the name of each data set ('*_dev'); by default the configs' DATASETS.TEST",
    )
    parser.add_argument(
        "--conditions", nargs="+", metavar="KEY", help="only these data sets and CLIPs, such as embedded embedded-clip1"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--jobs",
        type=int,
        help="parallel runs, which share the CPU's cores; by default 1 on a GPU, and on a CPU 4 or the number of cores",
    )
    parser.add_argument("--list", action="store_true", help="list experiments and finished runs; run nothing")
    parser.add_argument("--report-only", action="store_true", help="write the report of the finished runs; run nothing")
    parser.add_argument("--report", metavar="FILE", help=f"the report; by default DIR/{REPORT}")
    parser.add_argument("--overwrite", action="store_true", help="repeat runs that were made with another config")
    parser.add_argument(
        "--drop-checkpoints", action="store_true", help="remove the weights of finished runs that no other run needs"
    )
    parser.add_argument("--suite-file", type=Path, default=SUITE_FILE, metavar="FILE", help="another suite file")
    parser.add_argument(
        "--masks",
        type=Path,
        metavar="DIR",
        help="other systems' index masks: DIR/<data set's config>/<experiment>, such as DIR/voc20/peer_sclip",
    )
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="config overrides of all runs")
    return parser


def tool(name: str) -> ModuleType:
    """Another program in ``tools``: the one that trains with labels, or the one that pretrains a CLIP."""
    module = f"reclip_d2_{name}"
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, ROOT / "tools" / f"{name}.py")
        sys.modules[module] = program = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(program)
    return sys.modules[module]


def perform_pretrain(job: Job) -> dict[str, Any]:
    """Pretrain a CLIP, or take the file if it is there.

    Raises:
        ReclipError: there is a file of another CLIP.
    """
    world, seed, file = job.value("WORLD"), job.value("SEED"), Path(job.value("FILE"))
    program = tool("pretrain_embedded_clip")
    if world not in program.WORLDS:
        raise ReclipError(f"clip_seeds: only the worlds {', '.join(sorted(program.WORLDS))} have a CLIP to pretrain")
    job.folder.mkdir(parents=True, exist_ok=True)
    seconds, reused = None, file.exists()
    if reused:
        found = read_tensor_file(file, "pretrained CLIP").metadata
        if (found.get("world"), found.get("seed")) != (world, str(seed)):
            raise ReclipError(f"{file} is not the CLIP of world {world} and seed {seed}: remove it")
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        log = program.pretrain(file, program.WORLDS[world], seed)
        seconds = log["seconds"]
        with atomic_write(job.folder / "pretrain_log.json") as temporary:
            temporary.write_text(json.dumps(log, indent=1) + "\n")
    return {
        "dataset": "",
        "protocol": "",
        "supervision": "captions of generated pictures",
        "metrics": {},
        "training": None if reused else {"seconds": seconds, "first_iteration": 0},
        "versions": execute.versions(),
        "machine": execute.machine("cpu"),
        "world": world,
        "clip_seed": seed,
        "reused": reused,
    }


def perform_probe(job: Job) -> dict[str, Any]:
    """Train and evaluate a linear probe, with labels; also writes its results file."""
    with logging_to(job.folder):
        program = tool("linear_probe")
        overrides = program.probe_overrides(load_config(job.config_files, job.options))
        cfg = load_config(job.config_files, [*job.options, *overrides])
        trained = execute.train(cfg, resume=True, trainer_class=program.ProbeTrainer)
        results = program.ProbeTrainer.test(cfg, trained.model)
        file = program.write_results(cfg, trained.model, {cfg.DATASETS.TEST[0]: results})
        supervision = json.loads(file.read_text())["supervision"]
        return execute.result_of(cfg, execute.scores_of(results), execute.training_of(cfg, trained), supervision)


def perform_hypotheses(job: Job) -> dict[str, Any]:
    """Compare the training images' hypotheses with their labels: an analysis that no training uses."""
    # Here, not at the top: every run is a process that loads this file, and training processes must not load anything
    # that reads the training images' labels.
    from reclip_d2.evaluation.hypothesis import hypothesis_precision_recall
    from reclip_d2.evaluation.label_files import DatasetLabels
    from reclip_d2.evaluation.labelled_data import labelled_records, probe_datasets

    with logging_to(job.folder):
        cfg = load_config(job.config_files, job.options)
        Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
        hypotheses = {record["file_name"]: record["hypothesis"] for record in build_training_records(cfg)}
        datasets = probe_datasets(cfg)
        records = {r["file_name"]: r for r in labelled_records(datasets, class_names_from_config(cfg))}
        scores = hypothesis_precision_recall(hypotheses, records, DatasetLabels(datasets[0]))
        result = execute.result_of(cfg, scores, None, supervision="labels (analysis of the hypotheses)")
        return {**result, "dataset": ", ".join(datasets)}


def perform_true_shares(job: Job) -> dict[str, Any]:
    """MaskCLIP, calibrated to the class shares in the training images' labels: a control that knows the truth."""
    # Here, not at the top: see perform_hypotheses.
    from reclip_d2.evaluation.label_files import DatasetLabels
    from reclip_d2.evaluation.labelled_data import labelled_records, probe_datasets
    from reclip_d2.evaluation.true_shares import label_shares

    with logging_to(job.folder):
        cfg = load_config(job.config_files, job.options)
        Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
        datasets = probe_datasets(cfg)
        labels = DatasetLabels(datasets[0])
        shares = label_shares(labelled_records(datasets, class_names_from_config(cfg)), labels)
        model = build_evaluation_model(cfg, resume=False)
        if len(shares) != model.num_classes:
            raise ReclipError(f"{datasets[0]}: its labels merge classes, so that they have no shares to calibrate to")
        records = unlabelled_records(cfg.DATASETS.TRAIN)
        calibrate(model, whole_images(cfg, model.backbone, records, model.view_encoder), shares=shares)
        return execute.result_of(cfg, execute.evaluate(cfg, model).scores, None, supervision="labels (class shares)")


def perform_masks(job: Job) -> dict[str, Any]:
    """Score a folder of another system's masks, as ``tools/evaluate_masks.py`` does."""
    # Here, not at the top: see perform_hypotheses.
    from reclip_d2.data.class_file import read_class_file
    from reclip_d2.data.mask_files import MaskFiles
    from reclip_d2.evaluation.folder_scores import FolderEvaluation, class_ids

    with logging_to(job.folder):
        cfg = load_config(job.config_files, job.options)
        Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
        dataset, names = cfg.DATASETS.TEST[0], Path(job.masks) / "names.txt"
        known = read_class_file(names, "names of the masks' ids").model_classes if names.exists() else None
        ids = None if job.match else class_ids(dataset, known)
        scores = FolderEvaluation(dataset, MaskFiles(job.masks, ids=ids)).evaluate(job.match, space_preference=True)
        found = {
            **scores.scores,
            "IoU": scores.ious,
            "class_preference": {"score": scores.class_preference},
            "space_preference": scores.space_preference,
        }
        supervision = "masks of another system" + (", matched by the labels" if job.match else "")
        return execute.result_of(cfg, found, None, supervision)


def perform(job: Job) -> dict[str, Any]:
    """Do one run in this process."""
    of_its_own = {
        "probe": perform_probe,
        "hypotheses": perform_hypotheses,
        "true_shares": perform_true_shares,
        "masks": perform_masks,
        PRETRAIN: perform_pretrain,
    }
    return of_its_own.get(job.kind, execute.perform)(job)


def print_list(runs: Runs, jobs: int) -> None:
    """List the runs, how many are finished, and the estimated time of the others."""
    suite = runs.suite
    tables: dict[str, list[str]] = {}
    for table in suite.tables:
        for row in table.rows:
            tables.setdefault(row.experiment, []).append(table.key)
    experiments = {planned.run.experiment.key: planned.run.experiment for planned in runs.selected}
    width = max(map(len, experiments))
    for key, experiment in experiments.items():
        own = [planned for planned in runs.planned if planned.run.experiment is experiment]
        done = sum(planned.folder.result is not None for planned in own)
        print(
            f"{key:<{width}}  {done}/{len(own)} done  {experiment.kind:<10}  {experiment.title}"
            f"  [{', '.join(tables.get(key, ['needed by others']))}]"
        )
    done = sum(planned.folder.result is not None for planned in runs.selected)
    print(f"{len(runs.selected)} runs, {done} of them done; {estimated_time(runs, jobs)}")


def report_command(args: argparse.Namespace) -> list[str]:
    """The command that makes a report's runs."""
    command = ["python", "tools/reproduce.py", "--suite", args.suite, "--seeds", *map(str, args.seeds)]
    command += ["--out", str(args.out)]
    if args.suite_file != SUITE_FILE:
        command += ["--suite-file", str(args.suite_file)]
    for name in ("tables", "experiments", "conditions", "opts"):
        if getattr(args, name):
            command += [f"--{name}", *getattr(args, name)]
    for name in ("dataset", "jobs", "masks"):
        if getattr(args, name):
            command += [f"--{name}", str(getattr(args, name))]
    return command


@exit_on_error
def main() -> None:
    """See the module."""
    args = argument_parser().parse_args()
    args.out = check_output_folder(args.out, "--out")
    if args.report is not None:
        args.report = check_output_path(args.report, "--report")
    names = suite_names(args.suite_file)
    if args.suite not in names:
        raise ReclipError(f"--suite {args.suite!r} is not in {args.suite_file}: choose one of {', '.join(names)}")
    suite = load_suite(args.suite_file, args.suite, args.tables)
    if args.conditions is not None:
        by_key = {condition.key: condition for condition in suite.conditions}
        if unknown := [key for key in args.conditions if key not in by_key]:
            raise ReclipError(f"--conditions {unknown[0]!r}: choose from {', '.join(by_key)}")
        suite = dataclasses.replace(suite, conditions=tuple(c for c in suite.conditions if c.key in args.conditions))
    cores = os.cpu_count() or 1
    # These models are small: two parallel runs with one thread each are much faster than two sequential runs with two.
    jobs = (1 if args.device.startswith("cuda") else min(4, cores)) if args.jobs is None else args.jobs
    if jobs < 1:
        raise ReclipError(f"--jobs {jobs}: give 1 or more")
    if min(args.seeds) < 0:
        raise ReclipError(f"--seeds {min(args.seeds)}: give 0 or more")
    settings = Settings(
        args.out,
        tuple(dict.fromkeys(args.seeds)),
        args.device,
        args.dataset,
        tuple(args.opts),
        tuple(args.experiments),
        args.masks,
    )
    runs = Runs(suite, settings)
    if args.masks is not None and not any(planned.run.experiment.kind == "masks" for planned in runs.planned):
        raise ReclipError(f"--masks {args.masks}: no folder <data set>/<experiment> of an experiment of kind masks")
    planned = {planned.run.experiment.key for planned in runs.planned}
    if unknown := [key for key in args.experiments if key not in planned]:
        raise ReclipError(f"no table has the experiment {unknown[0]!r}: see --list")
    if args.list:
        print_list(runs, jobs)
        return
    failed: list[str] = []
    if not args.report_only:
        with runs.lock():
            runs.check_changes(args.overwrite)
            runs.check_datasets()
            print(estimated_time(runs, jobs))
            processes = Processes(max(1, cores // jobs) if jobs > 1 else 0, PRELOAD)
            try:
                failed = run_pending(
                    runs,
                    functools.partial(processes.call, perform),
                    jobs=jobs,
                    stop=processes.stop,
                    drop_checkpoints=args.drop_checkpoints,
                )
            except KeyboardInterrupt:
                print("\ninterrupted: repeat the command to resume", file=sys.stderr)
                sys.exit(130)
    report, *pictures = write_report(AcrossConditions.of(runs), args.report or args.out / REPORT, report_command(args))
    print(f"Written: {report}" + (f" and {len(pictures)} pictures in {pictures[0].parent}" if pictures else ""))
    if failed:
        count = f"{len(failed)} runs" if len(failed) > 1 else "1 run"
        raise ReclipError(f"{count} failed; repeat the command to retry; first {failed[0]}")


if __name__ == "__main__":
    main()
