"""Entries of a suite file, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from reclip_d2.errors import ReclipError


class Reader:
    """Entries of one file for one suite; errors name the file and the entry."""

    def __init__(self, file: Path, content: Mapping[str, Any], name: str) -> None:
        self.file = file
        self.content = content
        self.name = name

    def error(self, where: str, message: str) -> ReclipError:
        """An error at an entry of the file."""
        return ReclipError(f"suite file {self.file}: {where}: {message}")

    def entry(self, value: Any, where: str, allowed: str, required: str = "") -> dict[str, Any]:
        """Check that a mapping has all ``required`` and otherwise only ``allowed`` keys (space-separated names)."""
        if not isinstance(value, dict):
            raise self.error(where, "expected KEY: value lines")
        unknown = [key for key in value if key not in (*allowed.split(), *required.split())]
        missing = [key for key in required.split() if key not in value]
        if unknown or missing:
            what = f"unknown key {unknown[0]!r}" if unknown else f"no {missing[0]!r}"
            raise self.error(where, f"{what}; keys are {', '.join((*required.split(), *allowed.split()))}")
        return value

    def word(self, value: Any, words: Iterable[str], where: str) -> str:
        """Check that a value is one of some words."""
        if value not in words:
            raise self.error(where, f"{value!r} is not one of {', '.join(words)}")
        return value

    def for_suite(self, value: Any) -> Any:
        """A value, or from a mapping of suites to values this suite's (else ``default``, else None)."""
        return value.get(self.name, value.get("default")) if isinstance(value, dict) else value

    def applies(self, value: Mapping[str, Any]) -> bool:
        """Whether an entry with ``suites`` applies to this suite."""
        return self.name in value.get("suites", [self.name])

    def values(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Overrides that this suite has a value of."""
        values = {key: self.for_suite(value) for key, value in overrides.items()}
        return {key: value for key, value in values.items() if value is not None}
