"""Masks on Ray Data: ``--engine ray``, over the processes of this machine or over a cluster.

Workers read an image, predict it, and return the files of its mask; this process, which holds the folder's lock, writes
them. So only the images, the model and CLIP's weights must be readable on every machine (images may be at URLs), and an
image whose block is computed again after a lost worker is still written once. Ray limits how many blocks are in flight.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from detectron2.config import CfgNode

from reclip_d2.data.class_file import ClassList
from reclip_d2.data.image_folder import ImageFile
from reclip_d2.data.images import read_image
from reclip_d2.data.remote_images import fetch
from reclip_d2.errors import ReclipError
from reclip_d2.formats import FORMATS, Prediction
from reclip_d2.formats.writer import Writer
from reclip_d2.utils.files import open_to_append
from reclip_d2.utils.io import atomic_write, naming_errors, remove_leftovers
from reclip_d2.utils.progress import count_steps
from reclip_d2.workspace.masks import COVERAGE, MaskClassTable, count_pixels, problem_of
from reclip_d2.workspace.trained_model import load_predictor

if TYPE_CHECKING:
    from reclip_d2.workspace.results import MaskRequest
    from reclip_d2.workspace.run_folder import RunFolder

REMEDY = "pip install 'reclip_d2[ray]'"
_LARGEST_BLOCK = 16  # images
_BLOCKS_PER_WORKER = 8  # at least, if there are enough images
_RETRIES = 3  # of a block whose worker process has ended


@dataclasses.dataclass(frozen=True)
class MaskJob:
    """All that a worker needs to make masks.

    Attributes:
        cfg: config of the model.
        kind: kind of model, a key of :data:`~reclip_d2.workspace.options.TITLES`.
        classes: the model's classes.
        weights: its checkpoint.
        keep_background: whether masks have the background as a class.
        formats: formats to make, in the order in which they are written.
        threads: PyTorch's threads per worker.
    """

    cfg: CfgNode
    kind: str
    classes: ClassList
    weights: Path
    keep_background: bool
    formats: tuple[str, ...]
    threads: int


class MaskWorker:
    """Makes the files of some images; one per worker process."""

    def __init__(self, job: MaskJob) -> None:
        self.error = ""
        self._job = job
        torch.set_num_threads(job.threads)
        try:
            self._predictor = load_predictor(job.cfg, job.kind, job.classes, job.weights)
        except Exception as error:  # Ray would start the worker again, for ever
            self.error = " ".join(str(error).split()) or type(error).__name__
            return
        self._table = MaskClassTable(job.classes, job.keep_background)
        self._scratch = tempfile.TemporaryDirectory(prefix="reclip_ray_")
        folder = Path(self._scratch.name)
        self._copies = folder / "copies"
        self._writers: dict[str, Writer] = {
            name: FORMATS[name](folder / name, self._table.mask_classes) for name in job.formats
        }

    def __call__(self, batch: Any) -> Any:
        """A table with a row per image: ``header``, JSON, and the file of each format.

        Args:
            batch: table with ``path``, ``name`` and ``url``.
        """
        import pyarrow

        rows = [
            self._row(ImageFile(Path(r["path"]), PurePosixPath(r["name"]), url=r["url"])) for r in batch.to_pylist()
        ]
        types = {"header": pyarrow.string(), **{name: pyarrow.large_binary() for name in self._job.formats}}
        return pyarrow.table({k: pyarrow.array([row.get(k) for row in rows], t) for k, t in types.items()})

    def _row(self, image: ImageFile) -> dict[str, Any]:
        header: dict[str, Any] = {"name": str(image.name), "problem": "", "fatal": self.error}
        files: dict[str, bytes] = {}
        if not self.error:
            try:
                files, header["pixels"] = self._files(image)
            except ReclipError as error:
                header["problem"] = str(error)
            except Exception as error:  # one image must not end the run
                header["problem"] = f"image {image.name} failed ({type(error).__name__}: {error})"
        return {"header": json.dumps(header), **files}

    def _files(self, image: ImageFile) -> tuple[dict[str, bytes], dict[str, int]]:
        """The content of the files of an image, and pixels per id."""
        pixels = self._read(image)
        if problem := problem_of(image, pixels, self._predictor.tiling, "scores" in self._writers):
            raise ReclipError(problem)
        labels, scores = self._table.predict(self._predictor, pixels, "scores" in self._writers)
        prediction = Prediction(image.name, labels, image=pixels, scores=scores)
        files = {}
        for name, writer in self._writers.items():
            writer.add(prediction)
            (file,) = writer.files(image.name)
            files[name] = file.read_bytes()
            file.unlink()
        return files, count_pixels(labels)

    def _read(self, image: ImageFile) -> Any:
        if not image.url or image.path.exists():
            return read_image(image.path)
        copy = self._copies / image.name
        try:
            fetch(image.url, copy)
            return read_image(copy)
        finally:
            copy.unlink(missing_ok=True)


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


class RayEngine:
    """Makes masks on Ray.

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

    def masks(
        self, job: MaskJob, images: Sequence[ImageFile], folder: Path, output: Path, stage: str = "masks"
    ) -> dict[str, str]:
        """Write the masks of images that have none; blocks of lost workers are computed again.

        Args:
            job: what to make; ``formats`` are written below ``output``, except ``index``.
            folder: folder of the masks.
            output: the output folder.
            stage: name in progress events.

        Returns:
            The reason for each image that could not be predicted, by image id.
        """
        writers = {n: FORMATS[n](folder if n == "index" else output / n, _mask_classes(job)) for n in job.formats}
        todo = [i for i in images if not all(writers[n].is_done(i.name) for n in ("index", "scores") if n in writers)]
        remove_leftovers(folder)
        if not todo:
            return {}
        with self._started(job), count_steps(stage, len(todo)) as steps, open_to_append(folder / COVERAGE) as coverage:
            problems: dict[str, str] = {}
            waiting = {str(image.name): image for image in todo}
            for largest in (_LARGEST_BLOCK, 1):
                # The second pass is for images of blocks whose worker has died again and again: one of them did it.
                for header, files in self._rows(job, list(waiting.values()), largest) if waiting else ():
                    if header["fatal"]:
                        raise ReclipError(f"a worker cannot load the model: {header['fatal']}")
                    image = waiting.pop(header["name"], None)
                    if image is None:  # computed twice
                        continue
                    if header["problem"]:
                        problems[image.image_id] = header["problem"]
                    else:
                        with naming_errors(folder / COVERAGE):
                            line = {"image_id": image.image_id, "pixels": header["pixels"]}
                            coverage.write("\n" + json.dumps(line))
                            coverage.flush()
                        for name in job.formats:
                            (file,) = writers[name].files(image.name)
                            with atomic_write(file) as temporary:
                                temporary.write_bytes(files[name])
                    steps.advance()
        ended = f"its worker process ended {_RETRIES + 1} times: too little memory, or a damaged image"
        return problems | {image.image_id: f"image {image.name}: {ended}" for image in waiting.values()}

    def make_masks(
        self, folder: RunFolder, model: Callable[[str], tuple[CfgNode, Path]]
    ) -> Callable[[MaskRequest, Sequence[ImageFile], str], dict[str, str]]:
        """A :data:`~reclip_d2.workspace.results.MakeMasks` for an output folder.

        Args:
            model: config and checkpoint of a kind of model.
        """

        def make(request: MaskRequest, images: Sequence[ImageFile], stage: str) -> dict[str, str]:
            cfg, weights = model(request.kind)
            formats = ["index", *request.formats]
            job = MaskJob(
                cfg=cfg,
                kind=request.kind,
                classes=request.classes,
                weights=weights,
                keep_background=request.background == "keep",
                # In this order: an existing mask means that its scores exist, and that it is not newer than the others.
                formats=tuple(name for name in ("scores", "index", "palette", "overlay") if name in formats),
                threads=max(1, int(os.environ.get("OMP_NUM_THREADS") or 1)),
            )
            pictures = [image for image in images if not image.is_scene]  # this process makes those of GeoTIFFs
            return self.masks(job, pictures, folder.masks, folder.path, stage)

        return make

    def _started(self, job: MaskJob) -> Any:
        """Context with a connection to ``RAY_ADDRESS``, to the cluster of this process, or to one of this machine."""
        ray = self._ray
        if ray.is_initialized():
            return contextlib.nullcontext()
        quiet = {"log_to_driver": False, "logging_level": "error"}
        if os.environ.get("RAY_ADDRESS"):
            try:
                return ray.init(**quiet)
            except (ConnectionError, ValueError, RuntimeError) as error:
                text = " ".join(str(error).split())[:200]
                raise ReclipError(f"RAY_ADDRESS {os.environ['RAY_ADDRESS']} cannot be reached ({text})") from error
        count = self.workers or len(os.sched_getaffinity(0))
        return ray.init(address="local", num_cpus=max(count * job.threads, 1), include_dashboard=False, **quiet)

    def _rows(
        self, job: MaskJob, images: Sequence[ImageFile], largest: int
    ) -> Iterator[tuple[dict[str, Any], dict[str, bytes]]]:
        """Header and files of images, in the order in which they are done; images of failed blocks are missing."""
        ray = self._ray
        gpu = job.cfg.MODEL.DEVICE.startswith("cuda")
        available = ray.cluster_resources()
        workers = self.workers or max(1, int(available.get("GPU" if gpu else "CPU", 1) // (1 if gpu else job.threads)))
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.max_errored_blocks = -1  # see the second pass of masks()
        size = max(1, min(largest, len(images) // (workers * _BLOCKS_PER_WORKER)))
        items = [{"path": str(i.path), "name": str(i.name), "url": i.url} for i in images]
        table = ray.data.from_items(items, override_num_blocks=-(-len(items) // size)).map_batches(
            MaskWorker,
            batch_size=None,
            batch_format="pyarrow",
            fn_constructor_args=(job,),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers, initial_size=workers),
            num_cpus=job.threads,
            num_gpus=1 if gpu else 0,
            max_restarts=-1,
            max_task_retries=_RETRIES,
        )
        for batch in table.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            for row in batch.to_pylist():
                yield json.loads(row.pop("header")), row


def _mask_classes(job: MaskJob) -> Any:
    return MaskClassTable(job.classes, job.keep_background).mask_classes
