"""Label Studio: pre-annotations of brush masks, https://labelstud.io/guide/predictions."""

from __future__ import annotations

import hashlib
import json
import urllib.parse
from pathlib import Path
from typing import Any, ClassVar
from xml.sax.saxutils import quoteattr

from reclip_d2.formats.classes import MaskClasses
from reclip_d2.formats.prediction import Prediction
from reclip_d2.formats.rle import encode_mask, runs_by_label
from reclip_d2.formats.writer import Spool, Writer, write_json_array
from reclip_d2.utils.io import atomic_write

# Label Studio serves the files of a "local files" storage here; the path follows.
LOCAL_FILES = "/data/local-files/?d="
MODEL_VERSION = "reclip_d2"
_IMAGE, _BRUSH = "image", "brush"  # tags of the labeling configuration


class LabelStudioWriter(Writer):
    """``labelstudio``: ``tasks.json``, one task per image with one brush mask per class, and ``labeling_config.xml``.

    Paste the configuration into the project's settings, then import the tasks: the masks are predictions, which
    annotators accept or correct. Ignored pixels and the background have no mask.
    """

    whole_set: ClassVar[bool] = True

    def __init__(self, output: Path, classes: MaskClasses, *, image_prefix: str = LOCAL_FILES) -> None:
        """
        Args:
            image_prefix: prefix of the image's relative path in a task (percent-encoded): by default that of a
                local-files storage whose root is the images' folder; or the URL of a server.
        """
        super().__init__(output, classes)
        self._image_prefix = image_prefix
        self._tasks = Spool(self.output)

    def close(self) -> None:
        """Free the spool."""
        self._tasks.close()

    def _add(self, prediction: Prediction) -> None:
        shown = set(self.classes.annotated)
        result = [
            self._region(prediction, label, encode_mask(start, end, prediction.labels.size))
            for label, start, end in runs_by_label(prediction.labels, by_column=False)
            if label in shown
        ]
        task = {
            "data": {_IMAGE: self._image_prefix + urllib.parse.quote(str(prediction.path))},
            "predictions": [{"model_version": MODEL_VERSION, "result": result}],
        }
        self._tasks.put(str(prediction.path), json.dumps(task, ensure_ascii=False).encode("utf-8"))

    def _region(self, prediction: Prediction, label: int, rle: bytes) -> dict[str, Any]:
        height, width = prediction.size
        identity = hashlib.sha256(f"{prediction.path}\n{label}".encode()).hexdigest()[:10]
        return {
            "id": identity,
            "from_name": _BRUSH,
            "to_name": _IMAGE,
            "type": "brushlabels",
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "value": {"format": "rle", "rle": list(rle), "brushlabels": [self.classes.names[label]]},
        }

    def finish(self) -> None:
        """Write tasks and configuration."""
        with atomic_write(self.output / "tasks.json") as temporary, open(temporary, "w", encoding="utf-8") as out:
            write_json_array(out, (task.decode("utf-8") for _, task in self._tasks.items()))
        with atomic_write(self.output / "labeling_config.xml") as temporary:
            temporary.write_text(self._configuration(), encoding="utf-8")

    def _configuration(self) -> str:
        names, colors = self.classes.names, self.classes.colors
        labels = "".join(
            f'    <Label value={quoteattr(names[k])} background="#{bytes(colors[k]).hex()}"/>\n'
            for k in self.classes.annotated
        )
        return (
            f'<View>\n  <Image name="{_IMAGE}" value="${_IMAGE}" zoom="true"/>\n'
            f'  <BrushLabels name="{_BRUSH}" toName="{_IMAGE}">\n{labels}  </BrushLabels>\n</View>\n'
        )
