"""Work on Ray Data: ``--engine ray``, over the processes of this machine or over a cluster.

Workers return the content of files; this process, which holds the locks, writes them. So an item whose block is
computed again after a lost worker is still written once. Ray limits how many blocks are in flight.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, ClassVar, Protocol

import torch

from reclip_d2.errors import ReclipError

REMEDY = "pip install 'reclip_d2[ray]'"
LARGEST_BLOCK = 32
"""Items of a block, at most: Ray needs some 10 ms for a block."""
_BLOCKS_PER_WORKER = 8  # at least, if there are enough items
# What Ray's processes on this machine need not do: they collect metrics of each process and task for its dashboard.
_LEAN = {"RAY_enable_metrics_collection": "0", "RAY_task_events_report_interval_ms": "0", "RAY_event_stats": "0"}
_LOSSES = 5  # of machines in a run
_RETRIES = 3  # of a block whose worker process has ended
ENDED = f"its worker process ended {_RETRIES + 1} times: too little memory, or a damaged image"
"""Why an item has no row."""

Item = dict[str, Any]
"""What a worker gets, a row of an Arrow table; ``name`` is unique."""
Row = tuple[dict[str, Any], dict[str, bytes]]
"""What a worker returns for an item: a header, which is JSON with the item's ``name``, and contents of files."""


class LostBlocks(Exception):
    """Ray has lost computed blocks that it cannot compute again, with the machine that had them."""


class Job(Protocol):
    """All that a worker needs; can be pickled."""

    @property
    def device(self) -> str:
        """PyTorch's device of each worker."""

    @property
    def threads(self) -> int:
        """PyTorch's threads per worker."""

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files of a row."""


class Worker:
    """Computes rows of items, in a process made for it. Subclasses prepare in :meth:`prepare`, read in :meth:`read` and
    compute in :meth:`row`.

    Attributes:
        unit: what an item is, in messages.
    """

    unit: ClassVar[str] = "image"

    def __init__(self, job: Any) -> None:
        """
        Args:
            job: a :class:`Job`.
        """
        self.job = job
        self._error = ""
        torch.set_num_threads(job.threads)
        try:
            self.prepare()
        except Exception as error:  # Ray would start the worker again, for ever
            self._error = " ".join(str(error).split()) or type(error).__name__

    def prepare(self) -> None:
        """Load what all items need."""

    def read(self, item: Item) -> Any:
        """What the row of an item is made from, for :meth:`row`. Called in a thread, while the row of the item before
        is computed.

        Raises:
            ReclipError: the item is damaged.
        """

    def row(self, item: Item, source: Any) -> Row:
        """The row of an item; the engine adds the name to its header.

        Args:
            source: the result of :meth:`read`.

        Raises:
            ReclipError: the item is damaged.
        """
        raise NotImplementedError

    def answers(self, items: list[Item]) -> Iterator[Row]:
        """The rows of items, in order; of the items that follow, one is read ahead."""
        with ThreadPoolExecutor(1) as pool:
            reading = [] if self._error else [pool.submit(self.read, item) for item in items[:1]]
            for number, item in enumerate(items):
                source = reading.pop().result if reading else None
                following = items[number + 1 : number + 2]
                reading = [] if self._error else [pool.submit(self.read, item) for item in following]
                yield self._answer(item, source)

    def _answer(self, item: Item, source: Callable[[], Any] | None) -> Row:
        """A row; its header also has ``problem``, of this item, and ``fatal``, of the worker."""
        header: dict[str, Any] = {"name": item["name"], "problem": "", "fatal": self._error}
        if source is None:
            return header, {}
        try:
            more, files = self.row(item, source())
            return header | more, files
        except ReclipError as error:
            header["problem"] = str(error)
        except Exception as error:  # one item must not end the run
            header["problem"] = f"{self.unit} {item['name']} failed ({type(error).__name__}: {error})"
        return header, {}

    def __call__(self, batch: Any) -> Any:
        """The Arrow table of the rows of a table of items: ``header``, and a column per file."""
        import pyarrow

        rows = list(self.answers(batch.to_pylist()))
        columns = {"header": pyarrow.array([json.dumps(header) for header, _ in rows], pyarrow.string())}
        for name in self.job.files:
            columns[name] = pyarrow.array([files.get(name) for _, files in rows], pyarrow.large_binary())
        return pyarrow.table(columns)


def load_ray() -> ModuleType:
    """The package Ray with Ray Data.

    Raises:
        ReclipError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to Ray's authors
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")  # the terminal shows our progress
    try:
        import ray  # optional
        import ray.data
    except ModuleNotFoundError as error:
        raise ReclipError(f"--engine ray needs the package Ray: {REMEDY}") from error
    return ray


def worker_threads() -> int:
    """PyTorch's threads per worker: ``OMP_NUM_THREADS``, or 1."""
    return max(1, int(os.environ.get("OMP_NUM_THREADS") or 1))


class RayEngine:
    """Runs workers on Ray.

    Attributes:
        workers: number of worker processes.
    """

    def __init__(self, workers: int | None = None) -> None:
        """
        Args:
            workers: number of worker processes; None for one per GPU or, on CPUs, as many as there are CPUs.

        Raises:
            ReclipError: Ray is not installed, or the number is below 1.
        """
        if workers is not None and workers < 1:
            raise ReclipError(f"--workers {workers}: give a number above 0")
        self._ray = load_ray()
        self.workers = workers

    def run(
        self,
        worker: type[Worker],
        job: Job,
        items: Mapping[str, Item],
        done: Callable[[dict[str, Any], dict[str, bytes]], None],
        largest: int = LARGEST_BLOCK,
    ) -> list[str]:
        """Compute the rows of items; blocks of lost workers are computed again.

        Args:
            worker: class of the workers, made from the job.
            items: by their names.
            done: called with each row, in the order in which they arrive, once per item.
            largest: items of a block, at most.

        Returns:
            Names of the items that have no row, since they end their worker's process.

        Raises:
            ReclipError: a worker cannot load what it needs, or Ray cannot be reached, or fails again and again.
        """
        waiting, losses = dict(items), 0
        with self._started(job):
            # The second size is for items of blocks whose worker has died again and again: one of them did it.
            sizes = [largest, 1]
            while waiting and sizes:
                try:
                    for header, files in self._rows(worker, job, list(waiting.values()), sizes[0]):
                        if header["fatal"]:
                            raise ReclipError(f"a worker cannot start: {header['fatal']}")
                        if waiting.pop(header["name"], None) is not None:  # otherwise it was computed twice
                            done(header, files)
                    sizes.pop(0)
                except LostBlocks as error:
                    losses += 1
                    if losses == _LOSSES:
                        raise ReclipError(f"Ray has failed {losses} times ({error}): repeat the command") from error
        return list(waiting)

    def _started(self, job: Job) -> Any:
        """Context with a connection to ``RAY_ADDRESS``, to the cluster of this process, or to one of this machine."""
        ray = self._ray
        if ray.is_initialized():
            return contextlib.nullcontext()
        quiet = {"log_to_driver": False, "logging_level": "error"}
        address = os.environ.get("RAY_ADDRESS")
        try:
            if address:
                return ray.init(**quiet)
            for name, value in _LEAN.items():
                os.environ.setdefault(name, value)
            count = self.workers or len(os.sched_getaffinity(0))
            return ray.init(address="local", num_cpus=max(count * job.threads, 1), include_dashboard=False, **quiet)
        except Exception as error:  # Ray raises plain ones, too
            what = f"RAY_ADDRESS {address} cannot be reached" if address else "Ray cannot start on this machine"
            raise ReclipError(f"{what} ({' '.join(str(error).split())[:200]})") from error

    def _rows(self, worker: type[Worker], job: Job, items: list[Item], largest: int) -> Iterator[Row]:
        """Rows in the order in which they are done; items of failed blocks are missing.

        Raises:
            LostBlocks: the rows of others are lost, too.
        """
        ray = self._ray
        gpu = job.device.startswith("cuda")
        available = ray.cluster_resources()
        now = max(1, int(available.get("GPU" if gpu else "CPU", 1) // (1 if gpu else job.threads)))
        workers = self.workers or now
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.max_errored_blocks = -1  # see the second pass of run()
        size = max(1, min(largest, len(items) // (workers * _BLOCKS_PER_WORKER)))
        table = ray.data.from_items(items, override_num_blocks=-(-len(items) // size)).map_batches(
            worker,
            batch_size=None,
            batch_format="pyarrow",
            fn_constructor_args=(job,),
            # At least as many as have room: Ray would end idle workers, and a new one has to load the model.
            compute=ray.data.ActorPoolStrategy(min_size=min(now, workers), max_size=workers, initial_size=workers),
            num_cpus=job.threads,
            num_gpus=1 if gpu else 0,
            max_restarts=-1,
            max_task_retries=_RETRIES,
        )
        batches = iter(table.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
        while True:
            try:
                batch = next(batches, None)
            except ray.exceptions.RayError as error:
                raise LostBlocks(" ".join(str(error).split())[:200]) from error
            if batch is None:
                return
            for row in batch.to_pylist():
                yield json.loads(row.pop("header")), row
