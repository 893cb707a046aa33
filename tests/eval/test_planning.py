"""Planning says what the held-out items and seeds can show, and what a smaller difference would take."""

from __future__ import annotations

import re

import numpy as np
import pytest

from eval.planning import ASSUMED, SHARE, Assumption, Size, needed_items, needed_seeds, plan_lines
from eval.statistics import crossed
from eval.verdict import Question


def question(*measures: str, alpha: float = 0.05) -> Question:
    return Question(a="dpo", b="sft", measures=list(measures), alpha=alpha)


@pytest.mark.parametrize("size", [Size(84, 84, 1), Size(120, 40, 1), Size(84, 84, 3), Size(160, 80, 5)])
def test_the_smallest_gap_is_found_in_about_four_of_five_cases(size: Size) -> None:
    """Drawn as it is assumed: a third of an item's variance lasts over seeds, items of a prompt correlate by 0.3."""
    assumed = Assumption(item_sd=0.4, seed_sd=0.03 if size.seeds > 1 else 0.0, unit="share")
    gap, found, runs = size.smallest_gap(assumed, 0.05), 0, 300
    per = size.items // size.clusters
    generator = np.random.default_rng(size.items)
    for _ in range(runs):
        lasting, passing = (
            np.sqrt(0.3) * generator.normal(size=(rows, size.clusters)).repeat(per, axis=1)
            + np.sqrt(0.7) * generator.normal(size=(rows, size.items))
            for rows in (1, size.seeds)
        )
        values = gap + 0.4 * (np.sqrt(1 / 3) * lasting + np.sqrt(2 / 3) * passing)
        values += assumed.seed_sd * generator.normal(size=(size.seeds, 1))
        found += crossed(values, np.arange(size.items) // per).p_value <= 0.05
    assert 0.70 <= found / runs <= 0.90


def test_what_is_needed_is_more_than_there_is_and_enough() -> None:
    for size in (Size(40, 40, 1), Size(300, 100, 3), Size(84, 84, 5)):
        for gap in (0.3, 0.1, 0.03):
            items = needed_items(size, gap, SHARE, 0.025)
            assert items is None or (items > size.items and size.with_items(items).smallest_gap(SHARE, 0.025) <= gap)
            seeds = needed_seeds(size, gap, SHARE, 0.025)
            assert seeds is None or seeds > size.seeds
    assert needed_items(Size(84, 84, 3), 0.01, SHARE, 0.05) is None, "three seeds scatter by more than a point"


def test_each_measure_has_a_line_with_its_own_numbers() -> None:
    items, clusters = {"all_rules": 84, "preference_accuracy": 464}, {"all_rules": 84, "preference_accuracy": 274}
    lines = plan_lines(items, clusters, 1, question("all_rules", "preference_accuracy"))
    assert lines[0].startswith(
        "all_rules: 84 items, 1 seed: shows a difference between these two adapters of 15 points;"
    )
    assert re.search(r"half of that takes about \d+ items$", lines[0])
    assert lines[1].startswith("preference_accuracy: 464 items of 274 prompts, 1 seed:")
    scatter = "all_rules and preference_accuracy scatter by 45 points between items and 2 points between seeds"
    assert (
        lines[2] == f"assumed: {scatter} (standard deviations). In four of five comparisons, at 0.025 for each measure"
    )
    assert "between the methods of" in plan_lines(items, clusters, 3, question("all_rules"))[0]
    (loss, _) = plan_lines({"held_out_loss": 84}, {"held_out_loss": 84}, 1, question("held_out_loss"))
    assert "nats per token" in loss
    assert plan_lines({}, {}, 1, question("all_rules")) == []
    assert ASSUMED["held_out_loss"].unit == "nats per token"


def test_two_measures_show_less_than_one_and_pairs_of_a_prompt_less_than_prompts() -> None:
    alone, both = (Size(84, 84, 1).smallest_gap(SHARE, 0.05 / count) for count in (1, 2))
    assert alone < both
    assert Size(400, 400, 1).smallest_gap(SHARE, 0.05) < Size(400, 100, 1).smallest_gap(SHARE, 0.05)
    assert Size(400, 100, 1).smallest_gap(SHARE, 0.05) < Size(100, 100, 1).smallest_gap(SHARE, 0.05)
