"""The limits that the figures are compared with."""

from __future__ import annotations

from typing import NamedTuple

from tools.benchmark_training.results import Results

GB = 1e9


class Bar(NamedTuple):
    """A limit, and the figure that it is for.

    Attributes:
        text: what is limited.
        value: the figure; None if it is not measured.
        limit: its limit.
        at_least: the figure must not be below the limit; otherwise, not above it.
        unit: of both.
    """

    text: str
    value: float | None
    limit: float
    at_least: bool = False
    unit: str = "s"

    @property
    def verdict(self) -> str:
        """``pass``, ``FAIL`` or ``not measured``."""
        if self.value is None:
            return "not measured"
        met = self.value >= self.limit if self.at_least else self.value <= self.limit
        return "pass" if met else "FAIL"


def all_bars(results: Results) -> list[Bar]:
    """The bars in order; those of a quick run mean nothing."""
    a, b, c = (results.of_part(part) for part in "abc")
    twelve, fast, hundred = (b.get(name, {}) for name in ("12", "12-fast", "100"))
    bars = [
        Bar("12 photographs, 11 classes, from nothing to masks", twelve.get("seconds"), 360),
        Bar("its texts", twelve.get("stages", {}).get("texts"), 20),
        Bar("100 photographs, 20 classes", hundred.get("seconds"), 1500),
        Bar("12 photographs with `--fast`: 25 s and 4 s per image", fast.get("seconds"), 25 + 4 * 12),
    ]
    for name, run in (("12", twelve), ("100", hundred)):
        ratio = run.get("estimate_ratio")
        off = None if not ratio else max(ratio, 1 / ratio)
        bars.append(Bar(f"{name} photographs: estimate and truth differ by a factor of", off, 1.5, unit="x"))
    for name, limit in (("voc20", 20), ("ade150", 6)):
        variants = a.get(name, {}).get("variants", {})
        store, without = variants.get("store", {}), variants.get("fresh crops", {})
        bars.append(Bar(f"{name}: step without the store / with it", store.get("ratio"), limit, True, "x"))
        memory = store["peak_bytes"] / without["peak_bytes"] if store and without.get("peak_bytes") else None
        bars.append(Bar(f"{name}: memory of the step with the store / without it", memory, 1, unit="x"))
    for name, source in (("classes-fresh", "with fresh crops"), ("classes", "from the store")):
        steps, growth = c.get(name, {}).get("variants", {}), None
        if {"150", "1000"} <= steps.keys():
            growth = steps["1000"]["median_seconds"] / steps["150"]["median_seconds"]
        bars.append(Bar(f"step {source}: 1,000 classes / 150", growth, 1.8, unit="x"))
    peak = c.get("sides", {}).get("sides", {}).get("8192", {}).get("peak_bytes")
    bars.append(Bar("peak memory of `reclip predict`, 8,192 x 8,192 px", peak and peak / GB, 4, unit="GB"))
    paper = results.of_part("paper").get("voc20", {}).get("totals", {})
    for graph in ("CUDA graph", "eager"):
        bars.append(Bar(f"VOC 2012 on one H100, on paper, {graph}", paper.get(graph), 180))
    return bars
