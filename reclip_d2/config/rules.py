"""Rules for the values of keys. ``str(rule)`` completes the sentence "KEY must be ...".

A rule applies to a single value; :mod:`reclip_d2.config.checks` has rules across keys.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

# Maximum length of a text, in characters: that of a path on Linux.
MAX_TEXT = 4096
# Largest whole number, for keys without a smaller limit.
MAX_WHOLE = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Flag:
    """True or False."""

    def accepts(self, value: Any) -> bool:
        return isinstance(value, bool)

    def __str__(self) -> str:
        return "True or False"


@dataclasses.dataclass(frozen=True)
class Whole:
    """A whole number from ``minimum`` to ``maximum``, inclusive."""

    minimum: int = 0
    maximum: int = MAX_WHOLE
    odd: bool = False
    also: int | None = None
    """Another valid number, such as 0 for "off"."""

    def accepts(self, value: Any) -> bool:
        if not isinstance(value, int) or isinstance(value, bool):
            return False
        return value == self.also or (self.minimum <= value <= self.maximum and not (self.odd and value % 2 == 0))

    def __str__(self) -> str:
        kind = "an odd whole number" if self.odd else "a whole number"
        also = "" if self.also is None else f", or {self.also}"
        return f"{kind} from {self.minimum} to {self.maximum}{also}"


@dataclasses.dataclass(frozen=True)
class Number:
    """A finite number, whole or not.

    Attributes:
        minimum, maximum: inclusive limits.
        above, below: exclusive limits.
        also: another valid number, such as 0 for "off".
        infinite: whether infinity is valid.
    """

    minimum: float = -math.inf
    maximum: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    also: float | None = None
    infinite: bool = False

    def accepts(self, value: Any) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        try:
            value = float(value)
        except OverflowError:
            return False
        if value == self.also or (self.infinite and value == math.inf):
            return True
        return math.isfinite(value) and self.minimum <= value <= self.maximum and self.above < value < self.below

    def __str__(self) -> str:
        limits = (
            ("of at least", self.minimum),
            ("above", self.above),
            ("at most", self.maximum),
            ("below", self.below),
        )
        words = " and ".join(f"{word} {limit:g}" for word, limit in limits if math.isfinite(limit))
        also = "" if self.also is None else f", or {self.also:g}"
        return f"a {'' if self.infinite else 'finite '}number {words}".strip() + also


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several values; types are compared, too."""

    values: tuple[str | int | bool, ...]

    def accepts(self, value: Any) -> bool:
        return any(type(value) is type(choice) and value == choice for choice in self.values)

    def __str__(self) -> str:
        shown = ["''" if value == "" and isinstance(value, str) else str(value) for value in self.values]
        return f"one of {', '.join(shown)}" if len(shown) > 1 else shown[0]


@dataclasses.dataclass(frozen=True)
class Text:
    """A text without control characters.

    Attributes:
        empty: whether "" is valid.
        path: whether it may be the path of a local file.
        folder: whether it is the path of an output folder.
    """

    empty: bool = False
    path: bool = False
    folder: bool = False

    def accepts(self, value: Any) -> bool:
        if not isinstance(value, str) or len(value) > MAX_TEXT or re.search(r"[\x00-\x1f\x7f]", value):
            return False
        if self.folder and ("://" in value or not _is_utf8(value)):
            return False
        return self.empty or bool(value.strip())

    def __str__(self) -> str:
        words = "the path of a local folder" if self.folder else "a text"
        return f"{words} of at most {MAX_TEXT} characters{'' if self.empty else ', not empty'}"


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Device:
    """A supported device."""

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and re.fullmatch(r"cpu|cuda(:\d{1,3})?", value) is not None

    def __str__(self) -> str:
        return "cpu, cuda or cuda:N with the number of a GPU"


@dataclasses.dataclass(frozen=True)
class Items:
    """A list or tuple whose items obey one rule.

    Attributes:
        item: rule for each item.
        minimum, maximum: limits on the number of items, inclusive.
    """

    item: Rule
    minimum: int = 0
    maximum: int = 100_000

    def accepts(self, value: Any) -> bool:
        if not isinstance(value, list | tuple) or not self.minimum <= len(value) <= self.maximum:
            return False
        return all(self.item.accepts(item) for item in value)

    def __str__(self) -> str:
        if self.minimum == self.maximum:
            count = f"of {self.minimum} items"
        elif self.minimum:
            count = f"of at least {self.minimum} item{'s' if self.minimum > 1 else ''}"
        else:
            count = "of any length"
        return f"a list {count}, each {self.item}"


@dataclasses.dataclass(frozen=True)
class Fields:
    """A list with a rule for each position."""

    items: tuple[Rule, ...]

    def accepts(self, value: Any) -> bool:
        if not isinstance(value, list | tuple) or len(value) != len(self.items):
            return False
        return all(rule.accepts(item) for rule, item in zip(self.items, value, strict=True))

    def __str__(self) -> str:
        return f"a list of {', '.join(map(str, self.items))}"


@dataclasses.dataclass(frozen=True)
class Maybe:
    """None, or a value that obeys another rule."""

    rule: Rule

    def accepts(self, value: Any) -> bool:
        return value is None or self.rule.accepts(value)

    def __str__(self) -> str:
        return f"None or {self.rule}"


Rule = Flag | Whole | Number | Choice | Text | Device | Items | Fields | Maybe


def shown(value: Any) -> str:
    """A value for a message, shortened if it is long."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:60]} ... {text[-15:]}"


def problem_of(rule: Rule, value: Any) -> str | None:
    """What is wrong with a value, to follow its key in a message; None if it is valid."""
    if rule.accepts(value):
        return None
    if isinstance(rule, Choice) and len(rule.values) > 1:
        return f"is {shown(value)}; choose {rule}"
    return f"is {shown(value)}; it must be {rule}"


def coerced(value: Any, default: Any) -> Any:
    """Convert a value to the type of its default: between list and tuple, and from whole numbers to floats."""
    if isinstance(value, list | tuple) and isinstance(default, list | tuple):
        return type(default)(value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        return float(value)
    return value
