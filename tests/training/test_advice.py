"""Advice: each probable mistake in data or settings is named with its key, and sound ones get no word."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.common.schema import Config, Data
from scripts.dataset.records import DatasetFile, Record, parse_record
from scripts.dataset.rendering import Rendered
from scripts.dataset.split import split_records
from scripts.training.advice import advise_on_records, advise_on_run, describe_styles

PLAIN = Data()
SENTENCES = [
    f"Thank you for the {word}. It is with us, and the office will answer you by noon."
    for word in ("call", "order", "letter", "visit", "note", "parcel", "offer", "list", "plan", "draft")
]


def records_of(answers: list[str]) -> list[Record]:
    rows = (
        {"instruction": f"Request {number} of client {number * 7919}", "output": a} for number, a in enumerate(answers)
    )
    return [parse_record(row, f"a.jsonl:{number}", PLAIN) for number, row in enumerate(rows)]


def advice_on(records: list[Record], **data: Any) -> list[str]:
    split = split_records([DatasetFile("a.jsonl", "", 1, tuple(records))], Data(**data), 0)
    return advise_on_records("sft", split, records)


def test_sound_data_and_settings_get_no_word() -> None:
    records = records_of([sentence + f" The number is {n}." for n in range(20) for sentence in SENTENCES])
    rows = [Rendered([1] * 50, [-100] * 20 + [1] * 30)] * 140

    assert advice_on(records) == []
    assert advise_on_run(Config(), "sft", rows) == []


@pytest.mark.parametrize(
    ("count", "ratio", "advised"),
    [(20, 0.05, "data.test_ratio: 0.1"), (6, 0.1, "data.test_ratio: 0.25"), (4, 0.25, None)],
)
def test_few_test_records_are_named_with_a_ratio_that_leaves_enough_to_learn_from(
    count: int, ratio: float, advised: str | None
) -> None:
    (said,) = advice_on(records_of([f"{s} {n}." for n in range(count) for s in SENTENCES]), test_ratio=ratio)

    assert "records are for the test" in said
    assert "more records help most" in said
    assert advised in said if advised else "data.test_ratio" not in said


def test_duplicates_are_counted_with_the_key_of_their_files() -> None:
    records = records_of([f"{sentence} {n}." for n in range(20) for sentence in SENTENCES])

    (said,) = advice_on([*records, *records[:3]])

    assert said.startswith("3 records repeat an earlier one word for word")
    assert "sft.dataset_path" in said


STYLES = {
    "ending": ([s.rstrip(".") for s in SENTENCES], "answers end without punctuation, most end with punctuation"),
    "language": (["Vielen Dank für die Nachricht, sie ist nicht verloren und das Büro ist mit dem Fall vertraut."] * 10, "answers are in German, most are in English"),
    "script": (["Спасибо за письмо, мы ответим завтра."] * 10, "answers are in Cyrillic letters, most are in English"),
    "length": (["Yes."] * 10 + [" ".join(SENTENCES)] * 10, "answers differ much in length, a tenth has 1 words or fewer"),
}  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
def test_part_of_the_answers_in_another_style_is_counted(style: str) -> None:
    others, said = STYLES[style]

    (advice,) = describe_styles([*SENTENCES * 4, *others], "kto.dataset_path")

    assert said in advice
    assert "in kto.dataset_path" in advice


@pytest.mark.parametrize("odd", [["Fine"], ["Oui, c'est pour vous que les autres sont dans une salle."]])
def test_a_stray_answer_and_a_handful_of_answers_get_no_word(odd: list[str]) -> None:
    assert describe_styles([*SENTENCES * 4, *odd], "sft.dataset_path") == []
    assert describe_styles([*SENTENCES, *odd * 9], "sft.dataset_path") == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"num_train_epochs": 2.0},
            ["only 10 optimizer steps", "sft.num_train_epochs (to 4, say)", "sft.per_device_train_batch_size"],
        ),
        ({"trainer": {"max_steps": 3}}, ["only 3 optimizer steps", "sft.trainer.max_steps"]),
    ],
)
def test_few_steps_are_named_with_what_makes_more(settings: dict[str, Any], said: list[str]) -> None:
    rows = [Rendered([1, 1], [-100, 1])] * 40
    section = Config().sft.model_copy(update={"per_device_train_batch_size": 8} | settings)

    (advice,) = advise_on_run(Config().model_copy(update={"sft": section}), "sft", rows)

    assert [text for text in said if text not in advice] == [], advice


def test_answers_that_the_comparison_would_cut_are_counted() -> None:
    rows = [Rendered([1] * 50, [-100] * 20 + [1] * 30)] * 180 + [Rendered([1] * 420, [-100] * 20 + [1] * 400)] * 20

    (advice,) = advise_on_run(Config(), "sft", rows)

    assert advice.startswith("20 of 200 answers are longer than eval.max_new_tokens (256)")
    assert "raise it to 400" in advice
