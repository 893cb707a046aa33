"""Turn measurements into metrics with intervals and paired tests, and these into a verdict in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise
from statistics import mean, stdev
from typing import Any

import numpy as np

from eval.measuring import Measured, Prepared
from eval.statistics import (
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

SIGNIFICANT = 0.05
# What the verdict rests on, fixed before anything is measured: these are what SFT and DPO are trained for.
DECISIVE = ("checks_passed", "preference_accuracy")


def build_metrics(measured: dict[str, Measured], prepared: Prepared, adapters: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every metric with values, intervals, paired differences and p-values corrected for their number."""
    metrics = [_loss_metric(measured)]
    if prepared.chosen:
        metrics += _preference_metrics(measured, prepared, adapters)
    metrics += _check_metrics(measured)
    for decisive in (True, False):
        adjust_p_values([metric for metric in metrics if (metric["name"] in DECISIVE) == decisive])
    return metrics


def adjust_p_values(metrics: Sequence[dict[str, Any]]) -> None:
    """Correct the p-values of a family of metrics for their number, and say which differences are shown."""
    family = [difference for metric in metrics for difference in metric["differences"]]
    for difference, adjusted in zip(family, holm([d["p_value"] for d in family]), strict=True):
        difference["p_adjusted"] = adjusted
        difference["shown"] = adjusted < SIGNIFICANT


def _loss_metric(measured: dict[str, Measured]) -> dict[str, Any]:
    losses = {name: [-score.logps for score in result.references] for name, result in measured.items()}
    counts = [score.tokens for score in next(iter(measured.values())).references]
    return ratio_metric("held_out_loss", "Loss of the reference answers", "nats per token", "loss", losses, counts)


def _preference_metrics(
    measured: dict[str, Measured], prepared: Prepared, adapters: dict[str, Any]
) -> list[dict[str, Any]]:
    longer = prepared.chosen_is_longer()
    baselines = {"longer answer wins": _estimate(wilson(sum(longer), len(longer)))}
    plain = {name: result.prefers_chosen() for name, result in measured.items()}
    references = {"sft": "base"}
    if "dpo" in adapters:
        reference = adapters["dpo"][1]["config"]["dpo"]["reference"]
        references["dpo"] = reference if reference in measured else "base"
    rewards = {
        name: measured[name].rewards_chosen(measured[reference])
        for name, reference in references.items()
        if name in measured
    }
    against = ", ".join(f"{name} against {reference}" for name, reference in references.items() if name in measured)
    title = f"Implicit-reward accuracy ({against})"
    return [
        binary_metric("preference_accuracy", "Chosen answer likelier per token", "preference", plain, baselines),
        binary_metric("reward_accuracy", title, "preference", rewards, baselines),
    ]


def _check_metrics(measured: dict[str, Measured]) -> list[dict[str, Any]]:
    names = list(next(iter(measured.values())).checks[0]) if next(iter(measured.values())).checks else []
    if not names:
        return []
    shares = {name: [mean(answer.values()) for answer in result.checks] for name, result in measured.items()}
    overall = mean_metric("checks_passed", "Checks passed per answer", "share", "higher", "checks", shares)
    each = [
        binary_metric(
            f"check_{number}",
            check,
            "checks",
            {name: [answer[check] for answer in result.checks] for name, result in measured.items()},
        )
        for number, check in enumerate(names, 1)
    ]
    return [overall, *each]


def binary_metric(
    name: str, title: str, group: str, outcomes: dict[str, list[bool]], baselines: dict[str, Any] | None = None
) -> dict[str, Any]:
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
    values = {model: _estimate(wilson(sum(column), len(column))) for model, column in outcomes.items()}
    count = len(next(iter(outcomes.values())))
    return {**_metric(name, title, "share", "higher", group, count, values, differences), "baselines": baselines or {}}


def mean_metric(
    name: str, title: str, unit: str, better: str, group: str, columns: dict[str, list[float]]
) -> dict[str, Any]:
    """Describe the mean over items of each model."""
    differences = [
        _difference(
            a,
            b,
            paired_difference(columns[a], columns[b]),
            paired_p_value(columns[a], columns[b]),
            "sign-flip permutation",
            needed_n(np.array(columns[a]) - np.array(columns[b])),
        )
        for b, a in combinations(columns, 2)
    ]
    values = {model: _estimate(bootstrap_mean(column)) for model, column in columns.items()}
    return _metric(name, title, unit, better, group, len(next(iter(columns.values()))), values, differences)


def ratio_metric(
    name: str, title: str, unit: str, group: str, sums: dict[str, list[float]], counts: Sequence[float]
) -> dict[str, Any]:
    """Describe a loss per unit, where items count by how many units they hold."""
    differences = [
        _difference(
            a,
            b,
            paired_ratio_difference(sums[a], sums[b], counts),
            paired_p_value(sums[a], sums[b]),
            "sign-flip permutation",
            needed_n(np.array(sums[a]) - np.array(sums[b])),
        )
        for b, a in combinations(sums, 2)
    ]
    values = {model: _estimate(ratio_interval(column, counts)) for model, column in sums.items()}
    return _metric(name, title, unit, "lower", group, len(counts), values, differences)


def _metric(
    name: str,
    title: str,
    unit: str,
    better: str,
    group: str,
    n: int,
    models: dict[str, Any],
    differences: list[dict[str, Any]],
) -> dict[str, Any]:
    return {
        "name": name,
        "title": title,
        "unit": unit,
        "better": better,
        "group": group,
        "n": n,
        "models": models,
        "baselines": {},
        "differences": differences,
    }


def _estimate(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "ci_low": interval.low, "ci_high": interval.high}


def _difference(a: str, b: str, estimate: Interval, p_value: float, test: str, needed: int | None) -> dict[str, Any]:
    return {"a": a, "b": b, **_estimate(estimate), "p_value": p_value, "test": test, "needed_n": needed}


def decide(
    metrics: Sequence[dict[str, Any]], models: list[str], runs: dict[str, Any] | None
) -> tuple[dict[str, Any], list[str]]:
    """Answer the question of the last two models, and in the text those of every neighbouring pair."""
    decisive = [metric for metric in metrics if metric["name"] in DECISIVE] or list(metrics[:1])
    answers = [_decide_pair(decisive, a, b, runs) for b, a in pairwise(models)]
    verdict = dict(answers[-1])
    verdict["text"] = " ".join(answer["text"] for answer in reversed(answers))
    rested = " and ".join(f"“{metric['title'].lower()}”" for metric in decisive)
    notes = [
        f"The verdict rests on {rested}; p-values are corrected for {len(decisive) * len(decisive[0]['differences'])} "
        "comparisons (Holm). All other figures are there to look at, and are corrected as a family of their own.",
        "Held-out prompts are those no stage has trained on; answers are greedy.",
    ]
    if runs is None:
        notes.append(
            "One seed each: another seed may move a small difference either way. Train more and pass them with --runs."
        )
    return verdict, notes


def _decide_pair(decisive: Sequence[dict[str, Any]], a: str, b: str, runs: dict[str, Any] | None) -> dict[str, Any]:
    better: list[str] = []
    worse: list[str] = []
    open_questions: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for metric in decisive:
        difference = next((d for d in metric["differences"] if (d["a"], d["b"]) == (a, b)), None)
        if difference is None:
            continue
        if not difference["shown"] or _is_seed_noise(metric["title"], a, b, runs):
            open_questions.append((metric, difference))
            continue
        good = (difference["value"] > 0) == (metric["better"] == "higher")
        before, after = metric["models"][b]["value"], metric["models"][a]["value"]
        (better if good else worse).append(
            f"{metric['title'].lower()} {_shown(before, metric)} → {_shown(after, metric)}"
        )
    name, other = a.upper(), b.upper() if b != "base" else "the base"
    outcome = "mixed" if better and worse else "better" if better else "worse" if worse else "no_difference"
    needed = [d["needed_n"] for _, d in open_questions if d["needed_n"]]
    if outcome == "no_difference":
        n = min(metric["n"] for metric in decisive)
        text = f"Between {name} and {other} no difference can be shown with n = {n}."
        text += f" A difference of the size seen would need about {min(needed)} items." if needed else ""
    elif outcome == "mixed":
        text = f"{name} is better than {other} in {', '.join(better)}, and worse in {', '.join(worse)}."
    else:
        text = f"{name} is {outcome} than {other}: {', '.join(better or worse)}."
        text += "".join(
            f" No difference can be shown in {m['title'].lower()} (n = {m['n']})." for m, _ in open_questions
        )
    winner = {"better": a, "worse": b}.get(outcome)
    return {
        "text": text,
        "outcome": outcome,
        "compared": [a, b],
        "winner": winner,
        "needed_n": min(needed) if needed and outcome == "no_difference" else None,
    }


def _shown(value: float, metric: dict[str, Any]) -> str:
    return f"{100 * value:.0f} %" if metric["unit"] == "share" else f"{value:.3f}"


def _is_seed_noise(title: str, a: str, b: str, runs: dict[str, Any] | None) -> bool:
    """Tell whether the gap between two models changes sign between seeds or is no larger than their spread."""
    row = next((row for row in (runs or {}).get("metrics", []) if row["title"] == title), None)
    if row is None or a not in row["models"]:
        return False
    second = row["models"].get(b, {"values": [row["base"]] * len(row["models"][a]["values"])})
    gaps = [x - y for x, y in zip(row["models"][a]["values"], second["values"], strict=True)]
    return abs(mean(gaps)) <= stdev(gaps) or len({gap > 0 for gap in gaps}) > 1


def aggregate_runs(
    repeats: Sequence[dict[str, Measured]], seeds: list[int], prepared: Prepared, adapters: dict[str, Any]
) -> dict[str, Any]:
    """Collect mean and spread over seeds of each metric, for the models that were trained."""
    per_run = [build_metrics(measured, prepared, adapters) for measured in repeats]
    rows = []
    for number, metric in enumerate(per_run[0]):
        values = {
            name: [run[number]["models"][name]["value"] for run in per_run]
            for name in metric["models"]
            if name != "base"
        }
        rows.append(
            {
                "title": metric["title"],
                "base": metric["models"].get("base", {}).get("value"),
                "models": {
                    name: {"mean": mean(column), "spread": stdev(column), "values": column}
                    for name, column in values.items()
                },
            }
        )
    return {"seeds": seeds, "metrics": rows}
