"""What makes TRL's trainers fast without a GPU: score answer tokens only, plain attention for short rows, and
batches of similar length; what adapters cost is in adapted_linears.py.

All are exact: the same loss and gradients as TRL's own code on the same batch in fp32.
"""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch.nn import functional
from torch.utils.data import Sampler

from scripts.common.memory import attends_plainly

log = logging.getLogger(__name__)

# Logits of one tile; what lies beyond is recomputed in the backward pass instead of being kept.
TILE_BYTES = 512 * 2**20
PLAIN_ATTENTION = "plain_for_short_rows"
STATISTICS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
BLOCK_BYTES = 4 * 2**20  # logits looked at together in fp32: few enough to stay in the processor's cache


def score_answers_only(device: str, compiled: bool = False) -> bool:
    """Make TRL's LM head project only positions that carry a label, where it would project all of them.

    With Triton TRL does so itself. Elsewhere it scores every position, prompts and padding included, in a tiled loop;
    this replaces the two private names that decide it, after checking that they are what this release expects.
    """
    from trl.trainer import utils as trl_utils

    if device == "cuda":
        return False
    expected = ("_use_triton", "_ChunkedLogProbFunction", "add_fused_lm_head", "FusedCausalLMOutput")
    missing = [name for name in expected if not hasattr(trl_utils, name)]
    if missing:
        log.warning("performance.fast_path: this TRL has no %s; training with its own, slower head", ", ".join(missing))
        return False
    trl_utils._use_triton = lambda device: True
    trl_utils._ChunkedLogProbFunction = AnswerLogProbs(compiled)
    return True


class AnswerLogProbs:
    """Stand in for TRL's chunked autograd function with plain operations, which are faster on a CPU."""

    def __init__(self, compiled: bool = False) -> None:
        self.compiled = compiled

    def apply(
        self,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: Sequence[str],
    ) -> tuple[torch.Tensor | None, ...]:
        """Return log-probs, entropy, log of summed squared probs, mean logit and top-1 hit of each label.

        Shapes: hidden_states (N, H), weight (V, H), labels (N,); every output (N,) in fp32.
        """

        def tile(hidden: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            logits, factor = functional.linear(hidden, weight, bias), logit_scale / temperature
            if softcap is not None:
                logits, factor = softcap * torch.tanh(logits.float() * logit_scale / softcap), 1 / temperature
            found: tuple[torch.Tensor | None, ...] = _LabelStatistics.apply(
                logits, wanted, factor, outputs, self.compiled
            )
            return found

        rows = max(1, TILE_BYTES // (weight.element_size() * weight.shape[0]))
        if len(hidden_states) <= rows:
            return tile(hidden_states, labels)
        tiles = [
            torch.utils.checkpoint.checkpoint(tile, hidden, wanted, use_reentrant=False)
            for hidden, wanted in zip(hidden_states.split(rows), labels.split(rows), strict=True)
        ]
        return tuple(None if column[0] is None else torch.cat(column) for column in zip(*tiles, strict=True))


class _LabelStatistics(torch.autograd.Function):
    """Read off logits what TRL asks of them, block by block, so that they are never copied whole to fp32.

    Only the logits are kept for the backward pass, in their own dtype; softmax is taken again there. Compiled code goes
    row by row of its own accord.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, factor: float, outputs: Sequence[str], compiled: bool
    ) -> tuple[torch.Tensor | None, ...]:
        asked = tuple(name for name in STATISTICS if name == "log_probs" or name in outputs)
        if compiled:
            columns = _compiled(_read_statistics)(logits.detach(), labels, factor, asked)
        else:
            parts = [_read_statistics(block, wanted, factor, asked) for block, wanted in _blocks(logits, labels)]
            columns = [torch.cat(column) for column in zip(*parts, strict=True)]
        log_totals, found = columns[0], dict(zip(asked, columns[1:], strict=True))
        ctx.save_for_backward(logits, labels, log_totals)
        ctx.factor, ctx.compiled = factor, compiled
        results = tuple(found.get(name) for name in STATISTICS)
        ctx.mark_non_differentiable(*(result for result in results[1:] if result is not None))
        return results

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *others: Any) -> tuple[torch.Tensor | None, ...]:
        logits, labels, log_totals = ctx.saved_tensors
        gradient, labels = (gradient * ctx.factor)[:, None], labels[:, None]
        if ctx.compiled:
            slope = _compiled(_slope)(logits, log_totals, gradient, ctx.factor)
        else:
            slope = torch.empty_like(logits)
            for block, log_total, outer, target in _blocks(logits, log_totals, gradient, slope):
                target.copy_(_slope(block, log_total, outer, ctx.factor))
        odds_of_labels = (logits.gather(-1, labels).float() * ctx.factor - log_totals[:, None]).exp()
        slope.scatter_(-1, labels, (gradient - gradient * odds_of_labels).to(slope.dtype))
        return slope, None, None, None, None


def _read_statistics(
    logits: torch.Tensor, labels: torch.Tensor, factor: float, asked: tuple[str, ...]
) -> list[torch.Tensor]:
    """Return the log of the summed exponentials of each row, then what was asked for."""
    scores = logits.float() if factor == 1 else logits.float() * factor
    of_label, best = scores.gather(-1, labels[:, None])[:, 0], scores.amax(-1, keepdim=True)
    of_label, scores, best = of_label - best[:, 0], scores - best, best[:, 0]
    odds = scores.exp()
    total = odds.sum(-1)
    found = {"log_probs": of_label - total.log()}
    if "entropy" in asked:
        found["entropy"] = total.log() - torch.linalg.vecdot(odds, scores) / total
    if "log_sum_sq_probs" in asked:
        found["log_sum_sq_probs"] = torch.linalg.vecdot(odds, odds).log() - 2 * total.log()
    if "mean_logits" in asked:
        found["mean_logits"] = scores.mean(-1) + best
    if "is_top1" in asked:
        found["is_top1"] = of_label == 0  # a tie counts
    return [best + total.log(), *(found[name] for name in asked)]


def _slope(logits: torch.Tensor, log_totals: torch.Tensor, gradient: torch.Tensor, factor: float) -> torch.Tensor:
    """Return the gradient towards the logits, in their dtype, of log-probabilities of labels that are none of them."""
    scores = logits.float() if factor == 1 else logits.float() * factor
    return ((scores - log_totals[:, None]).exp() * -gradient).to(logits.dtype)


@functools.cache
def _compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=True)


def _blocks(logits: torch.Tensor, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Cut tensors of as many rows into blocks whose logits fit the processor's cache; no rows are one empty block."""
    rows = max(1, BLOCK_BYTES // (4 * logits.shape[-1]))
    return zip(*(tensor.split(rows) for tensor in (logits, *others)), strict=True)


def speed_up(model: Any, keep_weights: bool = True) -> None:
    """Choose the faster of equal computations for a model with adapters; call it before either adapter is first asked.

    Without `keep_weights`, layers that are compiled later keep no attention weights for the backward pass.
    """
    from scripts.common.adapted_linears import share_products

    share_products(model)
    attend_plainly_to_short_rows(model, keep_weights)


class _Odds(torch.autograd.Function):
    """Return exponentials in the dtype of the scores, 1 for the largest, and their fp32 sum over the last dimension."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        odds = (scores.float() - scores.amax(-1, keepdim=True).float()).exp()
        kept = odds.to(scores.dtype)
        ctx.save_for_backward(kept)
        return kept, odds.sum(-1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, towards_odds: torch.Tensor, towards_total: torch.Tensor) -> torch.Tensor:
        (kept,) = ctx.saved_tensors
        slope: torch.Tensor = (towards_odds.float() + towards_total) * kept.float()
        return slope.to(kept.dtype)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    keep_weights: bool = True,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend plainly while training on short rows and from a single new token, with torch's fused kernel otherwise.

    The backward pass of the fused CPU kernel would take a fifth of a step; the memory of plain attention grows with the
    square of the length, unless compiled code takes the weights again in the backward pass, which costs time.
    Shapes: query (B, H, T, D), key and value (B, G, S, D) with H a multiple of G; returns (B, T, H, D).
    """
    batch, heads, tokens, size = query.shape
    special = any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "cache", "s_aux"))
    plain = attends_plainly(batch, tokens) if torch.is_grad_enabled() else tokens == 1
    if special or attention_mask is None or not plain:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        fused: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return fused
    query = query * (size**-0.5 if scaling is None else scaling)
    dropout = dropout if module.training else 0.0
    if torch.compiler.is_compiling():
        # Dividing the few outputs instead of the many weights saves a pass over these; uncompiled it would add some.
        inputs = (query, key, value, attention_mask, dropout)
        sums, totals = (
            _weighted_sums(*inputs)
            if keep_weights
            else torch.utils.checkpoint.checkpoint(_weighted_sums, *inputs, use_reentrant=False)
        )
        output = (sums / totals).to(value.dtype)
    else:
        scores = _scores(query, key, attention_mask)
        output = _weighted(functional.softmax(scores, dim=-1), value, dropout)
    return output.view(batch, heads, tokens, -1).transpose(1, 2).contiguous(), None


def _scores(query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the scores of every head; the heads that share a key share one product. Shape (B, G, H / G, T, S)."""
    batch, heads, tokens, size = query.shape
    groups = key.shape[1]
    stacked = query.reshape(batch, groups, -1, size) @ key.transpose(2, 3)
    return stacked.view(batch, groups, heads // groups, tokens, -1) + attention_mask[:, :, None]


def _weighted(weights: torch.Tensor, value: torch.Tensor, dropout: float) -> torch.Tensor:
    return functional.dropout(weights, dropout).flatten(2, 3) @ value


def _weighted_sums(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor, dropout: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums of the values, weighted by exponentials of the scores, and what to divide them by."""
    odds, totals = _Odds.apply(_scores(query, key, attention_mask))
    return _weighted(odds, value, dropout), totals.flatten(2, 3)


def attend_plainly_to_short_rows(model: Any, keep_weights: bool = True) -> None:
    """Replace torch's fused attention on a CPU where plain matrix products are faster; other attention stays."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    base = model.get_base_model()
    if base.device.type == "cpu" and base.config._attn_implementation == "sdpa":
        AttentionInterface.register(PLAIN_ATTENTION, functools.partial(_attend, keep_weights=keep_weights))
        AttentionMaskInterface.register(PLAIN_ATTENTION, eager_mask)
        base.set_attn_implementation(PLAIN_ATTENTION)


class SimilarLengthSampler(Sampler[int]):
    """Yield indices so that consecutive batches hold records of similar length, in an order that differs by epoch.

    A batch here is what one optimizer step sees: its parts are equally long on every process, and it is the same
    however it is split over processes and accumulated gradients. Lengths are jittered by 3 %, so that batches differ
    between epochs too; the batch order is random, so no trend in length runs through an epoch. Only the first
    batch is the longest: a run that needs too much memory fails at once, and what follows fits into what it took.
    The order depends on seed and epoch alone: a resumed run sees the same batches.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = random.Random(self.seed * 1_000_003 + self.epoch)
        jittered = [length * generator.uniform(0.97, 1.03) for length in self.lengths]
        order = sorted(range(len(self.lengths)), key=jittered.__getitem__)
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        short = [batches.pop()] if len(batches[-1]) < self.batch_size else []  # a short batch must come last
        longest = [batches.pop()] if batches else []
        generator.shuffle(batches)
        for batch in longest + batches + short:
            yield from batch


class GroupedByLength:
    """Give a TRL trainer batches of similar length; `row_length` says what a row costs."""

    group_by_length: bool

    def row_length(self, row: dict[str, Any]) -> int:
        """Return the tokens a row takes."""
        raise NotImplementedError

    def floating_point_ops(self, inputs: Any) -> int:
        """Count none: transformers would go through all modules at every step, for a figure that is not reported here."""
        return 0

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.group_by_length:
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        dataset = self.train_dataset if train_dataset is None else train_dataset  # type: ignore[attr-defined]
        args: Any = self.args  # type: ignore[attr-defined]
        lengths = [self.row_length(row) for row in dataset]
        batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return SimilarLengthSampler(lengths, batch_size, args.seed)
