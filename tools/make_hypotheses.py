#!/usr/bin/env python
"""Make the hypothesis file of a config's training set (Eq. 6), on one or several GPUs, before training.

    python tools/make_hypotheses.py --num-gpus 1 \\
        --config-file configs/datasets/embedded.yaml --config-file configs/methods/reclippp_rectify.yaml

Training makes a missing file itself; this program makes only the file and, with ``--features``, the feature stores that
the training reads (``FEATURE_STORE``). A killed run resumes when you repeat it.

With ``--shard I/N`` it computes one of N parts, for machines that share a file system: run all, in any order or at
once. The last one writes the file. In a Slurm array ``--array=1-8``, give
``--shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT``.

With ``--engine ray`` the workers of Ray compute (extra ``ray``), in processes of this machine or in the cluster of
``RAY_ADDRESS``.
"""

from __future__ import annotations

import reclip_d2.utils.program_start  # noqa: F401  isort: skip  (first: see there)
import argparse
import collections

from detectron2.config import CfgNode
from detectron2.utils import comm

from reclip_d2.cli.arguments import add_engine_arguments
from reclip_d2.data.classes import class_names_of
from reclip_d2.engine.program import argument_parser, run_program, setup
from reclip_d2.errors import ReclipError, exit_on_error
from reclip_d2.hypothesis.training_records import TrainingImages, build_training_records, make_hypothesis_part
from reclip_d2.modeling.build import shared_backbones
from reclip_d2.utils.work_shard import WorkShard
from reclip_d2.workspace.predict import engine_of
from reclip_d2.workspace.ray_parts import make_parts
from reclip_d2.workspace.stores import make_part, store_parts


@exit_on_error
def main(args: argparse.Namespace) -> None:
    """Make the file if it is missing; print how often each class is in a hypothesis."""
    shard = WorkShard.parse(args.shard) if args.shard is not None else None
    engine = engine_of(args.engine, args.workers, args.shard)
    if engine is not None and comm.get_world_size() > 1:
        raise ReclipError("--engine ray: Ray starts the processes; omit --num-gpus and --num-processes")
    cfg = setup(args)
    with shared_backbones():
        if engine is not None:
            make_parts(engine, cfg, stores=args.features)
        elif shard is not None and not (make_part if args.features else make_hypothesis_part)(cfg, shard):
            if comm.is_main_process():
                print(f"shard {shard} is done; others are missing")
            return
        records = build_training_records(cfg)
        if args.features:
            make_stores(cfg)
    if not comm.is_main_process():
        return
    counts = collections.Counter(k for record in records for k in record["hypothesis"])
    names = [names[0] for names in class_names_of(cfg.DATASETS.TRAIN[0])]
    wanted = cfg.HYPOTHESIS.CLASSES_PER_IMAGE
    rule = f"{wanted:g} classes per image" if wanted else f"t = {cfg.HYPOTHESIS.THRESHOLD}"
    print(f"{'class':<{max(map(len, names))}}  images with it in their hypothesis ({rule})")
    for k, name in enumerate(names):
        print(f"{name:<{max(map(len, names))}}  {counts[k]:6d}  {100 * counts[k] / len(records):5.1f} %")


def make_stores(cfg: CfgNode) -> None:
    """Make what is missing of the feature stores; called by all processes.

    Raises:
        ReclipError: there is no room for one.
    """
    for parts in store_parts(cfg, TrainingImages.of(cfg)):
        if problem := parts.problem():
            raise ReclipError(f"--features: {problem}")
        parts.make(WorkShard(1, 1))


def parser() -> argparse.ArgumentParser:
    """Arguments of training, and those that divide the work."""
    result = argument_parser()
    result.add_argument("--features", action="store_true", help="also make the feature stores of FEATURE_STORE")
    result.add_argument("--shard", metavar="I/N", help="compute part I of N; the last part writes the file")
    add_engine_arguments(result, "hypotheses (and features)")
    return result


if __name__ == "__main__":
    run_program(main, parser())
