"""From what may be preferred to what is written: the filters, and how many pairs each of them leaves out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rapidfuzz.distance import Indel

from scripts.common.schema import Pairs
from scripts.dataset.chat_format import ChatFormat, UnfitRow
from scripts.dataset.records import Message, Preference, with_system_prompt
from scripts.dataset.rendering import RenderedPair, render_and_check

if TYPE_CHECKING:
    from scripts.pairs.sampling import Sample

# Pairs whose answers hardly differ make DPO lower the likelihood of both (Razin et al. 2024, arXiv:2410.08847). Their
# measure of likeness needs the model's hidden states; on texts, letters that would have to be changed come close.
NEAR_IDENTICAL = 0.9


@dataclass(frozen=True)
class Option:
    """An answer that may be chosen or rejected: a sample by its number, or None for one that the user wrote."""

    text: str
    number: int | None = None


@dataclass(frozen=True)
class Candidate:
    """One answer that is preferred to another, by whom, and how much it is worth beside others of its prompt."""

    chosen: Option
    rejected: Option
    labeller: str
    worth: int = 0


@dataclass(frozen=True)
class Labelled:
    """A prompt and what is preferred among its answers, what shows the difference best first."""

    source: str
    messages: tuple[Message, ...]
    group: str | None
    seed: int | None
    candidates: Sequence[Candidate]


@dataclass(frozen=True)
class Pair:
    """A pair to be written, and by how many tokens its chosen answer is the longer one."""

    prompt: Labelled
    candidate: Candidate
    longer_by: int


def usable(samples: Sequence[Sample], counts: Counter[str]) -> list[Option]:
    """Return the different samples that are whole answers.

    One that was cut at `pairs.max_new_tokens` has no end to be trained on, and DPO would be taught one in its middle.
    """
    options: dict[str, Option] = {}
    for number, sample in enumerate(samples):
        if not sample.ended:
            counts["samples cut at pairs.max_new_tokens"] += 1
        elif not sample.text:
            counts["samples without text"] += 1
        elif sample.text in options:
            counts["samples that repeat another one"] += 1
        else:
            options[sample.text] = Option(sample.text, number)
    return list(options.values())


def near_identical(one: str, other: str) -> bool:
    """Tell whether two answers share nearly all their letters in the same order."""
    return Indel.normalized_similarity(one, other) >= NEAR_IDENTICAL


def by_closeness(chosen: Sequence[Option], rejected: Sequence[Option]) -> list[tuple[Option, Option]]:
    """Return each of the chosen with each of the rejected, those closest in length first."""
    both = [(one, other) for one in chosen for other in rejected]
    return sorted(both, key=lambda pair: abs(len(pair[0].text) - len(pair[1].text)))


def choose_pairs(
    prompts: Sequence[Labelled], settings: Pairs, chat: ChatFormat, max_length: int, counts: Counter[str]
) -> list[Pair]:
    """Return the pairs that DPO can learn from; `counts` gets what each filter leaves out."""
    pairs: list[Pair] = []
    tilt = 0  # how much more often the chosen answer has been the longer one
    for prompt in prompts:
        if not prompt.candidates:
            counts["prompts with nothing to prefer"] += 1
        waiting, kept = list(prompt.candidates), 0
        while waiting and kept < settings.max_per_prompt:
            candidate = _next(waiting, tilt if settings.balance_length else 0)
            waiting.remove(candidate)
            if near_identical(candidate.chosen.text, candidate.rejected.text):
                counts["pairs of near-identical answers"] += 1
            elif (rendered := _rendered(prompt, candidate, chat)) is None:
                counts["pairs that the tokenizer or chat template cannot hold"] += 1
            elif len(rendered.input_ids) > max_length:
                counts["pairs longer than dpo.max_length"] += 1
            else:
                pairs.append(Pair(prompt, candidate, len(rendered.chosen_ids) - len(rendered.rejected_ids)))
                tilt += (pairs[-1].longer_by > 0) - (pairs[-1].longer_by < 0)
                kept += 1
        if waiting:
            counts["pairs beyond pairs.max_per_prompt"] += len(waiting)
    if settings.balance_length:
        balanced = balance_lengths(pairs)
        if len(balanced) < len(pairs):
            counts["pairs left out to keep lengths in balance"] = len(pairs) - len(balanced)
        pairs = balanced
    return pairs


def _next(waiting: Sequence[Candidate], tilt: int) -> Candidate:
    """Return the first of those worth most, or the first of them that brings the lengths closer to balance."""
    best = [candidate for candidate in waiting if candidate.worth == waiting[0].worth]
    righting = (each for each in best if tilt * (len(each.chosen.text) - len(each.rejected.text)) <= 0)
    return next(righting, best[0])


def _rendered(prompt: Labelled, candidate: Candidate, chat: ChatFormat) -> RenderedPair | None:
    messages = tuple(with_system_prompt(prompt.messages, chat.system_prompt))
    pair = Preference(prompt.source, messages, candidate.chosen.text, candidate.rejected.text)
    try:
        return render_and_check(chat, pair)[0]
    except UnfitRow:
        return None


def balance_lengths(pairs: Sequence[Pair]) -> list[Pair]:
    """Leave pairs out until the chosen answer is the longer one about as often as the rejected one.

    As often as chance allows: of n pairs of unequal length the two numbers may differ by two standard errors of a fair
    coin, 2·sqrt(n). The pairs whose lengths differ most go first. Without this DPO learns length before all else
    (Park et al. 2024, arXiv:2403.19159).
    """
    longer, shorter = ([pair for pair in pairs if sign * pair.longer_by > 0] for sign in (1, -1))
    more, fewer = sorted((longer, shorter), key=len, reverse=True)
    more.sort(key=lambda pair: abs(pair.longer_by))
    kept = len(more)
    while kept - len(fewer) > 2 * math.sqrt(kept + len(fewer)):
        kept -= 1
    out = {id(pair) for pair in more[kept:]}
    return [pair for pair in pairs if id(pair) not in out]


def describe_lengths(pairs: Sequence[Pair]) -> str:
    """Say how often the chosen answer is the longer one."""
    longer = sum(pair.longer_by > 0 for pair in pairs)
    return f"the chosen answer is the longer one in {longer} of {len(pairs)}"


def rows_of(pairs: Sequence[Pair], group_field: str | None) -> Iterator[dict[str, object]]:
    """Write pairs as training reads them; a prompt of one question is its text."""
    for pair in pairs:
        messages = pair.prompt.messages
        single = len(messages) == 1 and messages[0]["role"] == "user"
        row: dict[str, object] = {"prompt": messages[0]["content"] if single else list(messages)}
        row |= {"chosen": pair.candidate.chosen.text, "rejected": pair.candidate.rejected.text}
        yield row if group_field is None else {group_field: pair.prompt.group, **row}
