"""Greedy answers end where the model ends them, in any batch, and their health is measured as stated."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.dataset.rendering import render_prompt, stop_token_ids, user_turn
from scripts.model.base import load_tokenizer
from scripts.model.generation import Answer, generate_answers, health, repetition


@pytest.mark.parametrize("model_fixture", ["tiny_llama", "tiny_gpt2"])
def test_answers_do_not_depend_on_the_batch(model_fixture: str, request: pytest.FixtureRequest) -> None:
    from transformers import AutoModelForCausalLM

    folder: Path = request.getfixturevalue(model_fixture)
    tokenizer, model = load_tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompts = [render_prompt(tokenizer, user_turn("go " * count)) for count in (1, 9, 4, 2, 7)]
    together = generate_answers(model, tokenizer, prompts, 8, batch_size=5)
    alone = generate_answers(model, tokenizer, prompts, 8, batch_size=1)
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert all(len(answer.token_ids) == 8 or answer.ended for answer in together)


def test_an_answer_is_cut_at_its_end_token(tiny_llama: Path) -> None:
    """A model that says only its end token gives an empty answer that ended by itself."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer, model = load_tokenizer(tiny_llama), AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        # The largest logit is that of the first row when all are equal, so give the end token the only positive one.
        model.model.norm.weight.fill_(0)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    model.lm_head.bias.data[tokenizer.eos_token_id] = 1
    answer = generate_answers(model, tokenizer, [render_prompt(tokenizer, user_turn("hello"))], 8)[0]
    assert (answer.token_ids, answer.text, answer.ended) == ([], "", True)
    assert tokenizer.eos_token_id in stop_token_ids(tokenizer)


def test_repetition_of_known_sequences() -> None:
    assert repetition([1, 2, 3, 4, 5, 6]) == 0
    assert repetition([7] * 8) == pytest.approx(1 - 1 / 5)  # five 4-grams, one of them new
    assert repetition([1, 2]) == 0


def test_health_of_known_answers() -> None:
    found = health([Answer([1, 2, 3, 4], "a", True), Answer([1, 2], "b", False)])
    assert found.mean_tokens == 3
    assert found.eos_rate == 0.5
    assert found.distinct_2 == pytest.approx(3 / 4)  # 12, 23, 34 and 12 again
