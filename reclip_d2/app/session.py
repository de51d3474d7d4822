"""What the page does, without the page: segment an image, learn a bias, take logits apart.

Shape letters: C classes of the model, (H, W) size of the image in pixels, (h, w) of its reduced copy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from reclip_d2.app.limits import Limits
from reclip_d2.app.models import ClipChoice, InTurns, Models, class_places
from reclip_d2.app.pictures import reduce_image, reduce_labels
from reclip_d2.app.private_folder import private_folder
from reclip_d2.app.tasks import Task, Visitors
from reclip_d2.data.class_file import ClassList, parse_classes
from reclip_d2.data.dataset_mapper import UnlabelledDatasetMapper
from reclip_d2.data.images import read_image
from reclip_d2.data.working_files import check_shape
from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.logit_parts import LogitParts, has_bias, logit_parts
from reclip_d2.formats.pictures import write_png
from reclip_d2.utils.progress import ProgressCallback
from reclip_d2.workspace.child import SegmentProcess
from reclip_d2.workspace.masks import MaskClassTable, count_pixels
from reclip_d2.workspace.options import TITLES, SegmentOptions
from reclip_d2.workspace.trained_model import TrainedModel

_CLASS_FILE = "PAGE"  # stands for the file's path in the parser's messages
_IMAGES = "images"  # copies of what is learnt from, beside its output
_TRAINING, _LEARNT = "training-", "learnt-"
_KEPT_RESULTS = 100  # folders of masks and overlays that stay: browsers load them when they are shown
# Epochs of the papers on VOC, see configs/datasets/custom.yaml.
_EPOCHS = 200
_FEWEST_ITERATIONS = 50


def read_classes(text: str) -> ClassList:
    """The class list of a text in the syntax of class files.

    Raises:
        ReclipError: as :func:`parse_classes`, with the line; the message speaks of the class list, not of a file.
    """
    try:
        return parse_classes(text, _CLASS_FILE)
    except ReclipError as error:
        raise ReclipError(str(error).replace(f"class file {_CLASS_FILE}", "the class list")) from error


def class_text(classes: ClassList) -> str:
    """The text of a class list, as :func:`read_classes` reads it."""
    lines = [", ".join(names) for names in classes.classes]
    return "\n".join(lines + ([f"background: {', '.join(classes.background)}"] if classes.background else []))


@dataclasses.dataclass(frozen=True)
class AfterModel:
    """A trained model that has the classes that are asked for.

    Attributes:
        trained: the model.
        places: of these classes among the model's.
    """

    trained: TrainedModel
    places: list[int]

    @property
    def others(self) -> int:
        """How many further classes it has."""
        return len(self.trained.state.classes.model_classes) - len(self.places)


@dataclasses.dataclass
class Segmentation:
    """One image and its masks.

    Attributes:
        path: of the image.
        image: a copy of it, reduced if it is large, ``(h, w, 3)`` uint8.
        classes: the class list.
        table: from the model's classes to the ids of masks.
        before, after: masks of MaskCLIP and of the trained model at the copy's size, ``(h, w)`` uint8, 255 is ignored;
            ``after`` is None without a trained model.
        pixels_before, pixels_after: pixels of each id in the masks at full size.
        mask_file: index PNG at full size, of ``after`` if there is one.
        model: of ``after``.
        tiled: the image is so large that it is predicted in tiles.
        parts: its logits taken apart, once someone has asked for them.
    """

    path: Path
    image: np.ndarray
    classes: ClassList
    table: MaskClassTable
    before: np.ndarray
    after: np.ndarray | None
    pixels_before: dict[str, int]
    pixels_after: dict[str, int] | None
    mask_file: Path
    model: AfterModel | None
    tiled: bool
    parts: LogitParts | None = None


class Session:
    """A CLIP, the models that are at hand, and a folder to work in; its visitors share them.

    A visitor is one page in a browser. What a visitor has begun no other can stop, unless its page is gone.
    """

    def __init__(
        self, clip: ClipChoice, trained: TrainedModel | None, folder: Path, limits: Limits | None = None
    ) -> None:
        """
        Args:
            clip: the CLIP; that of ``trained`` if that is given.
            trained: model that is there from the start.
            folder: for what is learnt, which stays there, and what is written, which goes with :meth:`close`.
            limits: of what visitors send.
        """
        self.clip = clip
        self.trained = trained
        self.folder = folder
        self.limits = limits or Limits()
        self.visitors = Visitors()
        self.models = Models(clip)
        self.default_iterations = clip.config("rectified").SOLVER.MAX_ITER
        self._batch = clip.config("rectified").SOLVER.IMS_PER_BATCH
        self._own_folder: Path | None = None
        self._at_end = contextlib.ExitStack()
        self._results: deque[Path] = deque()
        self._learnt: list[TrainedModel] = []
        self._learning: tuple[SegmentProcess, str | None] | None = None  # and whose it is
        self._folder_lock = threading.Lock()
        self._learning_lock = threading.Lock()

    def own_folder(self) -> Path:
        """Folder of this session alone, made when it is first asked for; uploads, examples and masks go there.

        Not ``folder`` itself, which may hold files of the user's, or of another session.
        """
        with self._folder_lock:
            if self._own_folder is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._own_folder = self._at_end.enter_context(private_folder(self.folder, "page-"))
            return self._own_folder

    @property
    def masks(self) -> Path:
        """Folder of the masks and overlays."""
        return self.own_folder() / "masks"

    # ---- models -----------------------------------------------------------------------------------------------

    def model_for(self, classes: ClassList) -> AfterModel | None:
        """The trained model for a class list: with just these classes or else with more, the last that was learnt."""
        candidates = [*reversed(self._learnt), *([self.trained] if self.trained else [])]
        found = []
        for trained in candidates:
            places = class_places(trained.state.classes, classes)
            if trained.kind != "maskclip" and places is not None:
                found.append(AfterModel(trained, places))
        return min(found, key=lambda model: model.others > 0, default=None)

    @property
    def has_models(self) -> bool:
        """Whether there is a trained model of any class list."""
        return bool(self._learnt) or (self.trained is not None and self.trained.kind != "maskclip")

    def suggested_iterations(self, images: int) -> int:
        """Iterations of a training on so many images: the papers' epochs, within the config's iterations."""
        wanted = math.ceil(_EPOCHS * images / self._batch)
        return min(self.default_iterations, max(_FEWEST_ITERATIONS, wanted))

    # ---- segment ----------------------------------------------------------------------------------------------

    def read(self, path: Path) -> np.ndarray:
        """An image ``(H, W, 3)`` uint8 within the limits.

        Raises:
            ReclipError: as :func:`read_image`, or it is too large.
        """
        self.limits.check_image(path)
        return read_image(path)

    def segment(self, path: Path, text: str, visitor: str | None = None) -> Segmentation:
        """Masks of an image by MaskCLIP and, where there is one, by the trained model of these classes.

        Args:
            path: the image's file.
            text: class list.
            visitor: who asks for it, and can stop it.

        Raises:
            TaskStopped: the visitor has stopped it, or asked for something else.
            ReclipError: the class list or the image is wrong.
        """
        classes = self._read_classes(text)
        with self.visitors.task(visitor) as task:
            return self._segment(path, classes, task)

    def _segment(self, path: Path, classes: ClassList, task: Task) -> Segmentation:
        image = self.read(path)
        task.check()
        size = (image.shape[0], image.shape[1])
        table = MaskClassTable(classes, keep_background=False)
        model = self.model_for(classes)
        predictor = self.models.maskclip(classes, task.turn)
        check_shape(path, size, predictor.tiling)
        before = self._labels(InTurns(predictor, task), table, image)
        after = None
        if model is not None:
            predictor = self.models.trained(model.trained)
            after = self._labels(InTurns(predictor.for_classes(model.places), task), table, image)
        task.check()
        mask_file = self._result_folder() / f"{path.stem}.png"
        write_png(mask_file, before if after is None else after)
        return Segmentation(
            path=path,
            image=reduce_image(image),
            classes=classes,
            table=table,
            before=reduce_labels(before),
            after=None if after is None else reduce_labels(after),
            pixels_before=count_pixels(before),
            pixels_after=None if after is None else count_pixels(after),
            mask_file=mask_file,
            model=model,
            tiled=predictor.tiling.applies_to(size),
        )

    @staticmethod
    def _labels(predictor: InTurns, table: MaskClassTable, image: np.ndarray) -> np.ndarray:
        return table.predict(predictor, image, with_scores=False)[0]

    def _result_folder(self) -> Path:
        """A new folder for a mask and its overlays; the oldest goes."""
        self.masks.mkdir(exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=self.masks))
        self._results.append(folder)
        if len(self._results) > _KEPT_RESULTS:
            shutil.rmtree(self._results.popleft(), ignore_errors=True)
        return folder

    def _read_classes(self, text: str) -> ClassList:
        """A class list that CLIP can take, within the limits."""
        self.limits.check_text(text)
        classes = read_classes(text)
        try:
            self.models.check(classes)
        except ReclipError as error:
            raise ReclipError(str(error).replace(f"class file {_CLASS_FILE}", "the class list")) from error
        return classes

    # ---- bias -------------------------------------------------------------------------------------------------

    def bias_parts(self, segmentation: Segmentation, visitor: str | None = None) -> LogitParts:
        """The logits of a segmented image, taken apart, of its own classes in their order.

        Of a distilled student: those of the model that it was distilled from.

        Raises:
            TaskStopped: the visitor has stopped it, or asked for something else.
            ReclipError: there is no trained model, or none with a bias.
        """
        if segmentation.model is None:
            raise ReclipError("no bias has been learnt for these classes: press Learn")
        if segmentation.parts is None:
            trained, places = segmentation.model.trained, segmentation.model.places
            if trained.kind != "rectified":
                trained = TrainedModel.find(str(trained.folder.path), "rectified", trained.pretrained)
            model = self.models.trained(trained).model
            if not has_bias(model):
                raise ReclipError(f"{trained.folder.path} has no bias (MODEL.BIAS_HEAD.RECTIFICATION none)")
            mapper = UnlabelledDatasetMapper(self.models.config(trained), is_train=False)
            with self.visitors.task(visitor) as task:
                record = mapper({"file_name": str(segmentation.path)})  # before its turn: it reads the image
                with task.turn():
                    parts = logit_parts(model, lambda mapped: mapped, record)
            names = ("query", "bias", "rectified", "mask")
            segmentation.parts = parts._replace(**{name: getattr(parts, name)[places] for name in names})
        return segmentation.parts

    # ---- learn ------------------------------------------------------------------------------------------------

    def learn(
        self, paths: Sequence[Path], text: str, iterations: int, report: ProgressCallback, visitor: str | None = None
    ) -> TrainedModel:
        """Learn the bias for a class list from images, by ``reclip segment``; broken images have no part in it.

        Args:
            visitor: who asks for it, and can stop it.

        Raises:
            ReclipError: something is wrong with the input, another training is under way, or this one was stopped.
        """
        classes = self._read_classes(text)
        if not paths:
            raise ReclipError("there are no images to learn from: upload some")
        if not self._learning_lock.acquire(blocking=False):
            raise ReclipError("a training is under way already: wait for its end, or press Stop if it is yours")
        # In the folder that goes with the program, until it is finished: if that is killed nothing is left behind.
        folder = Path(tempfile.mkdtemp(dir=self.own_folder(), prefix=_TRAINING))
        try:
            self._run(folder, paths, classes, iterations, report, visitor)
            trained = self._keep(folder)
            self._learnt.append(trained)
            return trained
        finally:
            self._learning = None
            shutil.rmtree(folder, ignore_errors=True)
            self._learning_lock.release()

    def _run(
        self,
        folder: Path,
        paths: Sequence[Path],
        classes: ClassList,
        iterations: int,
        report: ProgressCallback,
        visitor: str | None,
    ) -> None:
        """One run of ``reclip segment``, with copies of the images: two uploads may have one name."""
        images = folder / _IMAGES
        options = SegmentOptions(
            clip=self.clip.name,
            pretrained=self.clip.pretrained,
            iterations=iterations,
            device=self.clip.device,
            opts=self.clip.opts,
        )
        learning = SegmentProcess([images], folder / "classes.txt", folder / "out", options)
        self._learning = (learning, visitor)
        images.mkdir()
        for number, path in enumerate(paths, start=1):
            shutil.copyfile(path, images / f"{number:04d} {path.name}")
        (folder / "classes.txt").write_text(class_text(classes) + "\n", encoding="utf-8")
        try:
            learning.run(report)
        except ReclipError as error:
            raise type(error)(str(error).replace(f"{images}/", "").replace(f"{folder}/", "")) from error

    def _keep(self, folder: Path) -> TrainedModel:
        """Move a finished training to where it stays, without the images."""
        target = self.folder.absolute() / folder.name.replace(_TRAINING, _LEARNT, 1)
        for part in (folder / _IMAGES, TrainedModel.find(str(folder / "out"), None, None).folder.working_files):
            shutil.rmtree(part, ignore_errors=True)
        folder.rename(target)
        return TrainedModel.find(str(target / "out"), None, None)

    # ---- the end ----------------------------------------------------------------------------------------------

    def stop(self, visitor: str | None) -> bool:
        """End what a visitor has begun, and a training that belongs to nobody; returns whether there is any."""
        stopped = visitor is not None and self.visitors.stop(visitor)
        learning, owner = self._learning or (None, None)
        if learning is not None and owner in (None, visitor):
            learning.stop()
            stopped = True
        return stopped

    def leave(self, visitor: str) -> None:
        """A visitor's page is gone: end its request; its training goes on, but belongs to nobody."""
        self.visitors.stop(visitor)
        learning, owner = self._learning or (None, None)
        if learning is not None and owner == visitor:
            self._learning = (learning, None)

    def stop_all(self) -> None:
        """End what is under way, whoever has begun it."""
        self.visitors.stop_all()
        learning, _ = self._learning or (None, None)
        if learning is not None:
            learning.stop()

    def close(self) -> None:
        """End what is under way, and remove the images and masks; what was learnt stays."""
        self.stop_all()
        self._at_end.close()

    @property
    def description(self) -> str:
        """The model and CLIP, in a line."""
        clip = f"CLIP {self.clip.name} on {self.clip.device}"
        if self.trained is None:
            return clip
        return f"{TITLES[self.trained.kind]} of {self.trained.folder.path}, {clip}"
