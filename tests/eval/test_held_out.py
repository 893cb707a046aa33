"""What is held out: a sample of its prompts that the order of the records does not change."""

from __future__ import annotations

from collections.abc import Sequence

from eval.held_out import HeldOut
from scripts.dataset.chat_format import user_turn
from scripts.dataset.records import Record


def asked(numbers: Sequence[int], most: int | None, seed: int = 0) -> list[str]:
    """Return the prompts drawn from records with these numbers."""
    answer = {"role": "assistant", "content": "yes"}
    records = tuple(Record(f"x:{n}", (*user_turn(f"prompt {n}"), answer), (1,)) for n in numbers)
    return [question.text for question in HeldOut(records).questions(most, seed)]


def test_all_prompts_are_asked_in_the_order_of_the_data() -> None:
    everything = [f"prompt {number}" for number in range(20)]

    assert asked(range(20), None) == asked(range(20), 20) == asked(range(20), 50) == everything


def test_a_part_of_the_prompts_is_a_sample_that_the_seed_fixes_and_not_the_first_ones() -> None:
    """Files are often sorted by subject or date, so their first records are like each other."""
    drawn = asked(range(100), 10)

    assert len(drawn) == 10
    assert drawn == sorted(drawn, key=lambda text: int(text.split()[1]))
    assert max(int(text.split()[1]) for text in drawn) > 50
    assert set(asked(range(99, -1, -1), 10)) == set(drawn)
    assert asked(range(100), 10) == drawn
    assert asked(range(100), 10, seed=1) != drawn


def test_other_records_leave_most_of_a_sample_as_it_is() -> None:
    assert len(set(asked(range(100), 10)) & set(asked(range(110), 10))) >= 8


def test_a_prompt_is_as_likely_drawn_wherever_it_stands() -> None:
    drawn = [int(text.split()[1]) for seed in range(200) for text in asked(range(20), 5, seed)]

    assert all(25 <= drawn.count(number) <= 80 for number in range(20)), "50 expected of each"
