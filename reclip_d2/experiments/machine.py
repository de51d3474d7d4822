"""What a result was measured with: versions and machine, for reports."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import detectron2
import numpy as np
import open_clip
import torch

import reclip_d2


def versions() -> dict[str, str]:
    """Versions by name, Python's first."""
    return {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "detectron2": detectron2.__version__,
        "numpy": np.__version__,
        "reclip_d2": reclip_d2.__version__,
    }


def machine(device: str) -> str:
    """The machine in words; with a GPU for ``device`` that, too."""
    words = f"{os.cpu_count()} CPU cores ({_cpu_name()})"
    return f"{words}, {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else words


def _cpu_name() -> str:
    """Model of the CPU, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.machine()
