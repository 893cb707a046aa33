"""One split for all stages, decided by the prompt alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from scripts.common.errors import UserError
from scripts.common.schema import Data, WeightedDataset
from scripts.dataset.records import (
    count_duplicates,
    load_datasets,
    parse_preference,
    parse_record,
)
from scripts.dataset.split import is_validation, shared_answers, split_records
from tests.conftest import write_jsonl
from tests.support.records import KEY, instruction, load, talk

# --- the split


def test_every_file_gives_records_to_both_sides(tmp_path: Path) -> None:
    data = Data(validation_ratio=0.5)
    sources = [
        WeightedDataset(path=str(write_jsonl(tmp_path / f"{name}.jsonl", [instruction(n) for n in numbers])))
        for name, numbers in (("a", range(20)), ("b", range(20, 40)))
    ]

    split = split_records(load_datasets(sources, parse_record, data, KEY), data, seed=0)

    assert {Path(record.source).name[0] for record in split.train} == {"a", "b"}
    assert {Path(record.source).name[0] for record in split.validation} == {"a", "b"}
    assert len(split.train) + len(split.validation) == 40


def sides(rows: list[dict], tmp_path: Path, data: Data, name: str = "a.jsonl") -> dict[str, str]:
    """Map each first user turn to its side."""
    files = load_datasets(str(write_jsonl(tmp_path / name, rows)), parse_record, data, KEY)
    split = split_records(files, data, seed=0)
    return {record.messages[0]["content"]: "train" for record in split.train} | {
        record.messages[0]["content"]: "validation" for record in split.validation
    }


def test_split_ignores_order_format_file_and_later_turns(tmp_path: Path) -> None:
    data = Data(validation_ratio=0.3)
    rows = [instruction(number) for number in range(60)]
    shuffled = random.Random(1).sample(rows, len(rows))
    chats = [{"messages": talk(row["instruction"], "something", "else", "entirely")} for row in rows]

    first = sides(rows, tmp_path, data)

    assert set(first.values()) == {"train", "validation"}
    assert sides(shuffled, tmp_path, data, "b.jsonl") == first
    assert sides(chats, tmp_path, data, "c.jsonl") == first
    assert sides(rows[:20], tmp_path, data, "d.jsonl").items() <= first.items()


def test_preference_pairs_fall_on_the_same_side_as_instruction_records(tmp_path: Path) -> None:
    data = Data(validation_ratio=0.3)
    pairs = [{"prompt": f"question {n}", "chosen": "good", "rejected": "bad"} for n in range(60)]
    files = load_datasets(str(write_jsonl(tmp_path / "p.jsonl", pairs)), parse_preference, data, "dpo.dataset_path")

    held_out = [record.prompt[0]["content"] for record in split_records(files, data, seed=0).validation]

    assert held_out == [text for text, side in sides([instruction(n) for n in range(60)], tmp_path, data).items() if side == "validation"]  # fmt: skip


def test_same_prompt_with_several_answers_stays_on_one_side(tmp_path: Path) -> None:
    data = Data(validation_ratio=0.5)
    rows = [{"instruction": f"q{n % 20}" + " " * (n // 20), "output": f"a{n}"} for n in range(80)]
    split = split_records(
        load_datasets(str(write_jsonl(tmp_path / "a.jsonl", rows)), parse_record, data, KEY), data, seed=0
    )

    train, held_out = (
        {record.messages[0]["content"].strip() for record in side} for side in (split.train, split.validation)
    )

    assert len(split.train) + len(split.validation) == 80
    assert not train & held_out


def test_split_seed_changes_who_is_held_out_and_ratio_how_many() -> None:
    prompts = [talk(f"prompt {n}") for n in range(2000)]

    def held_out(**changes: object) -> list[bool]:
        return [is_validation(prompt, Data(**changes)) for prompt in prompts]

    assert sum(held_out(validation_ratio=0.2)) == pytest.approx(400, abs=70)
    assert held_out(validation_ratio=0.2) != held_out(validation_ratio=0.2, split_seed=1)
    assert sum(held_out(validation_ratio=0.0)) == 0
    assert all(b for a, b in zip(held_out(validation_ratio=0.1), held_out(validation_ratio=0.3), strict=True) if a)


def test_split_is_the_one_of_earlier_versions() -> None:
    """A changed hash would move held-out prompts into the training of users who continue old work."""
    found = [n for n in range(40) if is_validation(talk(f"prompt {n}"), Data(validation_ratio=0.2))]

    assert found == [1, 9, 10, 13, 18, 22, 26, 27, 39]


def test_one_prompt_only_cannot_be_split(tmp_path: Path) -> None:
    data = Data(validation_ratio=0.999)
    files = load_datasets(str(write_jsonl(tmp_path / "a.jsonl", [instruction(1)] * 3)), parse_record, data, KEY)

    with pytest.raises(UserError) as caught:
        split_records(files, data, seed=0)

    assert str(caught.value) == (
        "data.validation_ratio: 0.999 leaves no record to train on. Lower it, or vary the prompts: "
        "records with the same prompt always stay on one side."
    )


def test_weights_repeat_records_and_take_a_fixed_part(tmp_path: Path) -> None:
    data = Data(validation_ratio=0.2)
    paths = [
        write_jsonl(tmp_path / f"{name}.jsonl", [{"instruction": f"{name} {n}", "output": "a"} for n in range(50)])
        for name in "ab"
    ]
    sources = [WeightedDataset(path=str(paths[0]), weight=2.5), WeightedDataset(path=str(paths[1]), weight=0.5)]

    files = load_datasets(sources, parse_record, data, KEY)
    split, again = split_records(files, data, seed=3), split_records(files, data, seed=3)

    unique = [
        len({r.messages[0]["content"] for r in file.records if not is_validation(r.prompt, data)}) for file in files
    ]
    taken = [[r for r in split.train if r.source.startswith(str(path))] for path in paths]
    assert [len(part) for part in taken] == [unique[0] * 2 + round(unique[0] / 2), round(unique[1] / 2)]
    assert len({r.source for r in taken[1]}) == len(taken[1])
    assert [r.source for r in again.train] == [r.source for r in split.train]
    assert len({r.source for r in split.validation}) == len(split.validation)


def test_duplicates_and_shared_answers_are_counted(tmp_path: Path) -> None:
    rows = [instruction(1), instruction(1), instruction(1, input="x"), instruction(2)]
    data = Data(validation_ratio=0.5)
    many = [{"instruction": f"q{n}", "output": "the same"} for n in range(30)]
    split = split_records(
        load_datasets(str(write_jsonl(tmp_path / "b.jsonl", many)), parse_record, data, KEY), data, seed=0
    )

    assert count_duplicates(load(write_jsonl(tmp_path / "a.jsonl", rows))) == 1
    assert shared_answers(split) == len(split.validation) > 0
