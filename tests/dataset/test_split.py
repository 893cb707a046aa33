"""One split for all stages, decided by the prompt alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from scripts.common.errors import UserError
from scripts.common.schema import Config, Data, Dpo, Sft, WeightedDataset
from scripts.dataset.records import (
    DatasetFile,
    Record,
    count_duplicates,
    load_datasets,
    load_rest_of_chain,
    parse_preference,
    parse_record,
)
from scripts.dataset.split import SIDES, Split, cluster_of, shared_answers, side_of, split_records
from tests.conftest import write_jsonl
from tests.support.records import KEY, instruction, load, refusal, talk

THIRDS = Data(validation_ratio=0.3, test_ratio=0.3)


def read(path: Path, rows: list[dict[str, Any]], data: Data = THIRDS) -> list[DatasetFile]:
    """Write and read the rows, which are instructions or pairs."""
    parse = parse_preference if "chosen" in rows[0] else parse_record
    return load_datasets(str(write_jsonl(path, rows)), parse, data, KEY)


def asked(prompt: str) -> Record:
    """Make a record of one question."""
    return Record("x:1", tuple(talk(prompt, "yes")), (1,))


def sides(rows: list[dict[str, Any]], tmp_path: Path, data: Data = THIRDS, name: str = "a.jsonl") -> dict[str, str]:
    """Map each first user turn to its side."""
    split = split_records(read(tmp_path / name, rows, data), data, seed=0)
    return {record.prompt[0]["content"]: side for side in SIDES for record in getattr(split, side)}


# --- which side


def test_every_file_gives_records_to_every_side(tmp_path: Path) -> None:
    sources = [
        WeightedDataset(path=str(write_jsonl(tmp_path / f"{name}.jsonl", [instruction(n) for n in numbers])))
        for name, numbers in (("a", range(30)), ("b", range(30, 60)))
    ]

    split = split_records(load_datasets(sources, parse_record, THIRDS, KEY), THIRDS, seed=0)

    for side in (split.train, split.validation, split.test):
        assert {Path(record.source).name[0] for record in side} == {"a", "b"}
    assert len(split.train) + len(split.validation) + len(split.test) == 60


def test_split_ignores_order_format_file_and_later_turns(tmp_path: Path) -> None:
    rows = [instruction(number) for number in range(60)]
    shuffled = random.Random(1).sample(rows, len(rows))
    chats = [{"messages": talk(row["instruction"], "something", "else", "entirely")} for row in rows]
    pairs = [{"prompt": row["instruction"], "chosen": "good", "rejected": "bad"} for row in rows]

    first = sides(rows, tmp_path)

    assert set(first.values()) == set(SIDES)
    assert sides(shuffled, tmp_path, name="b.jsonl") == first
    assert sides(chats, tmp_path, name="c.jsonl") == first
    assert sides(pairs, tmp_path, name="d.jsonl") == first
    assert sides(rows[:20], tmp_path, name="e.jsonl").items() <= first.items()


@pytest.mark.parametrize(
    "spelling",
    [
        "Where is the  café?",
        "where is the café",
        "WHERE IS THE CAFÉ??",
        "Where is the cafe\u0301?",  # e and a combining accent
        "“Where is the café?”",
        "Where is\u00a0the\u200b café.\n",
        "- Where is the *café*...",
        "\ufeffWhere is the ca\u00adfé ?",
        "Ｗhere is the café？",
        "Where_is_the_café",
    ],
)
def test_spelling_does_not_move_a_prompt(spelling: str) -> None:
    """One more full stop, and a copy of a trained prompt would be held out."""
    assert cluster_of(asked(spelling)) == cluster_of(asked("Where is the café?")) == "whereisthecafé"
    data = [Data(split_seed=seed) for seed in range(40)]
    assert [side_of(asked(spelling), each) for each in data] == [side_of(asked("Where is the café?"), each) for each in data]


def test_apostrophes_are_punctuation_however_they_are_typed() -> None:
    assert {cluster_of(asked(f"I don{mark}t know")) for mark in ("'", "’", "´", "`", "ʼ"[:0])} == {"idontknow"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Wo ist die Bar", "Wo ist die Bär"),
        ("3 + 2", "3 = 2"),
        ("कि", "का"),
        ("東京の人口は？", "大阪の人口は？"),
        ("🙂", "🙁"),
        ("...---...", "---...---"),
        ("?", "!"),
        ("\u200b", "?"),
    ],
)
def test_what_says_something_else_is_another_cluster(one: str, other: str) -> None:
    """Also where nothing but punctuation or emoji is written: else all such prompts would be on one side."""
    assert cluster_of(asked(one)) != cluster_of(asked(other))


def test_variants_of_an_emoji_are_one() -> None:
    assert cluster_of(asked("❤️ 👍🏽")) == cluster_of(asked("❤ 👍"))


def test_same_prompt_with_several_answers_stays_on_one_side(tmp_path: Path) -> None:
    rows = [{"instruction": f"q{n % 20}" + "." * (n // 20), "output": f"a{n}"} for n in range(80)]
    split = split_records(read(tmp_path / "a.jsonl", rows), THIRDS, seed=0)

    train, validation, test = (
        {cluster_of(record) for record in side} for side in (split.train, split.validation, split.test)
    )

    assert len(split.train) + len(split.validation) + len(split.test) == 80
    assert not train & validation and not train & test and not validation & test


def test_split_seed_changes_which_prompts_and_ratios_how_many() -> None:
    prompts = [asked(f"prompt {n}") for n in range(2000)]

    def on(side: str, **changes: Any) -> list[bool]:
        return [side_of(prompt, Data(**changes)) == side for prompt in prompts]

    for side in ("validation", "test"):
        assert sum(on(side, **{f"{side}_ratio": 0.2})) == pytest.approx(400, abs=70)
        assert on(side, split_seed=1) != on(side)
        assert sum(on(side, **{f"{side}_ratio": 0.0})) == 0
        smaller, larger = (on(side, **{f"{side}_ratio": ratio}) for ratio in (0.1, 0.3))
        assert all(b for a, b in zip(smaller, larger, strict=True) if a), "a larger side holds all of a smaller one"
    assert on("test", validation_ratio=0.0) == on("test", validation_ratio=0.7)
    assert on("validation", test_ratio=0.0) == on("validation", test_ratio=0.7)


def test_the_split_stays_as_it_is() -> None:
    """A changed hash would move test prompts into training, unless SPLIT_KEY_VERSION says so."""
    found = [side_of(asked(f"Prompt {n}!"), Data(validation_ratio=0.2, test_ratio=0.2))[0] for n in range(30)]

    assert "".join(found) == "?"


def test_one_prompt_only_cannot_be_split(tmp_path: Path) -> None:
    data = Data(validation_ratio=0.5, test_ratio=0.49)

    with pytest.raises(UserError) as caught:
        split_records(read(tmp_path / "a.jsonl", [instruction(1)] * 3, data), data, seed=0)

    assert str(caught.value) == (
        "data.validation_ratio: 0.5 and data.test_ratio: 0.49 leave no record to train on. Lower them, or vary the "
        "prompts: records with the same prompt always stay on one side."
    )


# --- groups


GROUPED = Data(validation_ratio=0.3, test_ratio=0.3, group_field="customer")


def test_a_group_stays_on_one_side_whatever_its_prompts_and_files(tmp_path: Path) -> None:
    names = [*range(20), *(f"Customer {n}" for n in range(20))]
    rows = [{**instruction(n), "customer": name} for n, name in enumerate(names * 3)]
    pairs = [{"prompt": f"other {n}", "chosen": "a", "rejected": "b", "customer": str(name)} for n, name in enumerate(names)]
    records = [
        record
        for name, of in (("a.jsonl", rows), ("b.jsonl", pairs))
        for record in read(tmp_path / name, of, GROUPED)[0].records
    ]

    found: dict[str, set[str]] = {}
    for record in records:
        found.setdefault(cluster_of(record), set()).add(side_of(record, GROUPED))

    assert len(found) == 40
    assert all(len(on) == 1 for on in found.values())
    assert set.union(*found.values()) == set(SIDES)


@pytest.mark.parametrize("value", [7, 7.0, "7", " 7 ", "7.0", "７"])
def test_one_group_is_written_as_number_or_text(tmp_path: Path, value: object) -> None:
    (record,) = read(tmp_path / "a.jsonl", [{**instruction(1), "customer": value}], GROUPED)[0].records

    assert cluster_of(record) == "7"


@pytest.mark.parametrize("format_", ["sft", "dpo"])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "is empty or missing, but data.group_field names it"),
        ("", "is empty or missing, but data.group_field names it"),
        ("  ", "is empty or missing, but data.group_field names it"),
        (float("nan"), "is empty or missing, but data.group_field names it"),
        (["a"], "found list, wanted text or a number, because data.group_field names it"),
        (True, "found bool, wanted text or a number, because data.group_field names it"),
    ],
)
def test_a_row_without_its_group_is_a_bad_row(tmp_path: Path, value: object, reason: str, format_: str) -> None:
    good = instruction(1) if format_ == "sft" else {"prompt": "x", "chosen": "a", "rejected": "b"}
    path = tmp_path / "a.jsonl"

    with pytest.raises(UserError, match=r"1 of 2 rows cannot be used") as caught:
        read(path, [{**good, "customer": "a"}, {**good, "customer": value}], GROUPED)
    assert f"{path}:2: customer: {reason}" in str(caught.value)
    skipping = GROUPED.model_copy(update={"on_bad_row": "skip"})
    (file,) = read(path, [{**good, "customer": "a"}, {**good, "customer": value}], skipping)
    assert (len(file.records), len(file.bad_rows)) == (1, 1)


def test_a_field_that_no_row_has_is_said_once(tmp_path: Path) -> None:
    said = refusal(write_jsonl(tmp_path / "a.jsonl", [instruction(n) for n in range(3)]), GROUPED)

    assert "none of the 3 rows can be used, all for one reason" in said
    assert "customer: is empty or missing" in said


# --- near-duplicates


def test_a_held_out_prompt_close_to_a_trained_one_is_left_out_and_named(tmp_path: Path) -> None:
    rows = [{**instruction(n), "instruction": text} for n, text in enumerate(ESSAYS)]
    first = sides(rows, tmp_path)
    held_out = [text for text, side in first.items() if side != "train"]
    copies = [f"Please, {text.lower()} Thank you" for text in held_out]
    assert held_out

    plain = split_records(read(tmp_path / "b.jsonl", rows), THIRDS, seed=0)
    split = split_records(read(tmp_path / "c.jsonl", [*rows, *({**rows[0], "instruction": c} for c in copies)]), THIRDS, 0)

    closest = {near.record.prompt[0]["content"]: near for near in split.near_duplicates}
    trained = {record.prompt[0]["content"] for record in split.train}
    for text, copy in zip(held_out, copies, strict=True):
        if copy in trained:
            assert closest[text].like.prompt[0]["content"] == copy
            assert str(closest[text]).endswith(f"is close to {closest[text].like.source} (train)")
        elif first[text] == "validation":
            assert text not in closest, "what is close to the test side stays"
    assert not plain.near_duplicates
    assert {r.prompt[0]["content"] for r in plain.train} <= trained, "training never changes"
    assert any(copy in trained for copy in copies)


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
