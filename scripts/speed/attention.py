"""Plain attention where it is faster than torch's fused CPU kernel: short rows that train, and single new tokens."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils.checkpoint
from torch.nn import functional

from scripts.model.memory import attends_plainly
from scripts.speed.guard import may_replace, other_arguments, other_numbers

PLAIN_ATTENTION = "plain_for_short_rows"


def attend_plainly_to_short_rows(model: Any, keep_weights: bool = True) -> None:
    """Replace torch's fused attention on a CPU where plain matrix products are faster; other attention stays."""
    base = model.get_base_model()
    if base.device.type != "cpu" or base.config._attn_implementation != "sdpa":
        return
    if may_replace(_difference, "training with the slower attention of transformers"):
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask

        AttentionInterface.register(PLAIN_ATTENTION, functools.partial(_attend, keep_weights=keep_weights))
        AttentionMaskInterface.register(PLAIN_ATTENTION, eager_mask)
        base.set_attn_implementation(PLAIN_ATTENTION)


def _difference() -> str | None:
    """Return how attention and masks of this transformers differ from what replaces them."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import eager_mask, sdpa_mask

    reason = other_arguments(sdpa_attention_forward, _attend, "keep_weights", "cache")  # transformers 5.24 has no cache
    if reason:
        return reason
    padding = torch.ones(3, 5, dtype=torch.bool)
    padding[1, 3:] = False
    masks = [
        mask(batch_size=3, q_length=5, kv_length=5, attention_mask=padding, allow_is_causal_skip=False)
        for mask in (sdpa_mask, eager_mask)
    ]
    start = torch.randn(3, 4, 5, 8), torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 8)  # two heads share a key
    module: Any = SimpleNamespace(num_key_value_groups=2, training=False, is_causal=True)
    results = []
    for attend, mask in zip((sdpa_attention_forward, _attend), masks, strict=True):
        query, key, value = (tensor.clone().requires_grad_() for tensor in start)
        with torch.enable_grad():
            output = attend(module, query, key, value, mask)[0]
            output.square().sum().backward()
        with torch.no_grad():
            one_token = attend(module, query[:, :, -1:], key, value, mask[:, :, -1:])[0]
        results.append([output.detach(), query.grad, key.grad, value.grad, one_token])
    return other_numbers("attention of this transformers", *results)


class _ExpScores(torch.autograd.Function):
    """Return exponentials in the dtype of the scores, 1 for the largest, and their fp32 sum over the last dimension."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        exp_scores = (scores.float() - scores.amax(-1, keepdim=True).float()).exp()
        rounded = exp_scores.to(scores.dtype)
        ctx.save_for_backward(rounded)
        return rounded, exp_scores.sum(-1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, grad_exp_scores: torch.Tensor, grad_total: torch.Tensor) -> torch.Tensor:
        (exp_scores,) = ctx.saved_tensors
        grad_scores: torch.Tensor = (grad_exp_scores.float() + grad_total) * exp_scores.float()
        return grad_scores.to(exp_scores.dtype)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    keep_weights: bool = True,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend plainly while training on short rows and from a single new token, with torch's fused kernel otherwise.

    The backward pass of the fused CPU kernel would take a fifth of a step; the memory of plain attention grows with the
    square of the length, unless compiled code takes the weights again in the backward pass, which costs time.
    Shapes: query (B, H, T, D), key and value (B, G, S, D) with H a multiple of G; returns (B, T, H, D).
    """
    batch, heads, tokens, size = query.shape
    special = position_bias is not None or any(kwargs.get(name) is not None for name in ("softcap", "cache", "s_aux"))
    plain = attends_plainly(batch, tokens) if torch.is_grad_enabled() else tokens == 1
    if special or attention_mask is None or attention_mask.shape[1] > 1 or not plain:  # Doge has a mask for each head
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        fused: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal,
            position_bias=position_bias, **kwargs
        )  # fmt: skip
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
    exp_scores, totals = _ExpScores.apply(_scores(query, key, attention_mask))
    return _weighted(exp_scores, value, dropout), totals.flatten(2, 3)
