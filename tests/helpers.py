"""Shared by several test modules: a tiny CLIP, models on it, and data sets of a few files.

Shape letters: B images, n = h*w patches, D width of the joint embedding, C classes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import ResNet
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image

from reclip_d2.backbones.dense import DenseCLIP
from reclip_d2.backbones.query import query_features
from reclip_d2.backbones.reference import ReferencePrompt
from reclip_d2.config import load_config
from reclip_d2.modeling.bias_head import BiasHead, PositionalProjection, ReCLIPPPBiasHead
from reclip_d2.modeling.mask_decoder import MaskDecoder
from reclip_d2.modeling.meta_arch.distillation import Distillation, inherit
from reclip_d2.modeling.meta_arch.maskclip import MaskCLIP
from reclip_d2.modeling.meta_arch.rectified_clip import RectifiedCLIP
from reclip_d2.modeling.meta_arch.segmentor import CLIPSegmentor
from reclip_d2.modeling.meta_arch.student import Student
from reclip_d2.modeling.reclip_bias_head import ReCLIPBiasHead, SpaceProjection
from reclip_d2.modeling.student.inherited import InheritedHead
from reclip_d2.modeling.student.network import DeepLabV2Head, build_dilated_resnet_backbone
from reclip_d2.toy.scenes import render_scene

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

TINY_NAME = "reclip-test-tiny"
TINY_VISION = {"layers": 3, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
TINY_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
EMBED_DIM = 24
CLASS_NAMES = [["sky"], ["tall tree", "oak"], ["water"], ["brick wall"]]
PIXEL_MEAN, PIXEL_STD = [122.7709, 116.7460, 104.0937], [68.5005, 66.6322, 70.3232]
IMAGENET_MEAN, IMAGENET_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


@pytest.fixture(autouse=True)
def isolated_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own: none reads what another, or a user's run, has left."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("RECLIP_CACHE", str(folder))
    return folder


@functools.cache
def tiny_tokenizer(context_length: int = 77) -> SimpleTokenizer:
    """CLIP's own tokenizer."""
    return SimpleTokenizer(context_length=context_length)


def tiny_clip(
    seed: int = 0,
    *,
    quick_gelu: bool = False,
    context_length: int = 77,
    custom_text: bool = False,
    text: dict | None = None,
    **vision: object,
) -> open_clip.CLIP:
    """A random open_clip ViT in eval mode. No weight is 0 or 1, so that each one matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(
            embed_dim=EMBED_DIM,
            vision_cfg=open_clip.CLIPVisionCfg(**{**TINY_VISION, **vision}),
            text_cfg=open_clip.CLIPTextCfg(**{**TINY_TEXT, "context_length": context_length, **(text or {})}),
            quick_gelu=quick_gelu,
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name != "logit_scale":
                    parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def tiny_dense(seed: int = 0, *, context_length: int = 77, quick_gelu: bool = False, **arguments: object) -> DenseCLIP:
    """:func:`tiny_clip` as a backbone; ``arguments`` are those of :class:`DenseCLIP`."""
    clip = tiny_clip(seed, context_length=context_length, quick_gelu=quick_gelu)
    return DenseCLIP(clip, tiny_tokenizer(context_length), **{"name": "tiny", **arguments})


def _segmentor_arguments(backbone: DenseCLIP, arguments: dict) -> dict:
    class_names = arguments.pop("class_names", CLASS_NAMES)
    return {
        "backbone": backbone,
        "query_features": query_features(backbone, class_names, ["a photo of a {}."]),
        "class_names": class_names,
        "templates": "photo",
        "pixel_mean": PIXEL_MEAN,
        "pixel_std": PIXEL_STD,
        **arguments,
    }


def make_maskclip(**arguments: object) -> MaskCLIP:
    """MaskCLIP on the tiny CLIP, in eval mode."""
    return MaskCLIP(**_segmentor_arguments(tiny_dense(), dict(arguments))).eval()


def make_rectified(
    *, decoder: bool | dict = True, prompt_length: int = 4, reference_norm: str = "row", **arguments: object
) -> RectifiedCLIP:
    """ReCLIP++ on the tiny CLIP, in training mode. ``decoder`` may hold arguments of :class:`MaskDecoder`."""
    backbone = tiny_dense()
    common = _segmentor_arguments(backbone, dict(arguments))
    names = [names[0] for names in common["class_names"]]
    head = ReCLIPPPBiasHead(
        ReferencePrompt(backbone, names, prompt_length=prompt_length),
        PositionalProjection(TINY_VISION["width"], EMBED_DIM),
        reference_norm=reference_norm,
    )
    options = decoder if isinstance(decoder, dict) else {}
    mask_decoder = MaskDecoder(EMBED_DIM, len(names), **options) if decoder is not False else None
    return RectifiedCLIP(bias_head=head, mask_decoder=mask_decoder, **common).train()


def bias_of(head: BiasHead, backbone: DenseCLIP, features: torch.Tensor) -> torch.Tensor:
    """M_b of a bias head for Z ``(B, D, h, w)``."""
    reference = head.reference_features(backbone)
    embedding = backbone.positional_embedding((features.shape[-2], features.shape[-1]))
    return head.add_image_bias(head.shared_bias(embedding, reference), reference, features)


def make_reclip_head(backbone: DenseCLIP, norm: str = "row", **projection: object) -> ReCLIPBiasHead:
    """ReCLIP's bias head for :data:`CLASS_NAMES`; ``projection`` are arguments of :class:`SpaceProjection`."""
    names = [names[0] for names in CLASS_NAMES]
    return ReCLIPBiasHead(
        ReferencePrompt(backbone, names, prompt_length=4),
        SpaceProjection(TINY_VISION["width"], len(names), (10, 6), **projection),
        reference_norm=norm,
    )


def make_reclip(*, decoder: bool = False, **arguments: object) -> RectifiedCLIP:
    """ReCLIP on the tiny CLIP, in training mode."""
    model = make_rectified(decoder=decoder, **arguments)
    model.bias_head = make_reclip_head(model.backbone)
    return model.train()


def tiny_resnet(*keys: object, depth: int = 18, stride: int = 8) -> ResNet:
    """A dilated ResNet of 8 to 64 channels (depth 18); ``keys`` are ``KEY VALUE`` overrides."""
    narrow = ["MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "8"]
    options = [*narrow, "MODEL.RESNETS.DEPTH", str(depth), "MODEL.STUDENT.OUTPUT_STRIDE", str(stride)]
    return build_dilated_resnet_backbone(load_config("", [*options, *map(str, keys)]), ShapeSpec(channels=3))


def make_student(
    teacher: CLIPSegmentor,
    *,
    head: str = "query_bias_decoder",
    grid: tuple[int, int] = (4, 5),
    stride: int = 8,
    **arguments: object,
) -> Student:
    """A small student that has inherited from a teacher, in training mode."""
    state = inherit(teacher.eval(), head, grid)
    backbone = tiny_resnet(stride=stride)
    inherited = InheritedHead(
        state["query_features"],
        head=head,
        bias_map=state.get("bias_map"),
        class_bias=state.get("class_bias"),
        mask_decoder=getattr(teacher, "mask_decoder", None),
        rectification=getattr(teacher, "rectification", "none"),
        logit_scale=state["logit_scale"].item(),
    )
    own = {
        "class_names": teacher.class_names,
        "templates": teacher.templates,
        "pixel_mean": IMAGENET_MEAN,
        "pixel_std": IMAGENET_STD,
        **arguments,
    }
    return Student(
        backbone=backbone,
        feature_head=DeepLabV2Head(backbone.output_shape()["res5"].channels, EMBED_DIM),
        inherited=inherited,
        clip_name="tiny",
        head=head,
        output_stride=stride,
        **own,
    ).train()


def make_distillation(
    teacher: CLIPSegmentor | None = None, *, student: Student | None = None, **arguments: object
) -> Distillation:
    """A student of a teacher (by default ReCLIP++ with a decoder) in training mode."""
    teacher = teacher or make_rectified()
    return Distillation(teacher=teacher, student=student or make_student(teacher), **arguments).train()


def random_image(seed: int, height: int = 32, width: int = 32) -> torch.Tensor:
    """Blocks of random colour, ``(3, H, W)`` uint8."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (3, -(-height // 8), -(-width // 8)))
    return torch.from_numpy(np.kron(blocks, np.ones((1, 8, 8), np.int64))[:, :height, :width].astype(np.uint8))


def config_files(dataset: str, method: str) -> list[str]:
    """The package's config files of a method on a data set."""
    return [str(CONFIGS / "datasets" / f"{dataset}.yaml"), str(CONFIGS / "methods" / f"{method}.yaml")]


def config_arguments(dataset: str, method: str) -> list[str]:
    """``--config-file`` for each of :func:`config_files`."""
    return [word for file in config_files(dataset, method) for word in ("--config-file", file)]


def register_tiny_model(folder: Path) -> str:
    """Make the tiny CLIP known to open_clip by name; with ``MODEL.CLIP.PRETRAINED random`` it needs no file."""
    if TINY_NAME not in open_clip.list_models():
        config = {"embed_dim": EMBED_DIM, "vision_cfg": TINY_VISION, "text_cfg": TINY_TEXT}
        path = folder / f"{TINY_NAME}.json"
        path.write_text(json.dumps(config))
        open_clip.add_model_config(path)
    return TINY_NAME


_watchers: list[Callable[[str], None]] = []


def tiny_config(folder: Path, architecture: str = "RectifiedCLIP") -> str:
    """YAML of a config on the tiny CLIP of a folder; it ends inside ``MODEL``, whose further keys may follow."""
    return f"""_BASE_: {CONFIGS}/Base-ReCLIP.yaml
MODEL:
  META_ARCHITECTURE: {architecture}
  DEVICE: cpu
  CLIP: {{NAME: {register_tiny_model(folder)}, PRETRAINED: random, TEMPLATES: photo}}
  BIAS_HEAD: {{PROMPT_LENGTH: 4}}"""


def hypothesis_config(folder: Path) -> CfgNode:
    """Config of hypotheses from 9 windows per image on the tiny CLIP of a folder, on the CPU."""
    keys = {
        "MODEL.CLIP.NAME": register_tiny_model(folder),
        "MODEL.CLIP.PRETRAINED": "random",
        "MODEL.CLIP.TEMPLATES": "photo",
        "MODEL.BACKBONE.NAME": "DenseCLIP",
        "MODEL.DEVICE": "cpu",
        "HYPOTHESIS.WINDOW_RATIO": 0.5,
    }
    return load_config("", [word for pair in keys.items() for word in pair])


@contextlib.contextmanager
def stopped_in_iteration(iteration: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A run in the block stops as if it were killed, before this iteration (they count from 0)."""

    class Stopped(BaseException):
        pass

    from reclip_d2.engine.trainer import Trainer  # here: most tests need no trainer

    run_step = Trainer.run_step

    def stop(self: Trainer) -> None:
        if self.iter == iteration:
            raise Stopped
        run_step(self)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Trainer, "run_step", stop)
        yield


def _audit(event: str, arguments: tuple) -> None:
    if event == "open" and _watchers and isinstance(arguments[0], str | bytes | os.PathLike):
        for watch in _watchers:
            watch(os.fsdecode(arguments[0]))


sys.addaudithook(_audit)  # for good: hooks cannot be taken away


@contextlib.contextmanager
def watch_opened_files(watch: Callable[[str], None]) -> Iterator[None]:
    """Call ``watch`` with the path of each file that Python opens, by any function; its exception bars the file."""
    _watchers.append(watch)
    try:
        yield
    finally:
        _watchers.remove(watch)


def write_scenes(
    root: Path, count: int, *, size: tuple[int, int] = (32, 40), classes: int = 4, seed: int = 0
) -> list[dict]:
    """JPEGs of coloured quarters and index PNGs, with their records."""
    images, labels = root / "images", root / "annotations_detectron2"
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    palette = rng.integers(0, 256, (classes, 3))
    height, width = size
    records = []
    for index in range(count):
        label = np.kron(rng.integers(0, classes, (2, 2)), np.ones((height // 2, width // 2), np.int64))
        pixels = palette[label] + rng.normal(0, 8, (*label.shape, 3))
        image_file, label_file = images / f"{index:03d}.jpg", labels / f"{index:03d}.png"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(image_file, quality=95)
        Image.fromarray(label.astype(np.uint8)).save(label_file)
        records.append(
            {
                "file_name": str(image_file),
                "sem_seg_file_name": str(label_file),
                "height": height,
                "width": width,
                "image_id": f"{seed}_{index:03d}",
            }
        )
    return records


def register_dataset(name: str, records: list[dict], class_names: list[str], **metadata: object) -> str:
    """Register records under ``name``, which must be taken back by :func:`unregister_dataset`."""
    DatasetCatalog.register(name, lambda: [dict(record) for record in records])
    MetadataCatalog.get(name).set(
        **{"stuff_classes": list(class_names), "ignore_label": 255, "evaluator_type": "sem_seg", **metadata}
    )
    return name


def unregister_dataset(name: str) -> None:
    """Forget a data set of :func:`register_dataset`."""
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.fixture
def datasets() -> object:
    """``datasets(name, records, class_names)`` registers a data set for the length of the test."""
    names: list[str] = []

    def register(name: str, records: list[dict], class_names: list[str], **metadata: object) -> str:
        names.append(register_dataset(name, records, class_names, **metadata))
        return name

    yield register
    for name in names:
        unregister_dataset(name)


def write_embedded_scenes(folder: Path, count: int) -> list[dict]:
    """Records of scenes of the embedded world with their label maps, written to a folder."""
    records = []
    for index in range(count):
        scene, record = render_scene(7, index), {"image_id": str(index), "height": 96, "width": 96}
        for key, array in (("file_name", scene.image), ("sem_seg_file_name", scene.labels)):
            record[key] = str(folder / f"{key}_{index}.png")
            Image.fromarray(array).save(record[key])
        records.append(record)
    return records
