"""The Python API: segmentation by class names, without labels.

::

    from reclip_d2 import Segmenter

    model = Segmenter.from_clip("ViT-B-16-quickgelu", pretrained="openai", classes=["sky", "road, street", "car"])
    model.fit("photos/", progress=print)
    result = model("photo.jpg")
    result.labels, result.logits(), result.overlay(), result.classes
    model.save("out")
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from reclip_d2.backbones.query import check_names_fit
from reclip_d2.data.class_file import ClassList
from reclip_d2.data.working_files import check_shape
from reclip_d2.errors import ReclipError
from reclip_d2.hypothesis.class_pruning import prune_classes, prunes_classes, with_left_out
from reclip_d2.inference import ImagePredictor
from reclip_d2.modeling.build import check_registered_parts
from reclip_d2.utils.digest import file_digest
from reclip_d2.utils.files import StrPath
from reclip_d2.utils.output_paths import check_output_folder
from reclip_d2.utils.progress import ProgressCallback
from reclip_d2.workspace import hub
from reclip_d2.workspace.api_arguments import Classes, check_arguments, class_list, public, with_lines
from reclip_d2.workspace.decision import Decision
from reclip_d2.workspace.masks import MaskClassTable
from reclip_d2.workspace.options import (
    DEFAULT_CLIP,
    DEFAULT_METHOD,
    DEFAULT_PRETRAINED,
    TITLES,
    SegmentOptions,
)
from reclip_d2.workspace.run_state import RunState
from reclip_d2.workspace.saved_model import ModelToSave, SavedModelFolder
from reclip_d2.workspace.segment import SegmentRun
from reclip_d2.workspace.segmentation import ImageLike, Segmentation, pixels_of
from reclip_d2.workspace.stage_config import ClipChoice, resolve_device
from reclip_d2.workspace.trained_model import TrainedModel, load_predictor


class Segmenter:
    """Segments images by class names; :meth:`fit` rectifies CLIP's bias on unlabelled images.

    Create one with :meth:`from_clip`, :meth:`load` or :meth:`from_pretrained`. Nothing is printed; a user's mistakes
    raise :class:`~reclip_d2.errors.ReclipError`, which names the argument.

    Attributes:
        classes: names of the classes; ``classes[k]`` has the label ``k``.
        kind: ``maskclip`` (nothing is trained), ``rectified`` or ``student``.
        clip, pretrained: name and weights of the CLIP.
        device: where the networks run.
        problems: the reason for each image that the last :meth:`fit` could not use, by image id.
        decision: which model the last :meth:`fit` kept, and why; see
            :class:`~reclip_d2.workspace.decision.Decision`. None before.
    """

    def __init__(
        self,
        classes: ClassList,
        choice: ClipChoice,
        *,
        keep_background: bool = False,
        trained: TrainedModel | None = None,
    ) -> None:
        """
        Args:
            classes: the class list.
            choice: the CLIP.
            trained: a trained model of these classes and this CLIP; None for MaskCLIP.
        """
        self._classes = classes
        self._choice = choice
        self.clip, self.pretrained, self.device = choice.name, choice.pretrained, choice.device
        self._table = MaskClassTable(classes, keep_background)
        self._trained = trained
        self._predictor: ImagePredictor | None = None
        self._temporary: tempfile.TemporaryDirectory | None = None
        self._temporary_of: tuple | None = None  # arguments of the fit() in that folder
        self.problems: dict[str, str] = {}
        self.decision: Decision | None = None

    # ---- creation ---------------------------------------------------------------------------------------------

    @classmethod
    @public
    def from_clip(
        cls,
        clip: str = DEFAULT_CLIP,
        pretrained: str = DEFAULT_PRETRAINED,
        *,
        classes: Classes,
        background: Sequence[str] = (),
        keep_background: bool = False,
        device: str = "auto",
        opts: Sequence[str] = (),
    ) -> Segmenter:
        """A segmenter of these classes with an untrained bias, that is MaskCLIP; weights are downloaded when they are
        needed.

        Args:
            clip: open_clip's name of the model, the JSON file of an architecture, or ``reclip-embedded``, a bundled
                toy model.
            pretrained: its weights: a file, or a tag of open_clip's.
            classes: a class file, or a list such as ``["sky", "road, street", "car"]``, where names after the first are
                synonyms.
            background: names of other things in the images, each a class for the model; 255 (ignored) in labels.
            keep_background: give the background names one class in labels, the last, instead of 255.
            device: ``cpu``, ``cuda``, ``cuda:1``, ...; ``auto`` uses a GPU if there is one.
            opts: ``KEY VALUE`` overrides of configs, see ``reclip_d2/config/keys.py``.

        Raises:
            ReclipError: the CLIP or its weights are not available, or a class name is invalid.
        """
        found = class_list(classes, background)
        choice = ClipChoice.find(clip, pretrained, device, [str(part) for part in opts])
        cfg = choice.config("maskclip")
        check_names_fit(found, cfg.MODEL.CLIP.NAME, cfg.MODEL.CLIP.TEMPLATES)
        check_registered_parts(cfg, len(found.model_classes))
        return cls(found, choice, keep_background=keep_background)

    @classmethod
    @public
    def load(
        cls,
        folder: StrPath,
        *,
        use: str | None = None,
        pretrained: str | None = None,
        keep_background: bool = False,
        device: str = "auto",
        opts: Sequence[str] = (),
    ) -> Segmenter:
        """Load a model saved by :meth:`save`, or trained by ``reclip segment``.

        Args:
            folder: folder of :meth:`save`, or the output folder of a run.
            use: which of a run's models: ``maskclip``, ``rectified`` or ``student``; None for the one that was kept.
            pretrained: CLIP's weights, if the file has moved since the training.
            keep_background, device, opts: see :meth:`from_clip`.

        Raises:
            ReclipError: the folder is neither, the model is not finished, or CLIP's weights differ from the training's.
        """
        if use is not None and use not in TITLES:
            raise ReclipError(f"use {use!r} is unknown: use one of {', '.join(TITLES)}")
        return cls._of(TrainedModel.find(str(folder), use, pretrained), keep_background, device, opts)

    @classmethod
    @public
    def from_pretrained(
        cls,
        name_or_folder: StrPath,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: StrPath | None = None,
        local_files_only: bool = False,
        pretrained: str | None = None,
        keep_background: bool = False,
        device: str = "auto",
        opts: Sequence[str] = (),
    ) -> Segmenter:
        """Load a saved model from the Hugging Face Hub, or from a folder: safetensors only; no code is executed.

        Args:
            name_or_folder: ``USER/NAME`` on the Hub, or a folder of :meth:`save`.
            revision: branch, tag or commit on the Hub; None for the main branch.
            token: the user's token; None for the one saved by ``hf auth login``.
            cache_dir: cache for downloads; None for the Hub's default.
            local_files_only: download nothing, like ``HF_HUB_OFFLINE=1``.
            pretrained, keep_background, device, opts: see :meth:`load`.

        Raises:
            ReclipError: there is no such model, it cannot be downloaded, or it is damaged.
        """
        folder = Path(os.fspath(name_or_folder)).expanduser()
        if not folder.is_dir():
            folder = hub.download(
                os.fspath(name_or_folder),
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else os.fspath(cache_dir),
                local_files_only=local_files_only,
            )
        if not SavedModelFolder.is_one(folder):
            raise ReclipError(
                f"{os.fspath(name_or_folder)} is not a saved model: it has no config.json of reclip_d2"
                " (Segmenter.load reads the output folders of reclip segment)"
            )
        return cls._of(TrainedModel.find(str(folder), None, pretrained), keep_background, device, opts)

    @classmethod
    def _of(cls, trained: TrainedModel, keep_background: bool, device: str, opts: Sequence[str]) -> Segmenter:
        choice = ClipChoice(
            trained.state.clip, trained.pretrained, resolve_device(device), tuple(str(part) for part in opts)
        )
        return cls(trained.state.classes, choice, keep_background=keep_background, trained=trained)

    # ---- properties -------------------------------------------------------------------------------------------

    @property
    def classes(self) -> list[str]:
        """Names of the classes; ``classes[k]`` has the label ``k``."""
        return list(self._table.mask_classes.names)

    @property
    def kind(self) -> str:
        """``maskclip`` (nothing is trained), ``rectified`` or ``student``."""
        return "maskclip" if self._trained is None else self._trained.kind

    def __repr__(self) -> str:
        return f"Segmenter({TITLES[self.kind]}, {len(self.classes)} classes, CLIP {self.clip}, {self.device})"

    # ---- training ---------------------------------------------------------------------------------------------

    @public
    def fit(
        self,
        images: StrPath | Sequence[StrPath],
        *,
        output: StrPath | None = None,
        progress: ProgressCallback | None = None,
        iterations: int | None = None,
        student: bool = False,
        keep: str = SegmentOptions.keep,
        method: str = DEFAULT_METHOD,
        student_iterations: int | None = None,
        student_weights: str | None = None,
        tile: int | None = None,
        bank: bool = False,
        seed: int | None = None,
        resume: bool = True,
        overwrite: bool = False,
        opts: Sequence[str] = (),
    ) -> Segmenter:
        """Rectify CLIP's bias on unlabelled images, like ``reclip segment``.

        Args:
            images: folders, images, globs or ``.txt`` lists; images that cannot be read are skipped, see
                :attr:`problems`.
            output: folder of the run, as for ``reclip segment``; None for a temporary one that is removed with this
                object.
            progress: called with each :class:`~reclip_d2.utils.progress.Progress`, in this thread; for example
                ``print``.
            iterations: iterations of the rectification; None for a number that suits the images.
            student: distil a student after the rectification, and predict with it.
            keep: which model to keep: see :class:`~reclip_d2.workspace.options.SegmentOptions`, and :attr:`decision`.
            method: rectification method, see there; ``reclippp_rectify`` is ReCLIP++ as published.
            student_iterations: iterations of the distillation; None for a number that suits the images.
            student_weights: initial weights of the student's backbone; None for the config's.
            tile: cut images with a longer side than this into tiles of this size in pixels; None for the config's.
            bank: make a bank of features from the images, and refine predictions with it (``TEST.REFINE bank``); saved
                models do not contain it.
            seed: random seed of the training; None for the config's.
            resume: resume an interrupted run with the same arguments in ``output`` (or of this object), or load a
                finished one; without it, a folder with a run is an error.
            overwrite: remove the results of earlier runs in ``output``.
            opts: ``KEY VALUE`` overrides in addition to those of the constructor.

        Returns:
            This object, now with the trained model.

        Raises:
            ReclipError: an argument is wrong, or ``output`` belongs to a run with other inputs.
        """
        check_arguments(
            images, progress, iterations=iterations, student_iterations=student_iterations, tile=tile, seed=seed
        )
        seeds = () if seed is None else ("SEED", str(seed))
        options = SegmentOptions(
            student=student,
            keep=keep,
            method=method,
            clip=self.clip,
            pretrained=self.pretrained,
            iterations=iterations,
            student_iterations=student_iterations,
            student_weights=None if student_weights is None else os.fspath(student_weights),
            tile=tile,
            bank=bank,
            overwrite=overwrite,
            device=self.device,
            opts=(*self._choice.opts, *seeds, *map(str, opts)),
        )
        folder = self._temporary_folder((repr(images), options), resume) if output is None else os.fspath(output)
        run = SegmentRun(images, with_lines(self._classes), folder, options)
        if output is not None and not (resume or overwrite) and run.folder.is_used():
            raise ReclipError(f"--output {folder} contains a run: give resume=True, overwrite=True, or another output")
        self.problems = run.train(progress)
        self.decision = Decision.read(run.folder.decision)
        self._trained, self._predictor = TrainedModel.find(folder, None, None), None
        if output is not None:
            self._temporary = None  # removes its files
        return self

    def _temporary_folder(self, arguments: tuple, resume: bool) -> str:
        """A folder that is removed with this object; reused from an interrupted call with the same arguments."""
        if self._temporary is None or self._temporary_of != arguments or not resume:
            self._temporary = tempfile.TemporaryDirectory(prefix="reclip-")
            self._temporary_of = arguments
        return self._temporary.name

    # ---- prediction -------------------------------------------------------------------------------------------

    def __call__(self, images: ImageLike | Iterable[ImageLike]) -> Segmentation | list[Segmentation] | Iterator:
        """Segment an image, or several.

        Args:
            images: an image's path, a PIL image or an array ``(H, W, 3)`` of uint8, RGB; a list of these; or an
                iterable of them.

        Returns:
            A :class:`~reclip_d2.workspace.segmentation.Segmentation`; a list of them for a list or tuple; a lazy
            iterator for any other iterable.

        Raises:
            ReclipError: an image cannot be read, or is not an image.
        """
        if isinstance(images, str | os.PathLike | Image.Image | np.ndarray):
            return self._segment(images)
        if isinstance(images, list | tuple):
            return [self._segment(image) for image in images]
        if hasattr(images, "__iter__") and not hasattr(images, "__array__"):  # not a tensor
            return map(self._segment, images)
        return self._segment(images)  # raises the error

    @public
    def _segment(self, image: ImageLike) -> Segmentation:
        pixels = pixels_of(image)
        path = Path(os.fspath(image)).absolute() if isinstance(image, str | os.PathLike) else None
        predictor = self._loaded()
        check_shape(path or Path("in memory"), pixels.shape[:2], predictor.tiling)
        labels, _ = self._table.predict(predictor, pixels, with_scores=False, file=path)
        return Segmentation(pixels, labels, path, predictor, self._table)

    def _config(self) -> Any:
        return (
            self._choice.config("maskclip") if self._trained is None else self._trained.config(self._choice.overrides)
        )

    def _loaded(self) -> ImagePredictor:
        """The network, built on first use."""
        if self._predictor is None:
            weights = None if self._trained is None else self._trained.weights
            self._predictor = load_predictor(self._config(), self.kind, self._classes, weights)
        return self._predictor

    # ---- saving -----------------------------------------------------------------------------------------------

    @public
    def save(self, folder: StrPath, *, overwrite: bool = False) -> Path:
        """Write the model to a folder for :meth:`load`, :meth:`from_pretrained` and ``reclip predict --model``.

        It contains the trained weights, the classes, and the name of the CLIP, but not the CLIP's own weights.

        Args:
            folder: a new or empty folder; it is written atomically.
            overwrite: replace an existing saved model.

        Returns:
            The folder.

        Raises:
            ReclipError: it cannot be written, or contains other files.
        """
        target = check_output_folder(folder, "folder").absolute()
        self._to_save().save(target, overwrite=overwrite)
        if self._temporary is not None and self._trained is not None:  # the run is no longer needed
            self._trained = TrainedModel.find(str(target), None, self.pretrained)
            self._temporary = self._temporary_of = None
        return target

    @public
    def push_to_hub(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload a reclip_d2 model",
        create_pr: bool = False,
    ) -> str:
        """Upload the model to the Hugging Face Hub with a model card, creating the repository if necessary.

        The card describes the model and claims no licence for CLIP's weights, which are not uploaded. A path of these
        weights is reduced to the file name.

        Args:
            repo_id: ``USER/NAME``.
            revision: branch; None for the main one.
            private: whether a new repository is private; None for the account's default.
            token: the user's token; None for the one saved by ``hf auth login``.
            commit_message: message of the commit.
            create_pr: open a pull request instead.

        Returns:
            The address of the commit.

        Raises:
            ReclipError: the Hub rejects it, or cannot be reached.
        """
        with tempfile.TemporaryDirectory(prefix="reclip-") as temporary:
            folder = Path(temporary) / "model"
            self._to_save().save(folder, portable=True)
            return hub.upload(
                folder,
                repo_id,
                revision=revision,
                private=private,
                token=token,
                commit_message=commit_message,
                create_pr=create_pr,
            )

    def _to_save(self) -> ModelToSave:
        if self._trained is None:
            weights = file_digest(self.pretrained) or self.pretrained
            state = RunState(self._classes, self.clip, self.pretrained, weights)
        else:
            state = dataclasses.replace(self._trained.state, pretrained=self.pretrained)
        cfg = self._config()
        if prunes_classes(cfg):
            cfg = with_left_out(cfg, prune_classes(cfg, self._classes.model_classes))
        return ModelToSave(self._loaded().model, self.kind, cfg, state)
