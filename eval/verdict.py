"""Decide what the metrics of a comparison show, and say it in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import mean, stdev
from typing import Literal

from pydantic import BaseModel

from eval.metrics import DECISIVE, Difference, Metric, Runs
from scripts.common.stages import BASE

Outcome = Literal["better", "worse", "mixed", "no_difference"]


class Question(BaseModel):
    """The primary question, fixed before anything is measured: is `a` better than `b` in these measures?"""

    a: str
    b: str
    measures: list[str]
    alpha: float = 0.05
    margins: dict[str, float] = {}
    planned: bool = False  # it stands in the manifests of the adapters as it is here
    plan_sha256: str | None = None


class Verdict(BaseModel):
    """The answer to whether the first of two models is better than the second."""

    text: str
    outcome: Outcome
    compared: list[str]
    winner: str | None
    needed_n: int | None


def decide(metrics: Sequence[Metric], models: list[str], runs: Runs | None) -> tuple[Verdict, list[str]]:
    """Answer the question of the last two models, and in the text those of every neighbouring pair.

    Returns: the verdict, and notes on what it rests on.
    """
    decisive = [metric for metric in metrics if metric.name in DECISIVE] or list(metrics[:1])
    answers = [_decide_pair(decisive, a, b, runs) for b, a in pairwise(models)]
    text = " ".join(answer.text for answer in reversed(answers))
    notes = [
        f"The verdict rests on {_listed([metric.phrase for metric in decisive])}. Its p-values are corrected for "
        f"{len(decisive) * len(decisive[0].differences)} comparisons (Holm). All other figures are there to look at, and "
        "are corrected as a family of their own.",
        "Held-out prompts are those that no stage has trained on. Answers are greedy.",
    ]
    if runs is None:
        notes.append(
            "One seed each: another seed may move a small difference either way. Train more and pass them with --runs."
        )
    return answers[-1].model_copy(update={"text": text}), notes


def _decide_pair(decisive: Sequence[Metric], a: str, b: str, runs: Runs | None) -> Verdict:
    better: list[str] = []
    worse: list[str] = []
    undecided: list[tuple[Metric, Difference]] = []
    for metric in decisive:
        difference = next((d for d in metric.differences if (d.a, d.b) == (a, b)), None)
        if difference is None:
            continue
        if not difference.shown or _is_seed_noise(metric.title, a, b, runs):
            undecided.append((metric, difference))
            continue
        good = (difference.value > 0) == (metric.better == "higher")
        (better if good else worse).append(_change(metric, b, a))
    name, other = a.upper(), b.upper() if b != BASE else "the base"
    open_metrics = [f"{metric.phrase} (n = {metric.n})" for metric, _ in undecided]
    needed = [(d.needed_n, metric) for metric, d in undecided if d.needed_n]
    fewest, nearest = min(needed, key=lambda entry: entry[0], default=(None, None))
    if better and worse:
        outcome: Outcome = "mixed"
        text = f"{name} is better than {other} in {_listed(better)}. It is worse in {_listed(worse)}."
    elif better or worse:
        outcome = "better" if better else "worse"
        text = f"{name} is {outcome} than {other} in {_listed(better or worse)}."
        text += f" No difference can be shown in {_listed(open_metrics, 'or in')}." if open_metrics else ""
    else:
        outcome = "no_difference"
        text = f"Between {name} and {other} no difference can be shown in {_listed(open_metrics, 'or in')}."
        if nearest:
            text += f" A difference of the size seen would need about {fewest} {nearest.items} for {nearest.phrase}."
    return Verdict(
        text=text,
        outcome=outcome,
        compared=[a, b],
        winner={"better": a, "worse": b}.get(outcome),
        needed_n=fewest if outcome == "no_difference" else None,
    )


def _change(metric: Metric, before: str, after: str) -> str:
    values = " → ".join(_figure(metric.models[model].value, metric.unit) for model in (before, after))
    return f"{metric.phrase} ({values}, n = {metric.n})"


def _figure(value: float | None, unit: str) -> str:
    assert value is not None, "a difference is shown only between values"
    return f"{100 * value:.0f} %" if unit == "share" else f"{value:.3f}"


def _listed(parts: Sequence[str], last: str = "and") -> str:
    return f" {last} ".join(parts)


def _is_seed_noise(title: str, a: str, b: str, runs: Runs | None) -> bool:
    """Decide whether the gap between two models changes sign between seeds or is no larger than their spread."""
    row = next((row for row in runs.metrics if row.title == title), None) if runs else None
    if row is None or a not in row.models:
        return False
    values = row.models[a].values
    others = row.models[b].values if b in row.models else [row.base] * len(values)
    gaps = [x - y for x, y in zip(values, others, strict=True) if y is not None]
    return abs(mean(gaps)) <= stdev(gaps) or len({gap > 0 for gap in gaps}) > 1
