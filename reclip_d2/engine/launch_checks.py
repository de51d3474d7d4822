"""Checks before the processes of a training start: machines, GPUs, and the keys that depend on them."""

from __future__ import annotations

import argparse
import os
import re

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from reclip_d2.engine.launch import place_in_environment
from reclip_d2.errors import ReclipError
from reclip_d2.utils.output_paths import check_output_folder, check_output_path


def check_processes(args: argparse.Namespace) -> int:
    """Number of processes on all machines.

    Args:
        args: Detectron2's arguments ``num_gpus``, ``num_machines``, ``machine_rank`` and ``dist_url``, and
            ``num_processes``.

    Raises:
        ReclipError: there are not enough GPUs, or the arguments contradict each other.
    """
    if (place := place_in_environment()) is not None:
        if args.num_machines > 1 or args.num_gpus > 1 or args.num_processes > 1:
            raise ReclipError(
                f"{place.started_by} has started {place.processes} processes: omit --num-gpus, --num-machines and"
                " --num-processes"
            )
        return place.processes
    gpus = torch.cuda.device_count()
    if args.num_processes < 1:
        raise ReclipError(f"--num-processes {args.num_processes}: give a number of at least 1")
    if args.num_processes > 1:
        if args.num_gpus > 1 or args.num_machines > 1:
            raise ReclipError("--num-processes is for the CPU of one machine: omit --num-gpus and --num-machines")
        return args.num_processes
    if args.num_gpus < 0:
        raise ReclipError(f"--num-gpus {args.num_gpus}: give a number of at least 0")
    if args.num_gpus > max(1, gpus):
        raise ReclipError(f"--num-gpus {args.num_gpus}: this machine has {gpus} GPUs")
    if args.num_machines < 1:
        raise ReclipError(f"--num-machines {args.num_machines}: give a number of at least 1")
    if args.num_machines > 1 and (gpus == 0 or args.num_gpus == 0):
        raise ReclipError(f"--num-machines {args.num_machines}: training on several machines needs GPUs on each")
    if not 0 <= args.machine_rank < args.num_machines:
        raise ReclipError(
            f"--machine-rank {args.machine_rank}: give a rank from 0 to {args.num_machines - 1}, below --num-machines"
        )
    processes = max(1, args.num_gpus) * args.num_machines
    if processes > 1 and not re.match(r"auto$|tcp://[^/]+:\d+$|file://|env://", args.dist_url):
        raise ReclipError(f"--dist-url {args.dist_url}: give tcp://HOST:PORT of the first machine, or auto")
    if args.num_machines > 1 and args.dist_url == "auto":
        raise ReclipError("--dist-url auto is for one machine: give tcp://HOST:PORT of the first machine")
    return processes


def check_config_for(cfg: CfgNode, processes: int, on_cpu: bool = False) -> None:
    """Check the keys that depend on the machine and on the number of processes.

    Args:
        on_cpu: whether the processes are those of ``--num-processes``.

    Raises:
        ReclipError: ``OUTPUT_DIR``, ``HYPOTHESIS.FILE`` or ``FEATURE_STORE.FOLDER`` is not writable, there is no such
            GPU, or the batch cannot be divided among the processes.
    """
    check_output_folder(cfg.OUTPUT_DIR, "OUTPUT_DIR")
    if cfg.HYPOTHESIS.FILE and not os.path.isfile(cfg.HYPOTHESIS.FILE):
        check_output_path(cfg.HYPOTHESIS.FILE, "HYPOTHESIS.FILE")
    if cfg.FEATURE_STORE.FOLDER:
        check_output_folder(cfg.FEATURE_STORE.FOLDER, "FEATURE_STORE.FOLDER")
    if on_cpu and cfg.MODEL.DEVICE.startswith("cuda") and torch.cuda.is_available():
        raise ReclipError(f"--num-processes is for the CPU, and MODEL.DEVICE is {cfg.MODEL.DEVICE}: set it to cpu")
    kind, _, index = cfg.MODEL.DEVICE.partition(":")
    if kind == "cuda" and 0 < torch.cuda.device_count() <= int(index or 0):
        raise ReclipError(f"MODEL.DEVICE is {cfg.MODEL.DEVICE}; this machine has {torch.cuda.device_count()} GPUs")
    scaled = DefaultTrainer.auto_scale_workers(cfg, processes)
    batch = scaled.SOLVER.IMS_PER_BATCH
    if batch % processes:
        raise ReclipError(f"SOLVER.IMS_PER_BATCH {batch} is not a multiple of {processes} processes: change it")
    if cfg.SOLVER.ACCUMULATE_STEPS > batch // processes:
        raise ReclipError(
            f"SOLVER.ACCUMULATE_STEPS {cfg.SOLVER.ACCUMULATE_STEPS} exceeds the {batch // processes} images per process"
            " and iteration: lower it, or raise SOLVER.IMS_PER_BATCH"
        )


def scale_to_processes(cfg: CfgNode, processes: int) -> CfgNode:
    """Detectron2's ``auto_scale_workers``, but without rounding periods or the number of iterations down to 0;
    also scales the iterations of ``SOLVER.PLATEAU``."""
    scaled = DefaultTrainer.auto_scale_workers(cfg, processes)
    if scaled is not cfg:
        frozen = scaled.is_frozen()
        scaled.defrost()
        for key in ("MAX_ITER", "CHECKPOINT_PERIOD"):
            scaled.SOLVER[key] = max(1, scaled.SOLVER[key])
        ratio = processes / cfg.SOLVER.REFERENCE_WORLD_SIZE
        scaled.SOLVER.PLATEAU.PERIOD = max(1, round(cfg.SOLVER.PLATEAU.PERIOD / ratio))
        scaled.SOLVER.PLATEAU.COOL_DOWN = round(cfg.SOLVER.PLATEAU.COOL_DOWN / ratio)
        if frozen:
            scaled.freeze()
    return scaled
