"""Score answer tokens only: TRL's LM head without prompts and padding, in blocks that fit the processor's cache."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils.checkpoint
from torch.nn import functional

from scripts.model.memory import TILE_BYTES
from scripts.speed.compiling import compile_for_this_processor
from scripts.speed.guard import may_replace, missing_names, other_arguments, other_numbers

STATISTICS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
BLOCK_BYTES = 4 * 2**20  # logits looked at together in fp32: few enough to stay in the processor's cache


def score_answers_only(device: str, compiled: bool = False) -> bool:
    """Make TRL's LM head project only positions that carry a label, where it would project all of them.

    With Triton TRL does so itself. Elsewhere it scores every position, prompts and padding included, in a tiled loop;
    this replaces the two private names that decide it, after proving that the head then computes the same.
    """
    from trl.trainer import utils as trl_utils

    if device == "cuda":
        return False
    if not isinstance(getattr(trl_utils, "_ChunkedLogProbFunction", None), AnswerLogProbs) and not may_replace(
        lambda: _difference(trl_utils), "training with TRL's own, slower head"
    ):
        return False
    vars(trl_utils).update(_stand_ins(compiled))
    return True


def _stand_ins(compiled: bool) -> dict[str, Any]:
    return {"_use_triton": lambda device: True, "_ChunkedLogProbFunction": AnswerLogProbs(compiled)}


def _difference(trl_utils: Any) -> str | None:
    """Return how this TRL differs from the one that the stand-ins are made for."""
    ours = _stand_ins(compiled=False)
    reason = missing_names("this TRL", trl_utils, (*ours, "add_fused_lm_head", "FusedCausalLMOutput"))
    if reason:
        return reason
    return (
        other_arguments(trl_utils._use_triton, ours["_use_triton"])
        or other_arguments(trl_utils._ChunkedLogProbFunction.forward, ours["_ChunkedLogProbFunction"].apply, "ctx")
        or other_numbers("TRL's LM head", *_scored_both_ways(trl_utils, ours))
    )


def _scored_both_ways(trl_utils: Any, ours: dict[str, Any]) -> list[list[torch.Tensor]]:
    """Return loss, statistics and gradients of TRL's head over three rows: as it is, and with the stand-ins."""
    config = SimpleNamespace(final_logit_softcapping=2.0, logit_scale=0.5)
    config.get_text_config = lambda: config
    start = torch.randn(3, 5, 8)
    labels = torch.randint(11, (3, 5))
    labels[0], labels[1, :3] = -100, -100
    head = _Head(config)
    results = []
    for stand_ins in ({}, ours):
        with _replaced(trl_utils, stand_ins):
            hidden = start.clone().requires_grad_()
            head.zero_grad()
            trl_utils.add_fused_lm_head(head, temperature=0.7, outputs=STATISTICS)
            output = head(hidden, labels=labels, fused_lm_head=True)
            output.loss.backward()
            grads = [hidden.grad, *(parameter.grad for parameter in head.parameters())]
            results.append([output.loss.detach(), *(getattr(output, name).detach() for name in STATISTICS), *grads])
            del head.forward
    return results


class _Head(torch.nn.Module):
    """The least that TRL can put its LM head on: a model that is given its hidden states."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.lm_head = config, torch.nn.Linear(8, 11)

    def base_model(self, hidden: torch.Tensor, **kwargs: Any) -> Any:
        return SimpleNamespace(last_hidden_state=hidden)

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.lm_head


@contextmanager
def _replaced(module: Any, stand_ins: dict[str, Any]) -> Iterator[None]:
    originals = {name: getattr(module, name) for name in stand_ins}
    vars(module).update(stand_ins)
    try:
        yield
    finally:
        vars(module).update(originals)


class AnswerLogProbs:
    """Stand in for TRL's chunked autograd function with plain operations, which are faster on a CPU."""

    def __init__(self, compiled: bool = False) -> None:
        self.compiled = compiled

    def apply(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None,
        logit_scale: float,
        outputs: Sequence[str],
    ) -> tuple[torch.Tensor | None, ...]:
        """Return log-probs, entropy, log of summed squared probs, mean logit and top-1 hit of each target.

        The arguments have TRL's names and order. Shapes: hidden (N, H), weight (V, H), targets (N,); every output (N,)
        in fp32.
        """
        softcap = final_logit_softcapping

        def score_tile(hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            logits, factor = functional.linear(hidden, weight, bias), logit_scale / temperature
            if softcap is not None:
                logits, factor = softcap * torch.tanh(logits.float() * logit_scale / softcap), 1 / temperature
            statistics: tuple[torch.Tensor | None, ...] = _TargetStatistics.apply(
                logits, targets, factor, outputs, self.compiled
            )
            return statistics

        rows = max(1, TILE_BYTES // (weight.element_size() * weight.shape[0]))
        if len(hidden) <= rows:
            return score_tile(hidden, targets)
        count = math.ceil(len(hidden) / rows)  # of equal size: for a small last one torch would copy the weight
        tiles = [
            torch.utils.checkpoint.checkpoint(score_tile, *tile, use_reentrant=False)
            for tile in zip(hidden.tensor_split(count), targets.tensor_split(count), strict=True)
        ]
        return tuple(None if column[0] is None else torch.cat(column) for column in zip(*tiles, strict=True))


class _TargetStatistics(torch.autograd.Function):
    """Read off logits what TRL asks of them, block by block, so that they are never copied whole to fp32.

    Only the logits are kept for the backward pass, in their own dtype; softmax is taken again there. Compiled code goes
    row by row of its own accord.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, factor: float, outputs: Sequence[str], compiled: bool
    ) -> tuple[torch.Tensor | None, ...]:
        names = tuple(name for name in STATISTICS if name == "log_probs" or name in outputs)
        if compiled:
            columns = _compiled(_read_statistics)(logits.detach(), targets, factor, names)
        else:
            parts = [_read_statistics(block, part, factor, names) for block, part in _blocks(logits, targets)]
            columns = [torch.cat(column) for column in zip(*parts, strict=True)]
        logsumexp, by_name = columns[0], dict(zip(names, columns[1:], strict=True))
        ctx.save_for_backward(logits, targets, logsumexp)
        ctx.factor, ctx.compiled = factor, compiled
        results = tuple(by_name.get(name) for name in STATISTICS)
        ctx.mark_non_differentiable(*(result for result in results[1:] if result is not None))
        return results

    @staticmethod
    def backward(ctx: Any, grad_log_probs: torch.Tensor, *others: Any) -> tuple[torch.Tensor | None, ...]:
        logits, targets, logsumexp = ctx.saved_tensors
        grad, targets = (grad_log_probs * ctx.factor)[:, None], targets[:, None]
        if ctx.compiled:
            grad_logits = _compiled(_grad_of_other_logits)(logits, logsumexp, grad, ctx.factor)
        else:
            grad_logits = torch.empty_like(logits)
            for block, block_logsumexp, grad_block, result in _blocks(logits, logsumexp, grad, grad_logits):
                result.copy_(_grad_of_other_logits(block, block_logsumexp, grad_block, ctx.factor))
        target_probs = (logits.gather(-1, targets).float() * ctx.factor - logsumexp[:, None]).exp()
        grad_logits.scatter_(-1, targets, (grad - grad * target_probs).to(grad_logits.dtype))
        return grad_logits, None, None, None, None


def _read_statistics(
    logits: torch.Tensor, targets: torch.Tensor, factor: float, names: tuple[str, ...]
) -> list[torch.Tensor]:
    """Return the logsumexp of each row, then the named statistics."""
    scores = logits.float() if factor == 1 else logits.float() * factor
    target_scores, best = scores.gather(-1, targets[:, None])[:, 0], scores.amax(-1, keepdim=True)
    target_scores, scores, best = target_scores - best[:, 0], scores - best, best[:, 0]
    exp_scores = scores.exp()
    total = exp_scores.sum(-1)
    statistics = {"log_probs": target_scores - total.log()}
    if "entropy" in names:
        statistics["entropy"] = total.log() - torch.linalg.vecdot(exp_scores, scores) / total
    if "log_sum_sq_probs" in names:
        statistics["log_sum_sq_probs"] = torch.linalg.vecdot(exp_scores, exp_scores).log() - 2 * total.log()
    if "mean_logits" in names:
        statistics["mean_logits"] = scores.mean(-1) + best
    if "is_top1" in names:
        statistics["is_top1"] = target_scores == 0  # a tie counts
    return [best + total.log(), *(statistics[name] for name in names)]


def _grad_of_other_logits(
    logits: torch.Tensor, logsumexp: torch.Tensor, grad: torch.Tensor, factor: float
) -> torch.Tensor:
    """Return the gradient of the targets' log-probs towards all logits but their own, in the logits' dtype."""
    scores = logits.float() if factor == 1 else logits.float() * factor
    return ((scores - logsumexp[:, None]).exp() * -grad).to(logits.dtype)


@functools.cache
def _compiled(function: Any) -> Any:
    return compile_for_this_processor(function)


def _blocks(logits: torch.Tensor, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Cut tensors of as many rows into blocks whose logits fit the processor's cache; no rows are one empty block."""
    rows = max(1, BLOCK_BYTES // (4 * logits.shape[-1]))
    return zip(*(tensor.split(rows) for tensor in (logits, *others)), strict=True)
