"""Drafted checks say what one's own answers have in common, and nothing that they do not."""

from __future__ import annotations

import json

import pytest

from eval.checks import passes
from eval.drafting import Draft, common_starts, draft_checks
from scripts.common.schema import Check, Data
from scripts.dataset.records import Record, parse_record
from tests.conftest import ROOT
from tests.support.emails import emails


def records_of(answers: list[str]) -> list[Record]:
    rows = [{"instruction": f"question {number}", "output": answer} for number, answer in enumerate(answers)]
    return [parse_record(row, f"a:{number}", Data()) for number, row in enumerate(rows)]


def drafted(answers: list[str]) -> list[Draft]:
    records = records_of(answers)
    return draft_checks(records, records)


def names(answers: list[str]) -> list[str]:
    return [draft.check["name"] for draft in drafted(answers)]


def test_letters_get_greeting_sign_off_length_and_language() -> None:
    answers = [row[3] for row in emails()]
    drafts = drafted(answers)

    assert names(answers) == [
        "begins with “Guten Tag Frau” or “Guten Tag Herr”", "a first line that ends with “,”", "the last line begins with “Ihr Team Nord”",
        "the line before the last begins with “Viele Grüße”", "no bullets", "no headings or bold text", "no exclamation mark",
        "30 to 41 words", "in German",
    ]  # fmt: skip
    assert all((draft.kept, draft.total) == (40, 40) for draft in drafts)
    other = "Sure! Here is what I can do:\n\n- **send** a letter\n- call you"
    assert not any(passes(Check(**draft.check), other, "", None) for draft in drafts)


def test_the_samples_layout_is_found() -> None:
    lines = (ROOT / "data/sft/sample_sft.jsonl").read_text(encoding="utf-8").splitlines()
    found = names([json.loads(line)["output"] for line in lines])

    assert any("BLOCKED" in name and "AT RISK" in name for name in found)
    assert "the last line begins with “Next:”" in found


@pytest.mark.parametrize(
    ("answers", "wanted"),
    [
        (["spam", "ham"] * 8, ["one of the known answers", "the right answer"]),
        ([json.dumps({"n": n, "text": "a b c"}) for n in range(10)], ["valid JSON"]),
        ([f"- eins {n}\n- zwei\n- drei" for n in range(10)], ["bullets"]),
        ([f"Добрый день, номер {n} готов и ждёт вас" for n in range(10)], ["in Cyrillic letters", "one line"]),
    ],
)
def test_other_kinds_of_answers_get_their_own_rules(answers: list[str], wanted: list[str]) -> None:
    assert set(wanted) <= set(names(answers))


def test_few_answers_get_no_rules() -> None:
    assert drafted(["one thing", "another thing"]) == []


def test_answers_without_anything_in_common_get_no_greeting() -> None:
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]

    assert common_starts([f"{word} is here" for word in words]) == []


def test_the_pass_rate_is_that_of_all_answers() -> None:
    kept = records_of([f"Hello there, number {n}." for n in range(12)])
    odd = records_of(["Bye now, friend."])

    (greeting, *_) = draft_checks(kept, [*kept, *odd])

    assert (greeting.check["name"], greeting.kept, greeting.total) == ("begins with “Hello there, number”", 12, 13)
