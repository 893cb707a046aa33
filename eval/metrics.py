"""Metrics: what each model reaches, how sure that is, and how the models differ on the same items."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from statistics import mean, stdev
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel

from eval.statistics import (
    SIGNIFICANT,
    Interval,
    bootstrap_mean,
    holm,
    mcnemar_exact,
    needed_n,
    paired_difference,
    paired_p_value,
    paired_ratio_difference,
    ratio_interval,
    wilson,
)
from eval.tables import Better
from scripts.common.artifacts import Manifest
from scripts.common.stages import BASE

if TYPE_CHECKING:
    from eval.measuring import Measured, Prepared

Outcome = Literal["better", "worse", "no_worse", "equivalent", "undecided"]

# What the verdict rests on, fixed before anything is measured: these are what SFT and DPO are trained for.
DECISIVE = ("checks_passed", "preference_accuracy")


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
    sd_items: float | None = None  # and between items
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
    models: dict[str, Estimate]
    baselines: dict[str, Estimate] = {}
    differences: list[Difference]
    primary: bool = False  # the primary question rests on it
    by_seed: dict[str, list[float]] = {}  # each arm's value for each of its seeds


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


def build_metrics(measured: dict[str, Measured], prepared: Prepared, manifests: dict[str, Manifest]) -> list[Metric]:
    """Return every metric with values, intervals, paired differences and p-values corrected for their number."""
    metrics = [_loss_metric(measured)]
    if prepared.pairs:
        metrics += _preference_metrics(measured, manifests)
    metrics += _check_metrics(measured)
    for decisive in (True, False):
        adjust_p_values([metric for metric in metrics if (metric.name in DECISIVE) == decisive])
    return metrics


def adjust_p_values(metrics: Sequence[Metric]) -> None:
    """Correct the p-values of a family of metrics for their number, and say which differences are shown."""
    family = [difference for metric in metrics for difference in metric.differences]
    for difference, adjusted in zip(family, holm([d.p_value for d in family]), strict=True):
        difference.p_adjusted = adjusted
        difference.shown = adjusted < SIGNIFICANT


def _loss_metric(measured: dict[str, Measured]) -> Metric:
    return ratio_metric(
        "held_out_loss",
        "Loss of the target answers",
        "nats per token",
        "loss",
        {name: [-score.logps for score in result.targets] for name, result in measured.items()},
        [score.tokens for score in next(iter(measured.values())).targets],
        phrase="the loss of the target answers",
        items="prompts",
    )


def reference_of(manifest: Manifest, manifests: Mapping[str, Manifest]) -> str | None:
    """Return the model among these that an adapter was trained against, by its hash; None where it is another one."""
    if manifest.parent is None or manifest.section.get("reference", BASE) == BASE:
        return BASE
    return next((name for name, other in manifests.items() if other.sha256 == manifest.parent.sha256), None)


def _preference_metrics(measured: dict[str, Measured], manifests: dict[str, Manifest]) -> list[Metric]:
    longer = next(iter(measured.values())).chosen_is_longer()
    baselines = {"longer answer wins": Estimate.of(wilson(sum(longer), len(longer)))}
    found = {name: reference_of(manifest, manifests) for name, manifest in manifests.items()}
    # A reward against any other model would not be the one that was trained.
    references = {name: other for name, other in found.items() if other is not None}
    against = ", ".join(f"{name} against {other}" for name, other in references.items())
    metrics = [
        binary_metric(
            "preference_accuracy",
            "Chosen answer likelier per token",
            "preference",
            {name: result.prefers_chosen() for name, result in measured.items()},
            phrase="the share of pairs where the chosen answer is likelier",
            items="pairs",
            baselines=baselines,
        )
    ]
    if references:
        metrics.append(
            binary_metric(
                "reward_accuracy",
                f"Implicit-reward accuracy ({against})",
                "preference",
                {name: measured[name].rewards_chosen(measured[other]) for name, other in references.items()},
                phrase="the share of pairs in which the chosen answer gets the higher implicit reward",
                items="pairs",
                baselines=baselines,
            )
        )
    return metrics


def _check_metrics(measured: dict[str, Measured]) -> list[Metric]:
    answers = next(iter(measured.values())).checks
    names = list(answers[0]) if answers else []
    if not names:
        return []
    overall = mean_metric(
        "checks_passed",
        "Checks passed per answer",
        "share",
        "higher",
        "checks",
        {name: [mean(answer.values()) for answer in result.checks] for name, result in measured.items()},
        phrase="the share of checks passed",
        items="prompts",
    )
    each = [
        binary_metric(
            f"check_{number}",
            check,
            "checks",
            {name: [answer[check] for answer in result.checks] for name, result in measured.items()},
            phrase=f"the share of answers that pass the check “{check}”",
            items="prompts",
        )
        for number, check in enumerate(names, 1)
    ]
    return [overall, *each]


def binary_metric(
    name: str,
    title: str,
    group: str,
    outcomes: dict[str, list[bool]],
    *,
    phrase: str = "",
    items: str = "items",
    baselines: dict[str, Estimate] | None = None,
) -> Metric:
    """Describe how often each model passes, with score intervals and exact paired tests."""
    columns = {model: np.array(outcome, float) for model, outcome in outcomes.items()}
    differences = [
        _difference(
            a,
            b,
            paired_difference(columns[a], columns[b]),
            mcnemar_exact(outcomes[a], outcomes[b]),
            "McNemar, exact",
            needed_n(columns[a] - columns[b]),
        )
        for b, a in combinations(outcomes, 2)
    ]
    return Metric(
        name=name,
        title=title,
        phrase=phrase,
        unit="share",
        better="higher",
        group=group,
        n=len(next(iter(outcomes.values()))),
        items=items,
        models={model: Estimate.of(wilson(sum(column), len(column))) for model, column in outcomes.items()},
        baselines=baselines or {},
        differences=differences,
    )


def mean_metric(
    name: str,
    title: str,
    unit: str,
    better: Better,
    group: str,
    columns: dict[str, list[float]],
    *,
    phrase: str = "",
    items: str = "items",
) -> Metric:
    """Describe the mean over items of each model."""
    return Metric(
        name=name,
        title=title,
        phrase=phrase,
        unit=unit,
        better=better,
        group=group,
        n=len(next(iter(columns.values()))),
        items=items,
        models={model: Estimate.of(bootstrap_mean(column)) for model, column in columns.items()},
        differences=_paired_differences(columns, paired_difference),
    )


def ratio_metric(
    name: str,
    title: str,
    unit: str,
    group: str,
    sums: dict[str, list[float]],
    counts: Sequence[float],
    *,
    phrase: str = "",
    items: str = "items",
) -> Metric:
    """Describe a loss per unit, where items count by how many units they hold."""
    return Metric(
        name=name,
        title=title,
        phrase=phrase,
        unit=unit,
        better="lower",
        group=group,
        n=len(counts),
        items=items,
        models={model: Estimate.of(ratio_interval(column, counts)) for model, column in sums.items()},
        differences=_paired_differences(sums, lambda a, b: paired_ratio_difference(a, b, counts)),
    )


def _paired_differences(
    columns: dict[str, list[float]], interval: Callable[[list[float], list[float]], Interval]
) -> list[Difference]:
    """Compare each model with every earlier one, item by item."""
    return [
        _difference(
            a,
            b,
            interval(columns[a], columns[b]),
            paired_p_value(columns[a], columns[b]),
            "sign-flip permutation",
            needed_n(np.array(columns[a]) - np.array(columns[b])),
        )
        for b, a in combinations(columns, 2)
    ]


def _difference(a: str, b: str, interval: Interval, p_value: float, test: str, needed: int | None) -> Difference:
    estimate = Estimate.of(interval).model_dump(include={"value", "ci_low", "ci_high"})
    return Difference(a=a, b=b, **estimate, p_value=p_value, test=test, needed_n=needed)


def spread_over_seeds(per_run: Sequence[Sequence[Metric]], seeds: list[int]) -> Runs:
    """Collect mean and spread over seeds of each metric, for the models that were trained.

    What was not measured in every run, as a reward whose reference is missing in one, has no spread.
    """
    rows = []
    for first in per_run[0]:
        runs = [metric for metrics in per_run for metric in metrics if metric.name == first.name]
        if len(runs) < len(per_run):
            continue
        columns = {
            name: [value for run in runs if (value := run.models[name].value) is not None]
            for name in first.models
            if name != BASE and all(name in run.models for run in runs)
        }
        rows.append(
            SeedMetric(
                title=first.title,
                base=first.models[BASE].value if BASE in first.models else None,
                models={
                    name: Spread(mean=mean(column), spread=stdev(column), values=column)
                    for name, column in columns.items()
                },
            )
        )
    return Runs(seeds=seeds, metrics=rows)
