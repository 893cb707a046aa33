"""Log-probabilities of given answers under a model: held-out loss, preference accuracy and KL all rest on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from scripts.dataset.rendering import IGNORED, Rendered
from scripts.model.batch import left_pad, left_padded_batch


@dataclass(frozen=True)
class AnswerScore:
    """Summed log-probability of an answer in nats, and how many tokens it has."""

    logps: float
    tokens: int


@dataclass(frozen=True)
class _Batch:
    indices: list[int]
    inputs: dict[str, Any]
    labels: torch.Tensor  # (B, kept - 1); -100 where nothing is scored


def _batches(rows: Sequence[Rendered], pad_token_id: int, batch_size: int, device: Any) -> Iterator[_Batch]:
    """Pad on the left, so that all answers end in the same column and only their logits need computing."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = [rows[index] for index in indices]
        input_ids, attention_mask = left_padded_batch([row.input_ids for row in batch], pad_token_id)
        labels = left_pad([row.labels for row in batch], IGNORED)
        first = int((labels != IGNORED).any(0).nonzero()[0])
        inputs = {
            "input_ids": input_ids.to(device),
            "attention_mask": attention_mask.to(device),
            "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0).to(device),
            "logits_to_keep": labels.shape[1] - first + 1,  # the logits before the first answer token predict it
            "use_cache": False,
        }
        yield _Batch(indices, inputs, labels[:, first:].to(device))


def _log_probs(model: Any, batch: _Batch) -> torch.Tensor:
    """Return the log-probabilities over the vocabulary at every scored position, (N, V) in fp32."""
    logits = model(**batch.inputs).logits[:, :-1]
    return torch.log_softmax(logits[batch.labels != IGNORED].float(), -1)


@torch.no_grad()
def score_answers(model: Any, rows: Sequence[Rendered], pad_token_id: int, batch_size: int = 8) -> list[AnswerScore]:
    """Score the trained tokens of each row, in the order given; independent of how rows fall into batches."""
    scores: dict[int, AnswerScore] = {}
    was_training = model.training
    model.eval()
    for batch in _batches(rows, pad_token_id, batch_size, next(model.parameters()).device):
        mask = batch.labels != IGNORED
        logps = _log_probs(model, batch).gather(-1, batch.labels[mask][:, None])[:, 0]
        per_row = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter_(mask.cpu(), logps.double().cpu()).sum(1)
        for index, total, count in zip(batch.indices, per_row.tolist(), mask.sum(1).tolist(), strict=True):
            scores[index] = AnswerScore(total, count)
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
    was_training = model.training
    model.eval()
    for batch in _batches(rows, pad_token_id, batch_size, next(model.parameters()).device):
        ours = _log_probs(model, batch)
        for name, reference in references.items():
            with reference():
                theirs = _log_probs(model, batch)
            totals[name] += float((ours.exp() * (ours - theirs)).sum(-1).clamp(min=0).sum())
        count += len(ours)
    model.train(was_training)
    return {name: total / max(count, 1) for name, total in totals.items()}


def mean_loss(scores: Sequence[AnswerScore]) -> float:
    """Return the mean loss per answer token in nats."""
    return -sum(score.logps for score in scores) / sum(score.tokens for score in scores)
