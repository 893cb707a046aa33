"""Linear layers over few tokens, which read each weight from memory once and compute little with it."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

LARGEST_ROUNDING = 2.0**-24  # relative: that of fp32 itself
FEW_TOKENS = 32  # up to which torch's fp32 product is slower than its mirror image


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x Wᵀ + b as functional.linear does; of few tokens in fp32 on a CPU as (W xᵀ)ᵀ, 1.3 to 5 times as fast.

    There MKL divides the rows of W between the cores and reads them once. A single token is computed twice: the product
    of a matrix and one vector is left to one core. Which way is taken depends on shapes alone, so that a run repeated gives
    the same bits.
    """
    tokens = x.numel() // x.shape[-1]
    by_mkl = x.dtype == torch.float32 and x.device.type == "cpu" and torch.backends.mkl.is_available()
    if not by_mkl or not 0 < tokens <= FEW_TOKENS:
        return functional.linear(x, weight, bias)
    rows = x.reshape(tokens, -1)
    product = (weight @ (rows if tokens > 1 else rows.expand(2, -1).contiguous()).T)[:, :tokens].T
    return (product if bias is None else product + bias).contiguous().view(*x.shape[:-1], -1)


def packed(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    """Return a frozen fp32 weight in 16 bits for `packed_linear`; None where that would change it, or torch has no kernel.

    Nearly all models are published in 16 bits, and numbers that were are read in half the time: a product of few tokens
    takes 0.4 to 0.6 of it. FBGEMM widens them on the way and computes in fp32.
    """
    if torch.backends.quantized.engine != "x86" or _halved(weight) is None:
        return None
    return torch.ops.quantized.linear_prepack_fp16(weight.detach(), bias)


def _halved(weight: torch.Tensor) -> torch.Tensor | None:
    """Return an fp32 weight on a CPU in 16 bits; None where that would change it."""
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        return None
    half = weight.detach().half()
    rounding = torch.linalg.vector_norm(weight - half.float()) / torch.linalg.vector_norm(weight)
    return half if rounding <= LARGEST_ROUNDING else None


def packed_linear(x: torch.Tensor, weight: Any) -> torch.Tensor:
    """Return x Wᵀ + b of what `packed` returned; it has no gradient."""
    product: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(x, weight)
    return product


class HeadLinear(torch.nn.Linear):
    """A head that computes few tokens the fast way."""

    packed: Any

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.packed is not None and (torch.is_inference_mode_enabled() or not len(self.weight)):
            return packed_linear(input, self.packed)
        return linear(input, self.weight, self.bias)


def quicken_head(model: Any, pack: bool = False) -> None:
    """Let a causal model's LM head compute few tokens the fast way; packed, its weight is there once more, in 16 bits."""
    head = model.get_output_embeddings()
    if type(head) is torch.nn.Linear:
        head.__class__ = HeadLinear
        head.__dict__["packed"] = packed(head.weight, head.bias) if pack else None


class HalfEmbedding(torch.nn.Embedding):
    """An embedding whose matrix is kept in 16 bits. Its `weight` is empty, and only says in which type it answers."""

    rows: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.rows[input].to(self.weight.dtype)


def keep_ends_in_16_bits(model: Any) -> None:
    """Let embeddings, and a head that is packed, go in 32 bits, where 16 hold the same; for answers only."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_packed = isinstance(head, HeadLinear) and head.packed is not None
    needed = head.weight is embeddings.weight and not is_packed  # by the head, in full
    half = None if needed else _halved(embeddings.weight)
    if half is not None:
        become_embedding(embeddings, HalfEmbedding, rows=half)
    if is_packed:
        empty_weight(head)


def become_embedding(module: Any, kind: type[torch.nn.Embedding], **kept: torch.Tensor) -> None:
    """Let an embedding look up its rows as another kind does, in what is kept in the place of its matrix."""
    # Gemma's and OPT's own classes scale or shift, and leave the look-up to the class behind them.
    own = type(module)
    module.__class__ = kind if own is torch.nn.Embedding else type(own.__name__, (own, kind), {})
    empty_weight(module)
    for name, tensor in kept.items():
        module.register_buffer(name, tensor, persistent=False)


def empty_weight(module: Any) -> None:
    """Let a matrix go; what is left only says of which type it was."""
    dtype = module.weight.dtype
    del module.weight
    module.register_buffer("weight", torch.empty(0, dtype=dtype), persistent=False)
