"""Tokens are drawn from the right distribution, and text comes out whole and in time."""

from __future__ import annotations

import bisect
import itertools
import random
from collections import Counter

import pytest
import torch

from serve.sampling import Sampler, Sampling, TextStream
from tests.conftest import tiny_tokenizer

PROBABILITIES = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])
LOGITS = PROBABILITIES.log()


def frequencies(count: int = 4000, **settings) -> dict[int, float]:
    sampler = Sampler(Sampling(**{"temperature": 1.0, "seed": 0, **settings}))
    drawn = Counter(sampler.choose(LOGITS, []) for _ in range(count))
    return {token: number / count for token, number in drawn.items()}


def test_tokens_are_drawn_by_their_probability():
    shares_drawn = frequencies()
    assert all(shares_drawn[token] == pytest.approx(float(p), abs=0.03) for token, p in enumerate(PROBABILITIES))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_k": 2}, {0: 2 / 3, 1: 1 / 3}),
        ({"top_p": 0.6}, {0: 2 / 3, 1: 1 / 3}),  # 0.5 does not reach 0.6, so the second stays
        ({"top_p": 0.5}, {0: 1.0}),
        ({"top_k": 10**9, "top_p": 0.01}, {0: 1.0}),
        ({"top_k": 2, "top_p": 0.6}, {0: 1.0}),  # of the two that are left the first has 2/3
        (
            {"temperature": 0.5},
            {t: float(p) ** 2 / float((PROBABILITIES**2).sum()) for t, p in enumerate(PROBABILITIES)},
        ),
        ({"temperature": 1e-320}, {0: 1.0}),
        ({"temperature": 2e-4}, {0: 1.0}),
    ],
)
def test_settings_change_the_distribution_as_defined(settings, expected):
    shares_drawn = frequencies(**settings)
    for token in range(len(LOGITS)):
        assert shares_drawn.get(token, 0) == pytest.approx(expected.get(token, 0), abs=0.03)


def test_without_filters_a_token_is_the_inverse_of_the_distribution_at_the_seeds_next_number():
    shares = [0.07, 0.5, 0.03, 0.25, 0.15]
    sampler, numbers = Sampler(Sampling(temperature=1.0, seed=7)), random.Random(7)
    expected = [bisect.bisect(list(itertools.accumulate(shares)), numbers.random()) for _ in range(500)]
    assert [sampler.choose(torch.tensor(shares).log(), []) for _ in range(500)] == expected


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.99}])
def test_a_token_without_probability_is_never_drawn_not_even_by_the_number_zero(filters):
    class Zero(random.Random):
        def random(self) -> float:
            return 0.0

    sampler = Sampler(Sampling(temperature=1.0, **filters))
    sampler.random = Zero()
    assert sampler.choose(torch.tensor([0.0, 0.3, 0.7]).log(), []) == (2 if filters else 1)


def test_a_nucleus_that_is_reached_exactly_takes_no_further_token():
    sampler = Sampler(Sampling(temperature=1.0, top_p=0.5, seed=0))
    assert len({sampler.choose(torch.zeros(4), []) for _ in range(200)}) == 2


def test_a_wide_nucleus_is_the_smallest_set_that_reaches_top_p():
    shares = torch.arange(1, 5001)[torch.randperm(5000, generator=torch.Generator().manual_seed(0))] / (5000 * 5001 / 2)
    order = shares.argsort(descending=True)
    nucleus = set(order[: int((shares[order].cumsum(0) < 0.9).sum()) + 1].tolist())
    sampler = Sampler(Sampling(temperature=1.0, top_p=0.9, seed=0))
    drawn = {sampler.choose(shares.log(), []) for _ in range(2000)}
    assert drawn <= nucleus
    assert len(drawn) > 1000, "many more than the first candidates"


def test_repetition_penalty_makes_seen_tokens_less_likely():
    penalised = Sampler(Sampling(repetition_penalty=2.0))
    assert penalised.choose(torch.tensor([3.0, 2.0, -1.0]), [0]) == 1
    assert penalised.choose(torch.tensor([-1.0, -1.5]), [0]) == 1, "a negative score falls, too"
    assert penalised.choose(torch.tensor([0.9, 0.5]), [0]) == 1, "a small positive score falls, too"
    assert penalised.choose(torch.tensor([3.0, 2.0]), []) == 0


def test_the_same_seed_draws_the_same_tokens():
    def draw(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return [sampler.choose(LOGITS, []) for _ in range(50)]

    assert draw(3) == draw(3) != draw(4)


def stream(text: str, *stops: str) -> tuple[list[str], bool]:
    """Return the pieces that a stream gives for a text, token by token."""
    tokenizer = tiny_tokenizer()
    decoder = TextStream(tokenizer, stops)
    pieces = []
    for token in tokenizer.encode(text):
        pieces.append(decoder.add(token))
        if decoder.stopped:
            break
    else:
        pieces.append(decoder.end())
    return pieces, decoder.stopped


@pytest.mark.parametrize("text", ["Hello world, this is it.", "häßlich 😀👩‍👩‍👧 שלום", "  spaces  ", "a\x00b"])
def test_the_pieces_are_the_text_and_no_half_character_is_among_them(text):
    pieces, _ = stream(text)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one STOP two", ["STOP"], "one "),
        ("one STO two", ["STOP"], "one STO two"),
        ("aaab", ["aab"], "a"),
        ("smile 😀👩 end", ["👩"], "smile 😀"),
        ("x yy zzz", ["zzz", "yy"], "x "),
        ("ends with ST", ["STOP"], "ends with ST"),
        ("well", ["l"], "we"),
    ],
)
def test_a_stop_string_cuts_exactly_and_nothing_of_it_leaks(text, stops, expected):
    pieces, stopped = stream(text, *stops)
    assert "".join(pieces) == expected
    assert stopped == any(stop in text for stop in stops)


def test_what_no_stop_string_can_begin_with_is_given_at_once():
    tokenizer = tiny_tokenizer()
    held_back = TextStream(tokenizer, ["STOP"])
    text = "Hello world, S and ST are held, this is not"
    released = ""
    for token in tokenizer.encode(text):
        released += held_back.add(token)
        waiting = next(n for n in (3, 2, 1, 0) if held_back.decoded.endswith("STO"[:n]))
        assert released == held_back.decoded[: len(held_back.decoded) - waiting]
    assert released == text


def test_control_tokens_give_no_text_and_half_a_character_ends_as_its_replacement():
    tokenizer = tiny_tokenizer()
    half = tokenizer.encode("well , it 's 😀")[:-1]
    for ids, expected in (([*tokenizer.encode("Hi"), tokenizer.eos_token_id], "Hi"), (half, "well , it 's \ufffd")):
        decoder = TextStream(tokenizer)
        pieces = [decoder.add(token) for token in ids]
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces) + decoder.end() == expected
