"""Lay out what the report draws: the scales of its intervals, and the curves of a training run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from eval.figures import number, percent_of, round_ticks
from eval.metrics import Difference, Estimate, Metric
from eval.overview import difference
from scripts.common.curves import PANELS, Curves, label

WIDTH, HEIGHT = 520, 250  # of the field of a drawing, without its scales


class Line(NamedTuple):
    """One series of one seed."""

    kind: int  # which of the panel's series it is
    held_out: bool
    points: list[tuple[float, float]]


class Drawing(NamedTuple):
    """One panel with all seeds."""

    title: str
    unit: str
    across: list[tuple[float, str]]
    up: list[tuple[float, str]]
    lines: list[Line]
    legend: list[tuple[int, bool, str]]
    words: str


def axis(metric: Metric) -> tuple[float, float]:
    """Return the ends of the common scale on which a metric's intervals are drawn."""
    if metric.unit == "share":
        return 0.0, 1.0
    bounds = _bounds([*metric.models.values(), *metric.baselines.values()])
    margin = 0.08 * (max(bounds) - min(bounds)) or 1.0
    return min(bounds) - margin, max(bounds) + margin


def zero_axis(metrics: Iterable[Metric], pair: tuple[str, str]) -> tuple[float, float]:
    """Return the ends of a scale with zero in its middle that holds the difference of two arms in all these metrics."""
    found = [each for metric in metrics if (each := difference(metric, *pair))]
    widest = max([*map(abs, _bounds(found)), *(each.margin or 0.0 for each in found)]) * 1.08 or 1.0
    return -widest, widest


def _bounds(estimates: Iterable[Estimate | Difference]) -> list[float]:
    bounds = [bound for each in estimates for bound in (each.value, each.ci_low, each.ci_high)]
    return [bound for bound in bounds if bound is not None and math.isfinite(bound)] or [0.0]


def draw_curves(runs: Sequence[Curves]) -> list[Drawing]:
    """Lay out the panels of an arm, with a line for each series and seed."""
    drawings = []
    for panel in PANELS:
        series = [key for key in panel.series if any(key in run.series for run in runs)]
        points = [point for run in runs for key in series for point in run.series.get(key, [])]
        if not points:
            continue
        across = round_ticks(min(step for step, _ in points), max(step for step, _ in points))
        up = round_ticks(min(value for _, value in points), max(value for _, value in points))
        lines = [
            Line(
                panel.series.index(key),
                key.startswith("eval_"),
                [
                    (
                        round(WIDTH * percent_of(step, across) / 100, 1),
                        round(HEIGHT * (100 - percent_of(value, up)) / 100, 1),
                    )
                    for step, value in run.series[key]
                ],
            )
            for key in series
            for run in runs
            if run.series.get(key)
        ]
        drawings.append(
            Drawing(
                panel.title,
                panel.unit,
                [(WIDTH * percent_of(tick, across) / 100, f"{tick:g}") for tick in across],
                [(HEIGHT * (100 - percent_of(tick, up)) / 100, f"{tick:g}".replace("-", "−")) for tick in up],
                lines,
                [(panel.series.index(key), key.startswith("eval_"), label(key)) for key in series],
                "; ".join(_words(key, runs) for key in series),
            )
        )
    return drawings


def _words(key: str, runs: Sequence[Curves]) -> str:
    """Say what a line shows to whoever does not see it."""
    lines = [run.series[key] for run in runs if run.series.get(key)]
    starts, ends = ([number(line[place][1]) for line in lines] for place in (0, -1))
    return f"{label(key)} from {', '.join(starts)} to {', '.join(ends)}"
