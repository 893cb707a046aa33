"""Answer the primary question of a comparison in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, field_validator

from eval.metrics import Difference, Metric, Outcome
from eval.metrics import Question as Question  # where others look for it
from scripts.common.errors import UserError
from scripts.common.stages import BASE, TRAINING_STAGES

METHODS = 3  # fewer seeds say nothing about the methods that made the adapters
# An outcome beside "better" or "worse" does not take it back; otherwise the weakest counts.
STRONGEST: tuple[Outcome, ...] = ("better", "worse", "undecided", "no_worse", "equivalent")
AS_WELL: dict[Outcome, str] = {"equivalent": "equivalent", "no_worse": "no worse", "undecided": "undecided"}


class Verdict(BaseModel):
    """The answer to the primary question."""

    text: str
    outcome: Outcome
    compared: list[str]
    winner: str | None
    needed_n: int | None

    @field_validator("outcome", mode="before")
    @classmethod
    def read_earlier(cls, outcome: Any) -> Any:
        """Take the words of earlier versions: what showed nothing, or both ways, is undecided."""
        return "undecided" if outcome in ("no_difference", "mixed") else outcome


def decide(metrics: Sequence[Metric], question: Question) -> tuple[Verdict, list[str]]:
    """Answer the question from the outcomes of its measures.

    Better in one measure and worse in none is better, and the other way round. Better in one and worse in another is
    undecided: which of them counts more is not for a test to say. Where nothing is better or worse, the answer is the
    weakest of the outcomes, so that no worse and equivalent need every measure.
    Returns: the verdict, and notes on what it rests on.
    Raises: UserError when no measure in question compares these two.
    """
    asked = [
        (metric, difference)
        for metric in metrics
        for difference in metric.differences
        if metric.primary and (difference.a, difference.b) == (question.a, question.b)
    ]
    if not asked:
        raise UserError(
            f"eval.plan.measures: found {', '.join(question.measures)}, none of which compares {question.a} with "
            f"{question.b}. Name another measure."
        )
    found: dict[Outcome, list[str]] = {}
    for metric, difference in asked:
        assert difference.outcome is not None, "build_metrics decides each primary measure"
        found.setdefault(difference.outcome, []).append(_figures(metric, difference))
    if "better" in found and "worse" in found:
        outcome: Outcome = "undecided"
    else:
        outcome = next(each for each in STRONGEST if each in found)
    seeds = min(difference.seeds for _, difference in asked)
    needed = [difference.needed_n for _, difference in asked if difference.needed_n]
    limited = f"{speaks_of(seeds, (question.a, question.b))}: " if seeds < METHODS else ""
    sentence = limited + _sentence(outcome, found, _called(question.a), _called(question.b)) + "."
    verdict = Verdict(
        text=sentence[0].upper() + sentence[1:],
        outcome=outcome,
        compared=[question.a, question.b],
        winner={"better": question.a, "worse": question.b}.get(outcome),
        needed_n=min(needed, default=None) if outcome == "undecided" else None,
    )
    return verdict, _notes(asked, question, seeds)


def speaks_of(seeds: int, pair: Sequence[str]) -> str:
    """Return what a difference over so many seeds is about."""
    if seeds == 1:
        return "this adapter" if BASE in pair else "these two adapters"
    return "these adapters of two seeds" if seeds < METHODS else "the methods"


def _called(arm: str) -> str:
    return "the base" if arm == BASE else arm.upper() if arm in TRAINING_STAGES else arm


def _sentence(outcome: Outcome, found: dict[Outcome, list[str]], a: str, b: str) -> str:
    said = {each: " and ".join(figures) for each, figures in found.items()}
    if "better" in said and "worse" in said:
        return f"it is undecided whether {a} is better than {b}: it is better in {said['better']} and worse in {said['worse']}"
    head = {
        "better": f"{a} is better than {b} in",
        "worse": f"{a} is worse than {b} in",
        "no_worse": f"{a} is no worse than {b} in",
        "equivalent": f"{a} and {b} are equivalent in",
        "undecided": f"it is undecided whether {a} is better or worse than {b} in",
    }[outcome]
    others = [f"{AS_WELL[each]} in {said[each]}" for each in AS_WELL if each in said and each != outcome]
    return "; ".join([f"{head} {said[outcome]}", *others])


def _figures(metric: Metric, difference: Difference) -> str:
    """Name a measure with what it went from and to, and what that rests on."""
    of = f" of {metric.clusters} prompts" if metric.clusters and metric.clusters < metric.n else ""
    facts = [_change(difference, metric.unit), f"n = {metric.n} {metric.items}{of}"]
    if difference.seeds > 1:
        facts.append(f"{difference.seeds} seeds")
    if difference.margin is not None:
        facts.append(f"margin {_amount(difference.margin, metric.unit)}")
    return f"{metric.phrase or metric.title} ({', '.join(facts)})"


def _change(difference: Difference, unit: str) -> str:
    """Write both values, with as many digits as it takes to tell them apart."""
    before, after = difference.value_b, difference.value_a
    assert before is not None, "build_metrics writes both"
    assert after is not None, "build_metrics writes both"
    scale, digits = (100, 0) if unit == "share" else (1, 3)
    apart = abs(difference.value) > 1e-9  # less is rounding of the mean over items, and no digit is worth showing
    while apart and f"{scale * before:.{digits}f}" == f"{scale * after:.{digits}f}" and digits < 9:
        digits += 1
    first, second = (f"{scale * value:.{digits}f}" + (" %" if unit == "share" else "") for value in (before, after))
    return f"{first} → {second}"


def _amount(gap: float, unit: str) -> str:
    return f"{_short(100 * gap)} points" if unit == "share" else f"{gap:.2g} {unit}".rstrip()


def _short(points: float) -> str:
    return f"{points:.0f}" if points >= 10 or points == round(points) else f"{points:.1f}"


def _notes(asked: Sequence[tuple[Metric, Difference]], question: Question, seeds: int) -> list[str]:
    phrases = " and ".join(metric.phrase or metric.title for metric, _ in asked)
    plural = "s" if len(asked) > 1 else ""
    notes = [
        f"The primary question is whether {_called(question.a)} is better than {_called(question.b)} in {phrases}. "
        + ("It was planned before training. " if question.planned else "It was not planned before training. ")
        + f"Its p-value{plural} {'are' if plural else 'is'} corrected for {len(asked)} comparison{plural} (Holm, at "
        f"{question.alpha:g}). All other differences are exploratory and are corrected as a family of their own. Intervals "
        "hold 95 % each and are not corrected, so one may leave out zero where the corrected p-value shows nothing.",
        "Held-out prompts are those that no stage has trained on. Answers are greedy.",
    ]
    if seeds < METHODS:
        notes.append(
            f"{'One seed' if seeds == 1 else 'Two seeds'}: this speaks of these adapters and not of the methods that made "
            "them. Other seeds may move a difference either way; three or more show by how much (`python -m scripts.study`)."
        )
    for metric, difference in asked:
        notes += _scatter(metric, difference) + _sight(metric, difference)
    return notes


def _scatter(metric: Metric, difference: Difference) -> list[str]:
    if difference.sd_seeds is None or difference.sd_items is None or difference.df is None:
        return []
    return [
        f"{_capital(metric)}: between seeds the difference scatters by {_amount(difference.sd_seeds, metric.unit)}, between "
        f"prompts by {_amount(difference.sd_items, metric.unit)} (standard deviations). Seeds × prompts, crossed; "
        f"t test with {difference.df:.1f} degrees of freedom."
    ]


def _sight(metric: Metric, difference: Difference) -> list[str]:
    if difference.shown or difference.smallest_gap is None:
        return []
    note = (
        f"{_capital(metric)}: a true difference of {_amount(difference.smallest_gap, metric.unit)} would be shown in four of "
        "five such comparisons."
    )
    if difference.needed_n:
        note += f" One of the size seen would need about {difference.needed_n:,} {metric.items}."
    elif difference.value:
        note += f" For one of the size seen no number of {metric.items} is enough: it takes more seeds."
    return [note]


def _capital(metric: Metric) -> str:
    name = metric.phrase or metric.title
    return name[0].upper() + name[1:]
