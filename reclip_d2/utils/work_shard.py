"""``--shard I/N``: one of N parts of a run's work, for machines that share a file system.

Parts depend only on the order of the items, so every process computes the same parts without talking to the others.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import TypeVar

from reclip_d2.errors import ReclipError

Item = TypeVar("Item")
MOST_SHARDS = 100_000


@dataclasses.dataclass(frozen=True)
class WorkShard:
    """Items number I-1, I-1+N, I-1+2N, ... of a list.

    Attributes:
        index: I, from 1 to N.
        count: N.
    """

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> WorkShard:
        """The value of ``--shard``.

        Raises:
            ReclipError: it is not ``I/N`` with I from 1 to N.
        """
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text.strip())
        index, count = map(int, match.groups()) if match else (0, 0)
        if not 1 <= index <= count <= MOST_SHARDS:
            raise ReclipError(
                f"--shard {text[:40]!r}: give I/N, with I from 1 to N and N at most {MOST_SHARDS}, such as 2/8"
            )
        return cls(index, count)

    def holds(self, number: int) -> bool:
        """Whether item ``number``, counted from 0, is in this part."""
        return number % self.count == self.index - 1

    def of(self, items: Sequence[Item]) -> list[Item]:
        """The items of this part, in order."""
        return list(items[self.index - 1 :: self.count])

    @property
    def name(self) -> str:
        """For file names: ``2-of-8``."""
        return f"{self.index}-of-{self.count}"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"
