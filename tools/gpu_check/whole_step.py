"""Images per second of the whole training step, evaluation and hypotheses at the papers' sizes, with a random ViT-B/16.

The step is also timed as a CUDA graph; with plain PyTorch in place of the operators (an eager batched product and
PyTorch's random numbers); and with given image features, as from a feature store. The image tower
runs in float32, or in bfloat16 (MODEL.CLIP.AUTOCAST and SOLVER.AMP).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
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


def training(name: str, device: torch.device, images: int, pixels: int, clock: Clock, repeats: int) -> dict[str, Any]:
    """Time the variants of the step; those measured by an earlier run are skipped."""
    done = read_figures().get(f"training {name}", {}).get("variants", {})
    result: dict[str, Any] = {"images": images, "pixels": pixels, "variants": done, "left_out": 0}
    for bfloat16 in (True, False):
        cfg = configuration(name, device, bfloat16)
        model = build_model(cfg).train()
        optimizer = build_optimizer(cfg, model)
        batch = training_batch(name, images, pixels, model.num_classes)

        def step(_: int, model=model, optimizer=optimizer, batch=batch, bfloat16=bfloat16) -> None:  # noqa: ANN001
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
                loss = sum(model(batch).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        for plain, given in ((False, False), (True, False), (False, True), (True, True)):
            if given and not bfloat16:
                continue
            label = f"{'bfloat16' if bfloat16 else 'float32'}, {'plain PyTorch' if plain else 'kernels'}"
            label += ", features given" * given
            if label in done:
                continue
            if clock.left() <= 0:
                result["left_out"] += 1
                continue
            with variant(model, batch, plain, given):
                seconds = median_seconds(step, device, repeats)
                result["variants"][label] = {
                    "seconds": seconds,
                    "images_per_second": images / seconds,
                    "host_seconds": host_seconds(step, device, repeats),
                    "peak_bytes": peak_bytes(lambda step=step: step(0), device),
                    "kernels": dict(list(kernel_seconds(step, device, 2).items())[:12]) if not plain else {},
                }
    return result


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


def stored(batch: list[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
    """The batch as a feature store gives it: features in half precision, on the host."""
    found = []
    for record in batch:
        features, size = model.view_encoder(record["image"])
        found.append({"hypothesis": record["hypothesis"], "features": features.half().cpu(), "view_size": size})
    return found


def static_step(
    name: str, device: torch.device, images: int, pixels: int, clock: Clock, repeats: int
) -> dict[str, Any]:
    """The step with the CUDA graph of SOLVER.CUDA_GRAPH and without, with the default precision of the tower: from the
    store, and with the tower in each step. On a CPU the graph is replaced by the same step from the same buffers."""
    done = read_figures().get(f"CUDA graph {name}", {}).get("variants", {})
    result: dict[str, Any] = {"images": images, "pixels": pixels, "variants": done, "left_out": 0}
    cfg = configuration(name, device, precision="auto")
    for store, graph in itertools.product((True, False), (False, True)):
        label = ("from the store" if store else "tower in each step") + ", CUDA graph" * graph
        if label in done:
            continue
        if clock.left() <= 0:
            result["left_out"] += 1
            continue
        torch.manual_seed(0)
        model = build_model(cfg).train()
        optimizer = build_optimizer(cfg, model)
        batch = training_batch(name, images, pixels, model.num_classes)
        batch = stored(batch, model) if store else batch
        static = StaticStep(model, optimizer)

        def step(_: int, model=model, optimizer=optimizer, batch=batch, static=static if graph else None) -> None:  # noqa: ANN001
            if static is not None:
                static.run(batch)
                return
            loss = sum(model(batch).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        for call in range(WARM_UP + 1 if graph else 0):  # then the graph is captured
            step(call)
        seconds = median_seconds(step, device, repeats)
        result["variants"][label] = {
            "seconds": seconds,
            "images_per_second": images / seconds,
            "host_seconds": host_seconds(step, device, repeats),
            "peak_bytes": peak_bytes(lambda step=step: step(0), device),
        }
        if graph:
            static.check()
    return result


def main() -> int:
    """Measure as many parts as time allows; figures are written after each. Finished parts are skipped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--seconds", type=float, default=80.0, help="no part is started after this time")
    options = parser.parse_args()
    device, clock = torch.device(options.device), Clock(options.seconds)
    figures = read_figures()
    left_out = 0
    parts: dict[str, Callable[[], Any]] = {
        "training voc20": lambda: training("voc20", device, 12, 512, clock, 20),
        "CUDA graph voc20": lambda: static_step("voc20", device, 12, 512, clock, 20),
        "hypotheses": lambda: hypotheses("voc20", device, 512, 8, 5),
        "evaluation ade150": lambda: evaluation("ade150", device, 512, 683, 20),
        "training ade150": lambda: training("ade150", device, 8, 512, clock, 20),
    }
    if device.type == "cpu":
        parts = {
            "training embedded": lambda: training("embedded", device, 2, 64, clock, 1),
            "hypotheses": lambda: hypotheses("embedded", device, 96, 1, 1),
            "evaluation embedded": lambda: evaluation("embedded", device, 64, 80, 1),
            "CUDA graph embedded": lambda: static_step("embedded", device, 2, 64, clock, 1),
        }
    for name, part in parts.items():
        if name in figures and not (isinstance(figures[name], dict) and figures[name].get("left_out")):
            continue
        if clock.left() <= 0:
            print(f"{name}: no time left")
            left_out += 1
            continue
        figures[name] = part()
        left_out += bool(isinstance(figures[name], dict) and figures[name].get("left_out"))
        write_figures(figures)
        print(f"{name}: {figures[name]}")
    return MORE_TO_DO if left_out else 0


if __name__ == "__main__":
    sys.exit(main())
