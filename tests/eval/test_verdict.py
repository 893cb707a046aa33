"""The verdict finds a planted effect, sells no chance, and says in whole sentences of what it speaks."""

from __future__ import annotations

import pytest
import torch

from eval.measuring import Measured
from eval.metrics import Difference, Estimate, Metric, Runs, build_metrics
from eval.verdict import decide


class NoPairs:
    """Stand where no preference pairs were held out."""

    pairs: tuple = ()


def planted(rate: float, count: int = 80) -> Measured:
    """Return a model that passes its one check at a given rate."""
    from scripts.model.scoring import AnswerScore

    generator = torch.Generator().manual_seed(int(rate * 100))
    passed = (torch.rand(count, generator=generator) < rate).tolist()
    return Measured(checks=[{"check": value} for value in passed], targets=[AnswerScore(-2.0, 2)] * count)


def test_a_planted_effect_is_found_and_a_planted_loss_too() -> None:
    """Checks that one model always passes and the other rarely does decide the verdict, whichever way round."""
    for better, outcome in (("dpo", "better"), ("sft", "worse")):
        measured = {name: planted(0.95 if name == better else 0.5) for name in ("base", "sft", "dpo")}
        metrics = build_metrics(measured, NoPairs(), {})
        verdict, _ = decide(metrics, ["base", "sft", "dpo"], None)
        assert (verdict.outcome, verdict.winner) == (outcome, better)


def test_an_effect_that_changes_sign_between_seeds_is_not_sold() -> None:
    measured = {name: planted(0.95 if name == "dpo" else 0.5) for name in ("base", "sft", "dpo")}
    metrics = build_metrics(measured, NoPairs(), {})
    title = next(metric.title for metric in metrics if metric.name == "checks_passed")
    noisy = {
        "sft": {"mean": 0.67, "spread": 0.21, "values": [0.5, 0.9, 0.6]},
        "dpo": {"mean": 0.72, "spread": 0.23, "values": [0.95, 0.5, 0.7]},
    }
    runs = {"seeds": [0, 1, 2], "metrics": [{"title": title, "base": 0.4, "models": noisy}]}
    assert decide(metrics, ["base", "sft", "dpo"], Runs.model_validate(runs))[0].outcome == "no_difference"


def metric(name: str, phrase: str, n: int, items: str, value: float, shown: bool, needed: int | None) -> Metric:
    """Return a share that SFT reaches in half of all items, and DPO in `value` more."""
    difference = Difference(
        a="dpo", b="sft", value=value, ci_low=value - 0.1, ci_high=value + 0.1, p_value=0.01, test="exact", needed_n=needed,
        p_adjusted=0.02, shown=shown,
    )  # fmt: skip
    models = {
        "sft": Estimate(value=0.5, ci_low=0.4, ci_high=0.6),
        "dpo": Estimate(value=0.5 + value, ci_low=0.4, ci_high=0.9),
    }
    return Metric(
        name=name, title=name, phrase=phrase, unit="share", better="higher", group="checks", n=n, items=items, models=models,
        differences=[difference],
    )  # fmt: skip


def two_metrics(first: tuple[float, bool], second: tuple[float, bool]) -> list[Metric]:
    """Return both decisive metrics, each with its difference and whether that is shown."""
    return [
        metric("checks_passed", "the share of checks", 84, "prompts", *first, 300),
        metric("preference_accuracy", "the share of pairs", 37, "pairs", *second, 238),
    ]


@pytest.mark.parametrize(("first", "second", "outcome", "text"), [
    (
        (0.1, False), (0.1, False), "no_difference",
        "Between DPO and SFT no difference can be shown in the share of checks (n = 84) or in the share of pairs (n = 37). "
        "A difference of the size seen would need about 238 pairs for the share of pairs.",
    ),
    (
        (0.21, True), (0.1, False), "better",
        "DPO is better than SFT in the share of checks (50 % → 71 %, n = 84). "
        "No difference can be shown in the share of pairs (n = 37).",
    ),
    (
        (-0.21, True), (-0.1, True), "worse",
        "DPO is worse than SFT in the share of checks (50 % → 29 %, n = 84) and the share of pairs (50 % → 40 %, n = 37).",
    ),
    (
        (0.21, True), (-0.1, True), "mixed",
        "DPO is better than SFT in the share of checks (50 % → 71 %, n = 84). "
        "It is worse in the share of pairs (50 % → 40 %, n = 37).",
    ),
])  # fmt: skip
def test_each_number_of_the_verdict_names_its_metric(
    first: tuple[float, bool], second: tuple[float, bool], outcome: str, text: str
) -> None:
    verdict, notes = decide(two_metrics(first, second), ["sft", "dpo"], None)
    assert (verdict.outcome, verdict.text) == (outcome, text)
    assert verdict.needed_n == (238 if outcome == "no_difference" else None)
    assert notes[0].startswith("The verdict rests on the share of checks and the share of pairs.")
    assert "corrected for 2 comparisons" in notes[0]
