"""The YAML file that lists suites.

It is loaded safely and checked before anything runs; the comments of ``configs/ablations/paper.yaml`` explain its
entries.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reclip_d2.config import load_config, read_yaml
from reclip_d2.errors import ReclipError
from reclip_d2.experiments.suite import (
    GROUPS,
    KINDS,
    METRICS,
    Claim,
    Condition,
    Curve,
    Experiment,
    Row,
    Suite,
    Table,
    value_of,
)


class Sweep(NamedTuple):
    """One experiment with several values of one key."""

    title: str
    key: str
    symbol: str
    points: tuple[str, ...]
    """Experiments, in the order of their values."""


Sweeps = Mapping[str, Sweep]


class _Reader:
    """Entries of one file for one suite; errors name the file and the entry."""

    def __init__(self, file: Path, content: Mapping[str, Any], name: str) -> None:
        self.file = file
        self.content = content
        self.name = name

    def error(self, where: str, message: str) -> ReclipError:
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
        if value not in words:
            raise self.error(where, f"{value!r} is not one of {', '.join(words)}")
        return value

    def for_suite(self, value: Any) -> Any:
        """A value, or from a mapping of suites to values this suite's (else ``default``, else None)."""
        return value.get(self.name, value.get("default")) if isinstance(value, dict) else value

    def applies(self, value: Mapping[str, Any]) -> bool:
        """Whether an entry with ``suites`` applies to this suite."""
        return self.name in value.get("suites", [self.name])


def suite_names(file: Path) -> list[str]:
    """Suites in a file."""
    return list(_read(file)["suites"])


def load_suite(file: Path, name: str, tables: Sequence[str] | None = None) -> Suite:
    """Load the suite ``name`` from a suite file.

    Args:
        tables: keys of the requested tables; None for all.

    Raises:
        ReclipError: the file is missing or wrong, or has no such suite or table.
    """
    content = _read(file)
    if name not in content["suites"]:
        raise ReclipError(f"suite {name!r} is not in {file}: choose one of {', '.join(content['suites'])}")
    reader = _Reader(file, content, name)
    settings = reader.entry(content["suites"][name], f"suites: {name}", "paper text clip_seeds seconds", "dataset")
    known, experiments = _experiments(reader)
    conditions = _conditions(reader, settings)
    methods = (file.parent / content["methods"]).resolve()
    sweeps = _sweeps(reader, experiments, conditions, methods)
    known |= {point for sweep in sweeps.values() for point in sweep.points}
    found = [_table(reader, key, value, known, experiments, sweeps) for key, value in content["tables"].items()]
    chosen = tuple(table for table in found if table is not None)
    if tables is not None:
        by_key = {table.key.lower(): table for table in chosen}
        unknown = [key for key in tables if key.lower() not in by_key]
        if unknown:
            raise ReclipError(
                f"suite {name} has no table {unknown[0]!r}: choose from {', '.join(table.key for table in chosen)}"
            )
        wanted = {key.lower() for key in tables}
        chosen = tuple(table for table in chosen if table.key.lower() in wanted)
    return Suite(
        name=name,
        file=file,
        conditions=conditions,
        methods=methods,
        paper_columns=tuple(settings.get("paper", ())),
        text=" ".join(str(settings.get("text", "")).split()),
        common=_values(reader, content.get("common", {})),
        experiments=experiments,
        tables=chosen,
        seconds=_seconds(reader, settings.get("seconds", {})),
    )


def _read(file: Path) -> dict[str, Any]:
    content = read_yaml(file, "suite file")
    if not isinstance(content, dict):
        raise ReclipError(f"suite file {file} contains no suites: see configs/ablations/paper.yaml")
    content = _Reader(file, {}, "").entry(content, "top", "common sweeps", "suites methods experiments tables")
    if not isinstance(content["methods"], str):
        raise ReclipError(f"suite file {file}: methods: expected a folder")
    for key, value in content.items():
        if key != "methods" and not isinstance(value, dict):
            raise ReclipError(f"suite file {file}: {key}: expected KEY: value lines")
    return content


def _conditions(reader: _Reader, settings: Mapping[str, Any]) -> tuple[Condition, ...]:
    """Every data set with every CLIP, the CLIPs of the configs first."""
    where = f"suites: {reader.name}"
    names, seeds = settings["dataset"], settings.get("clip_seeds", [0])
    names = names if isinstance(names, list) else [names]
    if not names or not all(isinstance(name, str) for name in names):
        raise reader.error(where, "dataset: expected a config file, or a list of them")
    whole = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not whole or seeds[:1] != [0] or len(set(seeds)) < len(seeds):
        raise reader.error(where, "clip_seeds: expected a list of different whole numbers that begins with 0")
    several = len(names) * len(seeds) > 1
    return tuple(Condition((reader.file.parent / name).resolve(), seed, several) for seed in seeds for name in names)


def _seconds(reader: _Reader, value: Any) -> dict[str, float]:
    """Seconds by config file, kind or experiment."""
    where = f"suites: {reader.name}: seconds"
    numbers = value.values() if isinstance(value, dict) else [value]
    if not isinstance(value, dict) or not all(isinstance(number, int | float) and number > 0 for number in numbers):
        raise reader.error(where, "expected NAME: number lines")
    return value


def _values(reader: _Reader, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides that this suite has a value of."""
    values = {key: reader.for_suite(value) for key, value in overrides.items()}
    return {key: value for key, value in values.items() if value is not None}


def _experiments(reader: _Reader) -> tuple[set[str], dict[str, Experiment]]:
    """Keys of all experiments, and those of this suite."""
    found: dict[str, Experiment] = {}
    for key, value in reader.content["experiments"].items():
        where = f"experiments: {key}"
        optional = "config overrides take teacher seeded group suites"
        value = reader.entry(value, where, optional, "title kind")
        if not reader.applies(value):
            continue
        kind = reader.word(value["kind"], KINDS, where)
        config, teacher = value.get("config", ""), value.get("teacher", "")
        if teacher and teacher not in found:
            raise reader.error(where, f"its teacher {teacher!r} must be an experiment listed above it")
        if kind == "probe":
            if config or not teacher:
                raise reader.error(where, "a probe takes its teacher's config: name a teacher and no config")
            config = found[teacher].config
        elif not config:
            raise reader.error(where, "no 'config'")
        inherited = found[teacher] if kind == "probe" else None
        overrides = _values(reader, value.get("overrides", {}))
        found[key] = Experiment(
            key=key,
            title=value["title"],
            kind=kind,
            config=config,
            overrides={
                **(inherited.overrides if inherited else {}),
                **overrides,
            },
            take={
                **(inherited.take if inherited else {}),
                **{file: tuple(keys) for file, keys in value.get("take", {}).items()},
            },
            teacher=teacher,
            seeded=value.get("seeded", True),
            group=reader.word(value.get("group", "paper"), GROUPS, where),
        )
    return set(reader.content["experiments"]), found


def _sweeps(
    reader: _Reader, experiments: dict[str, Experiment], conditions: Sequence[Condition], methods: Path
) -> Sweeps:
    """The sweeps of the file. Adds an experiment for each value other than the base's."""
    datasets = list(dict.fromkeys(condition.dataset for condition in conditions))
    found = {}
    for key, value in reader.content.get("sweeps", {}).items():
        where = f"sweeps: {key}"
        value = reader.entry(value, where, "suites", "title base key symbol values")
        if not reader.applies(value):
            continue
        base = experiments.get(value["base"])
        if base is None:
            raise reader.error(where, f"its base {value['base']!r} is not an experiment of suite {reader.name}")
        own = base.overrides.get(value["key"])
        if own is None:
            files = [[str(dataset), str(methods / base.config)] for dataset in datasets]
            own, *others = (value_of(load_config(pair), value["key"]) for pair in files)
            if any(other != own for other in others):
                raise reader.error(where, f"the data sets differ in {value['key']} of its base {base.key}")
        points = {own: base.key}
        for number in reader.for_suite(value["values"]) or []:
            if math.isclose(number, own, rel_tol=1e-3, abs_tol=1e-9):
                continue
            point = points[number] = f"{key}_{len(points)}"
            experiments[point] = dataclasses.replace(
                base,
                key=point,
                title=f"{base.title}, {value['symbol']} = {number:.3g}",
                overrides={**base.overrides, value["key"]: number},
            )
        found[key] = Sweep(value["title"], value["key"], value["symbol"], tuple(points[x] for x in sorted(points)))
    return found


def _table(
    reader: _Reader,
    key: str,
    value: Any,
    known: set[str],
    experiments: Mapping[str, Experiment],
    sweeps: Sweeps,
) -> Table | None:
    """A table with the rows that this suite has; None if it has none of them."""
    where = f"tables: {key}"
    value = reader.entry(value, where, "text metrics rows claims curves chart main suites", "title")
    if not reader.applies(value):
        return None
    metrics = tuple(reader.word(metric, METRICS, where) for metric in value.get("metrics", ["mIoU"]))

    def here(name: str) -> bool:
        if name not in known:
            raise reader.error(where, f"{name!r} is not an experiment")
        return name in experiments

    rows = []
    for item in value.get("rows", []):
        item = reader.entry(item, where, "title paper", "experiment")
        name = item["experiment"]
        if here(name):
            paper = _paper(reader, item.get("paper", {}), metrics, where)
            rows.append(Row(name, item.get("title", experiments[name].title), paper))
    curves = []
    for item in value.get("curves", []):
        item = reader.entry(item, where, "label line line_title", "sweep")
        if item["sweep"] not in sweeps:
            raise reader.error(where, f"{item['sweep']!r} is not a sweep")
        sweep = sweeps[item["sweep"]]
        line = item.get("line", "")
        if line and not here(line):
            line = ""
        curves.append(Curve(*sweep, item.get("label", ""), line, item.get("line_title", "")))
        shown = {row.experiment for row in rows}
        rows += [Row(name, experiments[name].title) for name in (line, *sweep.points) if name and name not in shown]
    claims = []
    for item in value.get("claims", []):
        claims += _claims(reader, item, where, here, sweeps)
    if not rows:
        return None
    return Table(
        key=key,
        title=value["title"],
        text=" ".join(str(value.get("text", "")).split()),
        metrics=metrics,
        rows=tuple(rows),
        claims=tuple(claims),
        curves=tuple(curves),
        chart=bool(value.get("chart", False)),
        main=bool(value.get("main", False)),
    )


def _paper(reader: _Reader, value: Any, metrics: Sequence[str], where: str) -> dict[str, dict[str, float | None]]:
    """``{data set: number}`` for a single metric, or ``{metric: {data set: number}}``."""
    if len(metrics) == 1:
        value = {metrics[0]: value}
    for metric, numbers in value.items():
        reader.word(metric, metrics, where)
        for column, number in numbers.items():
            if number is not None and not isinstance(number, int | float):
                raise reader.error(where, f"{column}: {number!r} is not a number (write ~ for an illegible one)")
    return value


def _claims(
    reader: _Reader,
    item: Any,
    where: str,
    here: Callable[[str], bool],
    sweeps: Sweeps,
) -> list[Claim]:
    """One claim, or for ``<sweep>.each`` one per point; none if this suite lacks one of the two experiments."""
    item = reader.entry(item, where, "metric explanation", "better worse source")

    def resolve(name: str) -> list[str]:
        sweep, dot, which = name.partition(".")
        if not dot:
            return [name] if here(name) else []
        if sweep not in sweeps:
            raise reader.error(where, f"{sweep!r} is not a sweep")
        points = sweeps[sweep].points
        which = reader.word(which, ("first", "last", "each"), where)
        return {"first": [points[0]], "last": [points[-1]], "each": list(points)}[which]

    return [
        Claim(
            better,
            worse,
            reader.word(item.get("metric", "mIoU"), METRICS, where),
            item["source"],
            " ".join(str(item.get("explanation", "")).split()),
        )
        for better in resolve(item["better"])
        for worse in resolve(item["worse"])
        if better != worse
    ]
