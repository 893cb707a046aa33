"""Which pairs are written: no near-identical answers, no lesson in length, nothing that DPO cannot read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from scripts.common.schema import Pairs
from scripts.dataset.chat_format import ChatFormat
from scripts.model.base import load_tokenizer
from scripts.pairs.choosing import (
    Candidate,
    Labelled,
    Option,
    Pair,
    balance_lengths,
    choose_pairs,
    near_identical,
    rows_of,
    usable,
)
from scripts.pairs.sampling import Sample

QUESTION = ({"role": "user", "content": "How is it going?"},)


@pytest.fixture(scope="module")
def chat(tiny_llama: Path) -> ChatFormat:
    """Return the format of the tiny model."""
    return ChatFormat(load_tokenizer(tiny_llama))


def offer(*pairs: tuple[str, str], worth: tuple[int, ...] = (), group: str | None = None) -> Labelled:
    """Return a prompt of which the first of each pair of texts is preferred."""
    worths = worth or (0,) * len(pairs)
    candidates = [Candidate(Option(a, 0), Option(b, 1), "x", w) for (a, b), w in zip(pairs, worths, strict=True)]
    return Labelled("data.jsonl:1", QUESTION, group, 7, candidates)


def texts(pairs: list[Pair]) -> list[tuple[str, str]]:
    """Return chosen and rejected answers."""
    return [(pair.candidate.chosen.text, pair.candidate.rejected.text) for pair in pairs]


def pair(longer_by: int) -> Pair:
    """Return a pair of which only the lengths matter."""
    return Pair(offer(), Candidate(Option("a"), Option("b"), "x"), longer_by)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("The team moved two of five tables.", "The team moved two of five tables", True),
        ("The team moved two of five tables.", "The team moves two of five tables.", True),
        ("The team moved two of five tables.", "Two tables are moved, three are not.", False),
        ("yes", "no", False),
        ("", "", True),
    ],
)
def test_answers_that_share_nearly_all_letters_are_near_identical(one: str, other: str, same: bool) -> None:
    assert near_identical(one, other) == near_identical(other, one) == same


def test_a_near_identical_pair_makes_room_for_the_next(chat: ChatFormat) -> None:
    counts: Counter[str] = Counter()
    prompt = offer(("It is all done now.", "It is all done now!"), ("It is all done now.", "No idea what you mean."))

    pairs = choose_pairs([prompt], Pairs(max_per_prompt=1), chat, 200, counts)

    assert texts(pairs) == [("It is all done now.", "No idea what you mean.")]
    assert counts == {"pairs of near-identical answers": 1}


def test_pairs_that_training_would_refuse_are_left_out_and_counted(chat: ChatFormat) -> None:
    counts: Counter[str] = Counter()
    unfit = offer((" ", "x y z"), ("long " * 300, "short"), ("yes it is", "no"))

    pairs = choose_pairs([unfit], Pairs(balance_length=False), chat, 100, counts)

    assert ("yes it is", "no") in texts(pairs)
    assert counts["pairs longer than dpo.max_length"] == 1


def test_what_is_worth_more_comes_first_and_of_the_like_what_rights_the_balance(chat: ChatFormat) -> None:
    tilted = offer(("longer one here", "short"))
    like = offer(("a long answer too", "brief"), ("brief", "a long answer too"), worth=(1, 1))
    unlike = offer(("a long answer too", "brief"), ("brief", "a long answer too"), worth=(2, 1))

    def chosen(*prompts: Labelled, balance: bool = True) -> list[tuple[str, str]]:
        settings = Pairs(max_per_prompt=1, balance_length=balance)
        return texts(choose_pairs(prompts, settings, chat, 200, Counter()))[1:]

    assert chosen(tilted, like) == [("brief", "a long answer too")]
    assert chosen(tilted, like, balance=False) == [("a long answer too", "brief")]
    assert chosen(tilted, unlike) == [("a long answer too", "brief")]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_pairs_whose_lengths_differ_most_are_left_out(sign: int) -> None:
    longer, shorter, equal = [pair(sign * by) for by in range(1, 71)], [pair(-sign * 5)] * 30, [pair(0)] * 10

    kept = balance_lengths([*longer, *equal, *shorter])

    left = [each.longer_by * sign for each in kept if each.longer_by * sign > 0]
    assert left == list(range(1, len(left) + 1))
    assert len(left) - 30 <= 2 * (len(left) + 30) ** 0.5 < len(left) + 1 - 30 + 1
    assert sum(each.longer_by == 0 for each in kept) == 10
    assert sum(each.longer_by * sign < 0 for each in kept) == 30


@pytest.mark.parametrize("count", [0, 1, 4])
def test_a_few_pairs_prove_no_bias(count: int) -> None:
    assert len(balance_lengths([pair(9)] * count)) == count


def test_only_whole_different_answers_are_used() -> None:
    counts: Counter[str] = Counter()
    samples = [Sample("a", True), Sample("b", False), Sample("", True), Sample("a", True), Sample("c", True)]

    assert usable(samples, counts) == [Option("a", 0), Option("c", 4)]
    assert list(counts.values()) == [1, 1, 1]


def test_a_conversation_stays_one_and_a_question_becomes_its_text() -> None:
    talk = ({"role": "system", "content": "Be brief."}, *QUESTION)
    pairs = [
        Pair(Labelled("x:1", messages, "7", 1, []), Candidate(Option("a"), Option("b"), "x"), 0)
        for messages in (QUESTION, talk)
    ]

    one, several = rows_of(pairs, "customer")

    assert one == {"prompt": "How is it going?", "chosen": "a", "rejected": "b", "customer": "7"}
    assert several["prompt"] == list(talk)
