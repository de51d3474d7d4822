"""How long the rest of a suite will take."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reclip_d2.experiments.runs import Planned


class Durations:
    """Seconds that runs took, those of earlier starts of the program among them."""

    def __init__(self, planned: Sequence[Planned]) -> None:
        """
        Args:
            planned: the suite's runs; those that are done say how long they took.
        """
        self._seconds: dict[tuple[str, ...], list[float]] = defaultdict(list)
        for run in planned:
            result = run.folder.result
            if result and not (result["training"] or {}).get("first_iteration"):  # of a resumed run a part is missing
                self.add(run, result["seconds"])

    def add(self, planned: Planned, seconds: float) -> None:
        """Remember how long a run took."""
        for key in self._keys(planned):
            self._seconds[key].append(seconds)

    def estimate(self, planned: Sequence[Planned]) -> float | None:
        """Seconds that these runs will take: as long as others of the same experiment, or of the same config file, or
        of the same kind, whatever is known first; None if nothing is."""
        total = 0.0
        for run in planned:
            known = next((self._seconds[key] for key in self._keys(run) if key in self._seconds), None)
            if known is None:
                return None
            total += statistics.median(known)
        return total

    @staticmethod
    def _keys(planned: Planned) -> list[tuple[str, ...]]:
        """From the most to the least like."""
        experiment = planned.run.experiment
        return [
            ("experiment", experiment.key),
            ("config", experiment.kind, experiment.config),
            ("kind", experiment.kind),
            (),
        ]


def duration_text(seconds: float) -> str:
    """``40 s``, ``12 min`` or ``1 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
