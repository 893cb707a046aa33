"""Greedy answers end where the model ends them, in any batch, and their health is measured as stated."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.common.schema import Lora
from scripts.dataset.chat_format import ChatFormat, stop_token_ids, user_turn
from scripts.dataset.rendering import Rendered, render_prompt
from scripts.model.adapter import add_lora
from scripts.model.base import load_tokenizer
from scripts.model.generation import (
    SCORED_TOGETHER,
    Answer,
    Sampling,
    choose,
    decoding_greedily,
    generate_and_score,
    generate_answers,
    health,
    repetition,
    sample_answers,
)
from scripts.model.scoring import score_answers
from scripts.speed.speed_up import speed_up
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


@pytest.mark.parametrize("fast", [True, False])
def test_rows_scored_beside_answers_have_the_scores_and_leave_the_answers_of_each_alone(
    tiny_llama: Path, fast: bool
) -> None:
    """Rows of one prompt and of none, more of one prompt than are read along with it, and a prompt that stands twice."""
    tokenizer, model = load_tokenizer(tiny_llama), add_lora(load(tiny_llama), Lora(r=4), "m")
    if fast:
        speed_up(model)
    prompts = [render_prompt(ChatFormat(tokenizer), user_turn("go " * count)) for count in (1, 9, 4, 9, 2)]
    many = [Rendered.of(prompts[2], [*range(7, 8 + count)]) for count in range(2 * SCORED_TOGETHER)]
    rows = [Rendered.of(prompts[3], [9, 8, 7]), *many, Rendered.of([5, 6], [7]), Rendered.of(prompts[0], [9] * 40)]

    answers, scores = generate_and_score(model, tokenizer, prompts, rows, 8, batch_size=2)

    assert answers == generate_answers(model, tokenizer, prompts, 8, batch_size=1)
    assert [score.tokens for score in scores] == [row.trained_tokens for row in rows]
    alone = [score_answers(model, [row], tokenizer.pad_token_id)[0].logps for row in rows]
    assert [score.logps for score in scores] == pytest.approx(alone, abs=1e-3)


def test_a_row_is_read_along_with_its_prompt(tiny_llama: Path) -> None:
    tokenizer, model = load_tokenizer(tiny_llama), add_lora(load(tiny_llama), Lora(r=4), "m")
    speed_up(model)
    prompts = [render_prompt(ChatFormat(tokenizer), user_turn(f"{word} " * 40)) for word in ("go", "stay", "come")]
    rows = [Rendered.of(prompt, [token, 8, 7]) for prompt in prompts for token in (9, 10)]
    generate_and_score(model, tokenizer, prompts[:2], [], 1)  # the forward pass is proven on the first that it sees
    read: list[int] = []
    embedding = model.get_base_model().model.embed_tokens
    embedding.register_forward_hook(lambda module, args, output: read.append(output.shape[1]))

    generate_and_score(model, tokenizer, prompts, rows, 1)

    assert len(read) == 1
    assert read[0] <= sum(map(len, prompts)) + 2 * len(rows)  # a row's last token predicts nothing


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


@pytest.mark.parametrize(("top_k", "top_p", "left"), [(0, 1.0, 4), (2, 1.0, 2), (0, 0.65, 2), (3, 0.6, 2), (1, 1.0, 1)])
def test_tokens_are_drawn_as_often_as_they_are_likely(top_k: int, top_p: float, left: int) -> None:
    """Probabilities 0.4, 0.3, 0.2 and 0.1 at temperature 2, of those that the limits leave."""
    probs = torch.tensor([0.3, 0.1, 0.4, 0.2])
    sampling = Sampling(1, temperature=2.0, top_p=top_p, top_k=top_k)
    drawn = choose((2 * probs.log()).expand(4000, -1), sampling, [random.Random(seed) for seed in range(4000)])

    kept = torch.tensor([2, 0, 3, 1])[:left]
    wanted = torch.zeros(4).index_copy(0, kept, probs[kept] / probs[kept].sum())
    assert torch.allclose(torch.bincount(torch.tensor(drawn), minlength=4) / 4000, wanted, atol=0.03)


def test_a_nucleus_of_more_tokens_than_are_looked_at_first_is_whole() -> None:
    drawn = choose(
        torch.zeros(3000, 1000), Sampling(1, temperature=1.0, top_p=0.9), [random.Random(n) for n in range(3000)]
    )

    assert len(set(drawn)) > 800


@pytest.mark.parametrize("fast", [True, False])
def test_samples_depend_on_their_seed_and_not_on_their_neighbours(tiny_llama: Path, fast: bool) -> None:
    tokenizer, model = load_tokenizer(tiny_llama), add_lora(load(tiny_llama), Lora(r=4), "m")
    if fast:
        speed_up(model)
    prompts = [render_prompt(ChatFormat(tokenizer), user_turn("go " * count)) for count in (1, 9, 4)]
    sampling = Sampling(6, temperature=0.8, top_p=0.95, top_k=50, n=3)

    together = sample_answers(model, tokenizer, prompts, sampling, [5, 6, 7], batch_size=5)
    alone = sample_answers(model, tokenizer, prompts[1:2], sampling, [6], batch_size=1)
    others = sample_answers(model, tokenizer, prompts, sampling, [5, 8, 7], batch_size=5)

    assert together[1] == alone[0]
    assert (others[0], others[2]) == (together[0], together[2])
    assert others[1] != together[1]
    assert len({tuple(answer.token_ids) for answers in together for answer in answers}) == 9
