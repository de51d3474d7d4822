"""Event handlers of the page."""

from __future__ import annotations

import functools
import html
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from reclip_d2.app import pictures
from reclip_d2.app.session import BeforeAfter, Session
from reclip_d2.app.tasks import Task, TaskStopped, TaskSuperseded
from reclip_d2.data.image_file import readable_extensions
from reclip_d2.data.image_folder import describe_kinds
from reclip_d2.errors import ReclipError, out_of_memory_message
from reclip_d2.utils.progress import Progress, duration_in_words
from reclip_d2.visualization.scene_figures import telling_classes
from reclip_d2.workspace.child import RunStopped
from reclip_d2.workspace.options import TITLES, in_options

# Fewer images than this get a warning.
_FEW = 100
_MOST_ITERATIONS = 10_000_000


def user_errors(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a handler: user errors become messages on the page; stopped requests leave the page as it is."""

    @functools.wraps(handler)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except TaskSuperseded:
            return gr.skip()
        except TaskStopped:
            gr.Info("Stopped.", duration=4)
            return gr.skip()
        except ReclipError as error:
            message = in_options(str(error))
        except (MemoryError, RuntimeError) as error:
            message = out_of_memory_message(error)
            if message is None:
                raise
        raise gr.Error(html.escape(message, quote=False), duration=15, print_exception=False)

    return wrapper


class Handlers:
    """The page's handlers. Each returns new values of its output components, in their order."""

    def __init__(self, session: Session) -> None:
        self.session = session

    # ---- images -----------------------------------------------------------------------------------------------

    @user_errors
    def upload(self, files: Sequence[str] | None, request: gr.Request) -> list[Any]:
        """Check the uploaded files.

        Returns:
            the usable images, the index of the chosen one, their gallery, suggested iterations, then :meth:`nothing`.
        """
        with self.session.visitors.task(request.session_hash) as task:
            paths, shown, problems = self._look_at([Path(file) for file in files or []], task)
        gallery = gr.update(value=shown, selected_index=0 if len(shown) > 1 else None, visible=len(shown) > 1)
        status = "".join(f"⚠️ {_plain(problem)}\n\n" for problem in problems)
        if paths:
            status += "Press *Segment*."
        iterations = self.session.suggested_iterations(len(paths))
        return [paths, 0, gallery, iterations, *self.nothing(status)]

    def _look_at(self, files: Sequence[Path], task: Task) -> tuple[list[Path], list[np.ndarray], list[str]]:
        """The usable images, their thumbnails, and the problems of the others."""
        paths, shown, problems = [], [], []
        extensions = readable_extensions()
        others = [path for path in files if path.suffix.lower() not in extensions]
        if others:
            problems.append(f"left out: {describe_kinds(others)}")
        for path in others:
            path.unlink(missing_ok=True)
        for path in (path for path in files if path not in others):
            task.check()
            try:
                shown.append(pictures.thumbnail(self.session.read(path)))
            except ReclipError as error:
                problems.append(str(error).replace(f"{path.parent}/", ""))
                path.unlink(missing_ok=True)
            else:
                paths.append(path)
        return paths, shown, problems

    @staticmethod
    def choose(event: gr.SelectData) -> int:
        """Index of the clicked image."""
        return event.index

    # ---- results ----------------------------------------------------------------------------------------------

    @staticmethod
    def nothing(status: str) -> list[Any]:
        """An empty result, with a status."""
        empty = gr.update(value=None)
        return [None, status, empty, "", "", gr.update(value=None, visible=False), gr.update(visible=False),
                gr.update(choices=[], value=None), "", *[empty] * len(pictures.HEAT_MAPS)]  # fmt: skip

    @user_errors
    def segment(self, paths: Sequence[Path], chosen: int, text: str, request: gr.Request) -> list[Any]:
        """Segment the chosen image.

        Returns:
            the result, status, the slider's two pictures and their captions, the legend, the mask file, whether the
            bias is shown, the classes to choose from, then :meth:`bias` of the chosen class.
        """
        if not paths:
            raise ReclipError("there is no image yet: drop one above, or choose an example")
        visitor = request.session_hash
        result = self.session.segment(paths[min(chosen, len(paths) - 1)], text, visitor)
        classes = result.table.mask_classes
        folder = result.mask_file.parent
        if result.after is None:
            left = pictures.write_overlay(folder, "image", result.image, None, classes)
            right = pictures.write_overlay(folder, "before", result.image, result.before, classes)
            words = ("image", "CLIP's own masks")
        else:
            left = pictures.write_overlay(folder, "before", result.image, result.before, classes)
            right = pictures.write_overlay(folder, "after", result.image, result.after, classes)
            words = ("before: CLIP's own masks", "after: bias subtracted")
        legend = pictures.legend_html(classes, result.pixels_before, result.pixels_after, result.classes.background)
        caption = f'<div class="sides"><span>◀ {words[0]}</span><span>{words[1]} ▶</span></div>'
        names = [names[0] for names in result.classes.model_classes]
        first = self._telling_class(result)
        status, bias, can_draw = self._status(result), self._no_bias(), False
        if result.model is not None:
            try:
                bias, can_draw = self._bias(result, first, visitor), True
            except TaskStopped:
                raise
            except ReclipError as error:  # the model has no bias to draw; its masks are fine
                status += f" The bias is not shown: {_plain(error)}."
        return [
            result,
            status,
            (str(left), str(right)),
            caption,
            legend,
            gr.update(value=str(result.mask_file), visible=True),
            gr.update(visible=can_draw),
            gr.update(choices=[(name, place) for place, name in enumerate(names)], value=first),
            *bias,
        ]

    @user_errors
    def bias(self, result: BeforeAfter | None, class_id: int | None, request: gr.Request) -> list[Any]:
        """Text and heat maps of a class's bias."""
        if result is None or class_id is None:
            return self._no_bias()
        if not 0 <= class_id < len(result.classes.model_classes):
            raise ReclipError("this class is not in the list: press Segment")
        return self._bias(result, class_id, request.session_hash)

    def _bias(self, result: BeforeAfter, class_id: int, visitor: str | None) -> list[Any]:
        parts = self.session.bias_parts(result, visitor)
        image = pictures.heat_image(result.image)
        maps = pictures.heat_maps(image, parts, class_id)
        name = result.classes.model_classes[class_id][0]
        share = 100 * float((maps["bias"] > 0).mean())
        text = (
            f"**Red**: CLIP prefers *{_plain(name)}* whatever the image shows; this is subtracted. **Blue**:"
            f" CLIP neglects it. {share:.0f} % of this image is red."
        )
        if result.tiled:
            text += " The image is predicted in tiles, but these maps are computed for the whole image at once."
        drawn = [pictures.draw_heat_map(image, maps[key], title) for key, title in pictures.HEAT_MAPS]
        return [text, *drawn]

    @staticmethod
    def _no_bias() -> list[Any]:
        return ["", *[None] * len(pictures.HEAT_MAPS)]

    @staticmethod
    def _telling_class(result: BeforeAfter) -> int:
        """Index of the class whose pixels change most."""
        after = result.before if result.after is None else result.after
        before, count = result.before.astype(np.int64), len(result.table.mask_classes.names)
        # Pixels of an ignored background before do not count: it is not a class of the masks.
        before = np.where(before < count, before, after)
        return next(iter(telling_classes(before, after, count, 1)), 0)

    def _status(self, result: BeforeAfter) -> str:
        """One or two sentences about the masks."""
        model = result.model
        if model is not None:
            trained = model.trained
            text = f"**After**: {_plain(TITLES[trained.kind])}"
            text += f", {_plain(trained.folder.path)}." if trained is self.session.trained else ", learnt on this page."
            if (decision := trained.decision) is not None:
                text += f" The run {_plain(decision.reason)}."
                if model.keeps_before:
                    text += " The index mask below is of the masks before."
                if decision.warning:
                    text += f" ⚠️ {_plain(decision.warning)}"
            if model.others:
                text += f" It has {model.others} more classes, whose logits are left out."
            return text
        if not self.session.has_models:
            return "These are CLIP's own masks. *Learn the bias* to compare with the masks after."
        return (
            "These are CLIP's own masks: no trained model here has all of these classes. *Learn the bias* for them, or"
            " type the classes of a trained model."
        )

    # ---- learning ---------------------------------------------------------------------------------------------

    @user_errors
    def learn(
        self,
        paths: Sequence[Path],
        text: str,
        iterations: float | None,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> str:
        """Learn the bias from all images; returns the status."""
        if iterations is None or not 1 <= iterations <= _MOST_ITERATIONS:
            raise ReclipError(f"the iterations must be a number from 1 to {_MOST_ITERATIONS:,}")
        start = time.monotonic()
        progress(0, desc="starting")

        def report(event: Progress) -> None:
            if event.total or not event.message:  # counts and new stages
                progress((event.done, event.total) if event.total else 0, desc=event.stage)

        try:
            self.session.learn(paths, text, int(iterations), report, request.session_hash)
        except RunStopped:
            return "Stopped; nothing was learnt."
        count = len(paths)
        few = " It is a poor estimate from so few images." if count < _FEW else ""
        images = "1 image" if count == 1 else f"{count} images"
        return f"Learnt from {images} in {duration_in_words(time.monotonic() - start)}.{few}"

    def stop(self, request: gr.Request) -> None:
        """Stop this page's work."""
        if not self.session.stop(request.session_hash):
            gr.Info("There is nothing to stop.", duration=4)

    def leave(self, request: gr.Request) -> None:
        """Handle a closed page."""
        if request.session_hash:
            self.session.leave(request.session_hash)


def _plain(text: object) -> str:
    """Text with Markdown's special characters escaped."""
    return "".join(f"&#{ord(letter)};" if letter in "\\`*_{}[]<>()#+!|&$~" else letter for letter in str(text))
