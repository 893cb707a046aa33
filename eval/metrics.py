"""Metrics: what each model reaches, how sure that is, and how the models differ on the same items."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel

from eval.statistics import SIGNIFICANT, Floats, Inference, Interval, crossed, holm
from eval.tables import Better, Table
from scripts.common.errors import UserError

Outcome = Literal["better", "worse", "no_worse", "equivalent", "undecided"]


class Estimate(BaseModel):
    """A value with its 95 % interval; lm-eval adds its standard error, and a perplexity where the value is its log."""

    value: float | None
    ci_low: float | None
    ci_high: float | None
    stderr: float | None = None
    perplexity: float | None = None

    @classmethod
    def of(cls, interval: Interval) -> Estimate:
        """Take over an interval."""
        return cls(value=interval.value, ci_low=interval.low, ci_high=interval.high)


class Difference(BaseModel):
    """Model `a` minus model `b` on the same items, with a paired test."""

    a: str
    b: str
    value: float
    value_a: float | None = None  # what the two reach over the seeds compared
    value_b: float | None = None
    ci_low: float | None  # None where no interval can be given
    ci_high: float | None
    p_value: float
    test: str
    needed_n: int | None = None  # items that would show a difference of this size
    p_adjusted: float = 1.0  # corrected for the number of comparisons
    shown: bool = False
    seeds: int = 1  # over how many seeds the two are compared
    df: float | None = None  # degrees of freedom of the test
    sd_seeds: float | None = None  # how far the difference scatters between seeds, in the metric's unit
    sd_items: float | None = None  # and between prompts under one seed
    smallest_gap: float | None = None  # the smallest difference that these items and seeds show with power .8
    margin: float | None = None  # of `eval.margins`
    outcome: Outcome | None = None  # of the primary question only


class Metric(BaseModel):
    """One figure of all models. A `share` holds values from 0 to 1 and is shown in percent."""

    name: str
    title: str
    phrase: str = ""  # the metric inside a sentence; files of earlier versions have none
    task: str | None = None  # lm-eval's
    unit: str
    better: Better
    group: str
    n: int
    items: str = "items"  # what n counts
    clusters: int | None = None  # groups of items that are not independent of each other
    models: dict[str, Estimate]
    baselines: dict[str, Estimate] = {}
    differences: list[Difference]
    primary: bool = False  # the primary question rests on it
    by_seed: dict[str, list[float]] = {}  # each arm's value for each of its seeds

    def table(self, **measured: Any) -> Table:
        """Lay out under this name and these words what was measured: the fields of a Table from `binary` on."""
        return Table(
            name=self.name,
            title=self.title,
            phrase=self.phrase,
            unit=self.unit,
            better=self.better,
            group=self.group,
            noun=self.items,
            **measured,
        )


class Spread(BaseModel):
    """One metric of one model over the adapters of several seeds."""

    mean: float
    spread: float  # standard deviation
    values: list[float]


class SeedMetric(BaseModel):
    """One metric over several seeds; the base has one value."""

    title: str
    base: float | None = None
    models: dict[str, Spread]


class Runs(BaseModel):
    """What varies between seeds."""

    seeds: list[int]
    metrics: list[SeedMetric]


class Question(BaseModel):
    """The primary question, fixed before anything is measured: is `a` better than `b` in these measures?"""

    a: str
    b: str
    measures: list[str]
    alpha: float = SIGNIFICANT
    margins: dict[str, float] = {}
    planned: bool = False  # it stands in the manifests of the adapters as it is here
    plan_sha256: str | None = None


class Finding(NamedTuple):
    """A difference as the report shows it, and the inference behind it."""

    difference: Difference
    inference: Inference


def build_metrics(tables: Sequence[Table], question: Question) -> list[Metric]:
    """Return every measure with values, intervals and differences, and the outcome of each that is in question.

    The p-values of the primary question are corrected for its measures, all others as a family of their own.
    """
    metrics: list[Metric] = []
    primary: list[tuple[Metric, Finding]] = []
    others: list[tuple[Metric, Finding]] = []
    for table in tables:
        metric, findings = describe(table, (question.a, question.b))
        metrics.append(metric)
        metric.primary = metric.name in question.measures
        for finding in findings:
            asked = metric.primary and (finding.difference.a, finding.difference.b) == (question.a, question.b)
            (primary if asked else others).append((metric, finding))
    adjust_p_values([finding for _, finding in primary], question.alpha)
    adjust_p_values([finding for _, finding in others], question.alpha)
    for metric, finding in primary:
        margin = question.margins.get(metric.name)
        finding.difference.margin = margin
        finding.difference.outcome = decide_outcome(finding, metric.better, margin, question.alpha)
    return metrics


def describe(table: Table, oriented: tuple[str, str] | None = None) -> tuple[Metric, list[Finding]]:
    """Return what each arm reaches in one measure, and how each differs from every earlier one on the same items.

    `oriented` are two arms whose difference is the first minus the second, whichever comes first.
    """
    codes = _numbered(table.clusters)
    levels = {arm: crossed(values, codes, table.weights, binary=table.binary) for arm, values in table.values.items()}
    findings = []
    for b, a in combinations(table.values, 2):
        first, second = (b, a) if (b, a) == oriented else (a, b)
        ours, theirs = paired_rows(table, first, second)
        inference = crossed(ours - theirs, codes, table.weights, binary=table.binary)
        findings.append(Finding(_difference(first, second, ours, theirs, inference, table), inference))
    metric = Metric(
        name=table.name,
        title=table.title,
        phrase=table.phrase,
        unit=table.unit,
        better=table.better,
        group=table.group,
        n=len(table.items),
        items=table.noun,
        clusters=next(iter(levels.values())).clusters,
        models={arm: Estimate.of(level.level(table.unit)) for arm, level in levels.items()},
        differences=[finding.difference for finding in findings],
        by_seed={arm: list(level.by_seed) for arm, level in levels.items()},
    )
    return metric, findings


def paired_rows(table: Table, a: str, b: str) -> tuple[Floats, Floats]:
    """Return the values of two arms seed by seed, over the seeds that both have.

    An arm without seeds, such as the base, stands beside each seed of the other, and so do two arms of one member each.
    Raises: UserError when they have no seed in common.
    """
    ours, theirs = table.values[a], table.values[b]
    one_each = len(ours) == len(theirs) == 1
    if not one_each and None not in (*table.seeds[a], *table.seeds[b]):
        seeds = [seed for seed in table.seeds[a] if seed in table.seeds[b]]
        if not seeds:
            raise UserError(f"{a} and {b} have no seed in common, so they cannot be compared seed by seed.")
        ours = ours[[table.seeds[a].index(seed) for seed in seeds]]
        theirs = theirs[[table.seeds[b].index(seed) for seed in seeds]]
    return ours, theirs


def adjust_p_values(findings: Sequence[Finding], alpha: float = SIGNIFICANT) -> None:
    """Correct a family's p-values for their number, say which differences are shown, and which could have been."""
    adjusted = holm([finding.difference.p_value for finding in findings])
    for (difference, inference), p_adjusted in zip(findings, adjusted, strict=True):
        difference.p_adjusted, difference.shown = p_adjusted, p_adjusted < alpha
        strictest = alpha / len(findings)
        gap = inference.smallest_gap(strictest)
        # An exact test asks for more than the t test that this rests on; what was seen in vain is not large enough.
        difference.smallest_gap = gap if gap and (difference.shown or gap > abs(difference.value)) else None
        difference.needed_n = None if difference.shown else inference.needed_items(strictest)


def decide_outcome(finding: Finding, better: Better, margin: float | None, alpha: float) -> Outcome:
    """Decide what one measure of the primary question shows.

    A difference that is shown is better or worse, however small. With a margin, one that is not is no worse where the
    one-sided test at alpha excludes a loss as large as the margin, and equivalent where it excludes a gain too.
    Source: two one-sided tests, Schuirmann, Journal of Pharmacokinetics and Biopharmaceutics 15 (1987).
    """
    difference, inference = finding
    sign = 1 if better == "higher" else -1
    if difference.shown:
        return "better" if sign * difference.value > 0 else "worse"
    interval = inference.difference(1 - 2 * alpha)
    if margin is None or interval.low is None or interval.high is None:
        return "undecided"
    loss, gain = sorted((sign * interval.low, sign * interval.high))
    if loss <= -margin:
        return "undecided"
    return "equivalent" if gain < margin else "no_worse"


def _difference(a: str, b: str, ours: Floats, theirs: Floats, inference: Inference, table: Table) -> Difference:
    interval = inference.difference()
    total = len(table.items) if table.weights is None else table.weights.sum()
    return Difference(
        a=a,
        b=b,
        value=interval.value,
        ci_low=interval.low,
        ci_high=interval.high,
        value_a=float(ours.sum(axis=1).mean() / total),
        value_b=float(theirs.sum(axis=1).mean() / total),
        p_value=inference.p_value,
        test=inference.test,
        seeds=inference.seeds,
        df=inference.df if inference.test.startswith("t") else None,
        sd_seeds=inference.sd_seeds if inference.seeds > 1 else None,
        sd_items=inference.sd_items,
    )


@lru_cache(maxsize=8)  # most tables of a comparison have the same
def _numbered(clusters: tuple[str, ...]) -> np.ndarray | None:
    """Number the clusters; None where each item is its own."""
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    return None if len(numbers) == len(clusters) else np.array([numbers[cluster] for cluster in clusters])
