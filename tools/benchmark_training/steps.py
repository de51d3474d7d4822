"""Parts a and d, and the growth with classes of part c: training steps of whole trainers, which take turns.

A step is an iteration of :class:`reclip_d2.engine.trainer.Trainer`: data, forward and backward pass, optimizer. Without
the store its images are fresh crops, as in the papers; with it, features of the same number of crops of the same size.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage

import reclip_d2.modeling.meta_arch.distillation
import reclip_d2.modeling.meta_arch.student  # noqa: F401  (both register their models)
from reclip_d2.config import load_config
from reclip_d2.config.files import configs_folder
from reclip_d2.data.class_file import ClassList
from reclip_d2.data.datasets.custom import CUSTOM, register_images
from reclip_d2.engine.trainer import Trainer
from reclip_d2.hypothesis.file import HypothesisHeader, write_hypothesis_file
from reclip_d2.utils.measuring import peak_bytes, resident_peak_bytes, take_turns
from tools.benchmark_training.inputs import Settings, classes_of, generated_classes, write_photographs

# Training images of a case: each is encoded once for the store.
_IMAGES = 4


@dataclasses.dataclass(frozen=True)
class StepCase:
    """A training step to time.

    Attributes:
        config: file in ``configs/datasets``: sizes and batch.
        classes: the class list.
        image: (H, W) of the training images, typical of the data set.
        classes_per_image: mean number of classes in a hypothesis.
        method: file in ``configs/methods``.
        opts: further overrides.
    """

    config: str
    classes: ClassList
    image: tuple[int, int]
    classes_per_image: float
    method: str = "reclippp_rectify"
    opts: tuple[str, ...] = ()


def step_cases(settings: Settings) -> dict[str, Callable[[], StepCase]]:
    """The cases of part a by name. Classes per image of VOC, Context, ADE20K and COCO-Stuff 171 are those of their
    labels; those of Cityscapes and COCO-Stuff 27 are assumed."""
    if settings.quick:
        return {"embedded": lambda: StepCase("embedded", classes_of("embedded_train"), (96, 96), 2)}
    return {
        "voc20": lambda: StepCase("voc20", classes_of("voc20_train"), (375, 500), 1.85),
        "ade150": lambda: StepCase("ade150", classes_of("ade150_train"), (512, 683), 22.3),
        "context59": lambda: StepCase("context59", classes_of("context59_train"), (375, 500), 12.8),
        "cityscapes19": lambda: StepCase("cityscapes19", classes_of("cityscapes19_train"), (1024, 2048), 10),
        "coco_stuff27": lambda: StepCase("coco_stuff27", classes_of("coco_stuff27_train"), (480, 640), 6),
        "coco_stuff171": lambda: StepCase("coco_stuff27", classes_of("coco_stuff171_train"), (480, 640), 19),
    }


def rectification(settings: Settings, case: StepCase) -> dict[str, Any]:
    """Part a: the step of a case with fresh crops and from the store."""
    with Workplace(settings, case) as place:
        return place.fresh_and_stored(store_steps=3)


def distillation(settings: Settings) -> dict[str, Any]:
    """Part d: the step of distillation into DeepLab V2, the papers' ResNet-101 from random weights, for VOC.

    On the CPU the batch is 2, not 12: a step of 12 takes minutes there.
    """
    teacher = next(iter(step_cases(settings).values()))()
    with Workplace(settings, teacher) as place:
        trained = place.trainer(False)
        trained.checkpointer.save("model_final", iteration=0)
        opts = ["MODEL.TEACHER.WEIGHTS", f"{trained.cfg.OUTPUT_DIR}/model_final.pth", "MODEL.STUDENT.WEIGHTS", ""]
        if settings.device.type == "cpu":
            opts += ["SOLVER.IMS_PER_BATCH", "2"]
        place.case = dataclasses.replace(teacher, method="reclippp_distill", opts=tuple(opts))
        return place.fresh_and_stored(store_steps=1)


def class_growth(settings: Settings, counts: Sequence[int], store: bool = True) -> dict[str, Any]:
    """Part c: the step from the store, or with fresh crops, for numbers of classes, all else as for ADE20K."""
    base = step_cases(settings)["embedded" if settings.quick else "ade150"]()
    with Workplace(settings, base) as place:
        trainers = {}
        for count in counts:
            classes = ClassList(base.classes.classes[:count]) if settings.quick else generated_classes(count)
            place.case = dataclasses.replace(base, classes=classes, classes_per_image=min(count / 2, 22.3))
            trainers[str(count)] = place.trainer(store)
        return compare(trainers, settings, store_steps=3 if store else 1)


class Workplace:
    """Makes trainers of a case in a folder that is removed at the end."""

    def __init__(self, settings: Settings, case: StepCase) -> None:
        self.settings = settings
        self.case = case
        self.folder = settings.folder / "steps"

    def __enter__(self) -> Workplace:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def trainer(self, store: bool, graph: bool = False) -> Trainer:
        """A trainer of the case, with the feature store or with fresh crops; makes the store.

        Args:
            graph: the step is a CUDA graph.
        """
        self._register()
        return Trainer(self._config(store, graph), evaluate=False)

    def fresh_and_stored(self, store_steps: int) -> dict[str, Any]:
        """:func:`compare` the case with fresh crops and from the store; on CUDA, also as a CUDA graph."""
        trainers = {"fresh crops": self.trainer(False), "store": self.trainer(True)}
        if self.settings.device.type == "cuda":
            trainers["store, CUDA graph"] = self.trainer(True, graph=True)
        return {"classes": len(self.case.classes.classes), **compare(trainers, self.settings, store_steps)}

    def _config(self, store: bool, graph: bool = False) -> CfgNode:
        case, settings = self.case, self.settings
        number = len(list(self.folder.glob("run*")))
        keys = {
            "DATASETS.TRAIN": (CUSTOM,),
            "DATASETS.TEST": (),
            "HYPOTHESIS.METHOD": "imported",
            "HYPOTHESIS.FILE": str(self.folder / "hypotheses.jsonl"),
            "FEATURE_STORE.VIEWS": int(store),
            "FEATURE_STORE.KIND": "crops",
            "FEATURE_STORE.FOLDER": str(self.folder / "store"),
            "SOLVER.CUDA_GRAPH": graph,
            "OUTPUT_DIR": str(self.folder / f"run{number}"),
        }
        if settings.device.type == "cpu":
            keys["DATALOADER.NUM_WORKERS"] = 0  # reading takes a hundredth of a step; workers would take a core
        files = [
            configs_folder() / folder / f"{name}.yaml"
            for folder, name in (("datasets", case.config), ("methods", case.method))
        ]
        pairs = [str(part) for pair in keys.items() for part in pair]
        cfg = load_config([str(file) for file in files], [*pairs, *settings.clip_keys, *case.opts])
        Path(cfg.OUTPUT_DIR).mkdir(parents=True)
        return cfg

    def _register(self) -> None:
        """Register images of the case as the data set ``custom``, and write their hypotheses."""
        case = self.case
        images = write_photographs(self.folder / "{}x{}".format(*case.image), _IMAGES, *case.image)
        records = [{"file_name": str(path), "image_id": path.stem} for path in images]
        register_images(records, case.classes)
        generator, lines = torch.Generator().manual_seed(0), []
        count, mean = len(case.classes.classes), case.classes_per_image
        for number, record in enumerate(records):
            size = max(1, min(count, round(mean * (number + 1)) - round(mean * number)))
            ids = torch.randperm(count, generator=generator)[:size].sort().values.tolist()
            lines.append({"image_id": record["image_id"], "classes": ids})
        header = HypothesisHeader(CUSTOM, case.classes.model_classes, "", "", "", "imported", 0.0)
        write_hypothesis_file(self.folder / "hypotheses.jsonl", header, lines)


def compare(trainers: Mapping[str, Trainer], settings: Settings, store_steps: int) -> dict[str, Any]:
    """Time and memory of a step of each trainer; the trainers take turns.

    Args:
        trainers: by name; ``fresh crops`` is the one without a store.
        store_steps: steps of each of the others in a repetition, since theirs are shorter.

    Returns:
        ``images`` per step, ``classes`` and ``variants``: for each its ``seconds`` (a list), ``median_seconds``,
        ``images_per_second``, ``peak_bytes`` (what a step adds) and ``ratio``: the median over the repetitions of the
        first trainer's time over this one's.
    """
    device = settings.device
    steps = {name: (lambda trainer=trainer: run_step(trainer)) for name, trainer in trainers.items()}
    for name, step in steps.items():
        for _ in range(8 if device.type == "cuda" else int(name != "fresh crops")):
            step()
    turns = {
        (name, part): (lambda turn, step=step: step())
        for name, step in steps.items()
        for part in range(1 if name == "fresh crops" else store_steps)
    }
    seconds = take_turns(turns, device, settings.repeats)
    repetitions = {
        name: [
            statistics.median(seconds[key][number] for key in turns if key[0] == name)
            for number in range(settings.repeats)
        ]
        for name in steps
    }
    first = next(iter(trainers.values()))
    images = first.cfg.SOLVER.IMS_PER_BATCH
    base = repetitions[next(iter(steps))]
    variants = {}
    for name, step in steps.items():
        every = [value for key in turns if key[0] == name for value in seconds[key]]
        peak = peak_bytes(step, device)
        variants[name] = {
            "seconds": every,
            "median_seconds": statistics.median(every),
            "images_per_second": images / statistics.median(every),
            "peak_bytes": resident_peak_bytes(step) if peak is None else peak,
            "ratio": statistics.median(a / b for a, b in zip(base, repetitions[name], strict=True)),
        }
    return {"images": images, "variants": variants}


def run_step(trainer: Trainer) -> None:
    """An iteration, with a place for its metrics."""
    with EventStorage(trainer.iter):
        trainer.run_step()
    trainer.iter += 1
