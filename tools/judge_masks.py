#!/usr/bin/env python
"""Validate the judge without labels (reclip_d2/evaluation/label_free.py): how well it ranks models.

    python tools/judge_masks.py --out output/judge
    python tools/judge_masks.py --out output/judge --clip embedded=DIR/seed1.safetensors --seeds 0 1    # another CLIP

Trains the runs of configs/ablations/judge.yaml on each world (some with hypotheses from labels, as controls), scores
their label maps of the training images without labels, and compares the scores with the mIoU on a labelled split.
Finished runs are kept in DIR; an interrupted validation resumes when you repeat the command. Prints the tables of
docs/label_free.md and writes them to DIR/judge_<split>.md.
"""

from __future__ import annotations

import reclip_d2.utils.program_start  # noqa: F401  isort: skip  (first: see there)
import argparse
import json
import logging
from pathlib import Path

import torch

from reclip_d2.errors import ReclipError, exit_on_error
from reclip_d2.experiments.judge_runs import JudgedRun, JudgedWorld, read_runs
from reclip_d2.experiments.judge_scores import SCORES, Evidence, Predictions, collect_evidence
from reclip_d2.experiments.judge_table import Judged, markdown
from reclip_d2.toy.worlds import WORLDS
from reclip_d2.utils.files import check_regular
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.output_paths import check_output_folder

ROOT = Path(__file__).resolve().parents[1]
RUNS_FILE = ROOT / "configs" / "ablations" / "judge.yaml"
logger = logging.getLogger("reclip_d2.judge_masks")


def argument_parser() -> argparse.ArgumentParser:
    """Arguments of the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the runs and the tables")
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS), choices=list(WORLDS), help="embedded data sets")
    parser.add_argument(
        "--clip",
        action="append",
        default=[],
        metavar="WORLD=FILE",
        help="also a CLIP from tools/pretrain_embedded_clip.py, in addition to the one that ships; may be repeated",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the training runs")
    parser.add_argument("--runs", nargs="+", metavar="NAME", help="only these runs, besides MaskCLIP's")
    parser.add_argument("--split", default="dev", choices=("dev", "val"), help="where the reported mIoU is measured")
    parser.add_argument("--images", type=int, default=134, help="about how many training images are judged")
    return parser


def clips_of(world: str, given: list[str]) -> list[str]:
    """``MODEL.CLIP.PRETRAINED`` of each CLIP of a world: the one that ships, and those of ``--clip``."""
    files = []
    for pair in given:
        name, _, file = pair.partition("=")
        if name not in WORLDS or not file:
            raise ReclipError(f"--clip {pair}: give WORLD=FILE, with a world of {', '.join(WORLDS)}")
        check_regular(file, "CLIP", "make it with tools/pretrain_embedded_clip.py --out FILE")
        if name == world:
            files.append(file)
    return [world, *files]


def judged_runs(
    world: JudgedWorld, runs: dict[str, JudgedRun], seeds: list[int], split: str, images: int
) -> list[Judged]:
    """All snapshots of a world with their scores."""
    views = [world.store.read(number) for number in range(0, len(world.store.views), 2)]
    stride = max(1, len(views) // images)
    features = torch.stack([view.features.float() for view in views[::stride]])
    files = [record["file_name"] for record in world.store.views.records[::stride]]
    evidence = collect_evidence(features, world.query_features, world.backbone, world.normalize, files)
    found = []
    for name, run in runs.items():
        for seed in seeds[:1] if run.config == "maskclip.yaml" else seeds:
            try:
                snapshots = world.run(name, run, seed)
            except ReclipError as error:
                logger.warning("%s, seed %d: %s", name, seed, error)
                continue
            for iteration, snapshot in snapshots.items():
                predictions = Predictions(
                    torch.from_numpy(snapshot.labels[::stride]).long(),
                    torch.from_numpy(snapshot.flipped[::stride]).long(),
                    snapshot.entropy,
                )
                scores = scores_of(evidence, predictions)
                final = iteration == max(snapshots)
                found.append(Judged(name, seed, final, run.hypotheses == "true", snapshot.miou[split], scores))
    return found


def scores_of(evidence: Evidence, predictions: Predictions) -> dict[str, float]:
    """All scores of a model's predictions."""
    return {name: score(evidence, predictions) for name, score in SCORES.items()}


@exit_on_error
def main(args: argparse.Namespace) -> str:
    """Run and score what is missing; returns the tables."""
    folder = check_output_folder(args.out)
    runs = read_runs(RUNS_FILE)
    if args.runs:
        unknown = [name for name in args.runs if name not in runs]
        if unknown:
            raise ReclipError(f"--runs {unknown[0]}: choose from {', '.join(runs)}")
        runs = {name: run for name, run in runs.items() if name in ("maskclip", "calibrated", *args.runs)}
    logging.getLogger("reclip_d2").setLevel(logging.WARNING)
    worlds = {}
    for world in args.worlds:
        for number, clip in enumerate(clips_of(world, args.clip)):
            name = f"{world} CLIP {number}"
            judged = JudgedWorld(world, clip, folder / f"{world}-{number}", ROOT / "configs", ("dev", "val"))
            worlds[name] = judged_runs(judged, runs, args.seeds, args.split, args.images)
            lines = [{"run": r.run, "seed": r.seed, "final": r.final, "mIoU": r.miou, **r.scores} for r in worlds[name]]
            with atomic_write(folder / f"{world}-{number}" / f"scores_{args.split}.json") as temporary:
                temporary.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    table = markdown(worlds)
    with atomic_write(folder / f"judge_{args.split}.md") as temporary:
        temporary.write_text(table, encoding="utf-8")
    print(table)
    return table


if __name__ == "__main__":
    main(argument_parser().parse_args())
