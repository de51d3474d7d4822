"""The time of a rectification on a GPU, on paper: operations and launches over the GPU's ceilings.

Operations follow from the shapes of the models' modules, launches are counted in a run on the CPU, so the sum follows
the code.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reclip_d2.backbones import packed_texts
from reclip_d2.backbones.query import get_templates
from reclip_d2.engine.trainer import Trainer
from reclip_d2.hypothesis.windows import crop_windows
from tools.benchmark_training.counts import dense_flops, global_flops, step_flops, text_flops
from tools.benchmark_training.inputs import Settings
from tools.benchmark_training.steps import StepCase, Workplace, run_step


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What a GPU and its host reach.

    The defaults are for an H100. 400 TFLOP/s in bfloat16 is 40 % of its data sheet; float32 without tensor cores is
    taken at 45 % (of 67 TFLOP/s), the copy at 75 % (of 3.35 TB/s). The first step of ``tools/gpu_check.sh`` measures
    these three.

    Attributes:
        bfloat16_flops, float32_flops: operations per second of large products.
        copy_bytes_per_second: bytes read plus written.
        launch_seconds: host time of an operator.
        graph_launch_seconds: time from one kernel to the next in a CUDA graph.
    """

    bfloat16_flops: float = 400e12
    float32_flops: float = 30e12
    copy_bytes_per_second: float = 2.5e12
    launch_seconds: float = 6e-6
    graph_launch_seconds: float = 1.5e-6


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a call costs: floating-point operations (two per multiply-add), and operators that launch a kernel."""

    flops: float
    launches: int


@dataclasses.dataclass(frozen=True)
class RectificationWork:
    """The work of a rectification.

    Attributes:
        images: training images.
        views: views of each in the store.
        iterations: of the training.
        texts: encoding of all class names.
        hypothesis: of one image, all windows.
        view: encoding of one view.
        step: of one iteration from the store.
        step_bytes: what an iteration moves: frozen text tower, features, logits.
        reading_seconds: host time to decode and resize an image.
    """

    images: int
    views: int
    iterations: int
    texts: Cost
    hypothesis: Cost
    view: Cost
    step: Cost
    step_bytes: float
    reading_seconds: float


def rectification_seconds(work: RectificationWork, ceilings: Ceilings, graph: bool) -> dict[str, float]:
    """Seconds of each part. Frozen image towers are in bfloat16, the step is in float32.

    Towers: the larger of their operations and their launches. The step: its operations plus its bytes, as if nothing
    overlapped, or its launches if they take longer; in a CUDA graph the gaps between kernels are added.

    Args:
        graph: the step is a CUDA graph.
    """

    def tower(cost: Cost, calls: float) -> float:
        return calls * max(cost.flops / ceilings.bfloat16_flops, cost.launches * ceilings.launch_seconds)

    busy = work.step.flops / ceilings.float32_flops + work.step_bytes / ceilings.copy_bytes_per_second
    if graph:
        step = busy + work.step.launches * ceilings.graph_launch_seconds
    else:
        step = max(busy, work.step.launches * ceilings.launch_seconds)
    return {
        "texts": tower(work.texts, 1),
        "hypotheses": tower(work.hypothesis, work.images),
        "feature store": tower(work.view, work.images * work.views),
        "reading images": work.reading_seconds * work.images * (1 + work.views),
        "iterations": work.iterations * step,
    }


class LaunchCounter(TorchDispatchMode):
    """Counts the operators that launch a kernel: all but views, allocations and detachments."""

    _SILENT = ("empty", "detach", "_unsafe_view", "_local_scalar_dense")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        returned = [one.alias_info for one in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        if not is_view and not func._schema.name.split("::")[1].startswith(self._SILENT):
            self.count += 1
        return func(*args, **(kwargs or {}))


def count_launches(function: Callable[[], Any]) -> int:
    """Operators of a call that launch a kernel. On a CPU some of them are larger than a GPU's, and some smaller."""
    with LaunchCounter() as counter:
        function()
    return counter.count


def count_rectification(settings: Settings, case: StepCase, images: int) -> RectificationWork:
    """Count the work of a case for a number of images and the config's iterations, with two stored views of each image
    and true crops for the hypotheses."""
    with Workplace(settings, case) as place:
        trainer = place.trainer(True)
        cfg, model = trainer.cfg, trainer._trainer.model
        backbone, side = model.backbone, model.backbone.patch_size
        visual = backbone.clip.visual
        views = trainer._trainer.data_loader.dataset.views
        begin = time.perf_counter()
        for number in range(len(views)):
            sample = views.sample(number)
        reading = (time.perf_counter() - begin) / len(views)
        crop, image = torch.zeros(1, 3, *backbone.image_size), sample["image"]
        lengths = _text_lengths(model)
        windows = len(crop_windows(*case.image, cfg.HYPOTHESIS.WINDOW_RATIO))
        run_step(trainer)
        with torch.no_grad():
            text_launches = count_launches(lambda: backbone.text_features(["a photo of a house."]))
            crop_launches = count_launches(lambda: backbone.global_features(crop))
            view_launches = count_launches(lambda: model.view_encoder(image))
        grid = (-(-image.shape[-2] // side), -(-image.shape[-1] // side))
        batch = cfg.SOLVER.IMS_PER_BATCH
        return RectificationWork(
            images=images,
            views=2,
            iterations=cfg.SOLVER.MAX_ITER,
            texts=Cost(text_flops(backbone, lengths), text_launches * -(-len(lengths) // 256)),
            hypothesis=Cost(
                windows * global_flops(visual, crop[0, 0].numel() // side**2),
                crop_launches * -(-windows // cfg.HYPOTHESIS.BATCH_SIZE),
            ),
            view=Cost(dense_flops(visual, grid[0] * grid[1]), view_launches),
            step=Cost(step_flops(model, batch, grid), _step_launches(trainer)),
            step_bytes=_step_bytes(model, grid, batch),
            reading_seconds=reading,
        )


def _step_launches(trainer: Trainer) -> int:
    """Launches of an iteration, with the texts of the Reference as one masked sequence, as on a GPU."""
    with mock.patch.object(packed_texts, "_is_usual", return_value=False):
        return count_launches(lambda: run_step(trainer))


def _text_lengths(model: Any) -> list[int]:
    """Tokens of all texts of the Query, with start and end."""
    backbone, templates = model.backbone, get_templates("imagenet_scene")
    names = [name for synonyms in model.class_names for name in synonyms]
    return [len(backbone.name_tokens(template.format(name))) + 2 for name in names for template in templates]


def _step_bytes(model: Any, grid: tuple[int, int], images: int) -> float:
    """Bytes of a step in float32: the text tower's weights, forward and backward; Z from the store, converted, and read
    by the decoder's two passes and by the pooling's two; logits and their gradient, each written and read."""
    text = sum(p.numel() for p in model.backbone.text_encoder.transformer.parameters())
    features = images * grid[0] * grid[1] * model.backbone.embed_dim
    logits = images * grid[0] * grid[1] * model.num_classes
    return 4 * (2 * text + 6 * features + 4 * logits)
