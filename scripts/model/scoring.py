"""Log-probabilities of given answers under a model: held-out loss, preference accuracy and KL all rest on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from scripts.dataset.rendering import IGNORED, Rendered
from scripts.model.forward import Forward, forward_of


@dataclass(frozen=True)
class AnswerScore:
    """Summed log-probability of an answer in nats, and how many tokens it has."""

    logps: float
    tokens: int


def _batches(forward: Forward, rows: Sequence[Rendered], batch_size: int) -> Iterator[list[int]]:
    order = sorted(range(len(rows)), key=lambda index: forward.similarity(rows[index].input_ids))
    yield from (order[start : start + batch_size] for start in range(0, len(order), batch_size))


def places_of_logits(rows: Sequence[Rendered]) -> list[list[int]]:
    """Return where the logits of each row stand that predict its answer tokens: before them."""
    return [[place - 1 for place, label in enumerate(row.labels) if label != IGNORED] for row in rows]


def scores_of(rows: Sequence[Rendered], log_probs: torch.Tensor) -> list[AnswerScore]:
    """Score rows, given the log-probabilities at their answer tokens, one row after the other, (N, V)."""
    labels = [torch.tensor([label for label in row.labels if label != IGNORED]) for row in rows]
    logps = log_probs.gather(-1, torch.cat(labels).to(log_probs.device)[:, None])[:, 0]
    by_row = logps.double().cpu().split([len(of_row) for of_row in labels])
    return [AnswerScore(float(of_row.sum()), len(of_row)) for of_row in by_row]


def _log_probs(forward: Forward, rows: Sequence[Rendered]) -> torch.Tensor:
    """Return the log-probabilities over the vocabulary at every scored position of the rows, (N, V) in fp32."""
    logits = forward.logits([row.input_ids for row in rows], places_of_logits(rows))
    return torch.log_softmax(logits.float(), -1)


@torch.no_grad()
def score_answers(model: Any, rows: Sequence[Rendered], pad_token_id: int, batch_size: int = 8) -> list[AnswerScore]:
    """Score the trained tokens of each row, in the order given; independent of how rows fall into batches."""
    scores: dict[int, AnswerScore] = {}
    forward, was_training = forward_of(model, pad_token_id), model.training
    model.eval()
    for indices in _batches(forward, rows, batch_size):
        batch = [rows[index] for index in indices]
        scores |= zip(indices, scores_of(batch, _log_probs(forward, batch)), strict=True)
    model.train(was_training)
    return [scores[index] for index in range(len(rows))]


@torch.no_grad()
def mean_kl(
    model: Any,
    rows: Sequence[Rendered],
    pad_token_id: int,
    references: Mapping[str, Callable[[], AbstractContextManager[None]]],
    batch_size: int = 8,
) -> dict[str, float]:
    """Return KL(model || reference) in nats per token over the scored positions, by the reference's name.

    Each value of `references` switches the model over to one.
    """
    totals, count = dict.fromkeys(references, 0.0), 0
    forward, was_training = forward_of(model, pad_token_id), model.training
    model.eval()
    for indices in _batches(forward, rows, batch_size):
        batch = [rows[index] for index in indices]
        ours = _log_probs(forward, batch)
        for name, reference in references.items():
            with reference():
                theirs = _log_probs(forward, batch)
            totals[name] += float((ours.exp() * (ours - theirs)).sum(-1).clamp(min=0).sum())
        count += len(ours)
    model.train(was_training)
    return {name: total / max(count, 1) for name, total in totals.items()}


def mean_loss(scores: Sequence[AnswerScore]) -> float:
    """Return the mean loss per answer token in nats."""
    return -sum(score.logps for score in scores) / sum(score.tokens for score in scores)
