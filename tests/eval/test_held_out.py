"""What is held out: a sample of its prompts that the order of the records does not change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eval.held_out import HeldOut, describe_changes, read_held_out
from scripts.common.config import load_config
from scripts.common.errors import UserError
from scripts.dataset.chat_format import user_turn
from scripts.dataset.records import Record
from scripts.dataset.split import side_of
from tests.conftest import write_jsonl
from tests.support.chain import write_chain
from tests.support.manifests import complete_manifest


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


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Write the data and the configuration of a chain, without a model."""
    (tmp_path / "model").mkdir()
    return write_chain(tmp_path)


@pytest.mark.parametrize("side", ["test", "validation"])
def test_one_side_is_read_and_nothing_of_the_others(config: Path, side: Any) -> None:
    loaded = load_config(config)

    held_out = (
        read_held_out(loaded, ["sft", "dpo"], side) if side == "validation" else read_held_out(loaded, ["sft", "dpo"])
    )

    assert {side_of(record, loaded.values.data) for record in held_out.records} == {side}
    assert {Path(record.source).name.split(".")[0] for record in held_out.records} == {"sft", "dpo"}


def test_near_duplicates_are_left_out_of_what_is_measured_and_counted(config: Path) -> None:
    text = "please say which of the colours on this old card is the brightest one, and why"
    write_jsonl(
        config.parent / "sft.jsonl", [{"instruction": f"{text}{end}", "output": "a"} for end in ("", " thanks")]
    )
    seeds = [load_config(config, [f"data.split_seed={seed}"]) for seed in range(40)]
    prompts = [Record("x:1", user_turn(f"{text}{end}"), (1,)) for end in ("", " thanks")]
    prompts = [
        replace(prompt, messages=(*prompt.messages, {"role": "assistant", "content": "a"})) for prompt in prompts
    ]
    loaded = next(each for each in seeds if [side_of(one, each.values.data) for one in prompts] == ["test", "train"])

    held_out = read_held_out(loaded, ["sft", "dpo"])
    with pytest.raises(UserError) as refused:
        read_held_out(loaded, ["sft"])

    assert [near.record.source for near in held_out.near_duplicates] == [f"{config.parent}/sft.jsonl:1"]
    assert not any("sft.jsonl" in record.source for record in held_out.records)
    assert "data.test_ratio: each of its 1 records is close to one of another side" in str(refused.value)
    assert "data.group_field" in str(refused.value)


def test_an_empty_side_is_refused_with_its_key(config: Path) -> None:
    with pytest.raises(
        UserError, match=r"^data.test_ratio: 0 puts no record on the test side, so nothing can be compared"
    ):
        read_held_out(load_config(config, ["data.test_ratio=0"]), ["sft"])


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            'data.system_prompt="Be brief."',
            'was trained with data.system_prompt: null, but the configuration has "Be brief."',
        ),
        ("data.train_on=last", 'was trained with data.train_on: "all", but the configuration has "last"'),
        (
            'data.chat_template_kwargs={"a": 1}',
            "was trained with data.chat_template_kwargs: {}, but the configuration has {",
        ),
        ("data.template_date=2026-01-31", "was trained with data.template_date: null, but the configuration has"),
        ("data.on_bad_row=skip", None),
    ],
)
def test_a_setting_that_changes_records_is_noticed(config: Path, setting: str, said: str | None) -> None:
    held_out = read_held_out(load_config(config, [setting]), ["sft"])
    before = complete_manifest("sft", config={"data": {"train_on": "all", "system_prompt": None}})

    notes = describe_changes(Path("adapter"), before, held_out)

    assert [note.startswith(f"adapter: {said}") for note in notes] == ([True] if said else [])
