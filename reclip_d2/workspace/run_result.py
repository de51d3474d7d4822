"""What a run has made: masks, class shares, problems."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from reclip_d2.workspace.decision import Decision
from reclip_d2.workspace.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class ClassShare:
    """A class's share of the masks.

    Attributes:
        id: id in the masks; 255 for ignored pixels.
        name: name of the class.
        pixels: number of pixels in all masks.
        images: number of masks in which it occurs.
    """

    id: int
    name: str
    pixels: int
    images: int


@dataclasses.dataclass(frozen=True)
class RunResult:
    """The results of a run.

    Attributes:
        folder: the output folder.
        kind: kind of model, a key of :data:`~reclip_d2.workspace.options.TITLES`.
        images: number of images.
        masks: number of images with a mask.
        made: number of masks made by this run; the others existed.
        classes: share of each class in the order of the ids; ignored pixels, if any, come last.
        problems: the reason for each image without a mask, by image id.
        formats: other formats that were written.
        decision: whose masks were kept, and why; None without training.
        lacking: with ``--shard``, number of images of other shards that have no mask yet; there is no summary until all
            have.
    """

    folder: RunFolder
    kind: str
    images: int
    masks: int
    made: int
    classes: tuple[ClassShare, ...]
    problems: Mapping[str, str]
    formats: tuple[str, ...]
    decision: Decision | None = None
    lacking: int = 0

    @property
    def pixels(self) -> int:
        """Number of pixels in all masks."""
        return sum(share.pixels for share in self.classes)

    def kept_shares(self) -> dict[int, float]:
        """Share of each id of :attr:`classes` in the masks: from 0 to 1."""
        return {share.id: share.pixels / max(self.pixels, 1) for share in self.classes}

    def shares(self, kind: str) -> dict[int, float]:
        """Share of each id of :attr:`classes` in the masks of a kind of model that was compared: from 0 to 1.

        Args:
            kind: a key of ``decision.pixels``.
        """
        counts = self.decision.pixels[kind]
        total = max(sum(counts.values()), 1)
        ids = [share.id for share in self.classes]
        # A kept background is the last class; the record has it as ignored.
        found = {label if label in ids else ids[-1]: pixels for label, pixels in _by_id(counts)}
        return {label: found.get(label, 0) / total for label in ids}


def _by_id(counts: Mapping[str, int]) -> list[tuple[int, int]]:
    return [(int(label), pixels) for label, pixels in counts.items()]
