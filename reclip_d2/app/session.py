"""What the page does, without the page: segment an image, learn a bias, take logits apart.

Shape letters: C classes of the model, (H, W) size of the image in pixels, (h, w) of its reduced copy.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from reclip_d2.app.learning import Learning, Report
from reclip_d2.app.models import ClipChoice, Models, SomeClasses, class_places
from reclip_d2.app.pictures import reduce_image, reduce_labels
from reclip_d2.cli import options
from reclip_d2.cli.masks import MaskClassTable, count_pixels
from reclip_d2.cli.trained_model import TrainedModel
from reclip_d2.data.class_file import ClassList, parse_classes
from reclip_d2.data.dataset_mapper import UnlabelledDatasetMapper
from reclip_d2.data.images import read_image
from reclip_d2.data.working_files import check_shape
from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.logit_parts import LogitParts, has_bias, logit_parts
from reclip_d2.formats.png import write_png
from reclip_d2.inference import ImagePredictor

_CLASS_FILE = "PAGE"  # stands for the file's path in the parser's messages
_IMAGES = "images"  # copies of what was learnt from, beside its output
# Epochs of the papers on VOC, see configs/custom/reclippp_rectify.yaml.
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
    """A CLIP, the models that are at hand, and a folder to work in."""

    def __init__(self, clip: ClipChoice, trained: TrainedModel | None, folder: Path) -> None:
        """
        Args:
            clip: the CLIP; that of ``trained`` if that is given.
            trained: model that is there from the start.
            folder: for what is learnt, which stays there, and what is written, which goes with :meth:`close`.
        """
        self.clip = clip
        self.trained = trained
        self.folder = folder
        self.models = Models(clip)
        self.default_iterations = clip.config("rectified").SOLVER.MAX_ITER
        self._batch = clip.config("rectified").SOLVER.IMS_PER_BATCH
        self._own_folder: Path | None = None
        self._learnt: list[TrainedModel] = []
        self._learning: Learning | None = None
        self._folder_lock = threading.Lock()
        self._models_lock = threading.Lock()
        self._learning_lock = threading.Lock()

    def own_folder(self) -> Path:
        """Folder of this session alone, made when it is first asked for; uploads, examples and masks go there.

        Not ``folder`` itself, which may hold files of the user's, or of another session.
        """
        with self._folder_lock:
            if self._own_folder is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._own_folder = Path(tempfile.mkdtemp(dir=self.folder, prefix="page-")).absolute()
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

    def segment(self, path: Path, text: str) -> Segmentation:
        """Masks of an image by MaskCLIP and, where there is one, by the trained model of these classes.

        Args:
            path: the image's file.
            text: class list.

        Raises:
            ReclipError: the class list or the image is wrong.
        """
        classes = read_classes(text)
        self._check(classes)
        image = read_image(path)
        size = (image.shape[0], image.shape[1])
        table = MaskClassTable(classes, keep_background=False)
        model = self.model_for(classes)
        with self._models_lock:
            predictor = self.models.maskclip(classes)
            check_shape(path, size, predictor.tiling)
            before = self._labels(predictor, table, image)
            after = None
            if model is not None:
                predictor = self.models.trained(model.trained)
                chosen = SomeClasses(predictor, model.places)
                after = self._labels(chosen, table, image)
        self.masks.mkdir(exist_ok=True)
        mask_file = Path(tempfile.mkdtemp(dir=self.masks)) / f"{path.stem}.png"
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
    def _labels(predictor: ImagePredictor | SomeClasses, table: MaskClassTable, image: np.ndarray) -> np.ndarray:
        return table.predict(predictor, image, with_scores=False)[0]

    def _check(self, classes: ClassList) -> None:
        try:
            self.models.check(classes)
        except ReclipError as error:
            raise ReclipError(str(error).replace(f"class file {_CLASS_FILE}", "the class list")) from error

    # ---- bias -------------------------------------------------------------------------------------------------

    def bias_parts(self, segmentation: Segmentation) -> LogitParts:
        """The logits of a segmented image, taken apart, of its own classes in their order.

        Of a distilled student: those of the model that it was distilled from.

        Raises:
            ReclipError: there is no trained model, or none with a bias.
        """
        if segmentation.model is None:
            raise ReclipError("no bias has been learnt for these classes: press Learn")
        if segmentation.parts is None:
            trained, places = segmentation.model.trained, segmentation.model.places
            if trained.kind != "rectified":
                trained = TrainedModel.find(str(trained.folder.path), "rectified", trained.pretrained)
            with self._models_lock:
                model = self.models.trained(trained).model
                if not has_bias(model):
                    raise ReclipError(f"{trained.folder.path} has no bias (MODEL.BIAS_HEAD.RECTIFICATION none)")
                mapper = UnlabelledDatasetMapper(self.models.config(trained), is_train=False)
                parts = logit_parts(model, mapper, {"file_name": str(segmentation.path)})
            names = ("query", "bias", "rectified", "mask")
            segmentation.parts = parts._replace(**{name: getattr(parts, name)[places] for name in names})
        return segmentation.parts

    # ---- learn ------------------------------------------------------------------------------------------------

    def learn(self, paths: Sequence[Path], text: str, iterations: int, report: Report) -> TrainedModel:
        """Learn the bias for a class list from images, by ``reclip segment``; broken images have no part in it.

        Raises:
            ReclipError: something is wrong with the input, another training is under way, or this one was stopped.
        """
        classes = read_classes(text)
        self._check(classes)
        if not paths:
            raise ReclipError("there are no images to learn from: upload some")
        if not self._learning_lock.acquire(blocking=False):
            raise ReclipError("a training is under way already: wait for its end, or press Stop")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=self.folder, prefix="learnt-"))
            try:
                self._run(folder, paths, classes, iterations, report)
                trained = TrainedModel.find(str(folder / "out"), None, None)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            self._learnt.append(trained)
            return trained
        finally:
            self._learning = None
            self._learning_lock.release()

    def _run(self, folder: Path, paths: Sequence[Path], classes: ClassList, iterations: int, report: Report) -> None:
        """One run of ``reclip segment``, with copies of the images: two uploads may have one name."""
        images = folder / _IMAGES
        images.mkdir()
        for number, path in enumerate(paths, start=1):
            shutil.copyfile(path, images / f"{number:04d} {path.name}")
        (folder / "classes.txt").write_text(class_text(classes) + "\n", encoding="utf-8")
        self._learning = Learning([
            str(images), "--classes", str(folder / "classes.txt"), "--output", str(folder / "out"),
            "--clip", self.clip.name, "--pretrained", self.clip.pretrained, "--iterations", str(iterations),
            "--skip-broken", "--device", self.clip.device, "--opts", *self.clip.opts,
        ])  # fmt: skip
        try:
            self._learning.run(report)
        except ReclipError as error:
            raise type(error)(str(error).replace(f"{images}/", "").replace(f"{folder}/", "")) from error

    def stop_learning(self) -> bool:
        """End the training that is under way; returns whether there is one."""
        learning = self._learning
        if learning is not None:
            learning.stop()
        return learning is not None

    def close(self) -> None:
        """End what is under way, and remove the images and masks; what was learnt stays."""
        self.stop_learning()
        folders = [] if self._own_folder is None else [self._own_folder]
        for trained in self._learnt:
            folders += [trained.folder.path.parent / _IMAGES, trained.folder.working_files]
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def description(self) -> str:
        """The model and CLIP, in a line."""
        clip = f"CLIP {self.clip.name} on {self.clip.device}"
        if self.trained is None:
            return clip
        return f"{options.TITLES[self.trained.kind]} of {self.trained.folder.path}, {clip}"
