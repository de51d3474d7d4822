"""The bias report: pictures, numbers and one web page of the analyses of several models.

The page's text and order are in ``templates/bias_report.html.jinja``. Shape letters: C classes, (H, W) size in pixels.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.class_preference import row_normalized
from reclip_d2.evaluation.label_evaluator import plain_json
from reclip_d2.evaluation.logit_parts import LogitParts
from reclip_d2.evaluation.model_analysis import ModelAnalysis
from reclip_d2.evaluation.preferences import ClassPlaces, Preference, agreement, preferred_places
from reclip_d2.evaluation.space_preference import compare_slopes
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.json_files import read_json
from reclip_d2.utils.templates import render
from reclip_d2.utils.text import number
from reclip_d2.visualization.figures import save_figure
from reclip_d2.visualization.scene_figures import logit_figure, scene_figure, telling_classes
from reclip_d2.visualization.score_figures import (
    class_iou_figure,
    confusion_figure,
    distance_figure,
    most_confused_classes,
    preference_figure,
)

PAGE, NUMBERS = "index.html", "bias.json"
_SCHEMA = {
    "type": "object",
    "required": ["pictures"],
    "properties": {"pictures": {"type": "array"}},
}
WORDS = 12
"""Number of classes from either end to describe in words, if there are more than twice as many."""


@dataclass
class Scene:
    """One drawn scene."""

    image_id: str
    image: np.ndarray
    """``(H, W, 3)`` uint8."""
    truth: np.ndarray | None
    """``(H, W)`` int64, if it is labelled."""


@dataclass
class ReportSubject:
    """The subject of the report, without the models."""

    dataset: str
    protocol: str
    images: int
    class_names: list[str]
    colors: np.ndarray
    """``(C, 3)`` uint8."""
    ignore_label: int
    labelled: bool
    bin_width: float
    min_object_area: int
    min_bin_objects: int
    scenes: list[Scene]


class Picture(NamedTuple):
    """A PNG inside the page."""

    data: str
    """Base64."""
    caption: str


class BiasReport:
    """Draws and writes the report; the page comes last, so a folder with a page is complete."""

    def __init__(self, folder: Path, subject: ReportSubject, models: Sequence[ModelAnalysis]) -> None:
        """
        Args:
            models: MaskCLIP first; the last one is the model of interest.
        """
        self.folder = folder
        self.subject = subject
        self.models = list(models)
        self.names = [model.name for model in models]
        self.pictures: list[str] = []

    def write(self) -> Path:
        """Write pictures, ``bias.json`` and ``index.html``; returns the page's path."""
        labelled = self.subject.labelled
        page = render(
            "reclip_d2.visualization",
            "bias_report.html.jinja",
            subject=self.subject,
            names=self.names,
            scores=self._scores() if labelled else None,
            class_ious=self._class_ious() if labelled else None,
            preferences=self._preferences(),
            agreements=[
                (model.name, number(classes, 2), number(places, 2)) for model, (classes, places) in self._agreements()
            ],
            logits=self._logits(),
            scenes=self._scenes(),
            sources=[(model.name, model.source) for model in self.models],
            numbers_file=NUMBERS,
        )
        with atomic_write(self.folder / NUMBERS) as temporary:
            temporary.write_text(json.dumps(plain_json(self._numbers()), indent=1) + "\n")
        with atomic_write(self.folder / PAGE) as temporary:
            temporary.write_text(page, encoding="utf-8")
        return self.folder / PAGE

    # ---- sections: values for the template -----------------------------------------------------------------

    def _scores(self) -> dict[str, Any]:
        rows = []
        for index, model in enumerate(self.models):
            space = model.results["space_preference"]
            change = self._space_change(model) if index else (None, None)
            rows.append(
                (
                    model.name,
                    number(model.results["sem_seg"]["mIoU"]),
                    number(model.results["class_preference"]["score"], 3),
                    _with_error(space["score"], space["standard_error"]),
                    _with_error(*change, sign=True),
                    _with_error(space["fitted_score"], space["fitted_standard_error"]),
                    number(space["slope_percent_per_pixel"], 3),
                )
            )
        objects = int(self.models[0].results["space_preference"]["objects"])
        return {
            "rows": rows,
            "objects": objects,
            "curve": self._distance_curve() if objects else None,
            "bins_header": ("distance (pixels)", "objects", *(f"IoU (%), {name}" for name in self.names)),
            "bins": self._bins(),
            "confusion": self._confusion(),
        }

    def _space_change(self, model: ModelAnalysis) -> tuple[float, float]:
        """Difference of a model's space-preference score to the first model's, and its standard error."""
        first, subject = self.models[0], self.subject
        slope, error = compare_slopes(
            first.distances, first.ious, model.ious, subject.bin_width, subject.min_bin_objects
        )
        return slope * first.half_diagonal, error * first.half_diagonal

    def _distance_curve(self) -> Picture:
        curves = [model.curve for model in self.models]
        scores = [model.results["space_preference"]["score"] for model in self.models]
        figure = distance_figure(self.names, curves, scores, self.subject.min_bin_objects)
        caption = "Space preference, as in Fig. 1(a) of ReCLIP++. Below: the number of objects per bin."
        return self._draw("fig1a_distance", figure, caption)

    def _bins(self) -> list[tuple[str, ...]]:
        curves = [model.curve for model in self.models]
        edges = curves[0].edges
        return [
            (f"{edges[i]:g} to {edges[i + 1]:g}", str(count), *(number(100 * curve.ious[i]) for curve in curves))
            for i, count in enumerate(curves[0].counts)
        ]

    def _confusion(self) -> Picture:
        class_names = self.subject.class_names
        chosen = most_confused_classes(self.models[0].confusion)
        caption = "Class preference, as in Fig. 1(b) of ReCLIP++: the predictions for each class's pixels."
        if len(chosen) < len(class_names):
            caption += f" Of {len(class_names)} classes, the ones that {self.names[0]} confuses most."
        confusions = [model.confusion for model in self.models]
        return self._draw("fig1b_confusion", confusion_figure(self.names, confusions, chosen, class_names), caption)

    def _class_ious(self) -> dict[str, Any]:
        class_names = self.subject.class_names
        ious = [model.class_ious(class_names) for model in self.models]
        pixels = max(int(self.models[0].confusion.sum()), 1)
        shares = [self.models[0].confusion.sum(1), *(model.confusion.sum(0) for model in self.models)]
        return {
            "picture": self._draw("class_iou", class_iou_figure(self.names, ious, class_names), "IoU of each class."),
            "header": (
                "class",
                *(f"IoU, {name}" for name in self.names),
                "% of pixels",
                *(f"% predicted, {name}" for name in self.names),
            ),
            "rows": [
                (name, *(number(iou[k]) for iou in ious), *(number(100 * share[k] / pixels) for share in shares))
                for k, name in enumerate(class_names)
            ],
        }

    def _preferences(self) -> list[dict[str, Any]]:
        sections = []
        for model in self.models:
            preference = model.preference
            if preference is None:
                continue
            what = preference.source + (f" of {preference.images} images" if preference.images > 1 else "")
            figure = preference_figure(f"{model.name}: {what}", preference, self.subject.class_names)
            caption = f"{model.name}: preference for each class at each place ({what}), and its overall value."
            picture = self._draw(f"preference_{file_part(model.name)}", figure, caption)
            lines = preferred_places(preference, self.subject.class_names)
            left_out = max(len(lines) - 2 * WORDS, 0)
            if left_out:
                lines = lines[:WORDS] + lines[-WORDS:]
            sections.append({"picture": picture, "sentences": preference_sentences(preference, lines, left_out)})
        return sections

    def _agreements(self) -> list[tuple[ModelAnalysis, tuple[float, float]]]:
        """For each model with bias logits, their correlation with the first model's mean soft-max."""
        first = self.models[0].preference
        if first is None or first.source != "mean soft-max":
            return []
        return [
            (model, agreement(first, model.preference))
            for model in self.models[1:]
            if model.preference is not None and model.preference.source == "bias logits"
        ]

    def _logits(self) -> list[Picture]:
        return [
            self._logit_picture(model, scene, parts, prediction)
            for model in self.models
            if model.parts
            for scene, parts, prediction in zip(self.subject.scenes, model.parts, model.predictions, strict=True)
        ]

    def _logit_picture(self, model: ModelAnalysis, scene: Scene, parts: LogitParts, prediction: np.ndarray) -> Picture:
        subject = self.subject
        query_mask = parts.labels(parts.query, scene.image.shape[:2]).numpy()
        after = prediction if scene.truth is None else scene.truth
        figure = logit_figure(
            scene.image,
            scene.truth,
            parts,
            telling_classes(query_mask, after, len(subject.class_names)),
            subject.class_names,
            subject.colors,
            model.name,
            subject.ignore_label,
        )
        outlined = "model's prediction" if scene.truth is None else "ground truth"
        caption = f"{model.name}, image {scene.image_id}. Outline: the class in the {outlined}."
        return self._draw(f"fig4_{file_part(model.name)}_{file_part(scene.image_id)}", figure, caption, dpi=80)

    def _scenes(self) -> Picture | None:
        scenes = self.subject.scenes
        if not scenes:
            return None
        figure = scene_figure(
            [scene.image for scene in scenes],
            [scene.truth for scene in scenes],
            {model.name: model.predictions for model in self.models},
            self.subject.class_names,
            self.subject.colors,
            self.subject.ignore_label,
        )
        caption = "As in Fig. 5 of ReCLIP++. The scenes are evenly spaced over the data set."
        return self._draw("fig5_predictions", figure, caption)

    # ---- files ---------------------------------------------------------------------------------------------

    def _draw(self, name: str, figure: Figure, caption: str, dpi: int = 110) -> Picture:
        """Save a figure, and add it to the page."""
        stem, count = name, 1
        while f"{name}.png" in self.pictures:  # two names with the same file name
            count += 1
            name = f"{stem}_{count}"
        self.pictures.append(f"{name}.png")
        file = save_figure(figure, self.folder / f"{name}.png", dpi)
        return Picture(base64.b64encode(file.read_bytes()).decode(), caption)

    def _numbers(self) -> dict[str, Any]:
        subject = self.subject
        return {
            "dataset": subject.dataset,
            "protocol": subject.protocol,
            "images": subject.images,
            "labelled": subject.labelled,
            "classes": subject.class_names,
            "bin_width": subject.bin_width,
            "min_object_area": subject.min_object_area,
            "min_bin_objects": subject.min_bin_objects,
            "models": [self._numbers_of(model) for model in self.models],
            "pictures": self.pictures,
        }

    def _numbers_of(self, model: ModelAnalysis) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": model.name, "source": model.source, "results": model.results}
        if model.confusion is not None:
            entry["confusion_row_normalized"] = row_normalized(model.confusion)
            entry["curve"] = model.curve._asdict()
            entry["space_preference_against_first"] = dict(
                zip(("difference", "standard_error"), self._space_change(model), strict=True)
            )
        if model.preference is not None:
            entry["preference"] = {
                "source": model.preference.source,
                "images": model.preference.images,
                "classes": [line._asdict() for line in preferred_places(model.preference, self.subject.class_names)],
            }
        for other, (classes, places) in self._agreements():
            if other is model:
                entry["correlation_with_mean_soft_max"] = {"classes": classes, "places": places}
        return entry


def _with_error(value: float | None, error: float | None, sign: bool = False) -> str:
    return "–" if number(value) == "–" else f"{number(value, 2, sign)} ± {number(error, 2)}"


def preference_sentences(preference: Preference, lines: Sequence[ClassPlaces], left_out: int = 0) -> list[str]:
    """A preference in words, one sentence per class.

    Args:
        lines: from the most preferred class to the least.
        left_out: classes between the preferred and the avoided half of ``lines``.
    """
    by_share = preference.source == "mean soft-max"

    def amount(value: float) -> str:
        return f"{math.exp(value):.1f} times" if by_share else number(value, 2, sign=True)

    sentences = []
    for index, line in enumerate(lines):
        if left_out and index == len(lines) // 2:
            sentences.append(f"({left_out} classes between them)")
        whole = f"{amount(line.strength)} the uniform share" if by_share else f"{amount(line.strength)} overall"
        sentences.append(
            f"{line.name}: {whole}; most at the {line.best_place} ({amount(line.best)}),"
            f" least at the {line.worst_place} ({amount(line.worst)})"
        )
    return sentences


# ---- the report's folder --------------------------------------------------------------------------------------


def check_output_dir(folder: Path, overwrite: bool) -> None:
    """Raise for a folder with a report, unless ``overwrite``.

    Raises:
        ReclipError: there is a report, and ``overwrite`` is off; or the folder is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ReclipError(f"{folder} is a file: choose another --output-dir")
    if not overwrite and any((folder / name).exists() for name in (PAGE, NUMBERS)):
        raise ReclipError(f"{folder} contains a bias report: add --overwrite, or choose another --output-dir")


def remove_report(folder: Path) -> None:
    """Remove the report of a folder: only the files that it lists."""
    page, numbers = folder / PAGE, folder / NUMBERS
    with contextlib.suppress(ReclipError):  # not our report, or damaged: its pictures are unknown
        for name in read_json(numbers, _SCHEMA, "report", "")["pictures"]:
            if isinstance(name, str) and re.fullmatch(r"[\w.+-]+\.png", name):
                (folder / name).unlink(missing_ok=True)
    page.unlink(missing_ok=True)
    numbers.unlink(missing_ok=True)


def file_part(name: str) -> str:
    """A name as part of a file name: ASCII letters, digits, and ``. + - _``."""
    return re.sub(r"[^\w.+-]+", "_", name, flags=re.ASCII).strip("._") or "model"
