"""What a report shows beside its figures: the columns, the health of the answers, and the answers side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from statistics import mean

from eval.arms import Arm
from eval.measuring import ORIGINS, Measured, Prepared
from eval.metrics import Estimate, Metric
from eval.report import Column, Sample
from eval.statistics import wilson
from eval.verdict import Question
from scripts.common.paths import portable_path
from scripts.common.stages import BASE


def describe_columns(arms: Sequence[Arm]) -> dict[str, Column]:
    """Say what each arm is."""
    columns = {BASE: Column(kind="base", stands=True)}
    for arm in arms:
        columns[arm.name] = Column(
            kind="merged" if arm.members[0].is_merged else "adapter",
            stage=arm.members[0].stage,
            seeds=list(arm.seeds),
            folders=[portable_path(member.folder) for member in arm.members],
            stands=arm.stands,
        )
    return columns


def describe_health(members: Sequence[Measured]) -> dict[str, float | None]:
    """Return the mean over seeds of what degenerate answers show first, and of how far the models have moved."""
    figures = [
        {**vars(each.health), **{f"kl_to_{origin}": each.kl.get(str(origin)) for origin in ORIGINS}} for each in members
    ]
    return {
        name: None if any(each[name] is None for each in figures) else mean(each[name] for each in figures)
        for name in figures[0]
    }


def choose_answers(arms: Sequence[Arm], question: Question) -> tuple[dict[str, int], list[str]]:
    """Return whose answers are shown: for each arm the place of the member whose seed the arms compared share.

    Returns also a note that says so, where there are others.
    """
    asked = [arm for arm in arms if arm.name in (question.a, question.b) and not arm.stands]
    shared = [seed for seed in (asked or arms)[0].seeds if all(seed in arm.seeds for arm in asked)]
    seed = shared[0] if shared else None
    places = {arm.name: arm.members.index(arm.member_of(seed)) for arm in arms}
    several = any(len(arm.members) > 1 for arm in arms)
    return places, [f"The answers that are shown are those of seed {seed}."] if several else []


def describe_samples(
    prepared: Prepared, measured: Mapping[str, Sequence[Measured]], places: Mapping[str, int], question: Question
) -> list[Sample]:
    """Put the answers of all models side by side, those that differ most between the two compared first."""
    shown = {name: members[places.get(name, 0)] for name, members in measured.items()}
    samples = []
    for index, asked in enumerate(prepared.questions):
        answers = {name: each.answers[index].text for name, each in shown.items()}
        before, after = (answers[name].split() for name in (question.b, question.a))
        samples.append(
            Sample(
                source=portable_path(asked.source),
                prompt="\n\n".join(message["content"] for message in asked.prompt if message["role"] != "system"),
                reference=asked.target,
                answers=dict(answers),
                checks={name: each.checks[index] for name, each in shown.items()},
                changed=round(1 - SequenceMatcher(None, before, after, autojunk=False).ratio(), 4),
            )
        )
    return sorted(samples, key=lambda sample: -sample.changed)


def add_baselines(metrics: Sequence[Metric], base: Measured) -> None:
    """Put beside the figures of pairs what a judge of nothing but length would reach."""
    longer = base.chosen_is_longer()
    for metric in metrics:
        if metric.group == "preference":
            metric.baselines = {"longer answer wins": Estimate.of(wilson(sum(longer), len(longer)))}
