"""The page without its layout: segment an image, learn a bias, split logits into their parts.

Shape letters: C classes of the model, (H, W) size of the image in pixels, (h, w) of its reduced copy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from reclip_d2.app.guard import Limits
from reclip_d2.app.models import InTurns, Models, class_places
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
from reclip_d2.visualization.reduced import reduce_image, reduce_labels
from reclip_d2.workspace.child import SegmentProcess
from reclip_d2.workspace.masks import MaskClassTable, count_pixels
from reclip_d2.workspace.options import TITLES, SegmentOptions
from reclip_d2.workspace.schedule import suggested_iterations
from reclip_d2.workspace.stage_config import ClipChoice
from reclip_d2.workspace.trained_model import TrainedModel

_CLASS_FILE = "PAGE"  # instead of a path in the parser's messages
_IMAGES = "images"  # copies of the training images
_TRAINING, _LEARNT = "training-", "learnt-"
_KEPT_RESULTS = 100  # folders of masks and overlays: browsers load these when they show them


def read_classes(text: str) -> ClassList:
    """Parse a class list in the syntax of class files.

    Raises:
        ReclipError: see :func:`parse_classes`; messages say "the class list, line N".
    """
    with _naming_class_list():
        return parse_classes(text, _CLASS_FILE)


@contextlib.contextmanager
def _naming_class_list() -> Iterator[None]:
    """Make errors name the class list instead of a class file."""
    try:
        yield
    except ReclipError as error:
        raise ReclipError(str(error).replace(f"class file {_CLASS_FILE}", "the class list")) from error


def class_text(classes: ClassList) -> str:
    """A class list as text for :func:`read_classes`."""
    lines = classes.entries
    return "\n".join(lines + ([f"background: {', '.join(classes.background)}"] if classes.background else []))


@dataclasses.dataclass(frozen=True)
class AfterModel:
    """A trained model that has all wanted classes.

    Attributes:
        trained: the model.
        places: indices of the wanted classes in the model's class list.
    """

    trained: TrainedModel
    places: list[int]

    @property
    def keeps_before(self) -> bool:
        """Whether its run kept CLIP's own masks."""
        decision = self.trained.decision
        return decision is not None and decision.kept == "maskclip"

    @property
    def others(self) -> int:
        """Number of its other classes."""
        return len(self.trained.state.classes.model_classes) - len(self.places)


@dataclasses.dataclass
class BeforeAfter:
    """An image with its masks before and after rectification.

    Attributes:
        path: the image file.
        image: a copy ``(h, w, 3)`` uint8, reduced if the image is large.
        classes: the class list.
        table: maps the model's classes to mask ids.
        before, after: masks ``(h, w)`` uint8 by MaskCLIP and by the trained model at the copy's size, 255 is ignored;
            ``after`` is None without a trained model.
        pixels_before, pixels_after: number of pixels per id at full size.
        mask_file: index PNG at full size, of ``after`` if there is one and its run did not keep CLIP's own masks.
        model: the model of ``after``.
        tiled: whether the image is predicted in tiles.
        parts: parts of the logits, once :meth:`Session.bias_parts` has computed them.
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
    """A CLIP, trained models and a working folder, shared by all visitors.

    A visitor is one open page in a browser. Visitors can stop only their own work, and trainings of closed pages.
    """

    def __init__(
        self, clip: ClipChoice, trained: TrainedModel | None, folder: Path, limits: Limits | None = None
    ) -> None:
        """
        Args:
            clip: the CLIP; that of ``trained`` if given.
            trained: a model that is available from the start.
            folder: for models, which are kept, and other files, which :meth:`close` removes.
            limits: limits on what visitors may send.
        """
        self.clip = clip
        self.trained = None if trained is None else trained.to_compare()
        self.folder = folder
        self.limits = limits or Limits()
        self.visitors = Visitors()
        self.models = Models(clip)
        self._config = clip.config("rectified")
        self.default_iterations = self._config.SOLVER.MAX_ITER
        self._own_folder: Path | None = None
        self._at_end = contextlib.ExitStack()
        self._results: deque[Path] = deque()
        self._learnt: list[TrainedModel] = []
        self._learning: tuple[SegmentProcess, str | None] | None = None  # and its visitor
        self._folder_lock = threading.Lock()
        self._learning_lock = threading.Lock()

    def own_folder(self) -> Path:
        """This session's private folder for uploads, examples and masks, created by the first call.

        It is below ``folder``, which may hold files of the user or of other sessions.
        """
        with self._folder_lock:
            if self._own_folder is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._own_folder = self._at_end.enter_context(private_folder(self.folder, "page-"))
            return self._own_folder

    @property
    def masks(self) -> Path:
        """Folder of masks and overlays."""
        return self.own_folder() / "masks"

    # ---- models -----------------------------------------------------------------------------------------------

    def model_for(self, classes: ClassList) -> AfterModel | None:
        """The latest trained model with exactly these classes or, if there is none, with more."""
        candidates = [*reversed(self._learnt), *([self.trained] if self.trained else [])]
        found = []
        for trained in candidates:
            places = class_places(trained.state.classes, classes)
            if trained.kind != "maskclip" and places is not None:
                found.append(AfterModel(trained, places))
        return min(found, key=lambda model: model.others > 0, default=None)

    @property
    def has_models(self) -> bool:
        """Whether there is any trained model."""
        return bool(self._learnt) or (self.trained is not None and self.trained.kind != "maskclip")

    def suggested_iterations(self, images: int) -> int:
        """Iterations for this number of images, see
        :func:`~reclip_d2.workspace.schedule.suggested_iterations`."""
        return suggested_iterations(images, self._config)

    # ---- segment ----------------------------------------------------------------------------------------------

    def read(self, path: Path) -> np.ndarray:
        """An image ``(H, W, 3)`` uint8 within the limits.

        Raises:
            ReclipError: see :func:`read_image`; or the image is too large.
        """
        self.limits.check_image(path)
        return read_image(path)

    def segment(self, path: Path, text: str, visitor: str | None = None) -> BeforeAfter:
        """Masks of an image by MaskCLIP and, if there is one, by the trained model of these classes.

        Args:
            path: the image file.
            text: the class list.
            visitor: who requests it and can stop it.

        Raises:
            TaskStopped: the visitor stopped it or made another request.
            ReclipError: the class list or the image is invalid.
        """
        classes = self._read_classes(text)
        with self.visitors.task(visitor) as task:
            return self._segment(path, classes, task)

    def _segment(self, path: Path, classes: ClassList, task: Task) -> BeforeAfter:
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
        write_png(mask_file, before if after is None or model.keeps_before else after)
        return BeforeAfter(
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
        """A new folder for a mask and its overlays; the oldest one is removed."""
        self.masks.mkdir(exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=self.masks))
        self._results.append(folder)
        if len(self._results) > _KEPT_RESULTS:
            shutil.rmtree(self._results.popleft(), ignore_errors=True)
        return folder

    def _read_classes(self, text: str) -> ClassList:
        """Parse a class list, and check it against the limits and CLIP's text encoder."""
        self.limits.check_text(text)
        classes = read_classes(text)
        with _naming_class_list():
            self.models.check(classes)
        return classes

    # ---- bias -------------------------------------------------------------------------------------------------

    def bias_parts(self, segmentation: BeforeAfter, visitor: str | None = None) -> LogitParts:
        """Parts of the logits of a segmented image, with its classes in their order.

        For a distilled student, those of its teacher.

        Raises:
            TaskStopped: the visitor stopped it or made another request.
            ReclipError: there is no trained model, or it has no bias.
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
            mapper = UnlabelledDatasetMapper(trained.config(self.clip.overrides), is_train=False)
            with self.visitors.task(visitor) as task:
                record = mapper({"file_name": str(segmentation.path)})  # before the turn, since it reads the image
                with task.turn():
                    parts = logit_parts(model, lambda mapped: mapped, record)
            names = ("query", "bias", "rectified", "mask")
            segmentation.parts = parts._replace(**{name: getattr(parts, name)[places] for name in names})
        return segmentation.parts

    # ---- learn ------------------------------------------------------------------------------------------------

    def learn(
        self, paths: Sequence[Path], text: str, iterations: int, report: ProgressCallback, visitor: str | None = None
    ) -> TrainedModel:
        """Learn the bias for a class list from images, as ``reclip segment`` does; broken images are left out.

        Args:
            report: called with each progress event, in this thread.
            visitor: who requests it and can stop it.

        Raises:
            RunStopped: the training was stopped.
            ReclipError: an input is invalid, or another training is running.
        """
        classes = self._read_classes(text)
        if not paths:
            raise ReclipError("there are no images to learn from: upload some")
        if not self._learning_lock.acquire(blocking=False):
            raise ReclipError("another training is running: wait until it ends, or press Stop if it is yours")
        # In the private folder until it is finished, so that a killed program leaves nothing behind.
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
        """Run the training on copies of the images, since two uploads can have the same name."""
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
        """Move a finished training, without its images, to the working folder."""
        target = self.folder.absolute() / folder.name.replace(_TRAINING, _LEARNT, 1)
        for part in (folder / _IMAGES, TrainedModel.find(str(folder / "out"), None, None).folder.working_files):
            shutil.rmtree(part, ignore_errors=True)
        folder.rename(target)
        return TrainedModel.find(str(target / "out"), None, None).to_compare()

    # ---- the end ----------------------------------------------------------------------------------------------

    def stop(self, visitor: str | None) -> bool:
        """Stop a visitor's work, and a training whose page was closed; returns whether there was any."""
        stopped = visitor is not None and self.visitors.stop(visitor)
        learning, owner = self._learning or (None, None)
        if learning is not None and owner in (None, visitor):
            learning.stop()
            stopped = True
        return stopped

    def leave(self, visitor: str) -> None:
        """Handle a closed page: stop its request; its training continues, and anyone may stop it."""
        self.visitors.stop(visitor)
        learning, owner = self._learning or (None, None)
        if learning is not None and owner == visitor:
            self._learning = (learning, None)

    def stop_all(self) -> None:
        """Stop all work of all visitors."""
        self.visitors.stop_all()
        learning, _ = self._learning or (None, None)
        if learning is not None:
            learning.stop()

    def close(self) -> None:
        """Stop all work, and remove images and masks; trained models are kept."""
        self.stop_all()
        self._at_end.close()

    @property
    def description(self) -> str:
        """Model and CLIP, in one line."""
        clip = f"CLIP {self.clip.name} on {self.clip.device}"
        if self.trained is None:
            return clip
        return f"{TITLES[self.trained.kind]}, {self.trained.folder.path}, {clip}"
