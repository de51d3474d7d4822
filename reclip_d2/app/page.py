"""Layout of the page, and the handler of each event. For the tiny CLIP that ships with the package, examples, too."""

from __future__ import annotations

from html import escape
from pathlib import Path

import gradio as gr
from PIL import Image

from reclip_d2.app.handlers import Handlers
from reclip_d2.app.pictures import HEAT_MAPS
from reclip_d2.app.session import Session, class_text
from reclip_d2.backbones.embedded import EMBEDDED_MODEL_NAME
from reclip_d2.toy.scenes import render_scene
from reclip_d2.toy.worlds import EMBEDDED, EMBEDDED_CLASSES
from reclip_d2.utils.io import atomic_write

TITLE = "ReCLIP++"
CSS = """
footer { display: none !important }
.gradio-container { max-width: 1600px !important; margin: 0 auto !important }
/* Errors have their own message: do not mark the outputs that they leave unchanged. */
[data-testid="status-tracker"]:has(.error) { display: none !important }
#head p, #head h2 { margin: 0 }
#head .faint { color: var(--body-text-color-subdued); font-size: .85rem; overflow-wrap: anywhere }
#status { min-height: 1.6rem }
#gallery .grid-container { grid-template: none / repeat(auto-fill, minmax(84px, 1fr)) !important;
  grid-auto-rows: auto !important }
#learn-help p { font-size: .85rem !important; line-height: 1.35; margin: 0 }
#learn-row { align-items: end }
#learn-status { min-height: 3.4rem }
#learn-status p { font-size: .85rem !important; line-height: 1.35 }
#learn-status .progress-text { font-size: .8rem }
.sides { display: flex; justify-content: space-between; gap: 1rem; font-size: .9rem }
.legend-box { overflow: auto; max-height: 22rem }
.legend-box table { border-collapse: collapse; width: 100%; margin: 0 !important; font-size: .85rem }
.legend-box :is(table, thead, tbody, tr, th, td) { border: none !important }
.legend-box :is(th, td) { padding: .12rem .4rem !important }
.legend-box tr { border-bottom: 1px solid var(--border-color-primary) !important }
.legend-box .number { text-align: right !important; font-variant-numeric: tabular-nums; white-space: nowrap }
.legend-box td:first-child { overflow-wrap: anywhere }
.legend-box tr.absent { opacity: .55 }
.swatch { display: inline-block; width: .9rem; height: .9rem; margin-right: .5rem; vertical-align: -.1rem;
  border: 1px solid rgba(128, 128, 128, .8); border-radius: 2px }
"""
_CLASSES_HELP = (
    "One class per line, synonyms after commas, other queries after semicolons. A line background: lists what else may"
    " be in the images."
)
_LEARN_HELP = (
    "From all images above, without labels, for exactly these classes. The papers use a thousand images or more: from a"
    " few, the estimate is poor, and the masks after may be worse than before."
)
_EXAMPLES = 24
EXAMPLE_CLASSES = "\n".join(EMBEDDED_CLASSES)
# Scenes that are in no split of the embedded data set.
_FIRST_EXAMPLE = 400_000
# Requests of different visitors that run concurrently, each with its image in memory.
_TOGETHER = 8
# The file dialogue offers all images, so that the page can say which ones it cannot read. Browsers do not know HEIC.
_UPLOADS = ["image", ".heic", ".heif", ".hif", ".avif"]


def theme() -> gr.themes.Base:
    """The page's colours, with local fonts: nothing is fetched."""
    return gr.themes.Default(
        primary_hue="blue",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
        spacing_size=gr.themes.sizes.spacing_sm,
    )


def build_page(session: Session) -> gr.Blocks:
    """The page of a session."""
    handlers = Handlers(session)
    with gr.Blocks(title=f"{TITLE}: masks from class names", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(_head(session), elem_id="head")
        paths, chosen, result = gr.State([]), gr.State(0), gr.State(None)
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                files = gr.File(label="Images", file_count="multiple", file_types=_UPLOADS, height=120, elem_id="files")
                gallery = gr.Gallery(
                    label="Shown image", show_label=False, columns=4, height=110, object_fit="cover",
                    fit_columns=False, allow_preview=False, interactive=False, visible=False, buttons=[],
                    elem_id="gallery",
                )  # fmt: skip
                names = gr.Textbox(
                    label="Classes", info=_CLASSES_HELP, lines=5, max_lines=7, value=_first_classes(session),
                    placeholder="road, street\ntree\nperson, pedestrian\nbackground: sky, wall", elem_id="classes",
                )  # fmt: skip
                with gr.Row():
                    segment = gr.Button("Segment", variant="primary", scale=4)
                    halt = gr.Button("Stop", min_width=80)
                with gr.Accordion("Learn the bias", open=True):
                    gr.Markdown(_LEARN_HELP, elem_id="learn-help")
                    with gr.Row(elem_id="learn-row"):
                        iterations = gr.Number(
                            label="Iterations", value=session.default_iterations, minimum=1, precision=0, min_width=90
                        )
                        learn = gr.Button("Learn", min_width=80)
                        stop = gr.Button("Stop", min_width=80)
                    learn_status = gr.Markdown(elem_id="learn-status")
                _examples(session, [files, names])
            with gr.Column(scale=9, min_width=320):
                status = gr.Markdown("Drop images, type class names, and press *Segment*.", elem_id="status")
                with gr.Row():
                    with gr.Column(scale=5, min_width=300):
                        slider = gr.ImageSlider(
                            label="Masks", type="filepath", format="jpeg", max_height=600, show_label=False,
                            interactive=False, buttons=["fullscreen"], elem_id="slider",
                        )  # fmt: skip
                        sides = gr.HTML()
                    with gr.Column(scale=4, min_width=280):
                        legend = gr.HTML(elem_classes="legend-box", elem_id="legend")
                        mask = gr.DownloadButton("Index mask (PNG)", visible=False, size="sm")
                with gr.Column(visible=False) as bias_column:
                    with gr.Row():
                        with gr.Column(scale=2, min_width=200):
                            class_choice = gr.Dropdown(label="Bias of the class", elem_id="class")
                        with gr.Column(scale=5, min_width=280):
                            bias_text = gr.Markdown(elem_id="bias-text")
                    with gr.Row():
                        maps = [
                            gr.Image(
                                label=title, show_label=False, interactive=False, buttons=["download", "fullscreen"],
                                min_width=220, elem_id=f"map-{key}",
                            )
                            for key, title in HEAT_MAPS
                        ]  # fmt: skip

        bias_outputs = [bias_text, *maps]
        outputs = [result, status, slider, sides, legend, mask, bias_column, class_choice, *bias_outputs]
        inputs = [paths, chosen, names]
        together = {"concurrency_limit": _TOGETHER, "concurrency_id": "look"}
        files.change(
            handlers.upload, files, [paths, chosen, gallery, iterations, *outputs], api_name="upload", **together
        )
        segment.click(
            handlers.segment, inputs, outputs, api_name="segment", **together
        )  # before the other users of this handler, which would get its name
        shown = gallery.select(handlers.choose, None, chosen, api_visibility="private", queue=False)
        shown.success(handlers.segment, inputs, outputs, api_visibility="private", **together)
        class_choice.input(handlers.bias, [result, class_choice], bias_outputs, api_name="bias", **together)
        learnt = learn.click(
            handlers.learn, [paths, names, iterations], learn_status, api_name="learn", concurrency_limit=None
        )
        learnt.success(handlers.segment, inputs, outputs, api_visibility="private", **together)
        # Not queued, so that it is never blocked.
        gr.on([stop.click, halt.click], handlers.stop, None, None, api_name="stop", queue=False)
        page.unload(handlers.leave)
    return page


def _head(session: Session) -> str:
    toy = " · a toy model for 12 materials" if session.clip.name == EMBEDDED_MODEL_NAME else ""
    return (
        f"<h2>{TITLE}: masks from class names, with CLIP's bias removed</h2>"
        f'<p class="faint">{escape(session.description)}{toy}</p>'
    )


def _first_classes(session: Session) -> str:
    return "" if session.trained is None else class_text(session.trained.state.classes)


def write_example_scenes(folder: Path, count: int) -> list[Path]:
    """Write scenes of the tiny CLIP's world as JPEGs; always the same ones."""
    paths = [folder / f"scene {number + 1:02d}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        scene = render_scene(EMBEDDED.dataset_seed, _FIRST_EXAMPLE + number)
        with atomic_write(path) as temporary:
            Image.fromarray(scene.image).save(temporary, "JPEG", quality=95)
    return paths


def _examples(session: Session, inputs: list[gr.components.Component]) -> None:
    """Example scenes, for the tiny CLIP only: other CLIPs do not know its world."""
    if session.clip.name != EMBEDDED_MODEL_NAME:
        return
    scenes: list[Path] = write_example_scenes(session.own_folder() / "examples", _EXAMPLES)
    files = [str(path) for path in scenes]
    gr.Examples(
        [[files[:1], EXAMPLE_CLASSES], [files, EXAMPLE_CLASSES]],
        inputs,
        label="Example of the 12 materials",
        example_labels=["one scene", f"{_EXAMPLES} scenes"],
        cache_examples=False,
    )
