"""One question, and the answers of base and adapters in the terminal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from scripts.common.config import load_config
from scripts.common.terminal import Answers, printable, shown
from scripts.dataset.chat_format import ChatFormat, user_turn
from scripts.dataset.rendering import render_prompt
from scripts.model.base import load_tokenizer
from serve import ask
from serve.adapters import find_default
from serve.jobs import Job
from tests.conftest import run_python
from tests.serve.test_engine import generate_with_peft
from tests.support.serving import save_adapter

QUESTION = "What is left to do?"


@pytest.fixture
def config(tiny_llama: Path, tmp_path: Path, write_config) -> Path:
    """Write a configuration whose outputs lie in the test's folder; nothing is trained yet."""
    outputs = {stage: {"output_dir": str(tmp_path / stage)} for stage in ("sft", "dpo", "kto")}
    serve = {"adapter_path": str(tmp_path / "dpo"), "default_max_new_tokens": 8, "max_context_tokens": 128}
    return write_config(
        base_model_id=str(tiny_llama), performance={"threads": 1, "dtype": "fp32"}, serve=serve, **outputs
    )


def own_answer(base: Path, adapter: Path | None) -> str:
    """Return the greedy answer of the libraries alone."""
    tokenizer = load_tokenizer(base)
    ids = render_prompt(ChatFormat(tokenizer), user_turn(QUESTION))
    return tokenizer.decode(generate_with_peft(base, adapter, ids, 8), skip_special_tokens=True)


def seen(answer: str) -> str:
    """Return the letters of a text, which no wrapping of lines changes."""
    return "".join(printable(answer).split())


def test_base_and_every_trained_adapter_answer_as_the_libraries_do(config, tiny_llama, tmp_path, capsys, monkeypatch):
    adapters = {
        stage: save_adapter(tmp_path / stage, tiny_llama, stage, seed=n) for n, stage in enumerate(("sft", "kto"))
    }
    monkeypatch.setenv("COLUMNS", "60")  # below each other
    assert ask.main([*QUESTION.split(), "--config", str(config)]) == 0
    said = capsys.readouterr().out
    places = []
    for name, adapter in (("base", None), *adapters.items()):
        places.append(said.index(f"{name} ─"))
        assert seen(own_answer(tiny_llama, adapter)) in seen(said[places[-1] :])
    assert places == sorted(places)
    assert said.endswith("\n"), "what a shell or a script prints next begins a line"


def test_before_any_training_the_base_answers_and_the_first_stage_is_named(config, tiny_llama, capsys):
    assert ask.main([QUESTION, "--config", str(config)]) == 0
    out, err = capsys.readouterr()
    assert seen(own_answer(tiny_llama, None)) in seen(out)
    assert "python -m scripts.train_sft" in err


def test_an_adapter_of_another_base_in_an_output_folder_is_left_out_and_named(
    config, tiny_llama, tiny_gpt2, tmp_path, capsys
):
    save_adapter(tmp_path / "sft", tiny_llama)
    save_adapter(tmp_path / "dpo", tiny_gpt2, "dpo")
    assert ask.main([QUESTION, "--config", str(config)]) == 0
    out, err = capsys.readouterr()
    assert "left out: " in err
    assert "another base" in err
    assert "sft (" in out
    assert "dpo (" not in out


def test_a_question_comes_through_a_pipe_too(config, tiny_llama):
    command = [sys.executable, "-m", "serve.ask", "--config", str(config)]
    done = subprocess.run(command, input=QUESTION + "\n", capture_output=True, text=True, check=False, cwd=ask.__file__.rsplit("/", 2)[0])  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert seen(own_answer(tiny_llama, None)) in seen(done.stdout)
    assert "\x1b" not in done.stdout


def test_an_answer_that_was_cut_says_so_and_what_allows_more(config, tiny_llama, capsys):
    assert ask.main([QUESTION, "--config", str(config), "--set", "serve.default_max_new_tokens=3"]) == 0
    assert "base: cut at 3 tokens; --set serve.default_max_new_tokens=" in capsys.readouterr().err


def test_only_the_answer_that_was_cut_says_at_which_length() -> None:
    ended = Job([1], "base", 64, out=[2] * 32, finish_reason="stop")
    cut = Job([1], "sft", 64, out=[2] * 64, finish_reason="length")

    assert ask.describe_cut([ended]) is None
    assert str(ask.describe_cut([ended, cut])).startswith("sft: cut at 64 tokens")


def test_no_question_and_a_question_that_does_not_fit_are_one_message(config, capsys):
    done = run_python("-m", "serve.ask", "--config", config, timeout=60)
    assert (done.returncode, "found no question" in done.stderr) == (2, True)
    assert ask.main(["word " * 200, "--config", str(config)]) == 2
    assert "error: prompt: the prompt has " in capsys.readouterr().err


def lines(width: int, texts: dict[str, str]) -> list[str]:
    console = Console(width=width, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(Answers(texts))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_answers_stand_beside_each_other_where_there_is_room_and_below_each_other_elsewhere() -> None:
    texts = {"base": "one " * 30, "sft": "two " * 30, "dpo": "三" * 60}
    wide, narrow = lines(120, texts), lines(60, texts)
    assert any("one" in line and "two" in line and "三" in line for line in wide)
    assert not any("one" in line and "two" in line for line in narrow)
    for seen_lines in (wide, narrow):
        assert [sum(line.count(word) for line in seen_lines) for word in ("one", "two", "三")] == [30, 30, 60]


def test_a_log_keeps_the_first_lines_of_an_answer_that_repeats_itself() -> None:
    logged = shown("Who?", {"base": "again\n" * 60, "sft": "Ann"})

    assert logged.count("again") == 20
    assert "… and 40 more lines" in logged
    assert "Ann" in logged


@pytest.mark.parametrize("width", [50, 80, 200])
def test_a_logged_answer_is_no_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))

    logged = shown("Who? " * 30, {"base": "one " * 60, "sft": "two " * 60}).splitlines()

    assert max(map(len, logged)) <= min(width, 96)
    assert any("one" in line and "two" in line for line in logged) == (width >= 80)


def test_an_answer_cannot_steer_the_terminal() -> None:
    assert printable("red\x1b[31m\rgone\x07\nline\u202e") == "red[31mgone\nline"


# --- which adapter answers at the server when the one that is named was never made


@pytest.mark.parametrize(
    ("wanted", "made", "found"),
    [
        ("dpo", ["sft"], "sft"), ("dpo", ["sft", "kto"], "sft"), ("dpo", [], None), ("kto", ["sft", "dpo"], "dpo"),
        ("kto", ["sft"], "sft"), ("sft", ["dpo"], None),
    ],
)  # fmt: skip
def test_what_this_configuration_never_made_gives_way_to_what_training_continues(config, tmp_path, wanted, made, found):
    for name in made:
        (tmp_path / name).mkdir()
    values = load_config(config, [f"serve.adapter_path={tmp_path / wanted}"]).values
    assert find_default(values) == (found and tmp_path / found, str(tmp_path / wanted))


@pytest.mark.parametrize("there", ["elsewhere", "dpo.old", "dpo"])
def test_any_other_path_is_taken_as_it_is(config, tmp_path, there):
    (tmp_path / "sft").mkdir()
    if there != "elsewhere":
        (tmp_path / there).mkdir()  # made, or lost in the middle of being replaced
    wanted = tmp_path / there.removesuffix(".old")
    values = load_config(config, [f"serve.adapter_path={wanted}"]).values
    assert find_default(values) == (wanted, None)
