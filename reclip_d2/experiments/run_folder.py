"""The folder of one run: its settings, result and checkpoints.

::

    DIR/runs/[<data set>[-clipN]/]<experiment>[-seedN]/
        settings.json   everything that the result depends on, written before the run begins
        result.json     written when it is done: metrics, overrides, durations, versions
        failure.txt     why it failed, until the next attempt
        log.txt, output.txt, metrics.json, model_final.pth, ...
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reclip_d2.config import flatten, load_config
from reclip_d2.engine.output_dir import remove_intermediate_checkpoints
from reclip_d2.errors import ReclipError
from reclip_d2.modeling.checkpoint import FINAL_CHECKPOINT
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.json_files import MissingFileError, read_json


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Short hash of a run's settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Differences between the settings that a run was made with and the current ones.

    Keys added to the project since then count as unchanged at their defaults; keys removed since then are ignored.
    """
    defaults: dict[str, Any] | None = None
    found = []
    for key, value in now.items():
        if key in before:
            then = before[key]
        else:
            defaults = defaults or json.loads(json.dumps(flatten(load_config(""))))
            then = defaults.get(key)
        if then != value:
            found.append(f"{key} is {value!r} now and was {then!r}")
    return found


PROBE_FOLDER = "linear_probe"


class ExperimentFolder:
    """Paths and recorded state of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / FINAL_CHECKPOINT
        self.failure_file = path / "failure.txt"
        self._settings = path / "settings.json"
        self._result = path / "result.json"

    @property
    def settings(self) -> dict[str, Any] | None:
        """The settings that the run was started with; None before that."""
        return self._read(self._settings)

    @property
    def result(self) -> dict[str, Any] | None:
        """The result; None if the run is not done."""
        return self._read(self._result)

    @property
    def failure(self) -> str:
        """Why the run failed; "" if it did not."""
        try:
            return self.failure_file.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return ""

    def changes(self, settings: Mapping[str, Any]) -> list[str]:
        """Differences between the run's recorded settings and ``settings``."""
        begun = self.settings
        return [] if begun is None else differences(begun, settings)

    def fingerprint(self, settings: Mapping[str, Any]) -> str:
        """Hash of the settings, or of the recorded ones if they are equivalent."""
        begun = self.settings
        return fingerprint(settings if begun is None or differences(begun, settings) else begun)

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Record the run's settings, and clear an earlier failure.

        Raises:
            ReclipError: there are checkpoints of unknown settings.
        """
        if self.settings is None:
            if self.checkpoint.exists() or any(self.path.glob("*.pth")):
                raise ReclipError(
                    f"{self.path} contains checkpoints of unknown origin: remove them, or name another --out"
                )
            self._write(self._settings, settings)
        self.failure_file.unlink(missing_ok=True)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the result, and remove intermediate checkpoints."""
        self._write(self._result, result)
        for folder in (self.path, self.path / PROBE_FOLDER):
            remove_intermediate_checkpoints(folder)

    def fail(self, message: str) -> None:
        """Record why the run failed."""
        self.path.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.failure_file) as temporary:
            temporary.write_text(message + "\n", encoding="utf-8")

    def clear(self) -> None:
        """Remove the run. It is renamed first, so that a partly removed folder does not count as a run."""
        if self.path.exists():
            removed = Path(tempfile.mkdtemp(prefix=f".removed-{self.path.name}-", dir=self.path.parent))
            self.path.rename(removed / self.path.name)
            shutil.rmtree(removed, ignore_errors=True)

    def drop_checkpoints(self) -> None:
        """Remove all weights, but keep the result."""
        for pattern in ("last_checkpoint", "*.pth"):  # the pointer first, so that it never dangles
            for file in self.path.rglob(pattern):
                file.unlink()

    def _read(self, file: Path) -> dict[str, Any] | None:
        try:
            return read_json(file, {"type": "object"}, "run file", f"remove {self.path} to run it again")
        except MissingFileError:
            return None

    @staticmethod
    def _write(file: Path, content: Mapping[str, Any]) -> None:
        with atomic_write(file) as temporary:
            temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
