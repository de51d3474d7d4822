"""A run: from a folder of unlabelled images and a class list to a trained model and masks.

The stages are hypotheses, rectification, distillation (if a student is requested) and masks. Each saves its result in
the output folder, so an interrupted run resumes when it is repeated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from detectron2.config import CfgNode

from reclip_d2.backbones.query import check_names_fit
from reclip_d2.data.class_file import ClassList, read_class_file
from reclip_d2.data.datasets.custom import register_images
from reclip_d2.data.geotiff import SceneReading
from reclip_d2.data.image_folder import ImageFile, find_images
from reclip_d2.data.remote_images import fetch_images
from reclip_d2.data.scene_files import mark_scenes
from reclip_d2.data.survey import SurveyedImage, survey_images
from reclip_d2.data.working_files import WorkingFiles
from reclip_d2.engine.logs import logging_to
from reclip_d2.engine.output_dir import remove_intermediate_checkpoints
from reclip_d2.errors import ReclipError
from reclip_d2.hypothesis.blocks import remove_blocks
from reclip_d2.inference import ImagePredictor
from reclip_d2.inference.bank import build_bank
from reclip_d2.modeling.build import check_registered_parts, shared_backbones
from reclip_d2.utils.digest import current_digest, file_digest, file_digests
from reclip_d2.utils.files import StrPath
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.output_paths import check_output_folder
from reclip_d2.utils.progress import ProgressCallback, report_to, say
from reclip_d2.workspace import training
from reclip_d2.workspace.class_pruning import pruning_stages
from reclip_d2.workspace.clip_weights import find_weights
from reclip_d2.workspace.decision import Decision, asked_for, compared, judged, total_pixels
from reclip_d2.workspace.estimate import report_estimate
from reclip_d2.workspace.judgement import calibrate_maskclip, judge
from reclip_d2.workspace.masks import read_coverage
from reclip_d2.workspace.options import KEEP, SegmentOptions
from reclip_d2.workspace.predict import engine_of, shard_of
from reclip_d2.workspace.ray_masks import masks_on_ray
from reclip_d2.workspace.results import (
    MaskRequest,
    RunResult,
    report_transparency,
    write_candidate,
    write_results,
)
from reclip_d2.workspace.run_folder import RunFolder, check_same_inputs
from reclip_d2.workspace.run_state import RunState
from reclip_d2.workspace.schedule import Stage, count_training_images, suggested_iterations
from reclip_d2.workspace.shard_lock import shard_lock, shared_state
from reclip_d2.workspace.stage_config import resolve_device, resolve_pretrained, settings_of, stage_config
from reclip_d2.workspace.stored_images import StoredImages
from reclip_d2.workspace.stores import make_part
from reclip_d2.workspace.trained_model import load_predictor

# CLIP's own masks, written before the training.
FIRST_MASKS = "first masks"


def segment(
    images: StrPath | Sequence[StrPath],
    classes: StrPath | ClassList,
    output: StrPath,
    options: SegmentOptions = SegmentOptions(),  # noqa: B008 (immutable)
    *,
    progress: ProgressCallback | None = None,
) -> RunResult:
    """Train on unlabelled images and write a mask for each; stages that an earlier run has finished are skipped.

    Args:
        images: folders, images, globs or ``.txt`` lists, see :func:`~reclip_d2.data.image_folder.find_images`.
        classes: a class file, or a class list.
        output: a folder: new, empty, or of an earlier run with the same inputs.
        progress: called with each :class:`~reclip_d2.utils.progress.Progress`, for example ``print``.

    Returns:
        The results. Images that cannot be used are listed there; they raise an error only if no image can be used.

    Raises:
        ReclipError: an input is wrong, or the folder belongs to a run with other inputs.
    """
    return SegmentRun(images, classes, output, options).segment(progress)


class SegmentRun:
    """A run with checked inputs: errors in them are found before anything is written.

    Attributes:
        folder: the output folder.
        classes: the class list.
        found: the images.
        kinds: kinds of model to make, in order.
        shard: the part of the hypotheses and features to compute; None for a whole run.
        configs: config of each kind.
        request: the masks to write, by the last kind; :meth:`segment` may keep another's.
    """

    def __init__(
        self,
        images: StrPath | Sequence[StrPath],
        classes: StrPath | ClassList,
        output: StrPath,
        options: SegmentOptions = SegmentOptions(),  # noqa: B008 (immutable)
    ) -> None:
        """Arguments and errors: see :func:`segment`."""
        sources = [images] if isinstance(images, str | os.PathLike) else list(images)
        self.folder = RunFolder(check_output_folder(output))
        self.classes = classes if isinstance(classes, ClassList) else read_class_file(classes)
        self._class_file = "" if isinstance(classes, ClassList) else str(Path(classes).absolute())
        self.found = find_images(sources, [self.folder.path], self.folder.copies)
        self.images = self.found.images
        self.kinds = ["maskclip"]
        if not options.fast:
            self.kinds += ["calibrated"] if options.keep == "best" else []
            self.kinds += ["rectified", "student"] if options.student else ["rectified"]
        if options.keep not in KEEP:
            raise ReclipError(f"--keep {options.keep} is unknown: use one of {', '.join(KEEP)}")
        self._trained_on: list[SurveyedImage] = []
        self._unfetched: dict[str, str] = {}  # why images at URLs could not be copied, by id
        self._new: dict[str, list[str]] = {}  # ids of the images whose masks this run has written, by kind of model
        self.shard = shard_of(options)
        self._engine = engine_of(options.engine, options.workers, options.shard)
        self._make = None if self._engine is None else masks_on_ray(self._engine, self.folder, self._model)
        if self.shard is not None and options.fast:
            raise ReclipError("--shard and --fast: MaskCLIP trains nothing; use reclip predict --use maskclip --shard")
        self.options = dataclasses.replace(
            options,
            clip=resolve_pretrained(options.clip),  # a name, or the path of an architecture file
            pretrained=resolve_pretrained(options.pretrained),
        )
        find_weights(self.options.clip, options.pretrained)
        self.configs = {kind: self._config(kind) for kind in self.kinds}
        if self.configs["maskclip"].INPUT.GEO.ENABLED:
            self.found = mark_scenes(self.found)
            self.images = self.found.images
        self._suggest_iterations()
        for cfg in self.configs.values():
            check_names_fit(self.classes, cfg.MODEL.CLIP.NAME, cfg.MODEL.CLIP.TEMPLATES)
            check_registered_parts(cfg, len(self.classes.model_classes))
        reading = SceneReading.from_config(self.configs["maskclip"])
        self.request = MaskRequest(self.kinds[-1], self.classes, options.background, options.formats, reading)
        self.request.check(self.images)
        if options.fast and options.bank and any(image.is_scene for image in self.images):
            raise ReclipError("--fast and --bank: a bank is made from the training's windows of GeoTIFFs: omit one")
        if options.student:
            training.check_student_weights(self.configs["student"])

    def _config(self, kind: str) -> CfgNode:
        options, folder = self.options, self.folder
        iterations = {"rectified": options.iterations, "student": options.student_iterations}.get(kind)
        for name, value in (
            ("iterations", options.iterations),
            ("student-iterations", options.student_iterations),
            ("tile", options.tile),
        ):
            if value is not None and value < 1:
                raise ReclipError(f"--{name} {value}: give a number above 0")
        pairs = {
            "MODEL.DEVICE": resolve_device(options.device),
            "MODEL.CLIP.PRETRAINED": options.pretrained,
            "DATASETS.CUSTOM.CLASSES": self._class_file,
            "HYPOTHESIS.FILE": str(folder.hypotheses),
            "FEATURE_STORE.FOLDER": str(folder.features),
            "TEST.CLASS_EVIDENCE": str(folder.evidence),
            "OUTPUT_DIR": str(folder.model(kind)),
        }
        if kind == "student":
            pairs["MODEL.TEACHER.WEIGHTS"] = str(folder.weights("rectified"))
            if options.student_weights is not None:
                pairs["MODEL.STUDENT.WEIGHTS"] = resolve_pretrained(options.student_weights)
        if iterations is not None:
            pairs["SOLVER.MAX_ITER"] = str(iterations)
        if options.tile is not None:
            pairs |= {"INPUT.TILES.FROM_SIDE": str(options.tile), "INPUT.TILES.SIZE": str(options.tile)}
        overrides = [*(part for pair in pairs.items() for part in pair), *options.opts]
        cfg = stage_config(kind, options.clip, overrides, options.method)
        if options.bank:
            if kind == "student":
                raise ReclipError("--bank compares features of CLIP, which a student does not have: omit --student")
            cfg.TEST.REFINE = ["bank", *(name for name in cfg.TEST.REFINE if name != "bank")]
            cfg.TEST.BANK.FILE = str(folder.bank(kind))
        return cfg

    def _suggest_iterations(self) -> None:
        """Choose numbers of iterations that the user has not given, by the number of training images."""
        options = self.options
        for kind, given in (("rectified", options.iterations), ("student", options.student_iterations)):
            if kind not in self.configs or given is not None or "SOLVER.MAX_ITER" in options.opts[::2]:
                continue
            cfg = self.configs[kind]
            cfg.SOLVER.MAX_ITER = suggested_iterations(count_training_images(self.images, cfg), cfg)

    def segment(self, progress: ProgressCallback | None = None) -> RunResult:
        """All stages; see the function :func:`segment`."""
        with self._begun(progress) as state:
            problems = self._train(state, masks=True)
            decision = self._decide(state, problems)
            request = self.request if decision is None else self.request.of(decision.kept)
            result = write_results(
                self.folder,
                state,
                request,
                self.images,
                problems,
                self._load,
                decision,
                self._new.get(request.kind, ()),
                self._make,
            )
            self.folder.remove_features()
            return result

    def prepare_shard(self, progress: ProgressCallback | None = None) -> bool:
        """Compute a part of the hypotheses and of the feature store, while other runs may compute other parts.

        Returns:
            Whether no part is missing any more. A run without ``--shard`` then trains without computing any.
        """
        folder, cfg = self.folder, self.configs["rectified"]
        folder.is_used()  # raises for a folder with other files
        with report_to(progress), shard_lock(folder.path, self.shard), shared_backbones():
            with shared_state(folder.path):
                folder.check_links()
                self._fetch()
                self._remember()
                self._survey()  # by the first; others read its record
            with logging_to(folder.run / "shards" / self.shard.name):
                say("hypotheses", f"shard {self.shard}")
                return make_part(cfg, self.shard)

    def train(self, progress: ProgressCallback | None = None) -> dict[str, str]:
        """All stages except the masks; returns the reason for each image that cannot be used, by id."""
        with self._begun(progress) as state:
            problems = self._train(state, masks=False)
            decision = self._decide(state, problems, masks=False)
            if self.options.bank:
                kept = self.kinds[-1] if decision is None else decision.kept
                self._make_bank(kept, self._predictor(kept))
            self.folder.remove_features()
            return problems

    @contextlib.contextmanager
    def _begun(self, progress: ProgressCallback | None) -> Iterator[RunState]:
        """Hold the folder's lock; send logs to its log file and progress to the callback."""
        self.folder.is_used()  # raises for a folder with other files
        with self.folder.lock(), report_to(progress), shared_backbones():
            if self.options.overwrite:
                self.folder.clear()
            self.folder.check_links()
            self._fetch()
            state = self._remember()
            with logging_to(self.folder.run):
                report_transparency(self.images)
                yield state

    def _fetch(self) -> None:
        """Copy the images at URLs."""
        if any(image.url for image in self.images):
            self.folder.claim(self._wanted())
            self._unfetched = fetch_images(self.images)

    def _wanted(self) -> RunState:
        """The state of a folder with this run alone."""
        return RunState(
            classes=self.classes,
            clip=self.options.clip,
            pretrained=self.options.pretrained,
            weights=file_digest(self.options.pretrained) or self.options.pretrained,
            settings={kind: settings_of(cfg) for kind, cfg in self.configs.items()},
        )

    def _remember(self) -> RunState:
        """The folder's state with this run added; raises for a folder with other inputs."""
        wanted = self._wanted()
        known = None if self.options.overwrite else self.folder.read()  # checked by clear()
        if known is not None:
            known.weights = current_digest(known.weights, self.options.pretrained)
            # First, since the number of iterations depends on that of the images.
            trained = self.folder.hypotheses.exists() and not self.options.fast
            signatures = self.folder.check_images(self.images, trained)
            check_same_inputs(self.folder, known, wanted)
            settings = {**known.settings, **wanted.settings}
            wanted = dataclasses.replace(
                wanted, settings=settings, results=known.results, entries=known.entries, kept=known.kept
            )
        else:
            signatures = self.folder.check_images(self.images, trained=False)
        self.folder.write(wanted)
        self.folder.remember_images(signatures)
        for kind, cfg in self.configs.items():
            with atomic_write(self.folder.config(kind)) as temporary:
                temporary.write_text(cfg.dump(), encoding="utf-8")
        return wanted

    def _train(self, state: RunState, masks: bool) -> dict[str, str]:
        """The stages before the last masks; returns the reason for each image that cannot be used, by id.

        Args:
            masks: whether masks are wanted; MaskCLIP's are written before the training.
        """
        folder = self.folder
        surveyed: list[SurveyedImage] = []
        if self.options.fast:
            register_images([], self.classes)
        else:
            surveyed = self._survey()
        problems = {image.file.image_id: image.problem for image in surveyed if image.problem} | self._unfetched
        usable = [image for image in self.images if image.image_id not in problems]
        decided = self._decided(masks)
        request = self.request if decided is None else self.request.of(decided.kept)
        report_estimate(
            self.configs["maskclip" if self.options.fast else "rectified"],
            folder,
            folder.missing_masks(usable, request.results) if masks else [],
            [image for image in surveyed if not image.problem],
            self.options.student and not folder.weights("student").exists(),
        )
        first = self._first_masks(state, usable) if masks and decided is None else None
        for stage in self._stages(first):
            if stage.is_done():
                stage.tidy()
                say(stage.name, "done before")
            else:
                say(stage.name)
                stage.run()
        return problems

    def _stages(self, first_masks: Stage | None) -> list[Stage]:
        pruned = pruning_stages(self.configs[self.kinds[-1]], self.classes, self.images, self.configs.get("rectified"))
        if self.options.fast:
            return pruned
        file, cfg = self.folder.hypotheses, self.configs["rectified"]
        stages = [
            Stage(
                "hypotheses",
                file.exists,
                lambda: training.make_hypotheses(cfg, self._engine),
                lambda: remove_blocks(file),
            ),
            *pruned,
            *([first_masks] if first_masks else []),
            self._training("rectification", "rectified"),
        ]
        if self.options.student:
            stages.append(self._training("distillation", "student"))
        if "calibrated" in self.kinds:
            weights = self.folder.weights("calibrated")
            stages.append(Stage("calibration", weights.exists, self._calibrate, lambda: None))
        return stages

    def _first_masks(self, state: RunState, usable: Sequence[ImageFile]) -> Stage:
        """CLIP's own masks, to look at while the model trains, and to fall back on."""
        request = self.request.of("maskclip", formats=False)
        return Stage(
            FIRST_MASKS,
            lambda: not self.folder.lacking_masks(usable, request.results),
            lambda: self._write_candidate(state, request, usable, FIRST_MASKS),
            lambda: None,
        )

    def _write_candidate(
        self, state: RunState, request: MaskRequest, images: Sequence[ImageFile], stage: str
    ) -> dict[str, str]:
        """See :func:`write_candidate`; notes which masks are new."""
        lacking = self.folder.lacking_masks(images, request.results)
        self._new.setdefault(request.kind, []).extend(image.image_id for image in lacking)
        if lacking and stage != FIRST_MASKS:
            say(stage)
        return write_candidate(self.folder, state, request, images, self._load, stage, self._make)

    def _calibrate(self) -> None:
        cfg = self.configs["calibrated"]
        model = load_predictor(cfg, "maskclip", self.classes).model
        training.register_training_images(self._trained_on, self.classes)
        calibrate_maskclip(model, cfg, self.configs["rectified"])

    def _predictor(self, kind: str) -> ImagePredictor:
        """The predictor of a kind of model; the training images, if there are any, are registered afterwards."""
        predictor = load_predictor(self.configs[kind], kind, self.classes, self.folder.weights(kind))
        if self._trained_on:
            training.register_training_images(self._trained_on, self.classes)  # load_predictor has registered no images
        return predictor

    def _make_bank(self, kind: str, predictor: ImagePredictor) -> None:
        """Make the bank of a kind of model, unless an earlier run has; of GeoTIFFs from their training windows."""
        file = self.folder.bank(kind)
        if not file.exists():
            records = training.bank_records(self.images, self._trained_on)
            build_bank(self.configs[kind], predictor, records).save(file)

    def _model(self, kind: str) -> tuple[CfgNode, Path]:
        """Config and checkpoint of a kind of model, whose bank has been made."""
        if self.options.bank:
            self._make_bank(kind, self._predictor(kind))
        return self.configs[kind], self.folder.weights(kind)

    def _load(self, kind: str) -> tuple[ImagePredictor, StoredImages | None]:
        """The predictor of a kind of model, and the images' features while the run has its store."""
        predictor = self._predictor(kind)
        if self.options.bank:
            self._make_bank(kind, predictor)
        if not self._trained_on:
            return predictor, None
        return predictor, StoredImages.find(self.configs["rectified"], predictor)

    def _decided(self, masks: bool) -> Decision | None:
        """The recorded decision, if it is about this run's models and options.

        Args:
            masks: whether it must have compared masks.
        """
        if self.options.fast:
            return None
        known = Decision.read(self.folder.decision)
        if known is None or (known.asked, known.trained) != (self.options.keep, self.kinds[-1]):
            return None
        return known if known.pixels or not masks else None

    def _decide(self, state: RunState, problems: dict[str, str], masks: bool = True) -> Decision | None:
        """Whose masks are kept, None for a run without training; records it.

        Args:
            masks: write the masks that are compared.
        """
        if self.options.fast:
            return None
        folder = self.folder
        decision = self._decided(masks)
        if decision is None:
            decision, pixels = self._decided(masks=False) or self._judgement(), {}
            usable = [image for image in self.images if image.image_id not in problems]
            for kind in compared(self.kinds) if masks else ():
                request = self.request.of(kind, formats=False)
                problems |= self._write_candidate(state, request, usable, "masks")
                usable = [image for image in usable if image.image_id not in problems]
                coverage = read_coverage(folder.masks_of(request.results), usable)
                pixels[kind] = total_pixels(coverage, request.table.mask_classes.background)
            decision = dataclasses.replace(decision, pixels=pixels)
            decision.write(folder.decision)
        state.kept = decision.kept
        folder.write(state)
        return decision

    def _judgement(self) -> Decision:
        if self.options.keep != "best":
            return asked_for(self.options.keep, self.kinds[-1])
        say("judgement")
        verdict = judge(self.kinds, self._predictor, self.configs["rectified"])
        return judged(verdict, self.kinds[-1])

    def _training(self, name: str, kind: str) -> Stage:
        folder, cfg = self.folder, self.configs[kind]
        return Stage(
            name,
            folder.weights(kind).exists,
            lambda: training.train(cfg, name, self._engine),
            lambda: remove_intermediate_checkpoints(folder.model(kind)),
        )

    def _survey(self) -> list[SurveyedImage]:
        """Decode all images once: find the broken ones, and register the others for the training."""
        folder = self.folder
        working = WorkingFiles.from_config(self.configs["rectified"], folder.working_files)
        digests = file_digests([image.path for image in self.images])
        by_id = {image.image_id: digest for image, digest in zip(self.images, digests, strict=True)}
        surveyed = survey_images(self.images, by_id, folder.survey, working)
        broken = [image.file.image_id for image in surveyed if image.problem]
        if not folder.hypotheses.exists():
            folder.mark_broken(broken)
        trained = [image for image in surveyed if not image.problem and image.file.image_id not in folder.broken]
        self._trained_on = trained
        if not any(image.training_files for image in trained):
            problem = next((image.problem for image in surveyed if image.problem), "no GeoTIFF has a pixel with data")
            raise ReclipError(f"no image can be used; first problem: {problem}")
        stretches = {str(image.file.path): image.stretch for image in surveyed if image.stretch is not None}
        self.request.reading = dataclasses.replace(self.request.reading, known=stretches)
        count = training.register_training_images(trained, self.classes)
        if broken:
            say("images", f"{len(broken)} of {len(surveyed)} cannot be used")
        if count != len(trained):
            say("images", f"{count:,} training files: tiles of very large images, and windows of GeoTIFFs")
        return surveyed
