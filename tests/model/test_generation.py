"""Greedy answers end where the model ends them, in any batch, and their health is measured as stated."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.common.schema import Lora
from scripts.dataset.chat_format import ChatFormat, stop_token_ids, user_turn
from scripts.dataset.rendering import render_prompt
from scripts.model.adapter import add_lora
from scripts.model.base import load_tokenizer
from scripts.model.generation import Answer, decoding_greedily, generate_answers, health, repetition
from tests.support.models import load
from tests.support.stops import FAMILIES, change_generation_config, save_family_model


@pytest.mark.parametrize("model_fixture", ["tiny_llama", "tiny_gpt2"])
def test_answers_do_not_depend_on_the_batch(model_fixture: str, request: pytest.FixtureRequest) -> None:
    from transformers import AutoModelForCausalLM

    folder: Path = request.getfixturevalue(model_fixture)
    tokenizer, model = load_tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompts = [render_prompt(ChatFormat(tokenizer), user_turn("go " * count)) for count in (1, 9, 4, 2, 7)]
    together = generate_answers(model, tokenizer, prompts, 8, batch_size=5)
    alone = generate_answers(model, tokenizer, prompts, 8, batch_size=1)
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert all(len(answer.token_ids) == 8 or answer.ended for answer in together)


def test_an_answer_is_cut_at_its_end_token(tiny_llama: Path) -> None:
    """A model that says only its end token gives an empty answer that ended by itself."""
    from transformers import AutoModelForCausalLM

    tokenizer, model = load_tokenizer(tiny_llama), AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        # The largest logit is that of the first row when all are equal, so give the end token the only positive one.
        model.model.norm.weight.fill_(0)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    model.lm_head.bias.data[tokenizer.eos_token_id] = 1
    answer = generate_answers(model, tokenizer, [render_prompt(ChatFormat(tokenizer), user_turn("hello"))], 8)[0]
    assert (answer.token_ids, answer.text, answer.ended) == ([], "", True)
    assert tokenizer.eos_token_id in stop_token_ids(tokenizer)


@pytest.mark.parametrize("name", FAMILIES)
def test_model_that_always_says_a_stop_ends_every_answer_at_once(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    for stop in sorted(family.stops):
        folder = save_family_model(tmp_path / stop.strip("<|>"), family, stop)
        tokenizer = load_tokenizer(folder)
        answer = generate_answers(
            load(folder), tokenizer, [render_prompt(ChatFormat(tokenizer), user_turn("hello"))], 8
        )[0]
        assert answer == Answer([], "", True), stop


SAYS, ALMOST = "a", "b"  # what the model below says at each step, and what is next likely
RECOMMENDED = {
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": [SAYS],
    "begin_suppress_tokens": [SAYS],
    "bad_words_ids": [[SAYS]],
    "sequence_bias": [[[ALMOST], 9.0]],
    "forced_eos_token_id": [ALMOST],
}


def as_ids(tokenizer: Any, value: Any) -> Any:
    """Put token ids for texts."""
    if isinstance(value, list):
        return [as_ids(tokenizer, part) for part in value]
    return tokenizer.convert_tokens_to_ids(value) if isinstance(value, str) else value


@pytest.mark.parametrize("key", RECOMMENDED)
@pytest.mark.parametrize("peft", [False, True], ids=["base", "adapter"])
def test_nothing_that_the_base_recommends_changes_an_answer(key: str, peft: bool, tmp_path: Path) -> None:
    """The server takes the most likely token, so all that compares models must do so, too."""
    folder = save_family_model(tmp_path / "model", FAMILIES["llama3"], SAYS)
    tokenizer = load_tokenizer(folder)
    value = as_ids(tokenizer, RECOMMENDED[key])
    change_generation_config(folder, **{key: value})
    model = load(folder)
    model.lm_head.weight.data[tokenizer.convert_tokens_to_ids(ALMOST)] = 0.99
    prompt = render_prompt(ChatFormat(tokenizer), user_turn("hello"))
    recommended = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)[0, len(prompt) :]
    network = model
    if peft:
        model = add_lora(network, Lora(r=4), str(folder))

    answer = generate_answers(model, tokenizer, [prompt], 4)[0]

    expected = [tokenizer.convert_tokens_to_ids(SAYS)] * 4
    assert answer.token_ids == expected
    assert recommended.tolist() != expected, "otherwise the recommendation changes nothing"
    assert getattr(network.generation_config, key) == value, "an export hands the base's own recommendation on"


def test_recommendation_of_the_base_returns_after_an_error(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    before = model.generation_config

    with suppress(ZeroDivisionError), decoding_greedily(model, load_tokenizer(tiny_llama)):
        assert model.generation_config is not before
        raise ZeroDivisionError

    assert model.generation_config is before


def test_minimum_length_of_the_base_lengthens_no_answer(tmp_path: Path) -> None:
    folder = save_family_model(tmp_path / "model", FAMILIES["llama3"])
    change_generation_config(folder, min_length=99, min_new_tokens=5)
    tokenizer = load_tokenizer(folder)

    answer = generate_answers(load(folder), tokenizer, [render_prompt(ChatFormat(tokenizer), user_turn("hello"))], 8)[0]

    assert answer.token_ids == []


def test_repetition_of_known_sequences() -> None:
    assert repetition([1, 2, 3, 4, 5, 6]) == 0
    assert repetition([7] * 8) == pytest.approx(1 - 1 / 5)  # five 4-grams, one of them new
    assert repetition([1, 2]) == 0


def test_health_of_known_answers() -> None:
    found = health([Answer([1, 2, 3, 4], "a", True), Answer([1, 2], "b", False)])
    assert found.mean_tokens == 3
    assert found.eos_rate == 0.5
    assert found.distinct_2 == pytest.approx(3 / 4)  # 12, 23, 34 and 12 again
