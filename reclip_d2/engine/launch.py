"""Start the processes of a training, or join those that torchrun or Slurm has started.

Detectron2's ``launch`` starts one process per GPU of ``--num-machines``. ``--num-processes`` starts processes on the
CPU, connected by gloo. Under ``torchrun`` or ``srun`` each process runs the program already, and the environment tells
its place.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import socket
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm

from reclip_d2.errors import ReclipError

_LOOPBACK = "127.0.0.1"


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among those of the job.

    Attributes:
        rank: number of the process, from 0.
        processes: number of processes of the job.
        local_rank: number of the process on its machine, which is also that of its GPU.
        address: ``tcp://HOST:PORT`` of process 0.
        started_by: who has started the processes, for messages.
    """

    rank: int
    processes: int
    local_rank: int
    address: str
    started_by: str


def place_in_environment(environment: Mapping[str, str] = os.environ) -> Place | None:
    """The place that ``torchrun`` or ``srun`` gives this process; None if neither has started it, or it is alone.

    Raises:
        ReclipError: a variable is missing or no number.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        rank, processes, local_rank = (_number(environment, name, "torchrun") for name in names)
        host = environment.get("MASTER_ADDR", "")
        port = environment.get("MASTER_PORT", "")
        if not host or not port.isdigit():
            raise ReclipError("RANK is set, but not MASTER_ADDR and MASTER_PORT: start the program by torchrun")
        place = Place(rank, processes, local_rank, f"tcp://{host}:{port}", "torchrun")
    # Inside a batch script, without srun, there is a process number too, but no number of the step's processes.
    elif "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        rank, processes, local_rank = (_number(environment, name, "Slurm") for name in names)
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "")
        host = environment.get("MASTER_ADDR") or first_host(nodes)
        # All processes must choose the same, and two jobs on a machine should not.
        port = environment.get("MASTER_PORT") or str(20_000 + _number(environment, "SLURM_JOB_ID", "Slurm") % 20_000)
        place = Place(rank, processes, local_rank, f"tcp://{host}:{port}", "Slurm")
    else:
        return None
    if not (0 <= place.rank < place.processes and 0 <= place.local_rank < place.processes):
        raise ReclipError(f"{names[0]} {place.rank} and {names[2]} {place.local_rank} of {place.processes} processes")
    return place if place.processes > 1 else None


def _number(environment: Mapping[str, str], name: str, who: str) -> int:
    text = environment.get(name, "")
    if not text.isascii() or not text.isdigit() or len(text) > 12:
        raise ReclipError(f"{name} is {text[:40]!r} and should be a number: {who} sets it")
    return int(text)


def first_host(nodes: str) -> str:
    """The first name of a Slurm list of nodes, such as ``gpu03`` of ``gpu[03-05,9],login``.

    Raises:
        ReclipError: there is none.
    """
    match = re.match(r"([A-Za-z0-9_.-]+)(?:\[([0-9]+))?", nodes)
    if match is None:
        raise ReclipError(f"SLURM_STEP_NODELIST is {nodes[:40]!r}: set MASTER_ADDR to the first machine")
    return match[1] + (match[2] or "")


def launch_processes(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Call ``main(args)`` in each process of the job.

    Args:
        args: Detectron2's arguments, and ``num_processes``; checked by
            :func:`~reclip_d2.engine.launch_checks.check_processes`.
    """
    place = place_in_environment()
    if place is not None:
        join(place)
        main(args)
        dist.destroy_process_group()
    elif args.num_processes > 1:
        address = f"tcp://{_LOOPBACK}:{_free_port()}"
        torch.multiprocessing.spawn(_run, (args.num_processes, address, main, args), nprocs=args.num_processes)
    else:
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )


def _run(rank: int, processes: int, address: str, main: Callable[[argparse.Namespace], Any], args: object) -> None:
    """A process of ``--num-processes``."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    join(Place(rank, processes, rank, address, "--num-processes"), on_gpu=False)
    main(args)
    dist.destroy_process_group()


def join(place: Place, on_gpu: bool | None = None) -> None:
    """Connect this process with the others, by NCCL on GPUs and by gloo on CPUs, and tell Detectron2.

    Args:
        on_gpu: None for whether there is a GPU.

    Raises:
        ReclipError: the machine has no GPU for this process.
    """
    on_gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
    if on_gpu:
        if place.local_rank >= torch.cuda.device_count():
            raise ReclipError(
                f"{place.started_by} started process {place.local_rank + 1} on a machine with"
                f" {torch.cuda.device_count()} GPUs: start one per GPU"
            )
        torch.cuda.set_device(place.local_rank)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=place.address,
        world_size=place.processes,
        rank=place.rank,
        timeout=DEFAULT_TIMEOUT,
    )
    hosts: list[str] = [""] * place.processes
    dist.all_gather_object(hosts, socket.gethostname())
    for host in dict.fromkeys(hosts):  # every process makes all groups, in this order
        group = dist.new_group([rank for rank, name in enumerate(hosts) if name == host])
        if host == hosts[place.rank]:
            comm._LOCAL_PROCESS_GROUP = group


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        return probe.getsockname()[1]
