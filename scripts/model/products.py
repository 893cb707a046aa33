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
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or torch.backends.quantized.engine != "x86":
        return None
    rounding = torch.linalg.vector_norm(weight - weight.half().float()) / torch.linalg.vector_norm(weight)
    if not rounding <= LARGEST_ROUNDING:
        return None
    return torch.ops.quantized.linear_prepack_fp16(weight.detach(), bias)


def packed_linear(x: torch.Tensor, weight: Any) -> torch.Tensor:
    """Return x Wᵀ + b of what `packed` returned; it has no gradient."""
    product: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(x, weight)
    return product


class HeadLinear(torch.nn.Linear):
    """A head that computes few tokens the fast way."""

    packed: Any

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.packed is not None and torch.is_inference_mode_enabled():
            return packed_linear(input, self.packed)
        return linear(input, self.weight, self.bias)


def quicken_head(model: Any, pack: bool = False) -> None:
    """Let a causal model's LM head compute few tokens the fast way; packed, its weight is there once more, in 16 bits."""
    head = model.get_output_embeddings()
    if type(head) is torch.nn.Linear:
        head.__class__ = HeadLinear
        head.__dict__["packed"] = packed(head.weight, head.bias) if pack else None
