"""A stage's work as numbered files, each of which can be made on its own, in any order and on any machine."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from reclip_d2.utils.work_shard import WorkShard


class WorkParts(Protocol):
    """Blocks of hypotheses, or shards of a feature store. ``WorkShard(number + 1, count)`` is one of them.

    Attributes:
        stage: name in progress events.
        unit: what a step of the progress is, in the singular.
        target: the file or folder that the parts are for; its lock is that of its only maker.
        count: number of parts, made or not.
    """

    stage: str
    unit: str
    target: Path
    count: int

    def problem(self) -> str:
        """Why the parts cannot be made here, such as a full disk; "" if they can."""

    def missing(self) -> list[int]:
        """Numbers of the parts, from 0, whose files are missing or damaged, as the main process sees them."""

    def steps(self, number: int) -> int:
        """Units in a part."""

    def file(self, number: int) -> Path:
        """The file of a part. Its folder's name depends on all that the content depends on."""

    def make(self, part: WorkShard) -> None:
        """Make the missing files that are in ``part``, atomically; called by all processes of a run."""
