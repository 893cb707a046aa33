"""The first screen of a report: one sentence, a tile for each step, a picture of the arms, one answer before and after."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from eval.figures import SPACE, number, percent_of, round_ticks, spoken, spoken_change
from eval.metrics import Difference, Metric
from eval.tables import Better
from eval.verdict import Question, Verdict
from scripts.common.stages import BASE, TRAINING_STAGES

LEADING = ("all_rules", "checks_passed", "preference_accuracy")  # what the first screen shows, the first that is there
SIGNS = {"better": "▲", "worse": "▼", "no_worse": "≥", "equivalent": "≈", "undecided": "○"}
RELATIONS = {"better": "than", "worse": "than", "no_worse": "than", "equivalent": "to"}
TILES = 4
METHODS = 3  # so many seeds speak of the procedures; fewer of the adapters that were compared


@dataclass(frozen=True)
class Story:
    """What the first screen tells, out of a report."""

    title: str
    verdict: Verdict | None
    question: Question | None
    models: list[str]
    metrics: list[Metric]
    seeds: Mapping[str, int]  # of each arm
    runs: int | None  # how many seeds a report of an earlier version has, which compared them one after the other
    merged: Collection[str]  # the arms that are merged models
    looks: int | None
    side: Literal["test", "validation"]


class Piece(NamedTuple):
    """A piece of the sentence; what was found is marked."""

    text: str
    found: str = ""


class Tile(NamedTuple):
    """One step of the chain: what it reaches, and what was found against the step before it."""

    name: str
    value: str
    found: str = ""
    change: str = ""
    against: str = ""


class Row(NamedTuple):
    """One arm in the picture; places are in percent of the width."""

    name: str
    figures: str
    dot: float
    line: tuple[float, float] | None
    seeds: list[float]


class Picture(NamedTuple):
    """All arms on one scale."""

    metric: Metric
    ticks: list[tuple[float, str]]
    rows: list[Row]


class Overview(NamedTuple):
    """What the first screen shows."""

    sentence: list[Piece]
    metric: Metric | None
    tiles: list[Tile]
    picture: Picture | None
    facts: list[str]


def tell(story: Story) -> Overview:
    """Lay out the first screen; what was not measured is left out."""
    metrics = decisive(story.metrics)
    metric = leading(metrics)
    return Overview(
        sentence=sentence(story, metrics, metric),
        metric=metric,
        tiles=tiles(story, metric) if metric else [],
        picture=picture(metric) if metric else None,
        facts=facts(story, metrics),
    )


def decisive(metrics: list[Metric]) -> list[Metric]:
    """Return the measures on which the verdict rests; a report of an earlier version does not mark them."""
    marked = [metric for metric in metrics if metric.primary]
    return marked or [metric for metric in metrics if metric.name in LEADING] or metrics[:1]


def leading(metrics: Sequence[Metric]) -> Metric | None:
    """Return the measure of the first screen."""
    rank = {name: place for place, name in enumerate(LEADING)}
    return min(metrics, key=lambda metric: rank.get(metric.name, len(rank)), default=None)


def key_pair(verdict: Verdict | None, models: list[str]) -> tuple[str, str] | None:
    """Return the two arms that the report is about."""
    if verdict and len(verdict.compared) == 2:
        return verdict.compared[0], verdict.compared[1]
    return (models[-1], models[-2]) if len(models) > 1 else None


def difference(metric: Metric, a: str, b: str) -> Difference | None:
    """Return `a` minus `b`, whichever way round it was computed."""
    for found in metric.differences:
        if (found.a, found.b) == (a, b):
            return found
        if (found.a, found.b) == (b, a):
            turned = {"ci_low": _minus(found.ci_high), "ci_high": _minus(found.ci_low), "outcome": None}
            return found.model_copy(update={"a": a, "b": b, "value": -found.value, **turned})
    return None


def _minus(value: float | None) -> float | None:
    return None if value is None else -value


def finding(each: Difference, better: Better) -> str:
    """Return what a difference shows: the outcome of the primary question, otherwise better, worse or undecided."""
    if each.outcome:
        return each.outcome
    if not each.shown:
        return "undecided"
    return "better" if (each.value > 0) == (better == "higher") else "worse"


def title_of(name: str) -> str:
    """Name an arm inside a sentence."""
    if name == BASE:
        return "the base"
    return TRAINING_STAGES[name].title if name in TRAINING_STAGES else name


def full_title(story: Story, name: str) -> str:
    """Name an arm as what it stands for: a method only if enough seeds were trained."""
    count = story.seeds.get(name, 1)
    if name == BASE or count >= METHODS:
        return title_of(name)
    kind = "merged model" if name in story.merged else "adapter"
    return f"{'these' if count > 1 else 'this'} {title_of(name)} {kind}{'s' if count > 1 else ''}"


def sentence(story: Story, metrics: Sequence[Metric], lead: Metric | None) -> list[Piece]:
    """Say in one sentence what the primary question found, in which measure, and how it began."""
    pair = key_pair(story.verdict, story.models)
    if story.verdict is None or pair is None or lead is None:
        return [Piece(story.verdict.text if story.verdict else story.title)]
    a, b = pair
    found = {metric.name: _finding_of(story, metric, a, b) for metric in metrics}
    if not any(found.values()):
        return [Piece(story.verdict.text)]
    groups = {outcome: [metric for metric in metrics if found[metric.name] == outcome] for outcome in RELATIONS}
    decided = {outcome: _lead_first(group, lead)[:2] for outcome, group in groups.items() if group}
    first, second = full_title(story, a), full_title(story, b)
    verb = "are" if first.startswith("these ") else "is"
    pieces = []
    for place, (outcome, group) in enumerate(decided.items()):
        link = f" {RELATIONS[outcome]} {second}" if place == 0 else ""
        where = " and in ".join(_measured(metric, b, a) for metric in group)
        pieces += [
            Piece(f"{_capital(first)} {verb} " if place == 0 else " but "),
            Piece(outcome.replace("_", " "), outcome),
            Piece(f"{link} in {where}"),
        ]
    named = [metric for group in decided.values() for metric in group]
    if not decided:
        named = _lead_first([metric for metric in metrics if found[metric.name]], lead)[:1]
        pieces = [
            Piece(f"Between {first} and {second} "),
            Piece("no difference can be shown", "undecided"),
            Piece(f" in {_measured(named[0], b, a)}"),
        ]
    pieces += _beginning(lead, b, lead in named, again=not decided)
    return [*pieces, Piece(".")]


def _finding_of(story: Story, metric: Metric, a: str, b: str) -> str | None:
    each = difference(metric, a, b)
    if each is None:
        return None
    # Earlier versions let the seeds overrule a difference that its own items show.
    overruled = story.runs is not None and story.verdict is not None and story.verdict.outcome == "undecided"
    return "undecided" if overruled else finding(each, metric.better)


def _lead_first(group: Sequence[Metric], lead: Metric) -> list[Metric]:
    return sorted(group, key=lambda metric: metric is not lead)


def _measured(metric: Metric, before: str, after: str) -> str:
    phrase = metric.phrase or f"“{metric.title}”"
    return f"{phrase} ({_values(metric, before, after)})"


def _values(metric: Metric, before: str, after: str) -> str:
    """Write two values with as many digits as tell them apart."""
    values = [metric.models[name].value if name in metric.models else None for name in (before, after)]
    texts = [spoken(value, metric.unit) for value in values]
    if texts[0] == texts[1] and values[0] != values[1] and metric.unit == "share":
        texts = [f"{number(value, metric.unit)}{SPACE}%" for value in values]
    return f"{texts[0]}{SPACE}→{SPACE}{texts[1]}"


def _capital(name: str) -> str:
    """Begin a sentence with an arm, whose own name stays as it is."""
    article = name.partition(" ")[0]
    return name[:1].upper() + name[1:] if article in ("the", "this", "these") else name


def _beginning(lead: Metric, b: str, same: bool, *, again: bool) -> list[Piece]:
    """Say how the second arm stands to the base, so that the last question is not the whole story."""
    each = difference(lead, b, BASE) if b != BASE else None
    if each is None:
        return []
    found = finding(each, lead.better)
    values = _values(lead, BASE, b)
    where = "" if same else f" in {lead.phrase or lead.title}"
    if found == "undecided":
        none = "none" if again else "no difference can be shown"
        return [Piece(f"; between {title_of(b)} and the base "), Piece(none, found), Piece(f"{where} ({values})")]
    return [Piece(f"; {title_of(b)} is "), Piece(found, found), Piece(f" than the base{where} ({values})")]


def tiles(story: Story, metric: Metric) -> list[Tile]:
    """Return the steps of the chain; of many arms only the base and the two of the question."""
    names = [name for name in story.models if name in metric.models]
    if len(names) > TILES:
        wanted = {BASE, *(key_pair(story.verdict, story.models) or ())}
        names = [name for name in names if name in wanted]
    made = [Tile(name, spoken(metric.models[name].value, metric.unit)) for name in names[:1]]
    for before, name in pairwise(names):
        each = difference(metric, name, before)
        value = spoken(metric.models[name].value, metric.unit)
        if each is None:
            made.append(Tile(name, value))
            continue
        decisive_one = (name, before) == key_pair(story.verdict, story.models)
        found = _finding_of(story, metric, name, before) if decisive_one else finding(each, metric.better)
        made.append(Tile(name, value, found or "", spoken_change(each.value, metric.unit), title_of(before)))
    return made


def picture(metric: Metric) -> Picture | None:
    """Lay out every arm of a measure on one scale, with its interval and the value of each seed."""
    estimates = {name: each for name, each in metric.models.items() if each.value is not None}
    values = [
        bound
        for name, each in estimates.items()
        for bound in (each.value, each.ci_low, each.ci_high, *metric.by_seed.get(name, []))
        if bound is not None and math.isfinite(bound)
    ]
    if not values:
        return None
    scale = 100 if metric.unit == "share" else 1
    ticks = round_ticks(scale * min(values), scale * max(values))
    if metric.unit == "share" and ticks[-1] - ticks[0] > 60:
        ticks = [0, 25, 50, 75, 100]
    rows = []
    for name, each in estimates.items():
        assert each.value is not None
        line = None
        if each.ci_low is not None and each.ci_high is not None:
            line = percent_of(scale * each.ci_low, ticks), percent_of(scale * each.ci_high, ticks)
        seeds = metric.by_seed.get(name, [])
        rows.append(
            Row(
                name,
                _interval(metric, each.value, each.ci_low, each.ci_high),
                percent_of(scale * each.value, ticks),
                line,
                [percent_of(scale * value, ticks) for value in seeds] if len(seeds) > 1 else [],
            )
        )
    unit = f"{SPACE}%" if metric.unit == "share" else ""
    return Picture(metric, [(percent_of(tick, ticks), f"{tick:g}{unit}") for tick in ticks], rows)


def _interval(metric: Metric, value: float, low: float | None, high: float | None) -> str:
    text = spoken(value, metric.unit)
    if low is None or high is None:
        return text
    ends = [spoken(end, metric.unit).replace(f"{SPACE}%", "") for end in (low, high)]
    return f"{text} ({ends[0]} to {ends[1]})"


def facts(story: Story, metrics: Sequence[Metric]) -> list[str]:
    """Say in a few words how far the sentence reaches: items, seeds, plan, looks and side."""
    if story.verdict is None:
        return []
    said = [" and ".join(dict.fromkeys(f"{metric.n:,} {metric.items}" for metric in metrics))] if metrics else []
    pair = key_pair(story.verdict, story.models)
    if pair and metrics:
        count = story.runs or _compared_seeds(metrics, pair)
        adapters = "this adapter" if BASE in pair else "these two adapters"
        what = adapters if count == 1 else "these adapters" if count < METHODS else "the methods"
        said.append(f"{'one seed' if count == 1 else f'{count} seeds'}, so it speaks of {what}")
    if story.question:
        said.append("planned before training" if story.question.planned else "not planned before training")
    if story.looks:
        said.append(
            "first look at these data" if story.looks == 1 else f"these data were looked at {story.looks} times"
        )
    if story.side == "validation":
        said.append("validation side: it has chosen checkpoints, so it proves nothing")
    return said


def _compared_seeds(metrics: Iterable[Metric], pair: tuple[str, str]) -> int:
    return max((each.seeds for metric in metrics if (each := difference(metric, *pair))), default=1)
