"""The model card of a saved model: ``README.md``."""

from __future__ import annotations

from detectron2.config import CfgNode

from reclip_d2.data.class_file import ClassList
from reclip_d2.workspace.options import TITLES

_HEAD = """\
---
library_name: reclip_d2
pipeline_tag: image-segmentation
tags:
- semantic-segmentation
- unsupervised
- clip
- reclip
---

# {title}

Semantic segmentation of {count} classes, by ReCLIP++ (reclip_d2): no labels were used.

```python
from reclip_d2 import Segmenter

model = Segmenter.from_pretrained("THIS REPOSITORY OR FOLDER")
result = model("photo.jpg")  # result.labels, result.overlay(), result.classes
```

## Classes

{classes}

## Model

{model}

## Licence

The weights of CLIP are not part of these files: they are downloaded from their publisher, under the publisher's
licence. The licence of this model depends on that licence and on the training images; no claim is made about either.
Add the licence that applies.
"""
_HOW = {
    "maskclip": "CLIP's own masks (MaskCLIP), without training.",
    "calibrated": "CLIP's own masks (MaskCLIP) with an offset per class, which gives them the class shares estimated on"
    " unlabelled images; no network was trained.",
    "rectified": "CLIP with rectified class-preference and space-preference bias, learned from unlabelled images"
    " (ReCLIP++).",
    "student": "A student of ReCLIP++, distilled on unlabelled images. It runs without CLIP.",
}


def model_card(kind: str, classes: ClassList, clip: str, pretrained: str, cfg: CfgNode) -> str:
    """The text of the card: the model, its training, and a note on licences.

    Args:
        kind: a key of :data:`~reclip_d2.workspace.options.TITLES`.
        cfg: the model's config.
    """
    names = [f"{number}. {_plain(entry)}" for number, entry in enumerate(classes.entries)]
    if classes.background:
        names.append(f"\nBackground: {_plain(', '.join(classes.background))}")
    lines = [_HOW[kind], "", f"- CLIP: `{clip}`, weights `{pretrained}`"]
    if kind in ("rectified", "student"):
        lines += [
            f"- iterations: {cfg.SOLVER.MAX_ITER:,}, {cfg.SOLVER.IMS_PER_BATCH} images each",
            f"- hypotheses: `{cfg.HYPOTHESIS.METHOD}`",
        ]
    lines.append(f"- prompt templates: `{cfg.MODEL.CLIP.TEMPLATES}`")
    return _HEAD.format(
        title=TITLES[kind], count=len(classes.classes), classes="\n".join(names), model="\n".join(lines)
    )


def _plain(text: str) -> str:
    """Escape text for Markdown."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>#|!~" else letter for letter in text)
