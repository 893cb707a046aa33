"""The primary question of a report: what was planned, or what follows from the arms and measures that there are."""

from __future__ import annotations

from collections.abc import Sequence

from eval.arms import Arm, members_of
from eval.held_out import HeldOut
from eval.verdict import Question
from scripts.common.errors import UserError
from scripts.common.question import (
    ALL_RULES,
    CHECKS_PASSED,
    LOSS,
    PREFERENCE,
    PRIMARY,
    REWARD,
    check_names,
    default_question,
    plan_sha256,
)
from scripts.common.schema import Config
from scripts.common.stages import BASE


def ask(values: Config, arms: Sequence[str], held_out: HeldOut) -> Question:
    """Return the question that `eval.plan` asks about these arms, or else the default one.

    Raises: UserError when `eval.plan` asks for an arm or a measure that there is not.
    """
    a, b = values.eval.plan.question or default_question(arms)
    if not {a, b} <= set(arms):
        raise UserError(
            f"eval.plan.question: found {a}, {b}; wanted two of the arms that there are: {', '.join(arms)}."
        )
    checks = values.eval.checks
    measurable = [LOSS, *((ALL_RULES, CHECKS_PASSED, *check_names(checks)) if checks else ())]
    measurable += [PREFERENCE, REWARD] if held_out.pairs else []
    planned = values.eval.plan.measures
    absent = [name for name in planned or [] if name not in measurable]
    if absent:
        raise UserError(
            f"eval.plan.measures: found {', '.join(absent)}, which cannot be measured here: {_lacking(held_out, values)}. "
            f"There are: {', '.join(measurable)}."
        )
    return Question(
        a=a,
        b=b,
        measures=planned or [name for name in PRIMARY if name in measurable] or [LOSS],
        alpha=values.eval.plan.alpha,
        margins=values.eval.margins,
    )


def choose_question(values: Config, arms: Sequence[Arm], held_out: HeldOut) -> Question:
    """Return the question that the verdict answers.

    It was planned if the manifest of every model compared holds the hash of just this one.
    """
    question = ask(values, [BASE, *(arm.name for arm in arms)], held_out)
    question.plan_sha256 = plan_sha256(values, (question.a, question.b))
    plans = [member.manifest.plan for member in members_of(arms)]
    question.planned = all(plan is not None and plan.sha256 == question.plan_sha256 for plan in plans)
    return question


def _lacking(held_out: HeldOut, values: Config) -> str:
    lacking = [] if values.eval.checks else ["there are no rules in eval.checks"]
    return " and ".join(lacking + ([] if held_out.pairs else ["no preference pair is held out"]))


def describe_seeds(values: Config, arms: Sequence[Arm]) -> list[str]:
    """Say where another number of seeds is compared than was planned."""
    wanted = values.eval.plan.seeds
    unlike = [f"{arm.name} has {len(arm.members)}" for arm in arms if not arm.stands and len(arm.members) != wanted]
    return [f"eval.plan.seeds: {wanted} seeds were planned, but {', '.join(unlike)}."] if wanted and unlike else []
