"""Checks: each condition alone decides, and the sample data keeps the house style it teaches."""

from __future__ import annotations

import json

import pytest

from eval.checks import check_rules, passes
from scripts.common.config import load_config
from scripts.common.errors import UserError
from scripts.common.schema import Check
from tests.conftest import ROOT

CASES = [
    ({"regex": r"\Aa.*z\Z"}, "a\nz", "a\nx"),
    ({"must_contain": ["Next:", "plan"]}, "the PLAN. next: go", "next: go"),
    ({"must_not_contain": ["very"]}, "everything is fine", "it is Very fine"),
    ({"must_not_contain": ["!"]}, "fine.", "fine!"),
    ({"min_words": 3}, "one two three", "one two"),
    ({"max_words": 2}, "one two", "one two three"),
    ({"max_sentences": 1}, "It cost 4.2 million.", "One. Two."),
    ({"json_parses": True}, '{"a": 1}', "{a: 1}"),
    ({"exact_match": True}, " the reference ", "another"),
    ({"numbers_from_prompt": True}, "12 of 1,500", "13 of 1,500"),
]


@pytest.mark.parametrize(("conditions", "kept", "broken"), CASES, ids=[str(next(iter(case[0]))) for case in CASES])
def test_each_condition_decides(conditions: dict, kept: str, broken: str) -> None:
    check = Check(name="rule", **conditions)
    prompt, reference = "12 of 1,500 boxes", "the reference"
    assert passes(check, kept, prompt, reference)
    assert not passes(check, broken, prompt, reference)


def test_all_conditions_of_a_check_must_hold() -> None:
    check = Check(name="rule", min_words=2, must_contain=["yes"])
    assert passes(check, "yes indeed", "", None)
    assert not passes(check, "yes", "", None)
    assert not passes(check, "no indeed", "", None)


@pytest.mark.parametrize("answer", ["", " \n", "...", "🎉🎉", "–—\u200b", "{}", "\ufffd"])
def test_an_answer_without_words_keeps_no_rule(answer: str) -> None:
    for conditions in (
        {},
        {"max_words": 9},
        {"must_not_contain": ["very"]},
        {"numbers_from_prompt": True},
        {"regex": "."},
    ):
        assert not passes(Check(name="rule", **conditions), answer, "the prompt", answer), conditions


@pytest.mark.parametrize("answer", ["a", "7", "да", "是", "ไทย", "हिन्दी", "١٢", '{"a": 1}', "…ok"])
def test_letters_and_digits_of_every_script_are_words(answer: str) -> None:
    assert passes(Check(name="rule", max_words=9), answer, "7 ١٢ 1", None)


def test_bad_rules_are_refused() -> None:
    with pytest.raises(UserError, match=r"eval\.checks\[0\]\.regex: not a regular expression"):
        check_rules([Check(name="a", regex="(")])
    with pytest.raises(UserError, match="share a name"):
        check_rules([Check(name="a"), Check(name="a")])


def read(path: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / path).read_text(encoding="utf-8").split("\n") if line]


def test_the_sample_data_keeps_the_house_style() -> None:
    """Every SFT answer and every chosen answer keeps every rule; most rejected ones break at least one."""
    checks = load_config(ROOT / "configs/demo.yaml").values.eval.checks
    assert len(checks) == 6
    sft, dpo = read("data/sft/sample_sft.jsonl"), read("data/dpo/sample_dpo.jsonl")
    for row in sft:
        assert all(passes(check, row["output"], row["input"], None) for check in checks), row["output"]
    for row in dpo:
        assert all(passes(check, row["chosen"], row["prompt"], None) for check in checks), row["chosen"]
    broken = [row for row in dpo if not all(passes(check, row["rejected"], row["prompt"], None) for check in checks)]
    mechanical = [row for row in dpo if row["rule"] in ("layout", "length", "hype", "figures")]
    assert len(broken) >= len(mechanical)


def test_the_sample_data_is_large_varied_and_without_repeats() -> None:
    sft, dpo = read("data/sft/sample_sft.jsonl"), read("data/dpo/sample_dpo.jsonl")
    assert len(sft) >= 200
    assert len(dpo) >= 120
    prompts = [row["instruction"] + row["input"] for row in sft] + [row["prompt"] for row in dpo]
    assert len(set(prompts)) == len(prompts)
    assert len({row["output"].split("\n\n")[1][:25] for row in sft}) > 0.95 * len(sft)
    longer = sum(len(row["rejected"]) > len(row["chosen"]) for row in dpo) / len(dpo)
    assert 0.4 < longer < 0.6


def test_data_readme_states_the_files_hashes() -> None:
    from scripts.common.artifacts import sha256_file

    text = (ROOT / "data/README.md").read_text(encoding="utf-8")
    for path in ("sft/sample_sft.jsonl", "dpo/sample_dpo.jsonl"):
        assert sha256_file(ROOT / "data" / path) in text
