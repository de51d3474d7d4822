"""Which masks a run keeps: CLIP's own or the trained model's, and why. Recorded in ``run/decision.json``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from reclip_d2.evaluation.label_free import Verdict
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.json_files import read_json
from reclip_d2.workspace.options import KEEP
from reclip_d2.workspace.run_state import KINDS

_COUNTS = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,5}$"},
    "additionalProperties": {"type": "integer", "minimum": 0},
}
_SCHEMA = {
    "type": "object",
    "required": ["asked", "trained", "kept", "reason", "warning", "scores", "pixels"],
    "additionalProperties": False,
    "properties": {
        "asked": {"enum": list(KEEP)},
        "trained": {"enum": list(KINDS)},
        "kept": {"enum": list(KINDS)},
        "reason": {"type": "string", "maxLength": 10_000},
        "warning": {"type": "string", "maxLength": 10_000},
        "scores": {
            "type": "object",
            "propertyNames": {"enum": list(KINDS)},
            "additionalProperties": {"type": "number"},
        },
        "pixels": {"type": "object", "propertyNames": {"enum": list(KINDS)}, "additionalProperties": _COUNTS},
    },
}


@dataclasses.dataclass(frozen=True)
class Decision:
    """Whose masks a run kept.

    Attributes:
        asked: ``--keep``.
        trained: kind of the model that was trained last.
        kept: kind of the model whose masks were kept.
        reason: one sentence for the user: which masks were kept, and why.
        warning: one sentence if the masks need a second look; "" if not.
        scores: the judge's score of each candidate, higher is better; empty if it was not asked.
        pixels: for each kind that is compared, pixels per mask id in all images, with background names ignored; empty
            if no masks were written.
    """

    asked: str
    trained: str
    kept: str
    reason: str
    warning: str = ""
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    pixels: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> Decision | None:
        """The recorded decision; None if there is none.

        Raises:
            ReclipError: the file is damaged.
        """
        if not file.exists():
            return None
        return cls(**read_json(file, _SCHEMA, "record of the masks that were kept", "remove it, and run again"))

    def write(self, file: Path) -> None:
        """Record the decision."""
        with atomic_write(file) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")


def asked_for(keep: str, trained: str) -> Decision:
    """The decision without a judgement: ``rectified`` or ``maskclip``.

    Args:
        keep: ``--keep``.
        trained: kind of the model that was trained last.
    """
    kept = "maskclip" if keep == "maskclip" else trained
    return Decision(keep, trained, kept, f"kept the masks of {kept}, as --keep {keep} asks")


def judged(verdict: Verdict, trained: str) -> Decision:
    """The decision of a judgement without labels, ``best``.

    Args:
        trained: kind of the model that was trained last.
    """
    return Decision("best", trained, verdict.kept, verdict.reason, verdict.warning or "", dict(verdict.scores))


def total_pixels(coverage: Mapping[str, Mapping[str, int]], kept_background: int | None) -> dict[str, int]:
    """Pixels per mask id in all images, with background names ignored.

    Args:
        coverage: pixels per id, by image id.
        kept_background: mask id of the background names; None if they are ignored.
    """
    total: dict[str, int] = {}
    for counts in coverage.values():
        for label, pixels in counts.items():
            label = "255" if kept_background is not None and int(label) == kept_background else label
            total[label] = total.get(label, 0) + pixels
    return dict(sorted(total.items(), key=lambda item: int(item[0])))


def compared(kinds: Sequence[str]) -> tuple[str, str]:
    """The two kinds whose class shares a summary shows side by side: MaskCLIP and the model that was trained last."""
    return "maskclip", kinds[-1]
