"""Answers to prompts, greedy or sampled, and how healthy they are."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from scripts.dataset.chat_format import stop_token_ids
from scripts.dataset.rendering import Rendered
from scripts.model.batch import left_padded_batch, reads_padding
from scripts.model.forward import Decoding, forward_of
from scripts.model.scoring import AnswerScore, places_of_logits, score_answers, scores_of
from scripts.model.shape import positions_of

NGRAM = 4
GREEDY_BELOW = 1e-4  # the most likely token wins with certainty in any float type
SCORED_TOGETHER = 8  # rows; the logits of a long answer take 100 MB and more
CANDIDATES = 256  # a nucleus rarely holds more; only when it does is the whole vocabulary sorted


@dataclass(frozen=True)
class Answer:
    """A generated answer and whether the model ended it by itself."""

    token_ids: list[int]
    text: str
    ended: bool


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: `n` for each prompt; greedily at temperature 0, and without limits unless they are set."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    n: int = 1

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW


@dataclass(frozen=True)
class Health:
    """What degenerate answers show first."""

    mean_tokens: float
    repetition: float  # share of 4-grams that repeat an earlier one of the same answer
    eos_rate: float  # share of answers that the model ended by itself
    distinct_2: float  # share of different 2-grams over all answers


@contextmanager
def decoding_greedily(model: Any, tokenizer: Any) -> Iterator[None]:
    """Make `generate` take the most likely token up to a stop, as the server does.

    Without it `generate` obeys what the base's makers recommend: a repetition penalty, tokens that it may not say. It
    does so for each value that is left out, so a configuration that is handed over would not be enough.
    """
    from transformers import GenerationConfig

    network = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT reads its base's
    recommended = network.generation_config
    network.generation_config = GenerationConfig(
        do_sample=False,
        use_cache=True,
        eos_token_id=sorted(stop_token_ids(tokenizer)),
        pad_token_id=tokenizer.pad_token_id,
    )
    try:
        yield
    finally:
        network.generation_config = recommended


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 16,
    progress: Callable[[int], object] = lambda done: None,
) -> list[Answer]:
    """Continue each prompt greedily, in the order given.

    Where the model has a table of positions, an answer ends with it at the latest.
    """
    return generate_and_score(model, tokenizer, prompts, [], max_new_tokens, batch_size, progress)[0]


def generate_and_score(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Rendered],
    max_new_tokens: int,
    batch_size: int = 16,
    progress: Callable[[int], object] = lambda done: None,
) -> tuple[list[Answer], list[AnswerScore]]:
    """Continue each prompt greedily, and score the answers of rows, in the orders given.

    Where the model's forward pass is lean, a row that begins with one of the prompts is read along with it. Where the model
    has a table of positions, an answer ends with it at the latest.
    """
    beside, sampling = _Beside(rows), Sampling(max_new_tokens=max_new_tokens)
    answers = _sample(model, tokenizer, prompts, sampling, (), batch_size, progress, beside)
    left = [index for index in range(len(rows)) if index not in beside.scores]
    of_left = score_answers(model, [rows[index] for index in left], tokenizer.pad_token_id)
    scores = beside.scores | dict(zip(left, of_left, strict=True))
    return [each[0] for each in answers], [scores[index] for index in range(len(rows))]


def sample_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int] = (),
    batch_size: int = 16,
    progress: Callable[[int], object] = lambda done: None,
) -> list[list[Answer]]:
    """Return `sampling.n` answers to each prompt, in the order given; `progress` is called with how many more are done.

    `seeds`: one for each prompt; an answer depends on its prompt's seed and on its number, not on its neighbours, but for
    rounding. The samples of a prompt stand together, so that it is read once.
    """
    return _sample(model, tokenizer, prompts, sampling, seeds, batch_size, progress, _Beside([]))


@torch.inference_mode()
def _sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int],
    batch_size: int,
    progress: Callable[[int], object],
    beside: _Beside,
) -> list[list[Answer]]:
    forward, stops = forward_of(model, tokenizer.pad_token_id), stop_token_ids(tokenizer)
    was_training = model.training
    model.eval()
    order = sorted(range(len(prompts)), key=lambda index: forward.similarity(prompts[index]))
    rows = deque(
        _Row(index, number, random.Random(f"{seeds[index] if seeds else 0} {number}"), list(prompts[index]))
        for index in order
        for number in range(sampling.n)
    )
    decoding = forward.decoding([row.prompt for row in list(rows)[:2]])
    answer = _answer_with_library if decoding is None else partial(_answer, decoding, beside)
    answers: list[list[Any]] = [[None] * sampling.n for _ in prompts]
    for row in answer(model, tokenizer, rows, sampling, stops, batch_size):
        answers[row.index][row.number] = _cut(tokenizer, row.ids, stops)
        progress(1)
    model.train(was_training)
    return answers


@dataclass(eq=False)
class _Row:
    """An answer in the making: which sample of which prompt, what it draws with, and what it has so far."""

    index: int
    number: int
    random: random.Random
    prompt: list[int]
    ids: list[int] = field(default_factory=list)


class _Beside:
    """Rows whose answers are scored while the prompts that they begin with are read."""

    def __init__(self, rows: Sequence[Rendered]) -> None:
        self.rows = rows
        self.scores: dict[int, AnswerScore] = {}  # by the number of the row, as far as its prompt was read
        self.waiting: dict[tuple[int, ...], list[int]] = {}  # by prompt
        for index, places in enumerate(places_of_logits(rows)):
            self.waiting.setdefault(tuple(rows[index].input_ids[: min(places, default=0) + 1]), []).append(index)

    def read(self, decoding: Decoding, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Read prompts into rows that are continued; return the logits of what follows each, (prompts, V)."""
        decoding.reserve(prompts)
        following: list[torch.Tensor] = []
        for some, indices in self._portions(prompts):
            rows = [self.rows[index] for index in indices]
            logits, of_rows = decoding.add(some, [row.input_ids for row in rows], places_of_logits(rows))
            following.append(logits)
            if rows:
                self.scores |= zip(indices, scores_of(rows, torch.log_softmax(of_rows.float(), -1)), strict=True)
        return torch.cat(following)

    def _portions(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[list[Sequence[int]], list[int]]]:
        """Yield prompts with the rows that begin with them, so few of these that their logits do not fill the memory."""
        some: list[Sequence[int]] = []
        indices: list[int] = []
        for prompt in prompts:
            of_prompt = self.waiting.pop(tuple(prompt), [])[:SCORED_TOGETHER]
            if len(indices) + len(of_prompt) > SCORED_TOGETHER:
                yield some, indices
                some, indices = [], []
            some.append(prompt)
            indices.extend(of_prompt)
        yield some, indices


def _answer(
    decoding: Decoding,
    beside: _Beside,
    model: Any,
    tokenizer: Any,
    waiting: deque[_Row],
    sampling: Sampling,
    stops: set[int],
    batch_size: int,
) -> Iterator[_Row]:
    """Yield rows as they end; those that wait take the places of those that ended, half a batch at a time."""
    live: list[_Row] = []
    while waiting or live:
        if waiting and len(live) <= batch_size // 2:
            new = [waiting.popleft() for _ in range(min(len(waiting), batch_size - len(live)))]
            live += new
            logits = beside.read(decoding, [row.prompt for row in new])
        else:
            new = live
            logits = decoding.step([row.ids[-1] for row in live])
        for row, token in zip(new, choose(logits, sampling, [row.random for row in new]), strict=True):
            row.ids.append(token)
        for place in reversed(range(len(live))):
            row = live[place]
            if row.ids[-1] in stops or len(row.ids) == sampling.max_new_tokens:
                decoding.drop(place)
                live[place] = live[-1]
                live.pop()
                yield row


def _answer_with_library(
    model: Any, tokenizer: Any, waiting: deque[_Row], sampling: Sampling, stops: set[int], batch_size: int
) -> Iterator[_Row]:  # fmt: skip
    """Yield rows batch by batch, as `generate` ends them."""
    device, positions = next(model.parameters()).device, positions_of(model)
    batch_size = 1 if reads_padding(model) else batch_size
    with decoding_greedily(model, tokenizer):
        while waiting:
            batch = [waiting.popleft() for _ in range(min(len(waiting), batch_size))]
            input_ids, attention_mask = left_padded_batch([row.prompt for row in batch], tokenizer.pad_token_id)
            width, most = input_ids.shape[1], sampling.max_new_tokens
            output = model.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                max_new_tokens=min(most, positions - width) if positions else most,
                logits_processor=[] if sampling.greedy else [_Choice(sampling, [row.random for row in batch])],
            )
            for row, ids in zip(batch, output[:, width:].tolist(), strict=True):
                row.ids = ids
                yield row


class _Choice:
    """Leave `generate` no choice but the token that was drawn."""

    def __init__(self, sampling: Sampling, randoms: Sequence[random.Random]) -> None:
        self.sampling, self.randoms = sampling, randoms

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = torch.tensor(choose(scores, self.sampling, self.randoms), device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def choose(logits: torch.Tensor, sampling: Sampling, randoms: Sequence[random.Random]) -> list[int]:
    """Choose a token for each row of logits (B, V), with a generator for each."""
    if sampling.greedy:
        return logits.argmax(-1).tolist()
    logits = logits.float() / sampling.temperature
    total = logits.logsumexp(-1, keepdim=True)
    drawn = torch.tensor([each.random() for each in randoms], dtype=torch.float64, device=logits.device)[:, None]
    if not sampling.top_k and sampling.top_p == 1:
        return _places(logits, total, drawn, 1)[:, 0].tolist()

    def place(best: torch.Tensor, rows: Any) -> torch.Tensor:
        of_rows = best.logsumexp(-1, keepdim=True) if sampling.top_k else total[rows]
        return _places(best, of_rows, drawn[rows], sampling.top_p)

    def lacks(best: torch.Tensor) -> torch.Tensor:
        return (best - total).exp().sum(-1) < sampling.top_p

    return choose_among_likeliest(logits, sampling.top_k, lacks, place)


def choose_among_likeliest(
    scores: torch.Tensor,
    top_k: int,
    lacks: Callable[[torch.Tensor], torch.Tensor],
    place: Callable[[torch.Tensor, Any], torch.Tensor],
) -> list[int]:
    """Choose a token for each row of scores (B, V) among its likeliest: top_k of them, or as many as its nucleus needs.

    lacks: says of each row whether the given scores, the highest first, are less than its nucleus; place: returns which of
    them is chosen, (n, 1), for the rows that an index names.
    """
    best, ids = scores.topk(min(top_k or CANDIDATES, scores.shape[1]))
    tokens = ids.gather(1, place(best, slice(None)))
    if not top_k:
        more = lacks(best)
        if bool(more.any()):  # only these rows are sorted as a whole
            best, ids = scores[more].sort(descending=True)
            tokens[more] = ids.gather(1, place(best, more))
    return tokens[:, 0].tolist()


def _places(logits: torch.Tensor, total: torch.Tensor, drawn: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return where numbers from 0 to below 1 fall among candidates, the likeliest first where top_p cuts them; (B, 1)."""
    probs = (logits - total).double().exp()
    if top_p < 1:  # a token stays while those before it have not reached top_p, so the first always stays
        probs *= probs.cumsum(-1) - probs < top_p
    cumulative = probs.cumsum(-1)
    # No number is 1, so the place lies before the end.
    return torch.searchsorted(cumulative, drawn * cumulative[:, -1:], right=True).clamp(max=cumulative.shape[1] - 1)


def _cut(tokenizer: Any, ids: list[int], stops: set[int]) -> Answer:
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    kept = ids if end is None else ids[:end]
    return Answer(kept, tokenizer.decode(kept, skip_special_tokens=True).strip(), end is not None)


def health(answers: Sequence[Answer]) -> Health:
    """Measure length, repetition, endings and variety."""
    pairs = [pair for answer in answers for pair in _ngrams(answer.token_ids, 2)]
    return Health(
        mean_tokens=sum(len(answer.token_ids) for answer in answers) / len(answers),
        repetition=sum(repetition(answer.token_ids) for answer in answers) / len(answers),
        eos_rate=sum(answer.ended for answer in answers) / len(answers),
        distinct_2=len(set(pairs)) / max(len(pairs), 1),
    )


def repetition(ids: Sequence[int]) -> float:
    """Return the share of 4-grams that occurred before in the same answer."""
    grams = _ngrams(ids, NGRAM)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _ngrams(ids: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(ids[place : place + size]) for place in range(len(ids) - size + 1)]
