"""Export a trained model (of a run, a saved model or a config) to one file that runs without this package."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from reclip_d2.config import load_config
from reclip_d2.data.class_file import read_class_file
from reclip_d2.data.classes import class_names_from_config
from reclip_d2.data.datasets.custom import CUSTOM, register_custom
from reclip_d2.data.datasets.custom_labels import CUSTOM_VAL
from reclip_d2.engine.trainer import build_evaluation_model
from reclip_d2.errors import ReclipError
from reclip_d2.export.calibration import CalibrationImages
from reclip_d2.export.description import DescribedFile
from reclip_d2.export.export import FORMATS, ExportOptions, export_model
from reclip_d2.export.int8 import Int8Agreement
from reclip_d2.export.parity import Agreement
from reclip_d2.formats import MaskClasses
from reclip_d2.modeling.build import check_registered_parts
from reclip_d2.modeling.meta_arch.base import LanguageSegmentor
from reclip_d2.utils.output_paths import check_output_folder, check_output_path
from reclip_d2.workspace.masks import MaskClassTable
from reclip_d2.workspace.options import TITLES
from reclip_d2.workspace.trained_model import TrainedModel, load_predictor

# The model is traced on the CPU, in full precision, with PyTorch's own operators; without windows, tiles, refinements.
_PLAIN = ("MODEL.DEVICE", "cpu", "MODEL.USE_KERNELS", "False", "MODEL.CLIP.AUTOCAST", "float32")
# Meta-architecture: the kind of model, and its default file name.
_KINDS = {"MaskCLIP": "maskclip", "RectifiedCLIP": "rectified", "Student": "student", "Distillation": "student"}


@dataclasses.dataclass(frozen=True)
class ExportSource:
    """A trained model to export, not built yet.

    Attributes:
        kind: a key of :data:`~reclip_d2.workspace.options.TITLES`.
        cfg: its config, for the CPU.
        weights: its checkpoint; None for MaskCLIP.
        folder: default folder of the exported file.
        classes: class names of the labels.
        label_ids: label id of each of the model's classes.
        trained: the model of ``reclip segment``; None for ``train_net.py``.
    """

    kind: str
    cfg: CfgNode
    weights: Path | None
    folder: Path
    classes: MaskClasses
    label_ids: Sequence[int]
    trained: TrainedModel | None = None

    @classmethod
    def of_run(
        cls,
        model: str,
        *,
        use: str | None = None,
        pretrained: str | None = None,
        keep_background: bool = False,
        opts: Sequence[str] = (),
    ) -> ExportSource:
        """A model trained by ``reclip segment``, or a saved one.

        Args:
            model, use, pretrained: see :meth:`TrainedModel.find`.
            keep_background: background names share a separate id in labels.
            opts: ``KEY VALUE`` overrides.
        """
        trained = TrainedModel.find(model, use, pretrained)
        table = MaskClassTable(trained.state.classes, keep_background)
        return cls(
            trained.kind,
            trained.config([*opts, *_PLAIN]),
            None if trained.kind == "maskclip" else trained.weights,
            trained.weights.parent / "export",
            table.mask_classes,
            table.ids.tolist(),
            trained,
        )

    @classmethod
    def of_config(
        cls,
        config_file: str | Sequence[str],
        *,
        weights: str | None = None,
        pretrained: str | None = None,
        keep_background: bool = False,
        opts: Sequence[str] = (),
    ) -> ExportSource:
        """A model trained by ``train_net.py``.

        Args:
            config_file: see :func:`~reclip_d2.config.load_config`.
            weights: the checkpoint; None for ``MODEL.WEIGHTS``.
            pretrained: CLIP's weights; None for the config's.
            keep_background, opts: see :meth:`of_run`.

        Raises:
            ReclipError: the model cannot be exported, or its checkpoint does not exist.
        """
        keys = [] if pretrained is None else ["MODEL.CLIP.PRETRAINED", pretrained]
        keys += [] if weights is None else ["MODEL.WEIGHTS", weights]
        cfg = load_config(config_file, [*opts, *keys, *_PLAIN])
        register_custom(cfg)
        check_registered_parts(cfg)
        architecture = cfg.MODEL.META_ARCHITECTURE
        if architecture not in _KINDS:
            raise ReclipError(
                f"MODEL.META_ARCHITECTURE {architecture} cannot be exported: use one of {', '.join(_KINDS)}"
            )
        kind = _KINDS[architecture]
        file = Path(cfg.MODEL.WEIGHTS) if cfg.MODEL.WEIGHTS and kind != "maskclip" else None
        if kind != "maskclip" and (file is None or not file.is_file()):
            said = "" if file is None else f" {file}: there is no such file"
            raise ReclipError(
                f"--weights{said or ' is missing'}: name the checkpoint, such as OUTPUT_DIR/model_final.pth"
            )
        classes, ids = _classes_of(cfg, keep_background)
        folder = Path(cfg.OUTPUT_DIR) if file is None else file.parent
        return cls(kind, cfg, file, folder / "export", classes, ids)

    def output_path(self, output: str | None, format: str, int8: bool = False) -> Path:
        """The file to write; in a folder, it is named after the model.

        Args:
            output: a file or a folder; None for :attr:`folder`.
            format: a key of :data:`~reclip_d2.export.export.FORMATS`.
            int8: whether the default name is that of an INT8 file.
        """
        suffixes = FORMATS[format].SUFFIXES
        name = f"{self.kind}{'_int8' if int8 else ''}{suffixes[0]}"
        if output is None:
            return self.folder / name
        path = Path(output).expanduser()
        if output and (path.is_dir() or not path.suffix or output.endswith("/")):
            return check_output_folder(output) / name
        path = check_output_path(output)
        if path.suffix not in suffixes:
            raise ReclipError(f"--output {output}: files of the format {format} end in {' or '.join(suffixes)}")
        return path

    def build(self) -> LanguageSegmentor:
        """The model with its weights, in eval mode, on the CPU."""
        if self.trained is None:
            return build_evaluation_model(self.cfg, resume=False)
        return load_predictor(self.cfg, self.kind, self.trained.state.classes, self.trained.weights).model


class Export:
    """An export with checked inputs; nothing is written yet.

    Attributes:
        source: the model.
        path: the file to write.
        options: export options.
        calibration: images that an INT8 file is calibrated on; None for float32.
    """

    def __init__(
        self,
        source: ExportSource,
        options: ExportOptions,
        output: str | None = None,
        *,
        overwrite: bool = False,
        calibrate: str | None = None,
        calibration_images: int = 100,
    ) -> None:
        """
        Args:
            output: see :meth:`ExportSource.output_path`.
            overwrite: replace an existing file.
            calibrate: images for ``options.int8``; see :meth:`CalibrationImages.choose`.
            calibration_images: largest number of images to calibrate with.

        Raises:
            ReclipError: the file exists, or cannot be written; or an INT8 file is wanted of a model that has none, or
                without images.
        """
        if (options.int8 is None) != (calibrate is None):
            raise ReclipError(
                "--int8 needs --calibrate FOLDER: images like those that the model will get, without labels"
                if calibrate is None
                else "--calibrate is for --int8: give both, or none"
            )
        if options.int8 is not None and source.kind != "student":
            raise ReclipError(
                f"--int8 is for students, and this model is {TITLES[source.kind]}: train one with reclip segment"
                " --student, or omit --int8 (a CLIP's transformer is exported in float32 only)"
            )
        self.source = source
        self.options = dataclasses.replace(options, label_ids=source.label_ids)
        self.path = source.output_path(output, options.format, options.int8 is not None)
        self._overwrite = overwrite
        self.calibration = None
        if calibrate is not None:
            self.calibration = CalibrationImages.choose(calibrate, calibration_images, source.cfg, options.size)
        keys = source.cfg.INPUT
        self._file = DescribedFile(
            path=self.path,
            classes=source.classes,
            channels=source.label_ids,
            model=source.kind,
            options=self.options,
            short_side=keys.MIN_SIZE_TEST,
            long_side=keys.MAX_SIZE_TEST,
            calibration_images=0 if self.calibration is None else len(self.calibration),
        )
        self._file.check(overwrite)

    def write(self, report: Callable[[Agreement | Int8Agreement], None] = lambda _: None) -> Path:
        """Write the file if its outputs match the model's; returns the path of ``classes.json``, which describes it.

        Args:
            report: called with each comparison.
        """
        model = self.source.build()
        export_model(model, self.path, self.options, self._file.text(), report=report, calibration=self.calibration)
        return self._file.write(self._overwrite)


def _classes_of(cfg: CfgNode, keep_background: bool) -> tuple[MaskClasses, Sequence[int]]:
    """The classes of a config's data set, and the id of each class of the model."""
    names = [synonyms[0] for synonyms in class_names_from_config(cfg)]
    dataset = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST][0]
    file = cfg.DATASETS.CUSTOM.CLASSES if dataset in (CUSTOM, CUSTOM_VAL) else cfg.DATASETS.VOCABULARY
    if file:
        table = MaskClassTable(read_class_file(file), keep_background)
        return table.mask_classes, table.ids.tolist()
    return MaskClasses.make(names, MetadataCatalog.get(dataset).get("stuff_colors")), range(len(names))
