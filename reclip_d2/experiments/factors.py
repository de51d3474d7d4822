"""Factors of a suite: variants of several experiments, for two-way tables and claims about them.

A factor ``refinement`` of the experiments ``a`` and ``b`` with the variants ``flip`` and ``pamr`` adds the experiments
``a_flip``, ``a_pamr``, ``b_flip`` and ``b_pamr``. Its ``of`` may name an earlier factor, for all of its experiments.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reclip_d2.experiments.suite import GROUPS, Experiment, Grid
from reclip_d2.experiments.suite_reader import Reader


@dataclass(frozen=True)
class Factor:
    """One change in several variants."""

    variants: Mapping[str, str]
    """Titles by name."""
    experiments: tuple[str, ...]
    """All experiments with one of the variants that this suite has."""
    known: frozenset[str] = field(default_factory=frozenset)
    """Those of other suites too."""


Factors = Mapping[str, Factor]


def read_factors(reader: Reader, known: set[str], experiments: dict[str, Experiment]) -> dict[str, Factor]:
    """The factors of a file. Adds their experiments.

    A variant of an experiment that is trained is trained as well, unless the factor is of the test time alone
    (``test_time: true``): then it evaluates the checkpoint of the experiment itself with other overrides.

    Args:
        known: keys of the file's experiments, whether this suite has them or not.
        experiments: those of this suite.

    Raises:
        ReclipError: an entry is wrong.
    """
    found: dict[str, Factor] = {}
    for key, value in reader.content.get("factors", {}).items():
        where = f"factors: {key}"
        value = reader.entry(value, where, "test_time group", "of variants")
        if key in known:
            raise reader.error(where, "an experiment has the same name")
        group = reader.word(value.get("group", "ours"), GROUPS, where)
        variants = {
            str(name): reader.entry(item, f"{where}: {name}", "", "title overrides")
            for name, item in value["variants"].items()
        }
        names: list[str] = []
        added: set[str] = set()
        for base_key in _bases(reader, value["of"], where, known, found):
            base = experiments.get(base_key)
            for name, item in variants.items():
                own = f"{base_key}_{name}"
                if own in known:
                    raise reader.error(f"{where}: {name}", f"there is an experiment {own}")
                added.add(own)
                if base is None:
                    continue
                names.append(own)
                retested = value.get("test_time", False) and base.kind == "train"
                experiments[own] = dataclasses.replace(
                    base,
                    key=own,
                    title=f"{base.title}, {item['title']}",
                    kind="evaluate" if retested else base.kind,
                    overrides={**base.overrides, **reader.values(item["overrides"])},
                    teacher=base.key if retested else base.teacher,
                    group=group,
                )
        known |= added
        titles = {name: item["title"] for name, item in variants.items()}
        found[key] = Factor(titles, tuple(names), frozenset(added))
    return found


def _bases(reader: Reader, value: Any, where: str, known: set[str], factors: Factors) -> list[str]:
    """Experiments that a list of experiments and factors stands for."""
    if not isinstance(value, list):
        raise reader.error(where, "expected a list of experiments and factors")
    names: dict[str, None] = {}
    for name in value:
        if name in factors:
            own = factors[name]
            names.update(dict.fromkeys([*own.experiments, *sorted(own.known - set(own.experiments))]))
        elif name in known:
            names[name] = None
        else:
            raise reader.error(where, f"{name!r} is neither an experiment nor a factor above it")
    return list(names)


def read_grid(
    reader: Reader, value: Any, where: str, experiments: Mapping[str, Experiment], factors: Factors
) -> Grid | None:
    """A table's ``grid``: experiments (``lines``) times the variants of a factor (``columns``).

    Returns:
        None if this suite has none of the experiments.
    """
    value = reader.entry(value, f"{where}: grid", "base", "lines columns")
    columns = value["columns"]
    if columns not in factors:
        raise reader.error(f"{where}: grid", f"{columns!r} is not a factor")
    factor = factors[columns]
    known = {name for other in factors.values() for name in other.known} | set(reader.content["experiments"])
    keys = [key for key in _bases(reader, value["lines"], f"{where}: grid", known, factors) if key in experiments]
    names = [(key, *(f"{key}_{variant}" for variant in factor.variants)) for key in keys]
    lines = [(experiments[own[0]].title, tuple(name if name in experiments else "" for name in own)) for own in names]
    return Grid((value.get("base", "none"), *factor.variants.values()), tuple(lines)) if lines else None


def expand_claims(reader: Reader, claims: Sequence[Any], where: str, factors: Factors) -> list[Any]:
    """Claims with ``for: {name: values}``, written out for each combination of the values.

    The values are a list, or a factor, for its variants; ``{name}`` in ``better`` and ``worse`` is replaced.
    """
    found: list[Any] = []
    for item in claims:
        if not isinstance(item, dict) or "for" not in item:
            found.append(item)
            continue
        ranges = item["for"]
        if not isinstance(ranges, dict):
            raise reader.error(where, "for: expected NAME: values lines")
        lists = [_values(reader, values, where, factors) for values in ranges.values()]
        for combination in itertools.product(*lists):
            own = {key: value for key, value in item.items() if key != "for"}
            for name, value in zip(ranges, combination, strict=True):
                for side in ("better", "worse"):
                    own[side] = str(own.get(side, "")).replace(f"{{{name}}}", value)
            found.append(own)
    return found


def _values(reader: Reader, values: Any, where: str, factors: Factors) -> list[str]:
    """Values of one name in ``for``."""
    if isinstance(values, str) and values in factors:
        return list(factors[values].variants)
    if isinstance(values, list) and all(isinstance(value, str) for value in values):
        return values
    raise reader.error(where, f"for: expected a list of words or a factor, not {values!r}")
