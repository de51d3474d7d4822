"""The folder of one run: what it was begun with, its checkpoints, its result or why it failed.

::

    DIR/runs/<experiment>[-seedN]/
        settings.json   all that the result depends on, written before the run begins
        result.json     written when it is done: metrics, overrides, durations, versions
        failure.txt     why it failed, until it is tried again
        log.txt, output.txt, metrics.json, model_final.pth, ...
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reclip_d2.engine.checkpoint import FINAL_CHECKPOINT, remove_intermediate_checkpoints
from reclip_d2.errors import ReclipError
from reclip_d2.experiments.resolve import differences, fingerprint
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.json_files import MissingFileError, read_json

PROBE_FOLDER = "linear_probe"


class RunFolder:
    """Paths and memory of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / FINAL_CHECKPOINT
        self.failure_file = path / "failure.txt"
        self._settings = path / "settings.json"
        self._result = path / "result.json"

    @property
    def settings(self) -> dict[str, Any] | None:
        """What the run was begun with; None before that."""
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
        """What differs between the settings that the run was begun with and ``settings``."""
        begun = self.settings
        return [] if begun is None else differences(begun, settings)

    def fingerprint(self, settings: Mapping[str, Any]) -> str:
        """Hash of the settings; of those that it was begun with where these amount to the same."""
        begun = self.settings
        return fingerprint(settings if begun is None or differences(begun, settings) else begun)

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Remember what the run is made with, and forget an earlier failure.

        Raises:
            ReclipError: there are checkpoints, and nothing says what they were made with.
        """
        if self.settings is None:
            if self.checkpoint.exists() or any(self.path.glob("*.pth")):
                raise ReclipError(
                    f"{self.path} holds checkpoints of another origin: remove them, or name another --out"
                )
            self._write(self._settings, settings)
        self.failure_file.unlink(missing_ok=True)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Keep the result; checkpoints from before the end are removed."""
        self._write(self._result, result)
        for folder in (self.path, self.path / PROBE_FOLDER):
            remove_intermediate_checkpoints(folder)

    def fail(self, message: str) -> None:
        """Keep why the run failed."""
        self.path.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.failure_file) as temporary:
            temporary.write_text(message + "\n", encoding="utf-8")

    def clear(self) -> None:
        """Remove the run. It is renamed first: nothing half removed is taken for a run."""
        if self.path.exists():
            removed = Path(tempfile.mkdtemp(prefix=f".removed-{self.path.name}-", dir=self.path.parent))
            self.path.rename(removed / self.path.name)
            shutil.rmtree(removed, ignore_errors=True)

    def drop_checkpoints(self) -> None:
        """Remove all weights; the result stays."""
        for pattern in ("last_checkpoint", "*.pth"):  # the pointer first: it never points to nothing
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
