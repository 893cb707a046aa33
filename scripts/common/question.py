"""The primary question of a comparison, fixed before anything is trained: which arms, which measures, at which margins."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from scripts.common.artifacts import PlanFacts, sha256_json
from scripts.common.schema import Check, Config
from scripts.common.stages import BASE, TRAINING_STAGES, planned_stages

ALL_RULES, PREFERENCE, REWARD = "all_rules", "preference_accuracy", "reward_accuracy"
LOSS, CHECKS_PASSED = "held_out_loss", "checks_passed"
MEASURES = (ALL_RULES, PREFERENCE, REWARD, LOSS, CHECKS_PASSED)
PRIMARY = (ALL_RULES, PREFERENCE)  # the default, as far as they are measured: SFT and DPO are trained for them


def arm_names(values: Config) -> list[str]:
    """Return the arms that a configuration names, the base first, and those that only a study has before the stages."""
    return [BASE, *(values.eval.models or dict.fromkeys([*(values.study.arms or ()), *TRAINING_STAGES]))]


def planned_arms(values: Config) -> list[str]:
    """Return the arms that a comparison will have once every stage of the configuration was run."""
    return [BASE, *(values.eval.models or [stage.name for stage in planned_stages(values)])]


def default_question(arms: Sequence[str]) -> list[str]:
    """Ask about the last arm, against the one before it."""
    return [arms[-1], arms[-2]]


def check_names(checks: Sequence[Check]) -> list[str]:
    """Return the measure of each single check: its name in lower case, without what is neither letter nor digit."""
    found: list[str] = []
    for number, check in enumerate(checks, 1):
        slug = re.sub(r"[\W_]+", "_", check.name.casefold()).strip("_")
        name = f"check_{slug}"[:60]
        found.append(f"check_{number}" if not slug or name in found else name)
    return found


def plan_of(values: Config, question: Sequence[str] | None = None) -> dict[str, Any]:
    """Return everything that decides what the verdict will be about; the rules are part of it, as they are a measure."""
    plan = values.eval.plan
    asked = question or plan.question or default_question(planned_arms(values))
    return {
        "question": list(asked),
        "measures": plan.measures,
        "margins": values.eval.margins,
        "alpha": plan.alpha,
        "seeds": plan.seeds,
        "rules": [check.model_dump(mode="json") for check in values.eval.checks],
    }


def plan_sha256(values: Config, question: Sequence[str] | None = None) -> str:
    """Return the identity of a plan."""
    return sha256_json(plan_of(values, question))


def freeze_plan(values: Config) -> PlanFacts:
    """Write down, for the manifest of the first training stage, what was planned and when."""
    return PlanFacts(sha256=plan_sha256(values), frozen=datetime.now(UTC).isoformat(timespec="seconds"))


def question_problems(values: Config) -> Iterator[tuple[str, str]]:
    """Yield (key, problem) for each name in `eval.plan` and `eval.margins` that nothing in the configuration has."""
    question, arms = values.eval.plan.question, arm_names(values)
    if question and (len(set(question)) < 2 or not set(question) <= set(arms)):
        yield "eval.plan.question", f"found {', '.join(question)}; wanted two of {', '.join(arms)}"
    known = [*MEASURES, *check_names(values.eval.checks)]
    for key, names in (("eval.plan.measures", values.eval.plan.measures or []), ("eval.margins", values.eval.margins)):
        unknown = [name for name in names if name not in known]
        if unknown:
            yield key, f"found {', '.join(unknown)}; wanted measures of {', '.join(known)}"
