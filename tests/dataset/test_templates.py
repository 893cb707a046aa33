"""Every chat template of the installed trl, and real tokenizers: what is served is trained, up to the first stop."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from scripts.dataset.rendering import render_record
from tests.support.families import OTHERS, REFUSED, TRL_TEMPLATES, text_templates
from tests.support.templates import (
    BY_NAME,
    CASES,
    Case,
    Oracle,
    compare,
    family_tokenizer,
    table,
    trl_masks,
    verdict,
    with_template,
)
from tests.support.tokenizers import real_tokenizer

LEFT_OUT = "the model's chat template leaves out the system message"
NO_SYSTEM = "System role not supported"
CLOSED = "the prompt closes the thinking block"
DROPPED = "the chat template drops the reasoning of a last answer"
# Where there is no right rendering, and why. Everything else is right.
REASONS = {
    **{("gemma", case.name): NO_SYSTEM for case in CASES if "system prompt" in case.name},
    **{("phi3_first", case.name): LEFT_OUT for case in CASES if "system prompt" in case.name},
    **{
        (name, "thinking off, reasoning in the data"): CLOSED
        for name in (*text_templates(), *OTHERS)
        if name in ("glm4moe", "smollm3")
        or name.startswith("nemotron")
        or (name.startswith("qwen3") and "2507" not in name)
    },
    **{
        (name, case.name): DROPPED
        for name in ("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4")
        for case in CASES
        if case.thinking
    },
}


def test_every_template_of_trl_is_tried_or_refused_by_name() -> None:
    originals = {path.stem for path in TRL_TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training")}

    assert originals == {*text_templates(), *REFUSED}
    assert len(text_templates()) >= 34


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", [*text_templates(), *OTHERS])
def test_template_is_right_or_refused_with_its_reason(name: str, case: Case) -> None:
    assert verdict(family_tokenizer(name), case) == REASONS.get((name, case.name), "right")


# Templates of the same family run on the real vocabulary too; None is the tokenizer's own.
REAL = [
    ("qwen3", None), ("qwen3", "qwen3"), ("qwen3", "qwen2_5"), ("qwen3", "qwen3_instruct_2507"), ("qwen3", "qwen3_5_think"),
    ("gemma3", None), ("gemma3", "gemma"), ("llama3_1", None), ("llama3_1", "llama3_1"), ("llama3_1", "llama3_2"),
]  # fmt: skip


load_once = functools.cache(real_tokenizer)


@pytest.mark.parametrize(("vocabulary", "name"), REAL)
def test_real_tokenizer_is_right_or_refuses_with_its_reason(vocabulary: str, name: str | None) -> None:
    tokenizer = load_once(vocabulary)
    template = (TRL_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8") if name else tokenizer.chat_template
    tokenizer = with_template(tokenizer, template)

    found = {case.name: verdict(tokenizer, case) for case in CASES}

    assert found == {case.name: REASONS.get((name or vocabulary, case.name), "right") for case in CASES}


# --- the oracle itself


@pytest.mark.parametrize("fault", ["no stop", "one token more", "another prompt", "an answer less"])
def test_a_fault_of_the_rendering_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, case = family_tokenizer("qwen3"), BY_NAME["several turns"]
    compare(tokenizer, case)

    def faulty(*arguments: Any) -> list[Any]:
        *rows, last = render_record(*arguments)
        if fault == "an answer less":
            return rows
        if fault == "no stop":
            last.labels[-1] = -100
        if fault == "one token more":
            last.labels[last.labels.index(last.input_ids[-1]) - 30] = 1
        if fault == "another prompt":
            last.input_ids[0] += 1
        return [*rows, last]

    monkeypatch.setattr("tests.support.templates.render_record", faulty)
    with pytest.raises(AssertionError):
        compare(tokenizer, case)


# trl's training templates mark what trl trains. Three ways in which it differs are its own choice: it trains the assistant's
# header or the opening tag of a thinking block, what stands behind the first stop, and an earlier answer without its
# reasoning, so several turns with reasoning are not compared.
OTHERWISE = {
    # It closes an answer with the token that opens the next turn; ours is EOS. Both are stops of the family.
    **{("glm4moe", name): ("<|endoftext|>", "<|user|>") for name in ("one turn", "several turns", "thinking on")},
    # It closes an earlier answer as the history shows it, not as the model ends a turn.
    ("gptoss", "several turns"): ("<|return|>", "<|end|>"),
}
MASKED = [name for name in text_templates() if (TRL_TEMPLATES / f"{name}_training.jinja").is_file()]


@pytest.mark.parametrize("case", ["one turn", "several turns", "thinking on"])
@pytest.mark.parametrize("name", MASKED)
def test_trl_trains_the_same_answers(name: str, case: str) -> None:
    if name.startswith("deepseek") and case == "thinking on":
        pytest.skip("trl's template drops the reasoning that its own prompt opens")
    tokenizer = family_tokenizer(name)
    template = (TRL_TEMPLATES / f"{name}_training.jinja").read_text(encoding="utf-8")
    oracle = Oracle.of(tokenizer, BY_NAME[case])

    for turn, theirs in zip(oracle.case.answered, trl_masks(oracle, template), strict=True):
        prompt, trained = oracle.expected(turn)
        ours, stop = OTHERWISE.get((name, case), ("", ""))
        if ours and not theirs.startswith(trained) and stop in theirs:
            trained = trained.replace(ours, stop)
        before, found, after = theirs.partition(trained)
        assert found, f"{trained!r} is not in {theirs!r}"
        assert prompt.endswith(before)
        assert after.strip() in ("", tokenizer.eos_token)


def test_table_has_a_row_for_each_template_and_marks_what_does_not_concern_it() -> None:
    lines = table().splitlines()

    assert len(lines) == 2 + len(text_templates()) + len(OTHERS)
    assert "| `llama3` | right | right | right | – | – |" in lines
    assert "| `gemma` | right | right | System role not supported | – | – |" in lines
    assert "| `deepseek_r1_distill` | right | right | right | – | right |" in lines
    assert "| `qwen3` | right | right | right | right | right |" in lines
