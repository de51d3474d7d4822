"""``reclip export``: a trained model as one file that runs without this package."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from reclip_d2.config import load_config
from reclip_d2.data.class_file import read_class_file
from reclip_d2.data.classes import class_names_from_config
from reclip_d2.data.datasets.custom import CUSTOM, register_custom, register_images
from reclip_d2.data.datasets.custom_labels import CUSTOM_VAL
from reclip_d2.engine.trainer import build_evaluation_model
from reclip_d2.errors import ReclipError
from reclip_d2.export.description import DescribedFile
from reclip_d2.export.export import FORMATS, ExportOptions, export_model
from reclip_d2.formats import MaskClasses
from reclip_d2.modeling.build import check_registered_parts
from reclip_d2.modeling.meta_arch.base import LanguageSegmentor
from reclip_d2.utils.output_paths import check_output_folder, check_output_path
from reclip_d2.workspace.masks import MaskClassTable
from reclip_d2.workspace.options import TITLES
from reclip_d2.workspace.trained_model import TrainedModel, load_predictor

# The model is traced on the CPU, in full precision, as a whole, with PyTorch's own operators.
_PLAIN = ("MODEL.DEVICE", "cpu", "MODEL.USE_KERNELS", "False", "MODEL.CLIP.AUTOCAST", "float32")
# Meta-architecture: what such a model is called here, and its file by default.
_KINDS = {"MaskCLIP": "maskclip", "RectifiedCLIP": "rectified", "Student": "student", "Distillation": "student"}


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    export_options = ExportOptions(
        format=args.format,
        size=None if args.size is None else parse_size(args.size),
        labels=args.labels,
        input_type=args.input_type,
        tolerance=args.tolerance,
    )
    export_options.check()
    source = _from_run(args) if args.model is not None else _from_config(args)
    export_options = dataclasses.replace(export_options, label_ids=source.label_ids)
    keys = source.cfg.INPUT
    file = DescribedFile(
        path=_output_path(args, source),
        classes=source.classes,
        channels=source.label_ids,
        model=source.kind,
        options=export_options,
        short_side=keys.MIN_SIZE_TEST,
        long_side=keys.MAX_SIZE_TEST,
    )
    file.check(args.overwrite)
    shape = "any size" if export_options.size is None else f"{export_options.size[0]} x {export_options.size[1]}"
    print(f"model     {TITLES[source.kind]}{f', {source.weights}' if source.weights else ''}")
    print(f"format    {args.format}, {shape}, {args.input_type} in, {'labels' if args.labels else 'logits'} out")
    export_model(
        source.build(), file.path, export_options, file.text(), report=lambda result: print(f"check     {result}")
    )
    classes = file.write(args.overwrite)
    print(f"file      {file.path} ({file.path.stat().st_size / 2**20:.1f} MiB)")
    print(f"classes   {classes}")
    return 0


def parse_size(text: str) -> tuple[int, int]:
    """(H, W) of ``HxW``.

    Raises:
        ReclipError: the text is something else.
    """
    found = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if found is None or 0 in (size := (int(found[1]), int(found[2]))):
        raise ReclipError(f"--size {text}: give height and width in pixels, such as 512x683")
    return size


@dataclasses.dataclass(frozen=True)
class _Source:
    """A trained model, not built yet.

    Attributes:
        weights: its checkpoint; None of MaskCLIP.
        folder: where its file goes by default.
        classes: of labels.
        label_ids: the id of each class of the model.
        trained: of ``reclip segment``; None of ``train_net.py``.
    """

    kind: str
    cfg: CfgNode
    weights: Path | None
    folder: Path
    classes: MaskClasses
    label_ids: Sequence[int]
    trained: TrainedModel | None = None

    def build(self) -> LanguageSegmentor:
        """The model with its weights, in eval mode, on the CPU."""
        if self.trained is None:
            return build_evaluation_model(self.cfg, resume=False)
        register_images([], self.trained.state.classes)
        return load_predictor(self.cfg, self.kind, self.trained.weights).model


def _from_run(args: argparse.Namespace) -> _Source:
    if args.weights is not None:
        raise ReclipError("--weights is for --config-file: a --model folder has its own")
    trained = TrainedModel.find(args.model, args.use, args.pretrained)
    table = MaskClassTable(trained.state.classes, args.background == "keep")
    return _Source(
        trained.kind,
        trained.config([*args.opts, *_PLAIN]),
        None if trained.kind == "maskclip" else trained.weights,
        trained.weights.parent / "export",
        table.mask_classes,
        table.ids.tolist(),
        trained,
    )


def _from_config(args: argparse.Namespace) -> _Source:
    if args.use is not None:
        raise ReclipError("--use is for --model: a --config-file names its model")
    pretrained = [] if args.pretrained is None else ["MODEL.CLIP.PRETRAINED", args.pretrained]
    weights = [] if args.weights is None else ["MODEL.WEIGHTS", args.weights]
    cfg = load_config(args.config_file, [*args.opts, *pretrained, *weights, *_PLAIN])
    register_custom(cfg)
    check_registered_parts(cfg)
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture not in _KINDS:
        raise ReclipError(f"MODEL.META_ARCHITECTURE {architecture} cannot be exported: take one of {', '.join(_KINDS)}")
    kind = _KINDS[architecture]
    file = Path(cfg.MODEL.WEIGHTS) if cfg.MODEL.WEIGHTS and kind != "maskclip" else None
    if kind != "maskclip" and (file is None or not file.is_file()):
        said = "" if file is None else f" {file}: there is no such file"
        raise ReclipError(f"--weights{said or ' is missing'}: name the checkpoint, such as OUTPUT_DIR/model_final.pth")
    classes, ids = _classes_of(cfg, args.background == "keep")
    folder = Path(cfg.OUTPUT_DIR) if file is None else file.parent
    return _Source(kind, cfg, file, folder / "export", classes, ids)


def _classes_of(cfg: CfgNode, keep_background: bool) -> tuple[MaskClasses, Sequence[int]]:
    """The classes of a config's data set, and the id of each class of the model."""
    names = [synonyms[0] for synonyms in class_names_from_config(cfg)]
    dataset = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST][0]
    if dataset in (CUSTOM, CUSTOM_VAL):
        table = MaskClassTable(read_class_file(cfg.DATASETS.CUSTOM.CLASSES), keep_background)
        return table.mask_classes, table.ids.tolist()
    return MaskClasses.make(names, MetadataCatalog.get(dataset).get("stuff_colors")), range(len(names))


def _output_path(args: argparse.Namespace, source: _Source) -> Path:
    """The file to write: a folder gets one of the model's name."""
    suffixes = FORMATS[args.format].SUFFIXES
    name = f"{source.kind}{suffixes[0]}"
    if args.output is None:
        return source.folder / name
    path = Path(args.output).expanduser()
    if args.output and (path.is_dir() or not path.suffix or args.output.endswith("/")):
        return check_output_folder(args.output) / name
    path = check_output_path(args.output)
    if path.suffix not in suffixes:
        raise ReclipError(f"--output {args.output}: a file of the format {args.format} ends in {' or '.join(suffixes)}")
    return path
