"""A file of requests is answered line by line, and a run that was cut off is continued."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.dataset.chat_format import ChatFormat, user_turn
from scripts.dataset.rendering import render_prompt
from scripts.model.base import load_tokenizer
from serve import batch
from tests.serve.test_engine import generate_with_peft
from tests.support.serving import save_adapter

LINES: list[Any] = [
    {"prompt": "Hi", "max_new_tokens": 6, "id": "first"},
    {"messages": [{"role": "user", "content": "Hello"}], "model": "base", "max_tokens": 5, "temperature": 0},
    {"prompt": "There", "max_new_tokens": 4, "adapter": "base"},
]


@pytest.fixture
def run(tiny_llama: Path, tmp_path: Path, write_config) -> Callable[..., tuple[int, list[dict]]]:
    """Return a function that writes lines, answers them, and returns exit code and answers."""
    adapter = save_adapter(tmp_path / "sft", tiny_llama)
    config = write_config(base_model_id=str(tiny_llama), performance={"threads": 1, "dtype": "fp32"}, serve={})

    def answer(lines: list[Any], *more: str) -> tuple[int, list[dict]]:
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (tmp_path / "in.jsonl").write_text(text + "\n", encoding="utf-8")
        flags = ["--config", str(config), "--set", f"serve.adapter_path={adapter}", "--set", "serve.adapters={}", *more]
        code = batch.main([str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl"), *flags])
        out = tmp_path / "out.jsonl"
        return code, [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []

    return answer


def test_answers_are_those_of_the_libraries_in_the_order_of_the_lines(run, tiny_llama, tmp_path):
    code, answers = run(LINES)
    assert code == 0
    tokenizer = load_tokenizer(tiny_llama)
    for record, adapter, text, new in zip(
        answers, (tmp_path / "sft", None, None), ("Hi", "Hello", "There"), (6, 5, 4), strict=True
    ):
        ids = render_prompt(ChatFormat(tokenizer), user_turn(text))
        tokens = generate_with_peft(tiny_llama, adapter, ids, new)
        assert record["text"] == tokenizer.decode(tokens, skip_special_tokens=True)
        assert record["completion_tokens"] == len(tokens)
    assert [(record["line"], record["id"]) for record in answers] == [(1, "first"), (2, None), (3, None)]


def test_a_run_that_was_cut_off_is_continued_and_nothing_is_answered_twice(run, tmp_path, monkeypatch):
    _, whole = run(LINES)
    out = tmp_path / "out.jsonl"
    lines = out.read_text(encoding="utf-8").splitlines()
    out.write_text(f"{lines[0]}\n{lines[1][:40]}", encoding="utf-8")  # killed in the middle of a line
    asked = []
    answer_one = batch._answer_one

    async def count(service, line):
        asked.append(line.number)
        return await answer_one(service, line)

    monkeypatch.setattr(batch, "_answer_one", count)
    assert run(LINES) == (0, whole)
    assert asked == [2, 3]
    assert run(LINES) == (0, whole)
    assert asked == [2, 3], "a file that is complete needs no model"


def test_bad_lines_are_named_and_the_others_answered(run, capsys):
    bad = ['{"prompt": ', "[1]", {"prompt": "Hi", "max_tokenz": 3}, {"prompt": ""}, {"prompt": "Hi", "adapter": "dpo"},
           {"prompt": "word " * 5000}]  # fmt: skip
    code, answers = run([LINES[0], *bad, LINES[2]])
    assert code == batch.EXIT_BAD_LINES
    assert [record["line"] for record in answers] == [1, 8]
    said = capsys.readouterr().err
    for number, reason in ((2, "not valid JSON"), (3, "no JSON object"), (4, "max_tokenz"), (5, "prompt"),
                           (6, "no such model"), (7, "characters")):  # fmt: skip
        [line] = [line for line in said.splitlines() if f"in.jsonl:{number}:" in line]
        assert reason in line


def test_answers_to_other_requests_or_of_another_adapter_are_never_mixed(run, tiny_llama, tmp_path, capsys):
    run(LINES[:1])
    assert run([{**LINES[0], "prompt": "Other"}, LINES[1]])[0] == 2
    assert "is no answer to a line of" in capsys.readouterr().err
    save_adapter(tmp_path / "sft", tiny_llama, seed=9)
    assert run(LINES)[0] == 2
    assert "another version of the adapter `sft`" in capsys.readouterr().err


def test_a_small_queue_holds_a_large_file(run):
    many = [{"prompt": f"Hi {n}", "max_new_tokens": 2} for n in range(12)]
    code, answers = run(many, "--set", "serve.max_concurrent=1", "--set", "serve.max_queue=1")
    assert (code, len(answers)) == (0, 12)


def test_a_missing_file_is_one_message(run, tmp_path, capsys):
    assert batch.main([str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "o.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err
