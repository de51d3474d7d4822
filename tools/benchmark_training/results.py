"""The figures of a benchmark as a JSON file: kept from run to run, and written after each measurement."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from reclip_d2.errors import ReclipError
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.measuring import machine

FORMAT = "reclip_d2 training benchmark 1"
QUIET_LOAD = 0.5
"""Load average above which a machine is busy."""


class Results:
    """Figures by name, such as ``a/voc20``, each with the number of the run that measured it.

    Attributes:
        runs: for each call of the program its command, time, machine, and load average at the start.
        figures: by name.
    """

    def __init__(self, path: Path | None, device: torch.device, quick: bool) -> None:
        """
        Args:
            path: the file; None to keep the figures in memory only.
            device, quick: settings that all figures of a file share.

        Raises:
            ReclipError: the file is no benchmark, or one with other settings.
        """
        self.path = path
        self.settings = {"device": device.type, "quick": quick}
        self.runs: list[dict[str, Any]] = []
        self.figures: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            self._read(path)
        self.runs.append(
            {
                "command": sys.argv[1:],
                "began": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
                "load": os.getloadavg()[0],
                **machine(device),
            }
        )

    def _read(self, path: Path) -> None:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise ValueError
            settings, self.runs, self.figures = data["settings"], data["runs"], data["figures"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ReclipError(f"{path} holds no figures of this benchmark: give another file, or --fresh") from error
        if settings != self.settings:
            raise ReclipError(
                f"{path} was measured with {settings}, not {self.settings}: give another file, or --fresh"
            )

    def add(self, name: str, figures: dict[str, Any]) -> None:
        """Keep figures, and write the file."""
        self.figures[name] = {**figures, "run": len(self.runs) - 1}
        if self.path is not None:
            data = {"format": FORMAT, "settings": self.settings, "runs": self.runs, "figures": self.figures}
            with atomic_write(self.path) as temporary:
                temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    def drop(self, names: list[str]) -> None:
        """Forget figures, to measure them again."""
        for name in names:
            self.figures.pop(name, None)

    def of_part(self, part: str) -> dict[str, dict[str, Any]]:
        """Figures of a part, by the rest of their names."""
        return {
            name.partition("/")[2]: figures for name, figures in self.figures.items() if name.startswith(f"{part}/")
        }

    def busy_runs(self) -> list[dict[str, Any]]:
        """Runs with figures that began on a busy machine."""
        used = {figures["run"] for figures in self.figures.values()}
        return [self.runs[number] for number in sorted(used) if self.runs[number]["load"] > QUIET_LOAD]
