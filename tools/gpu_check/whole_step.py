"""Images per second of the whole training step, evaluation and hypotheses at the papers' sizes, with a random ViT-B/16.

The step is also timed as a CUDA graph; with plain PyTorch in place of the operators (an eager batched product and
PyTorch's random numbers); and with given image features, as from a feature store. The image tower
runs in float32, or in bfloat16 (MODEL.CLIP.AUTOCAST and SOLVER.AMP).

A part or variant that fails leaves its error in the figures, and the others run. The times of kernels come last, since
PyTorch's profiler slows down all later launches of a process.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

import reclip_d2.data.datasets
import reclip_d2.modeling  # noqa: F401  (registers the models, as the line above the data sets)
from reclip_d2.config import load_config
from reclip_d2.engine.solver import build_optimizer
from reclip_d2.engine.static_step import WARM_UP, StaticStep
from reclip_d2.hypothesis.generate import HypothesisGenerator
from reclip_d2.hypothesis.windows import crop_windows
from reclip_d2.modeling import pooling
from reclip_d2.utils.measuring import host_seconds, median_seconds, peak_bytes
from tools.benchmark_kernels import VOCABULARIES, eager_batched, padded_rows
from tools.gpu_check.figures import MORE_TO_DO, Clock, read_ceilings, read_figures, write_figures
from tools.gpu_check.kernel_times import kernel_seconds
from tools.gpu_check.steps import ROOT

# Mean number of classes per image of each data set; the embedded one is for a dry run on the CPU.
CLASSES_IN_AN_IMAGE = {
    "voc20": VOCABULARIES["voc20"][1],
    "ade150": VOCABULARIES["ade150"][1],
    "embedded": 2.0,
}
PROFILE_SECONDS = 10  # after the time of the parts, for the kernels' times
CROP_FLOPS = 35.1e9  # of ViT-B/16 on 224 x 224 pixels: two per multiply-add, of which it has 17.6e9


def configuration(name: str, device: torch.device, bfloat16: bool = True, precision: str = "") -> CfgNode:
    """A paper's config with random weights, or the embedded data set's with its own.

    Args:
        bfloat16: precision of the image tower, otherwise float32.
        precision: a value of ``MODEL.CLIP.AUTOCAST`` instead.
    """
    pretrained = "embedded" if name == "embedded" else "random"
    keys = ["MODEL.DEVICE", device.type, "MODEL.CLIP.PRETRAINED", pretrained, "MODEL.CLIP.TEMPLATES", "photo"]
    keys += ["MODEL.CLIP.AUTOCAST", precision or ("bfloat16" if bfloat16 else "float32")]
    files = [f"datasets/{name}.yaml", "methods/reclippp_rectify.yaml"]
    return load_config([str(ROOT / "configs" / file) for file in files], keys)


def training_batch(name: str, images: int, pixels: int, classes: int) -> list[dict[str, Any]]:
    """Random images with hypotheses of the mean length."""
    generator, mean = torch.Generator().manual_seed(0), CLASSES_IN_AN_IMAGE[name]
    counts = [max(1, round(mean * (image + 1)) - round(mean * image)) for image in range(images)]
    return [
        {
            "image": torch.randint(0, 256, (3, pixels, pixels), generator=generator, dtype=torch.uint8),
            "hypothesis": torch.randperm(classes, generator=generator)[:count],
            "height": pixels,
            "width": pixels,
            "file_name": "random",
        }
        for count in counts
    ]


def plain_rectify_and_pool(
    logits: Tensor,
    bias: Tensor | None,
    features: Tensor,
    class_ids: Tensor,
    offsets: Tensor,
    tau: float,
    hard: bool,
    seed: None = None,
) -> tuple[Tensor, Tensor]:
    """``rectify_and_pool`` in plain PyTorch: see ``eager_batched``. Areas affect the loss only for rows of area 0; here
    they are 1."""
    padded, index = (rows.to(logits.device) for rows in padded_rows(class_ids, offsets.tolist()))
    zero = logits.new_zeros(()) if bias is None else bias
    pooled = eager_batched(logits, zero, features, padded, index)
    return pooled.float(), pooled.new_ones(len(pooled), dtype=torch.float32)


class GivenFeatures(nn.Module):
    """Replaces the image tower: returns stored features of a batch."""

    def __init__(self, backbone: nn.Module, features: Tensor) -> None:
        super().__init__()
        self.tower = [backbone]  # in a list, so that its parameters are not registered here
        self.features = features

    def dense(self, images: Tensor, image_sizes: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """The features, for any images."""
        return self.features

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.tower[0], name)


@contextlib.contextmanager
def variant(model: nn.Module, batch: list[dict[str, Any]], plain: bool, given: bool) -> Iterator[None]:
    """The model for a variant."""
    pool = mock.patch.object(pooling, "rectify_and_pool", plain_rectify_and_pool)
    backbone = model.backbone
    with pool if plain else contextlib.nullcontext():
        if given:
            with torch.no_grad():
                images = model.preprocess_image(batch)
                features = backbone.dense(images.tensor, images.image_sizes)
            model.backbone = GivenFeatures(backbone, features)
        try:
            yield
        finally:
            model.backbone = backbone


class Part:
    """The variants of a part that are timed now and profiled later."""

    def __init__(self, name: str, device: torch.device, clock: Clock, **sizes: int) -> None:
        """
        Args:
            name: of the part in the figures, which keep what an earlier run has measured.
            sizes: of the images, for the report.
        """
        self.device, self.clock = device, clock
        found = read_figures().get(name, {}).get("variants", {})
        self.variants: dict[str, Any] = {label: row for label, row in found.items() if "error" not in row}
        self.result: dict[str, Any] = {**sizes, "variants": self.variants, "left_out": 0}
        self.profiles: list[Callable[[], None]] = []

    def add(self, label: str, images: int, repeats: int, make: Callable[[], contextlib.AbstractContextManager]) -> None:
        """Time a variant, unless that is done or no time is left.

        Args:
            images: per step.
            make: gives a context with the step, a function of the number of the call; entered again for the profile.
        """
        if label in self.variants:
            return
        if self.clock.left() <= 0:
            self.result["left_out"] += 1
            return
        try:
            context = make()
            with context as step:
                seconds = median_seconds(step, self.device, repeats)
                self.variants[label] = {
                    "seconds": seconds,
                    "images_per_second": images / seconds,
                    "host_seconds": host_seconds(step, self.device, repeats),
                    "peak_bytes": peak_bytes(lambda: step(0), self.device),
                }
        except Exception as error:
            self.variants[label] = failure(error)
            return
        self.profiles.append(lambda: self._profile(label, context))

    def _profile(self, label: str, context: contextlib.AbstractContextManager) -> None:
        with context as step:
            step(0)
            kernels = kernel_seconds(step, self.device, 2)
        if kernels:
            self.variants[label] |= {
                "kernel_seconds": sum(kernels.values()),
                "kernels": dict(list(kernels.items())[:12]),
            }


def failure(error: Exception) -> dict[str, str]:
    """What the figures say about an error; the log has its traceback."""
    traceback.print_exception(error)
    return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


class Variant(contextlib.AbstractContextManager):
    """The model for a variant of the training step, again in each ``with``."""

    def __init__(self, model: nn.Module, batch: list[dict[str, Any]], plain: bool, given: bool, step: Any) -> None:  # noqa: ANN401
        self.arguments, self.step = (model, batch, plain, given), step

    def __enter__(self) -> Callable[[int], None]:
        self.entered = variant(*self.arguments)
        self.entered.__enter__()
        return self.step

    def __exit__(self, *error: object) -> None:
        self.entered.__exit__(*error)


def training(name: str, device: torch.device, images: int, pixels: int, clock: Clock, repeats: int) -> Part:
    """The variants of the step."""
    part = Part(f"training {name}", device, clock, images=images, pixels=pixels)
    for bfloat16 in (True, False):
        made = functools.cache(functools.partial(_step_of, name, device, images, pixels, bfloat16))
        for plain, given in ((False, False), (True, False), (False, True), (True, True)):
            if given and not bfloat16:
                continue
            label = f"{'bfloat16' if bfloat16 else 'float32'}, {'plain PyTorch' if plain else 'kernels'}"
            label += ", features given" * given

            def make(made=made, plain=plain, given=given) -> Variant:  # noqa: ANN001
                model, batch, step = made()
                return Variant(model, batch, plain, given, step)

            part.add(label, images, repeats, make)
    return part


def _step_of(
    name: str, device: torch.device, images: int, pixels: int, bfloat16: bool
) -> tuple[nn.Module, list[dict[str, Any]], Callable[[int], None]]:
    """Model, batch and training step."""
    cfg = configuration(name, device, bfloat16)
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    batch = training_batch(name, images, pixels, model.num_classes)

    def step(_: int) -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
            loss = sum(model(batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return model, batch, step


def evaluation(name: str, device: torch.device, height: int, width: int, repeats: int) -> dict[str, Any]:
    """Label maps of single images, with the kernels and without."""
    model = build_model(configuration(name, device, True)).eval()
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    result: dict[str, Any] = {"height": height, "width": width, "variants": {}}
    for kernels in (True, False):
        model.kernels = kernels

        @torch.no_grad()
        def predict(_: int) -> None:
            model([{"image": image, "height": height, "width": width}])

        seconds = median_seconds(predict, device, repeats)
        result["variants"]["kernels" if kernels else "plain PyTorch"] = {
            "seconds": seconds,
            "images_per_second": 1 / seconds,
            "peak_bytes": peak_bytes(lambda predict=predict: predict(0), device),
        }
    return result


def hypotheses(name: str, device: torch.device, side: int, images: int, repeats: int) -> dict[str, Any]:
    """Crops per second, and the fraction of the peak of bfloat16 products."""
    cfg = configuration(name, device, True)
    model = build_model(cfg).eval()
    generator = HypothesisGenerator(model.backbone, model.query_features, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    pixels = [torch.randint(0, 256, (3, side, side), dtype=torch.uint8) for _ in range(images)]
    ratio = cfg.HYPOTHESIS.WINDOW_RATIO
    crops = images * len(crop_windows(side, side, ratio))

    @torch.no_grad()
    def score(_: int) -> None:
        generator.window_scores(pixels, ratio)

    seconds = median_seconds(score, device, repeats, warmup=1)
    result = {"crops": crops, "seconds": seconds, "crops_per_second": crops / seconds}
    if name != "embedded" and (peak := read_ceilings().get("bfloat16_flops")):
        result["of_bfloat16_peak"] = crops * CROP_FLOPS / seconds / peak
    return result


def stored(batch: list[dict[str, Any]], model: nn.Module, device: torch.device) -> list[dict[str, Any]]:
    """The batch as a feature store gives it: features in half precision, on the host or in device memory."""
    found = []
    for record in batch:
        features, size = model.view_encoder(record["image"])
        found.append({"hypothesis": record["hypothesis"], "features": features.half().to(device), "view_size": size})
    return found


SOURCES = {"store on the GPU": "device", "store on the host": "cpu", "tower in each step": None}


def static_step(name: str, device: torch.device, images: int, pixels: int, clock: Clock, repeats: int) -> Part:
    """The step with the CUDA graph of SOLVER.CUDA_GRAPH and without, with the default precision of the tower: with
    stored features, which training keeps on the GPU while they fit, and with the tower in each step. On a CPU the graph
    is replaced by the same step from the same buffers."""
    part = Part(f"CUDA graph {name}", device, clock, images=images, pixels=pixels)
    cfg = configuration(name, device, precision="auto")
    variants = [*itertools.product(SOURCES, (True, False), (None,)), (next(iter(SOURCES)), True, torch.bfloat16)]
    for source, graph, amp_dtype in variants:

        def make(source=source, graph=graph, amp_dtype=amp_dtype) -> contextlib.AbstractContextManager:  # noqa: ANN001
            torch.manual_seed(0)
            model = build_model(cfg).train()
            optimizer = build_optimizer(cfg, model)
            batch = training_batch(name, images, pixels, model.num_classes)
            if place := SOURCES[source]:
                batch = stored(batch, model, device if place == "device" else torch.device("cpu"))
            if graph:
                static = StaticStep(model, optimizer, amp_dtype=amp_dtype)
                for _ in range(WARM_UP + 1):  # then the graph is captured
                    static.run(batch)
                static.check()
                return contextlib.nullcontext(lambda _: static.run(batch))

            def step(_: int) -> None:
                loss = sum(model(batch).values())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

            return contextlib.nullcontext(step)

        part.add(source + ", CUDA graph" * graph + ", SOLVER.AMP" * bool(amp_dtype), images, repeats, make)
    return part


def parts_of(device: torch.device, clock: Clock) -> dict[str, Callable[[], Any]]:
    """The parts, most important first."""
    if device.type == "cpu":
        return {
            "CUDA graph embedded": lambda: static_step("embedded", device, 2, 64, clock, 1),
            "hypotheses": lambda: hypotheses("embedded", device, 96, 1, 1),
            "evaluation embedded": lambda: evaluation("embedded", device, 64, 80, 1),
            "training embedded": lambda: training("embedded", device, 2, 64, clock, 1),
        }
    return {
        "CUDA graph voc20": lambda: static_step("voc20", device, 12, 512, clock, 20),
        "hypotheses": lambda: hypotheses("voc20", device, 512, 16, 5),
        "evaluation ade150": lambda: evaluation("ade150", device, 512, 683, 20),
        "training voc20": lambda: training("voc20", device, 12, 512, clock, 20),
        "training ade150": lambda: training("ade150", device, 8, 512, clock, 20),
    }


def is_done(figure: object) -> bool:
    """Whether a part needs no further run: all is measured, without an error."""
    if not isinstance(figure, dict):
        return False
    rows = figure.get("variants", {}).values()
    return not (figure.get("left_out") or "error" in figure or any("error" in row for row in rows))


def measure(parts: dict[str, Callable[[], Any]], clock: Clock) -> int:
    """Measure as many parts as time allows; figures are written after each. Returns the exit status."""
    figures = read_figures()
    left_out, profiles = 0, []
    for name, run in parts.items():
        if is_done(figures.get(name)):
            continue
        if clock.left() <= 0:
            print(f"{name}: no time left")
            left_out += 1
            continue
        try:
            found = run()
        except Exception as error:
            figures[name] = failure(error)
        else:
            figures[name] = found.result if isinstance(found, Part) else found
            profiles += [(name, profile) for profile in getattr(found, "profiles", ())]
        left_out += bool(figures[name].get("left_out"))
        write_figures(figures)
        print(f"{name}: {figures[name]}")
    for name, profile in profiles:
        if clock.left() <= -PROFILE_SECONDS:
            break
        try:
            profile()
        except Exception as error:
            figures[name] |= failure(error)
        write_figures(figures)
    if not all(is_done(figures[name]) or figures[name].get("left_out") for name in parts if name in figures):
        return 1
    return MORE_TO_DO if left_out else 0


def main() -> int:
    """See :func:`measure`. Finished parts are skipped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--seconds", type=float, default=80.0, help="no part is started after this time")
    options = parser.parse_args()
    device, clock = torch.device(options.device), Clock(options.seconds)
    return measure(parts_of(device, clock), clock)


if __name__ == "__main__":
    sys.exit(main())
