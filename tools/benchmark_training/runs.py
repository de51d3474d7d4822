"""Part b: the whole of ``reclip segment`` on generated photographs, by stage, and ``--fast``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tools.benchmark_training.child import measure
from tools.benchmark_training.inputs import Settings, generated_classes, write_photographs


def segment_run(settings: Settings, photographs: int, classes: int, fast: bool = False) -> dict[str, Any]:
    """``reclip segment`` in a fresh process with an empty cache: nothing is left of earlier runs.

    Returns:
        ``seconds`` of the process, ``stages``, ``estimate`` and its ratio to the truth, ``peak_bytes``; with ``fast``
        also ``seconds_per_image`` of the masks.
    """
    size = (96, 128) if settings.quick else (480, 640)
    folder = settings.folder / "segment"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        images = settings.folder / "photographs-{}x{}-{}".format(*size, photographs)
        write_photographs(images, photographs, *size)
        options = {**settings.clip_options, "device": settings.device.type, "fast": fast}
        if settings.quick and not fast:
            options["iterations"] = 4
        figures = measure(
            "segment",
            {
                "images": str(images),
                "classes": str(write_classes(folder, classes)),
                "output": str(folder / "output"),
                "options": options,
            },
            folder,
            {"RECLIP_CACHE": str(folder / "cache")},
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"photographs": photographs, "classes": classes, "fast": fast, **figures}


def write_classes(folder: Path, count: int) -> Path:
    """A class file with ``count`` classes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "classes.txt"
    path.write_text("".join(f"{names[0]}\n" for names in generated_classes(count).classes))
    return path
