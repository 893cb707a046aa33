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
    assert [side_of(asked(spelling), each) for each in data] == [
        side_of(asked("Where is the café?"), each) for each in data
    ]


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
    assert not train & validation
    assert not train & test
    assert not validation & test


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
    data = Data(validation_ratio=0.2, test_ratio=0.2)
    found = {side: [n for n in range(30) if side_of(asked(f"Prompt {n}!"), data) == side] for side in SIDES}

    assert found["validation"] == [0, 1, 2, 3, 8, 9, 10, 11, 17]
    assert found["test"] == [7, 29]


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


def test_a_group_stays_on_one_side_in_every_file_and_with_any_prompt(tmp_path: Path) -> None:
    names = [*range(20), *(f"Customer {n}" for n in range(20))]
    rows = [{**instruction(n), "customer": name} for n, name in enumerate(names * 3)]
    pairs = [
        {"prompt": f"other {n}", "chosen": "a", "rejected": "b", "customer": str(name)} for n, name in enumerate(names)
    ]
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


def rows_of(*prompts: str) -> list[dict[str, str]]:
    """Make a row of each prompt."""
    return [{"instruction": prompt, "output": f"answer {n}"} for n, prompt in enumerate(prompts)]


def beside(held: str, trained: str, tmp_path: Path, *others: str, names: tuple[str, str] = ("test", "train")) -> Split:
    """Split two prompts with others around them, with a seed that puts the two on the sides of these names."""
    files = read(tmp_path / "near.jsonl", rows_of(held, trained, *(others or PROMPTS)))
    for seed in range(500):
        data = THIRDS.model_copy(update={"split_seed": seed})
        if tuple(side_of(record, data) for record in files[0].records[:2]) == names:
            return split_records(files, data, seed=0)
    raise AssertionError("no seed does")


def left_out(split: Split) -> dict[str, str]:
    """Map each prompt that is left out to the one that it is close to."""
    return {near.record.prompt[0]["content"]: near.like.prompt[0]["content"] for near in split.near_duplicates}


PROMPTS = [
    "How do I change the oil of an old lawn mower without spilling half of it?",
    "Explain to a child why the moon seems to follow our car at night.",
    "Which vegetables can be sown in the garden as early as March?",
    "Write two sentences that thank a neighbour for watering the plants.",
    "What should I check before I buy a second-hand violin for my daughter?",
    "Describe the smell of a library to somebody who has never been in one.",
    "Our bakery closes on Mondays; draft a sign for the door.",
    "Why does bread go stale faster in the fridge than on the counter?",
]
TEXT = "The boiler on the second floor makes a rattling noise whenever the heating starts, and the tenants complain about it."


@pytest.mark.parametrize(
    "copy",
    [
        f"Please help: {TEXT}",
        TEXT.replace("complain", "are complaining"),
        TEXT.replace("boiler", "biolerr"[:6]).replace("tenants", "tennants"),
        "Whenever the heating starts, the boiler on the second floor makes a rattling noise, and the tenants complain about it.",
        TEXT.replace(" about it", ""),
    ],
)
def test_a_held_out_prompt_close_to_a_trained_one_is_left_out_and_named(tmp_path: Path, copy: str) -> None:
    split = beside(copy, TEXT, tmp_path)

    assert left_out(split) == {copy: TEXT}
    assert (
        str(split.near_duplicates[0]) == f"{tmp_path}/near.jsonl:1 (test) is close to {tmp_path}/near.jsonl:2 (train)"
    )
    assert copy not in {record.prompt[0]["content"] for record in split.test}
    assert TEXT in {record.prompt[0]["content"] for record in split.train}, "training never changes"


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("validation", "train"), True),
        (("test", "validation"), True),  # a checkpoint was chosen by it
        (("validation", "test"), False),  # the other one is left out instead
        (("train", "test"), False),
        (("test", "test"), False),
    ],
)
def test_each_side_is_unlike_those_before_it(tmp_path: Path, names: tuple[str, str], found: bool) -> None:
    copy = f"Please help: {TEXT}"

    assert (copy in left_out(beside(copy, TEXT, tmp_path, names=names))) == found


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("A baker has 12 loaves and sells 5 of them. How many are left?", "A baker has 17 loaves and sells 8 of them. How many are left?"),
        ("Why does bread rise in the oven?", "Why does the sun rise in the east?"),
    ],
)  # fmt: skip
def test_another_question_in_the_same_words_is_no_near_duplicate(tmp_path: Path, one: str, other: str) -> None:
    assert not left_out(beside(one, other, tmp_path))


def test_a_question_asked_of_many_things_is_no_near_duplicate(tmp_path: Path) -> None:
    names = [
        "Austria",
        "Australia",
        "Peru",
        "Norway",
        "Ghana",
        "Japan",
        "Chile",
        "Cuba",
        "Kenya",
        "Malta",
        "Nepal",
        "Oman",
    ]
    rows = rows_of(*(f"What is the capital of {name}?" for name in names), *PROMPTS * 2)

    assert not left_out(split_records(read(tmp_path / "a.jsonl", rows), THIRDS, seed=0))


@pytest.mark.parametrize("instructions", [1, 3, 10])
def test_what_many_records_share_is_no_likeness(tmp_path: Path, instructions: int) -> None:
    """A long instruction before a short text, constant or from a handful of variants, makes no two records alike."""
    long = "Decide what the customer wants and answer with one label in capital letters, without an explanation and without quotation marks"
    syllables = ["ba", "ke", "lim", "no", "pur", "sta", "tri", "wo", "xi", "zel"]
    made_up = random.Random(0)
    rows = rows_of(
        *(
            f"{long}, variant {'abcdefghij'[n % instructions] * 3}: "
            + " ".join("".join(made_up.sample(syllables, 3)) for _ in range(3))
            for n in range(100)
        )
    )

    assert not left_out(split_records(read(tmp_path / "a.jsonl", rows), THIRDS, seed=0))


def test_a_near_duplicate_is_found_below_a_shared_instruction(tmp_path: Path) -> None:
    long = "Decide what the customer wants and answer with one label in capital letters: "
    copy = TEXT.replace("complain", "are complaining")

    split = beside(long + copy, long + TEXT, tmp_path, *(long + prompt for prompt in PROMPTS))

    assert left_out(split) == {long + copy: long + TEXT}


def test_a_text_under_ten_instructions_is_the_same_text(tmp_path: Path) -> None:
    """Multiplying a few texts by asking for them differently multiplies no evidence."""
    asks = ["Summarise", "Shorten", "Write a headline for", "List the main points of", "What is said in", "Translate", "Rate",
            "Rewrite", "Quote", "Check"]  # fmt: skip
    rows = rows_of(*(f"{ask} this: {text}" for text in [TEXT, *PROMPTS, TEXT[::-1]] for ask in asks))

    split = split_records(read(tmp_path / "a.jsonl", rows), THIRDS, seed=0)

    assert split.test == split.validation == ()
    assert len(split.train) + len(split.near_duplicates) == 100


def test_system_messages_and_answers_make_no_two_prompts_alike(tmp_path: Path) -> None:
    system = {"role": "system", "content": TEXT}
    rows = [
        {"messages": [system, *talk(prompt, TEXT, "And " + prompt[::-1], TEXT)]} for prompt in PROMPTS
    ]  # fmt: skip

    for seed in range(5):
        data = THIRDS.model_copy(update={"split_seed": seed})
        assert not left_out(split_records(read(tmp_path / "a.jsonl", rows), data, seed=0))


def test_the_same_prompt_in_two_groups_is_a_near_duplicate(tmp_path: Path) -> None:
    rows = [{**row, "customer": n} for n, row in enumerate(rows_of(*PROMPTS, *PROMPTS))]

    split = split_records(read(tmp_path / "a.jsonl", rows, GROUPED), GROUPED, seed=0)

    kept = {side: {cluster_of(asked(r.prompt[0]["content"])) for r in getattr(split, side)} for side in SIDES}
    assert split.near_duplicates
    assert not kept["train"] & kept["test"]
    assert not kept["train"] & kept["validation"]
    assert not kept["validation"] & kept["test"]


@pytest.mark.parametrize(
    "prompts", [["東京から京都まで新幹線でどのくらいかかりますか", "東京から京都まで新幹線でどれくらいかかりますか"]]
)
def test_languages_without_spaces_are_compared_too(tmp_path: Path, prompts: list[str]) -> None:
    others = [
        "今日の夕食に何を作ればいいですか",
        "犬の散歩は一日に何回必要ですか",
        "俳句を一つ書いてください",
        "京都の天気を教えて",
    ]

    assert left_out(beside(*prompts, tmp_path, *others)) == {prompts[0]: prompts[1]}
    assert not left_out(beside(others[0], others[1], tmp_path, *others[2:]))


def chain_of(tmp_path: Path, sft: list[dict[str, str]], dpo: str = "dpo.jsonl") -> Config:
    """Configure a chain whose preferences are about a text that instruction records have too."""
    write_jsonl(tmp_path / "dpo.jsonl", [{"prompt": TEXT, "chosen": "a", "rejected": "b"}, {"prompt": ""}])
    return Config(
        sft=Sft(dataset_path=str(write_jsonl(tmp_path / "sft.jsonl", sft))),
        dpo=Dpo(dataset_path=str(tmp_path / dpo)),
        data=THIRDS,
    )


def test_the_files_of_other_stages_count(tmp_path: Path) -> None:
    copy = f"Please help: {TEXT}"
    config = chain_of(tmp_path, rows_of(copy, *PROMPTS))
    seed = next(
        seed for seed in range(500)
        if side_of(asked(TEXT), Data(split_seed=seed)) == "train" and side_of(asked(copy), Data(split_seed=seed)) == "test"
    )  # fmt: skip
    config = config.model_copy(update={"data": Data(split_seed=seed)})
    files = load_datasets(config.sft.dataset_path, parse_record, config.data, KEY)

    alone = split_records(files, config.data, 0)
    in_chain = split_records(files, config.data, 0, load_rest_of_chain(config, ["sft"]))

    assert not left_out(alone)
    assert left_out(in_chain) == {copy: TEXT}
    assert in_chain.near_duplicates[0].like.source == f"{tmp_path}/dpo.jsonl:1"
    assert in_chain.train == alone.train


@pytest.mark.parametrize("name", ["absent.jsonl", "owner/name", "broken.jsonl"])
def test_what_another_stage_lacks_stops_no_stage(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "broken.jsonl").write_text("{")
    config = chain_of(tmp_path, rows_of(*PROMPTS), name)
    if name == "owner/name":
        config = config.model_copy(update={"dpo": Dpo(dataset_path=name)})

    with caplog.at_level("INFO"):
        assert load_rest_of_chain(config, ["sft"]) == []
    assert ("not searched for near-duplicates" in caplog.text) == (name != "owner/name")


# --- what follows from it


def test_weights_repeat_records_and_take_a_fixed_part(tmp_path: Path) -> None:
    data = Data(validation_ratio=0.2)
    paths = [
        write_jsonl(tmp_path / f"{name}.jsonl", [{"instruction": f"{name} {n}", "output": "a"} for n in range(50)])
        for name in "ab"
    ]
    sources = [WeightedDataset(path=str(paths[0]), weight=2.5), WeightedDataset(path=str(paths[1]), weight=0.5)]

    files = load_datasets(sources, parse_record, data, KEY)
    split, again = split_records(files, data, seed=3), split_records(files, data, seed=3)

    unique = [len({r.messages[0]["content"] for r in file.records if side_of(r, data) == "train"}) for file in files]
    taken = [[r for r in split.train if r.source.startswith(str(path))] for path in paths]
    assert [len(part) for part in taken] == [unique[0] * 2 + round(unique[0] / 2), round(unique[1] / 2)]
    assert len({r.source for r in taken[1]}) == len(taken[1])
    assert [r.source for r in again.train] == [r.source for r in split.train]
    assert len({r.source for r in split.validation}) == len(split.validation)


def test_duplicates_and_shared_answers_are_counted(tmp_path: Path) -> None:
    rows = [instruction(1), instruction(1), instruction(1, input="x"), instruction(2)]
    data = Data(validation_ratio=0.5, test_ratio=0)
    many = [{"instruction": f"q{n}", "output": "the same"} for n in range(30)]
    split = split_records(
        load_datasets(str(write_jsonl(tmp_path / "b.jsonl", many)), parse_record, data, KEY), data, seed=0
    )

    assert count_duplicates(load(write_jsonl(tmp_path / "a.jsonl", rows))) == 1
    assert shared_answers(split) == len(split.validation) > 0
