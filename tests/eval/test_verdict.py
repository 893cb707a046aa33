"""The verdict finds a planted effect, sells no chance, and says in one sentence of what it speaks."""

from __future__ import annotations

import numpy as np
import pytest

from eval.metrics import build_metrics
from eval.verdict import Question, Verdict, decide
from scripts.common.errors import UserError
from tests.support.tables import passes, table

MARGINS = {"all_rules": 0.25, "preference_accuracy": 0.25}


def answer(*tables, a: str = "dpo", b: str = "sft", **facts: object) -> tuple[Verdict, list[str]]:
    """Decide whether one arm is better than the other in all these tables."""
    question = Question(a=a, b=b, measures=[each.name for each in tables], **facts)
    return decide(build_metrics(tables, question), question)


def rates(sft: float, dpo: float, seeds: int = 1, count: int = 84, chance: int = 0) -> dict[str, list[list[float]]]:
    """Return outcomes of two arms, exactly as often passed as it is said, on items of which some tie."""
    rows = {}
    for place, (name, rate) in enumerate((("sft", sft), ("dpo", dpo))):
        row = (np.arange(count) < round(rate * count)).astype(float)
        generator = np.random.default_rng(chance + place)
        rows[name] = [generator.permutation(row).tolist() for _ in range(seeds)]
    return rows


@pytest.mark.parametrize("seeds", [1, 3, 5])
@pytest.mark.parametrize(("better", "outcome"), [("dpo", "better"), ("sft", "worse")])
def test_a_planted_effect_is_found_and_a_planted_loss_too(seeds: int, better: str, outcome: str) -> None:
    rows = {name: passes(0.95 if name == better else 0.5, seeds=seeds, chance=len(name)) for name in ("sft", "dpo")}
    rows["dpo"] = passes(0.95 if better == "dpo" else 0.5, seeds=seeds, chance=9)
    verdict, _ = answer(table(rows))
    assert (verdict.outcome, verdict.winner, verdict.compared) == (outcome, better, ["dpo", "sft"])


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_an_effect_that_changes_with_the_seed_is_not_sold(seeds: int) -> None:
    """Two procedures that are equal, whose adapters differ by 8 points one way or the other, on 300 prompts."""
    sold = 0
    for chance in range(100):
        generator = np.random.default_rng(chance)
        gaps = generator.normal(0, 0.08, (seeds, 1))
        rows = {"sft": generator.random((seeds, 300)) < 0.5, "dpo": generator.random((seeds, 300)) < 0.5 + gaps}
        sold += answer(table(rows))[0].outcome != "undecided"
    assert sold <= 12, f"{sold} of 100 reports name a winner"


def test_what_is_better_with_one_seed_is_said_of_two_adapters_and_with_three_of_the_methods() -> None:
    texts = {seeds: answer(table(rates(0.5, 0.75, seeds))) for seeds in (1, 2, 3)}
    assert texts[1][0].text == (
        "These two adapters: DPO is better than SFT in the share of all_rules (50 % → 75 %, n = 84 prompts)."
    )
    assert texts[2][0].text.startswith("These adapters of two seeds: ")
    assert (
        texts[3][0].text == "DPO is better than SFT in the share of all_rules (50 % → 75 %, n = 84 prompts, 3 seeds)."
    )
    assert any(note.startswith("One seed: this speaks of these adapters") for note in texts[1][1])
    assert any(note.startswith("Two seeds: this speaks of these adapters") for note in texts[2][1])
    assert not any("speaks of these adapters" in note for note in texts[3][1])
    assert any(
        "between seeds the difference scatters by" in note and "degrees of freedom" in note for note in texts[3][1]
    )


def test_the_base_and_arms_with_names_of_their_own_are_called_by_them() -> None:
    rows = {"base": passes(0.2), "lr 2e-4": passes(0.9, chance=1)}
    assert "lr 2e-4 is better than the base in" in answer(table(rows), a="lr 2e-4", b="base")[0].text


def measures(first: tuple[float, float], second: tuple[float, float], seeds: int = 3):
    """Return two primary measures with what SFT and DPO reach in each."""
    return table(rates(*first, seeds)), table(rates(*second, seeds, chance=7), "preference_accuracy")


@pytest.mark.parametrize(
    ("first", "second", "margins", "outcome", "text"),
    [
        (
            (0.5, 0.75), (0.5, 0.5), {}, "better",
            "DPO is better than SFT in the share of all_rules (50 % → 75 %, n = 84 prompts, 3 seeds); undecided in the share "
            "of preference_accuracy (50 % → 50 %, n = 84 prompts, 3 seeds).",
        ),
        (
            (0.75, 0.5), (0.75, 0.5), {}, "worse",
            "DPO is worse than SFT in the share of all_rules (75 % → 50 %, n = 84 prompts, 3 seeds) and the share of "
            "preference_accuracy (75 % → 50 %, n = 84 prompts, 3 seeds).",
        ),
        (
            (0.5, 0.75), (0.75, 0.5), {}, "undecided",
            "It is undecided whether DPO is better than SFT: it is better in the share of all_rules (50 % → 75 %, n = 84 "
            "prompts, 3 seeds) and worse in the share of preference_accuracy (75 % → 50 %, n = 84 prompts, 3 seeds).",
        ),
        (
            (0.5, 0.51), (0.5, 0.5), {}, "undecided",
            "It is undecided whether DPO is better or worse than SFT in the share of all_rules (50 % → 51 %, n = 84 prompts, 3 "
            "seeds) and the share of preference_accuracy (50 % → 50 %, n = 84 prompts, 3 seeds).",
        ),
        (
            (0.5, 0.5), (0.5, 0.5), MARGINS, "equivalent",
            "DPO and SFT are equivalent in the share of all_rules (50 % → 50 %, n = 84 prompts, 3 seeds, margin 25 points) and "
            "the share of preference_accuracy (50 % → 50 %, n = 84 prompts, 3 seeds, margin 25 points).",
        ),
        (
            (0.5, 0.5), (0.5, 0.5), {"all_rules": 0.25}, "undecided",
            "It is undecided whether DPO is better or worse than SFT in the share of preference_accuracy (50 % → 50 %, n = 84 "
            "prompts, 3 seeds); equivalent in the share of all_rules (50 % → 50 %, n = 84 prompts, 3 seeds, margin 25 points).",
        ),
    ],
)  # fmt: skip
def test_one_sentence_names_each_measure_with_its_figures(
    first: tuple[float, float], second: tuple[float, float], margins: dict[str, float], outcome: str, text: str
) -> None:
    verdict, notes = answer(*measures(first, second), margins=margins)
    assert (verdict.outcome, verdict.text) == (outcome, text)
    assert "corrected for 2 comparisons (Holm, at 0.05)" in notes[0]
    assert (verdict.winner is None) == (outcome not in ("better", "worse"))


def test_no_worse_needs_a_margin_and_a_bound_on_the_loss() -> None:
    """Ten points up, of which the test cannot be sure; a loss of a quarter it can exclude, a gain of a quarter not."""
    rows = rates(0.5, 0.6, chance=3)
    assert answer(table(rows))[0].outcome == "undecided"
    verdict, _ = answer(table(rows), margins={"all_rules": 0.15})
    assert verdict.outcome == "no_worse"
    assert verdict.text == (
        "These two adapters: DPO is no worse than SFT in the share of all_rules (50 % → 60 %, n = 84 prompts, margin 15 points)."
    )
    assert answer(table(rows), margins={"all_rules": 0.01})[0].outcome == "undecided"
    assert answer(table(rows), a="sft", b="dpo", margins={"all_rules": 0.15})[0].outcome == "undecided"


def test_a_margin_of_a_loss_is_on_its_upper_side() -> None:
    generator = np.random.default_rng(0)
    sft = generator.gamma(4, 0.3, (1, 84)) * 20
    facts = {"weights": [20.0] * 84, "unit": "nats per token", "better": "lower", "noun": "prompts"}
    for shift, outcome in (
        (0.0, "equivalent"),
        (0.05, "undecided"),
        (0.4, "worse"),
        (-0.4, "better"),
        (-0.05, "no_worse"),
    ):
        noise = generator.normal(0, 1, (1, 84))
        dpo = sft + 20 * (shift + 0.24 * (noise - noise.mean()) / noise.std())
        rows = {"sft": sft.tolist(), "dpo": dpo.tolist()}
        verdict, _ = answer(table(rows, "held_out_loss", **facts), margins={"held_out_loss": 0.05})
        assert verdict.outcome == outcome, shift


def test_what_is_shown_is_better_or_worse_even_within_the_margin() -> None:
    assert answer(table(rates(0.5, 0.75, 3)), margins={"all_rules": 0.5})[0].outcome == "better"


def test_figures_that_differ_are_not_written_alike() -> None:
    rows = {"sft": [[1.0] * 700 + [0.0] * 300], "dpo": [[1.0] * 704 + [0.0] * 296]}
    assert "(70.0 % → 70.4 %, n = 1000 prompts)" in answer(table(rows))[0].text


def test_figures_that_rounding_alone_tells_apart_are_written_alike() -> None:
    """Over three seeds a third of the items each, in another order of summation."""
    thirds = {"sft": [[0.1] * 9, [0.2] * 9, [0.3] * 9], "dpo": [[0.3] * 9, [0.2] * 9, [0.1] * 9]}
    verdict, _ = answer(table(thirds))
    assert "(20 % → 20 %" in verdict.text


def test_pairs_are_counted_with_their_prompts() -> None:
    rows = rates(0.5, 0.55, count=80)
    assert "n = 80 pairs of 20 prompts" in answer(table(rows, pairs=4))[0].text


def test_what_would_be_needed_is_more_than_there_is_or_more_seeds() -> None:
    verdict, notes = answer(table(rates(0.5, 0.56, chance=3)))
    assert verdict.needed_n > 84
    assert any(
        "would be shown in four of five" in note and f"about {verdict.needed_n:,} prompts" in note for note in notes
    )
    scattered = [[1.0] * n + [0.0] * (300 - n) for n in (200, 100, 165)]
    verdict, notes = answer(table({"sft": [[1.0] * 150 + [0.0] * 150] * 3, "dpo": scattered}))
    assert (verdict.outcome, verdict.needed_n) == ("undecided", None)
    assert any("no number of prompts is enough: it takes more seeds" in note for note in notes)


def test_the_notes_say_whether_the_question_was_planned() -> None:
    planned = answer(table(rates(0.5, 0.6)), planned=True)[1]
    assert "It was planned before training." in planned[0]
    assert "It was not planned before training." in answer(table(rates(0.5, 0.6)))[1][0]


def test_a_question_that_no_measure_answers_is_refused() -> None:
    rows = {"sft": passes(0.5), "dpo": passes(0.5, chance=1)}
    question = Question(a="dpo", b="base", measures=["all_rules"])
    with pytest.raises(UserError, match="none of which compares dpo with base"):
        decide(build_metrics([table(rows)], question), question)


@pytest.mark.parametrize("earlier", ["no_difference", "mixed"])
def test_the_outcomes_of_earlier_versions_are_undecided(earlier: str) -> None:
    verdict = Verdict(text="…", outcome=earlier, compared=["dpo", "sft"], winner=None, needed_n=None)
    assert verdict.outcome == "undecided"
