"""Greedy answers to prompts, and how healthy they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from scripts.dataset.chat_format import stop_token_ids
from scripts.model.batch import left_padded_batch
from scripts.model.shape import positions_of

NGRAM = 4


@dataclass(frozen=True)
class Answer:
    """A generated answer and whether the model ended it by itself."""

    token_ids: list[int]
    text: str
    ended: bool


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


@torch.inference_mode()
def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 16,
    progress: Callable[[int], object] = lambda done: None,
) -> list[Answer]:
    """Continue each prompt greedily, in the order given; prompts of similar length share a batch.

    Where the model has a table of positions, an answer ends with it at the latest.
    """
    stops = stop_token_ids(tokenizer)
    answers: dict[int, Answer] = {}
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    positions = positions_of(model)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    with decoding_greedily(model, tokenizer):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            input_ids, attention_mask = left_padded_batch([prompts[index] for index in indices], tokenizer.pad_token_id)
            output = model.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                max_new_tokens=min(max_new_tokens, positions - input_ids.shape[1]) if positions else max_new_tokens,
            )
            for row, index in enumerate(indices):
                answers[index] = _cut(tokenizer, output[row, input_ids.shape[1] :].tolist(), stops)
            progress(len(indices))
    model.train(was_training)
    return [answers[index] for index in range(len(prompts))]


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
