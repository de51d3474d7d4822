"""The YAML file that lists suites.

It is loaded safely and checked before anything runs; the comments of ``configs/ablations/paper.yaml`` explain its
entries.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reclip_d2.config import load_config, read_yaml
from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.matching import MATCHINGS
from reclip_d2.experiments.factors import Factors, expand_claims, read_factors, read_grid
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
from reclip_d2.experiments.suite_reader import Reader


class Sweep(NamedTuple):
    """One experiment with several values of one key."""

    title: str
    key: str
    symbol: str
    points: tuple[str, ...]
    """Experiments, in the order of their values."""


Sweeps = Mapping[str, Sweep]


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
    reader = Reader(file, content, name)
    settings = reader.entry(content["suites"][name], f"suites: {name}", "paper text clip_seeds seconds also", "dataset")
    if "also" in settings:
        _add_file(reader, settings["also"])
    known, experiments = _experiments(reader)
    factors = read_factors(reader, known, experiments)
    conditions = _conditions(reader, settings)
    methods = (file.parent / content["methods"]).resolve()
    sweeps = _sweeps(reader, experiments, conditions, methods)
    known |= {point for sweep in sweeps.values() for point in sweep.points}
    found = [
        _table(reader, key, value, known, experiments, sweeps, factors)
        for key, value in reader.content["tables"].items()
    ]
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
        common=reader.values(content.get("common", {})),
        experiments=experiments,
        tables=chosen,
        seconds=_seconds(reader, settings.get("seconds", {})),
    )


def _read(file: Path) -> dict[str, Any]:
    content = read_yaml(file, "suite file")
    if not isinstance(content, dict):
        raise ReclipError(f"suite file {file} contains no suites: see configs/ablations/paper.yaml")
    content = Reader(file, {}, "").entry(content, "top", "common factors sweeps", "suites methods experiments tables")
    if not isinstance(content["methods"], str):
        raise ReclipError(f"suite file {file}: methods: expected a folder")
    for key, value in content.items():
        if key != "methods" and not isinstance(value, dict):
            raise ReclipError(f"suite file {file}: {key}: expected KEY: value lines")
    return content


def _add_file(reader: Reader, name: Any) -> None:
    """Add the experiments, factors, sweeps and tables of another suite file, for the entry ``also``.

    Raises:
        ReclipError: the two define a name differently, or have other methods or common overrides.
    """
    where = f"suites: {reader.name}: also"
    if not isinstance(name, str):
        raise reader.error(where, "expected a suite file")
    other = _read(reader.file.parent / name)
    content = dict(reader.content)
    for section in ("methods", "common"):
        if other.get(section) != content.get(section):
            raise reader.error(where, f"{name} has other {section}")
    for section in ("experiments", "factors", "sweeps", "tables"):
        own, added = content.get(section, {}), other.get(section, {})
        if different := [key for key in added if key in own and own[key] != added[key]]:
            raise reader.error(where, f"{section}: {different[0]} is another in {name}")
        content[section] = {**own, **added}
    reader.content = content


def _conditions(reader: Reader, settings: Mapping[str, Any]) -> tuple[Condition, ...]:
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


def _seconds(reader: Reader, value: Any) -> dict[str, float]:
    """Seconds by config file, kind or experiment."""
    where = f"suites: {reader.name}: seconds"
    numbers = value.values() if isinstance(value, dict) else [value]
    if not isinstance(value, dict) or not all(isinstance(number, int | float) and number > 0 for number in numbers):
        raise reader.error(where, "expected NAME: number lines")
    return value


def _experiments(reader: Reader) -> tuple[set[str], dict[str, Experiment]]:
    """Keys of all experiments, and those of this suite."""
    found: dict[str, Experiment] = {}
    for key, value in reader.content["experiments"].items():
        where = f"experiments: {key}"
        optional = "config overrides take teacher seeded group match suites"
        value = reader.entry(value, where, optional, "title kind")
        if not reader.applies(value):
            continue
        kind = reader.word(value["kind"], KINDS, where)
        config, teacher = value.get("config", ""), value.get("teacher", "")
        if teacher and teacher not in found:
            raise reader.error(where, f"its teacher {teacher!r} must be an experiment listed above it")
        inherited = None
        if kind == "probe" or (kind == "evaluate" and teacher):
            if config or not teacher:
                what = "a probe" if kind == "probe" else "an evaluation of a checkpoint"
                raise reader.error(where, f"{what} takes its teacher's config: name a teacher and no config")
            inherited = found[teacher]
            config = inherited.config
        elif kind == "masks":
            if set(value) - {"title", "kind", "group", "match", "suites"}:
                raise reader.error(where, "masks of another system have no config, overrides, teacher or seed")
        elif not config:
            raise reader.error(where, "no 'config'")
        # An evaluation is as random as its teacher; a probe has a random start of its own.
        seeded = inherited.seeded if inherited and kind == "evaluate" else kind != "masks"
        match = value.get("match", "")
        if match and (kind != "masks" or match not in MATCHINGS):
            raise reader.error(where, f"match: only for masks, one of {', '.join(MATCHINGS)}")
        overrides = reader.values(value.get("overrides", {}))
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
            seeded=value.get("seeded", seeded),
            group=reader.word(value.get("group", "paper"), GROUPS, where),
            match=match,
        )
    return set(reader.content["experiments"]), found


def _sweeps(
    reader: Reader, experiments: dict[str, Experiment], conditions: Sequence[Condition], methods: Path
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
    reader: Reader,
    key: str,
    value: Any,
    known: set[str],
    experiments: Mapping[str, Experiment],
    sweeps: Sweeps,
    factors: Factors,
) -> Table | None:
    """A table with the rows that this suite has; None if it has none of them."""
    where = f"tables: {key}"
    value = reader.entry(value, where, "text metrics rows grid claims curves chart main suites", "title")
    if not reader.applies(value):
        return None
    metrics = tuple(reader.word(metric, METRICS, where) for metric in value.get("metrics", ["mIoU"]))

    def here(name: str) -> bool:
        if name not in known:
            raise reader.error(where, f"{name!r} is not an experiment")
        return name in experiments

    rows = []
    for item in value.get("rows", []):
        item = reader.entry(item, where, "title paper source", "experiment")
        name = item["experiment"]
        if here(name):
            paper = _paper(reader, item.get("paper", {}), metrics, where)
            rows.append(Row(name, item.get("title", experiments[name].title), paper, item.get("source", "")))
    grid = read_grid(reader, value["grid"], where, experiments, factors) if "grid" in value else None
    if grid is not None:
        keys = dict.fromkeys(name for _, names in grid.lines for name in names if name)
        rows += [Row(name, experiments[name].title) for name in keys]
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
    for item in expand_claims(reader, value.get("claims", []), where, factors):
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
        grid=grid,
    )


def _paper(reader: Reader, value: Any, metrics: Sequence[str], where: str) -> dict[str, dict[str, float | None]]:
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
    reader: Reader,
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
