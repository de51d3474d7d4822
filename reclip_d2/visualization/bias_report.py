"""The bias report: pictures, numbers and one web page of the analyses of several models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from reclip_d2.evaluation.class_preference import row_normalized
from reclip_d2.evaluation.label_evaluator import plain_json
from reclip_d2.evaluation.model_analysis import ModelAnalysis
from reclip_d2.evaluation.preferences import agreement, in_words
from reclip_d2.evaluation.space_preference import compare_slopes
from reclip_d2.utils.io import atomic_write
from reclip_d2.visualization import report_texts as texts
from reclip_d2.visualization.figures import save_figure
from reclip_d2.visualization.html import Page, number
from reclip_d2.visualization.preference_figure import preference_figure
from reclip_d2.visualization.report_folder import NUMBERS, PAGE, file_part
from reclip_d2.visualization.report_subject import ReportSubject
from reclip_d2.visualization.scene_figures import logit_figure, scene_figure, telling_classes
from reclip_d2.visualization.score_figures import (
    class_iou_figure,
    confusion_figure,
    distance_figure,
    most_confused_classes,
)

WORDS = 12
"""Classes that are put in words, from either end, if there are more than twice as many."""


class BiasReport:
    """Draws and writes the report; the page comes last, so that a folder with a page is complete."""

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
        self.page = Page(f"Biases of CLIP on {subject.dataset}: {', '.join(self.names)}")

    def write(self) -> Path:
        """Write pictures, ``bias.json`` and ``index.html``; returns the page's path."""
        subject = self.subject
        self.page.paragraph(
            f"{subject.images} images, {len(subject.class_names)} classes. Protocol: {subject.protocol}."
        )
        if subject.labelled:
            self._scores()
            self._class_ious()
        else:
            self.page.paragraph(texts.WITHOUT_LABELS)
        self._preferences()
        self._logits()
        self._scenes()
        self._methods()
        with atomic_write(self.folder / NUMBERS) as temporary:
            temporary.write_text(json.dumps(plain_json(self._numbers()), indent=1) + "\n")
        with atomic_write(self.folder / PAGE) as temporary:
            temporary.write_text(self.page.render(), encoding="utf-8")
        return self.folder / PAGE

    # ---- sections ------------------------------------------------------------------------------------------

    def _scores(self) -> None:
        self.page.heading("The two biases, measured")
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
        against = f"against {self.names[0]}"
        self.page.table(
            ("model", "mIoU (%)", "class preference", "space preference", against, "fitted line", "slope (% a pixel)"),
            rows,
        )
        objects = int(self.models[0].results["space_preference"]["objects"])
        self.page.paragraph(texts.SCORES.format(objects=objects))
        if objects:
            self._distance_curve()
        chosen = most_confused_classes(self.models[0].confusion)
        caption = "Class preference, after Fig. 1(b) of ReCLIP++: what becomes of the pixels of each class."
        if len(chosen) < len(self.subject.class_names):
            caption += f" Of {len(self.subject.class_names)} classes those that {self.names[0]} confuses most."
        confusions = [model.confusion for model in self.models]
        self._draw(
            "fig1b_confusion", confusion_figure(self.names, confusions, chosen, self.subject.class_names), caption
        )

    def _space_change(self, model: ModelAnalysis) -> tuple[float, float]:
        """Difference of a model's space-preference score to the first model's, and its standard error."""
        first, subject = self.models[0], self.subject
        slope, error = compare_slopes(
            first.distances, first.ious, model.ious, subject.bin_width, subject.min_bin_objects
        )
        return slope * first.half_diagonal, error * first.half_diagonal

    def _distance_curve(self) -> None:
        curves = [model.curve for model in self.models]
        scores = [model.results["space_preference"]["score"] for model in self.models]
        figure = distance_figure(self.names, curves, scores, self.subject.min_bin_objects)
        caption = "Space preference, after Fig. 1(a) of ReCLIP++. Below: how many objects each bin has."
        self._draw("fig1a_distance", figure, caption)
        edges = curves[0].edges
        rows = [
            (f"{edges[i]:g} to {edges[i + 1]:g}", str(count), *(number(100 * curve.ious[i]) for curve in curves))
            for i, count in enumerate(curves[0].counts)
        ]
        self.page.table(("distance (pixels)", "objects", *(f"IoU (%), {name}" for name in self.names)), rows)

    def _class_ious(self) -> None:
        self.page.heading("IoU by class, before and after")
        class_names = self.subject.class_names
        ious = [model.class_ious(class_names) for model in self.models]
        self._draw("class_iou", class_iou_figure(self.names, ious, class_names), "IoU of each class.")
        pixels = max(int(self.models[0].confusion.sum()), 1)
        shares = [self.models[0].confusion.sum(1), *(model.confusion.sum(0) for model in self.models)]
        rows = [
            (name, *(number(iou[k]) for iou in ious), *(number(100 * share[k] / pixels) for share in shares))
            for k, name in enumerate(class_names)
        ]
        header = (
            "class",
            *(f"IoU, {n}" for n in self.names),
            "% of pixels",
            *(f"% predicted, {n}" for n in self.names),
        )
        self.page.table(header, rows)

    def _preferences(self) -> None:
        found = [model for model in self.models if model.preference is not None]
        if not found:
            return
        self.page.heading("What CLIP prefers: classes and places")
        self.page.paragraph(texts.PREFERENCES)
        for model in found:
            preference = model.preference
            what = preference.source + (f" of {preference.images} images" if preference.images > 1 else "")
            figure = preference_figure(f"{model.name}: {what}", preference, self.subject.class_names)
            caption = f"{model.name}: preference of each class at each place ({what}); beside the name, of the class."
            self._draw(f"preference_{file_part(model.name)}", figure, caption)
            lines = in_words(preference, self.subject.class_names)
            left_out = max(len(lines) - 2 * WORDS, 0)
            if left_out:
                lines = lines[:WORDS] + lines[-WORDS:]
            self.page.items(texts.preference_sentences(preference, lines, left_out))
        for model, (classes, places) in self._agreements():
            self.page.paragraph(
                f"Correlation of {model.name}'s bias logits with {self.names[0]}'s mean soft-max:"
                f" {number(classes, 2)} over the classes, {number(places, 2)} over the places within the classes."
            )

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

    def _logits(self) -> None:
        subject = self.subject
        found = [model for model in self.models if model.parts]
        if not found:
            return
        self.page.heading("Logits taken apart")
        self.page.paragraph(texts.LOGITS)
        for model in found:
            for scene, parts, prediction in zip(subject.scenes, model.parts, model.predictions, strict=True):
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
                caption = f"{model.name}, image {scene.image_id}. Outlined: the class in the {outlined}."
                name = f"fig4_{file_part(model.name)}_{file_part(scene.image_id)}"
                self._draw(name, figure, caption, dpi=80)

    def _scenes(self) -> None:
        scenes = self.subject.scenes
        if not scenes:
            return
        self.page.heading("Predictions")
        figure = scene_figure(
            [scene.image for scene in scenes],
            [scene.truth for scene in scenes],
            {model.name: model.predictions for model in self.models},
            self.subject.class_names,
            self.subject.colors,
            self.subject.ignore_label,
        )
        self._draw(
            "fig5_predictions", figure, "After Fig. 5 of ReCLIP++. The scenes are spread evenly over the data set."
        )

    def _methods(self) -> None:
        subject = self.subject
        self.page.heading("How this was made")
        items = [f"{model.name}: {model.source}" for model in self.models]
        if subject.labelled:
            items.append(texts.OBJECTS.format(area=subject.min_object_area))
            items.append(texts.BINS.format(width=subject.bin_width, objects=subject.min_bin_objects))
        items.append(f"All numbers: {NUMBERS}. The pictures stand beside this page as PNG files.")
        self.page.items(items)

    # ---- files ---------------------------------------------------------------------------------------------

    def _draw(self, name: str, figure: Figure, caption: str, dpi: int = 110) -> None:
        """Save a figure and put it into the page."""
        stem, count = name, 1
        while f"{name}.png" in self.pictures:  # two names that are one as a file name
            count += 1
            name = f"{stem}_{count}"
        self.pictures.append(f"{name}.png")
        self.page.picture(save_figure(figure, self.folder / f"{name}.png", dpi), caption)

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
                "classes": [line._asdict() for line in in_words(model.preference, self.subject.class_names)],
            }
        for other, (classes, places) in self._agreements():
            if other is model:
                entry["correlation_with_mean_soft_max"] = {"classes": classes, "places": places}
        return entry


def _with_error(value: float | None, error: float | None, sign: bool = False) -> str:
    return "–" if number(value) == "–" else f"{number(value, 2, sign)} ± {number(error, 2)}"
