"""``reclip segment``: from a folder of unlabelled images and a class file to masks and a trained model."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

from detectron2.config import CfgNode

from reclip_d2.backbones.embedded import EMBEDDED_MODEL_NAME
from reclip_d2.data.class_file import read_class_file
from reclip_d2.data.datasets.custom import check_names_fit, register_images
from reclip_d2.data.image_folder import find_images
from reclip_d2.data.survey import SurveyedImage, survey_images
from reclip_d2.data.working_files import WorkingFiles
from reclip_d2.engine.checkpoint import remove_intermediate_checkpoints
from reclip_d2.engine.logs import logging_to
from reclip_d2.errors import ReclipError
from reclip_d2.hypothesis.blocks import remove_blocks
from reclip_d2.modeling.build import check_registered_parts
from reclip_d2.utils.digest import current_digest, file_digest, file_digests
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.output_paths import check_output_folder
from reclip_d2.workspace import options, training
from reclip_d2.workspace.clip_weights import find_weights
from reclip_d2.workspace.estimate import announce_duration
from reclip_d2.workspace.results import Request, write_results
from reclip_d2.workspace.run_folder import RunFolder, check_same_inputs
from reclip_d2.workspace.run_state import RunState

STEPS = {
    "maskclip": "masks by MaskCLIP, no training",
    "rectified": "hypotheses, rectification (ReCLIP++), masks",
    "student": "hypotheses, rectification (ReCLIP++), distillation, masks by the student",
}


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    return SegmentRun(args).execute()


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step before the masks.

    Attributes:
        name: in messages.
        is_done: whether an earlier run has finished it.
        run: does what is missing of it.
        tidy: removes what a run that was killed at the end of it has left.
    """

    name: str
    is_done: Callable[[], bool]
    run: Callable[[], None]
    tidy: Callable[[], None]


class SegmentRun:
    """One call of the command. What can be wrong with the arguments is found before anything is written."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder = RunFolder(check_output_folder(args.output))
        self.classes = read_class_file(args.classes)
        self.found = find_images(args.images, exclude=[self.folder.path])
        self.images = self.found.images
        self.kinds = ["maskclip"] if args.fast else ["rectified", "student"] if args.student else ["rectified"]
        self.pretrained = options.resolve_pretrained(args.pretrained)
        args.clip = options.resolve_pretrained(args.clip)  # a name, or the file of an architecture
        find_weights(args.clip, args.pretrained)
        self.configs = {kind: self._config(kind) for kind in self.kinds}
        for cfg in self.configs.values():
            check_names_fit(self.classes, cfg.MODEL.CLIP.NAME, cfg.MODEL.CLIP.TEMPLATES)
            check_registered_parts(cfg, len(self.classes.model_classes))
        self.request = Request(
            self.kinds[-1],
            self.classes,
            background=args.background,
            formats=args.formats,
            skip_broken=args.skip_broken,
        )
        self.request.check(self.images)
        if args.student:
            training.check_student_weights(self.configs["student"])

    def _config(self, kind: str) -> CfgNode:
        args, folder = self.args, self.folder
        iterations = args.student_iterations if kind == "student" else args.iterations
        for name, value in (("iterations", iterations), ("tile", args.tile)):
            if value is not None and value < 1:
                raise ReclipError(f"--{name} {value}: give a number above 0")
        pairs = {
            "MODEL.DEVICE": options.resolve_device(args.device),
            "MODEL.CLIP.PRETRAINED": self.pretrained,
            "DATASETS.CUSTOM.CLASSES": str(Path(args.classes).absolute()),
            "HYPOTHESIS.FILE": str(folder.hypotheses),
            "OUTPUT_DIR": str(folder.model(kind)),
        }
        if kind == "student":
            pairs["MODEL.TEACHER.WEIGHTS"] = str(folder.weights("rectified"))
            if args.student_weights is not None:
                pairs["MODEL.STUDENT.WEIGHTS"] = options.resolve_pretrained(args.student_weights)
        if iterations is not None:
            pairs["SOLVER.MAX_ITER"] = str(iterations)
        if args.tile is not None:
            pairs |= {"INPUT.TILES.FROM_SIDE": str(args.tile), "INPUT.TILES.SIZE": str(args.tile)}
        return options.stage_config(kind, args.clip, [part for pair in pairs.items() for part in pair] + args.opts)

    def execute(self) -> int:
        """All steps; returns the exit status."""
        folder, kind = self.folder, self.request.kind
        folder.is_used()  # a folder of other things is left alone
        with folder.lock(), contextlib.ExitStack() as stack:
            if self.args.overwrite:
                folder.clear()
            folder.check_links()
            state = self._remember()
            stack.enter_context(logging_to(folder.run))
            self._announce()
            surveyed: list[SurveyedImage] = []
            if self.args.fast:
                register_images([], self.classes)
            else:
                surveyed = self._survey()
            problems = {image.file.image_id: image.problem for image in surveyed if image.problem}
            usable = [image for image in self.images if image.image_id not in problems]
            announce_duration(
                self.configs[self.kinds[0]],
                folder,
                folder.missing_masks(usable, self.request.results),
                [image for image in surveyed if not image.problem],
                self.args.student and not folder.weights("student").exists(),
            )
            for stage in self.stages():
                if stage.is_done():
                    stage.tidy()
                    print(f"{stage.name}: done before")
                else:
                    print(f"{stage.name} ...", flush=True)
                    stage.run()
            status = write_results(
                folder, state, self.request, self.images, problems, self.configs[kind], folder.weights(kind)
            )
            if not self.args.fast:
                print(f"model     {folder.path}: reclip predict IMAGES --model {folder.path} --output FOLDER")
            return status

    def _remember(self) -> RunState:
        """The folder's state with this run in it; refuses a folder of other inputs."""
        wanted = RunState(
            classes=self.classes,
            clip=self.args.clip,
            pretrained=self.pretrained,
            weights=file_digest(self.pretrained) or self.pretrained,
            settings={kind: options.settings_of(cfg) for kind, cfg in self.configs.items()},
        )
        known = None if self.args.overwrite else self.folder.read()  # clear() has looked
        if known is not None:
            known.weights = current_digest(known.weights, self.pretrained)
            check_same_inputs(self.folder, known, wanted)
            settings = {**known.settings, **wanted.settings}
            wanted = dataclasses.replace(wanted, settings=settings, results=known.results, entries=known.entries)
        trained = self.folder.hypotheses.exists() and not self.args.fast
        signatures = self.folder.check_images(self.images, trained)
        self.folder.write(wanted)
        self.folder.remember_images(signatures)
        for kind, cfg in self.configs.items():
            with atomic_write(self.folder.config(kind)) as temporary:
                temporary.write_text(cfg.dump(), encoding="utf-8")
        return wanted

    def stages(self) -> list[Stage]:
        """What comes before the masks."""
        if self.args.fast:
            return []
        file, cfg = self.folder.hypotheses, self.configs["rectified"]
        stages = [
            Stage("hypotheses", file.exists, lambda: training.make_hypotheses(cfg), lambda: remove_blocks(file)),
            self._training("rectification", "rectified"),
        ]
        if self.args.student:
            stages.append(self._training("distillation", "student"))
        return stages

    def _training(self, name: str, kind: str) -> Stage:
        folder, cfg = self.folder, self.configs[kind]
        return Stage(
            name,
            folder.weights(kind).exists,
            lambda: training.train(cfg),
            lambda: remove_intermediate_checkpoints(folder.model(kind)),
        )

    def _announce(self) -> None:
        """Say what will be done."""
        args, names = self.args, self.request.table.mask_classes.names
        options.announce_images(self.found)
        print(f"classes   {len(self.classes.classes)}: {_shorten(', '.join(names))}")
        if self.classes.background:
            word = "a class of its own" if args.background == "keep" else "ignored"
            print(f"          {word}: {_shorten(', '.join(self.classes.background))}")
        print(f"CLIP      {args.clip}{'' if args.clip == EMBEDDED_MODEL_NAME else f', weights {args.pretrained}'}")
        print(f"device    {self.configs[self.kinds[0]].MODEL.DEVICE}")
        print(f"steps     {STEPS[self.request.kind]}")
        print(f"output    {self.folder.path}", flush=True)

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
        if not trained:
            raise ReclipError(f"no image can be used; the first: {surveyed[0].problem}")
        count = training.register_training_images(trained, self.classes)
        if broken:
            print(f"  {len(broken)} of {len(surveyed)} images cannot be used: they are listed at the end")
        if count != len(trained):
            print(f"  trained on as {count:,} files, since very large images are cut into tiles")
        return surveyed


def _shorten(text: str, length: int = 90) -> str:
    return text if len(text) <= length else f"{text[: length - 4].rsplit(', ', 1)[0]}, ..."
