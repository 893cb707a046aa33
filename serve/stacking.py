"""Linear layers that hold all adapters at once, so that rows of different adapters share a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from scripts.common.stages import BASE
from scripts.model.base import copy_out_of_file
from scripts.model.shape import siblings


@dataclass(frozen=True)
class LoraWeights:
    """The matrices of one adapter for one linear layer, the scale folded into B. A: (r, in), B: (out, r)."""

    A: torch.Tensor
    B: torch.Tensor


class RowAdapters:
    """Say which adapter each row of the running batch uses; one mask serves every layer.

    Each adapter owns a block of rank columns. A row's mask is 1 in the block of its adapter and 0 elsewhere.
    """

    def __init__(self, ranks: dict[str, int], device: str, dtype: torch.dtype) -> None:
        self.ranks = ranks
        self.index = {BASE: 0, **{name: number for number, name in enumerate(ranks, 1)}}
        width = sum(ranks.values())
        # Of an odd width, the outputs that stand beside it would lie where llama4 cannot see them as complex numbers.
        table, start = torch.zeros(len(self.index), width + width % 2), 0
        for name, rank in ranks.items():
            table[self.index[name], start : start + rank] = 1
            start += rank
        self.table = table.to(device, dtype)
        self.mask: torch.Tensor | None = None

    def set(self, names: Sequence[str]) -> None:
        """Choose the adapters of the next forward pass. A batch of base rows does no adapter work."""
        indices = [self.index[name] for name in names]
        self.mask = self.table[indices].unsqueeze(1) if any(indices) else None


class StackedLinears(nn.Module):
    """Linear layers that read the same input, with all adapters under each other: two products serve any mixture of rows.

    y = W x + b + B (mask * A x), A: (sum of ranks, in), B: (out, sum of ranks), for each layer. The A stand below the W
    in one matrix: beside a few tokens, a small product takes as long as a large one.
    """

    def __init__(self, bases: list[Any], As: list[torch.Tensor], Bs: list[torch.Tensor], rows: RowAdapters) -> None:
        super().__init__()
        self.rows, self.widths = rows, [len(B) for B in Bs]
        self.base: nn.Module | None = None
        weights, bias = As, None
        if not all(type(base) is nn.Linear for base in bases):
            (self.base,) = bases  # quantised, or stored the other way round
        else:
            weights = [base.weight.detach() for base in bases] + As
            if any(base.bias is not None for base in bases):
                parts = [
                    As[0].new_zeros(len(B)) if base.bias is None else base.bias.detach()
                    for base, B in zip(bases, Bs, strict=True)
                ]
                bias = torch.cat([*parts, As[0].new_zeros(sum(map(len, As)))])
        self.register_buffer("weight", torch.cat(weights), persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("B_t", torch.block_diag(*[B.t() for B in Bs]).contiguous(), persistent=False)
        self.weight: torch.Tensor
        self.bias: torch.Tensor | None
        self.B_t: torch.Tensor

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the output of each layer. x: (B, T, in), or those tokens as (B, 1, T, in) or (B * T, in)."""
        product = nn.functional.linear(x, self.weight, self.bias)
        y, hidden = (
            (self.base(x), product)
            if self.base is not None
            else product.split([sum(self.widths), len(self.B_t)], dim=-1)
        )
        if self.rows.mask is not None:
            hidden = hidden.reshape(len(self.rows.mask), -1, len(self.widths), self.rows.mask.shape[-1])
            hidden = hidden * self.rows.mask[:, :, None]
            y = torch.addmm(y.flatten(0, -2), hidden.view(-1, len(self.B_t)), self.B_t).view(*x.shape[:-1], -1)
        outputs: tuple[torch.Tensor, ...] = y.split(self.widths, dim=-1)
        return outputs


class Member(nn.Module):
    """Stand where one of several stacked layers stood; the first to be asked computes for all."""

    def __init__(self, stack: StackedLinears, index: int, shared: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        self.stack, self.index, self.shared = stack, index, shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        source, output = self.shared.pop(self.index, (None, None))
        if output is None or source is not x:
            self.shared.update({index: (x, part) for index, part in enumerate(self.stack(x))})
            _, output = self.shared.pop(self.index)
        return output


def stack_adapters(
    network: Any, weights: dict[str, dict[str, LoraWeights]], device: str, dtype: torch.dtype
) -> RowAdapters:
    """Replace adapted linear layers with ones that hold all adapters; ranks and targets may differ."""
    ranks = {name: max(len(layer.A) for layer in layers.values()) for name, layers in weights.items()}
    rows = RowAdapters(ranks, device, dtype)
    for targets in _sharing_an_input(network, {layer for layers in weights.values() for layer in layers}):
        bases = [network.get_submodule(target) for target in targets]
        As, Bs = zip(*[_side_by_side(target, weights, ranks, rows.table.shape[1]) for target in targets], strict=True)
        stack = StackedLinears(bases, [A.to(device, dtype) for A in As], [B.to(device, dtype) for B in Bs], rows)
        shared: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for index, target in enumerate(targets):
            owner, _, child = target.rpartition(".")
            setattr(network.get_submodule(owner), child, Member(stack, index, shared))
    copy_out_of_file(network.parameters())
    return rows


def _side_by_side(
    target: str, weights: dict[str, dict[str, LoraWeights]], ranks: dict[str, int], width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the matrices of all adapters for one layer into their rank columns; an adapter without that layer gets zeros."""
    sample = next(layers[target] for layers in weights.values() if target in layers)
    A = torch.zeros(width, sample.A.shape[1])
    B = torch.zeros(sample.B.shape[0], width)
    start = 0
    for name, layers in weights.items():
        if target in layers:
            rank = len(layers[target].A)
            A[start : start + rank], B[:, start : start + rank] = layers[target].A, layers[target].B
        start += ranks[name]
    return A, B


def _sharing_an_input(network: Any, targets: set[str]) -> list[list[str]]:
    """Group layers that read the same input. Only plain ones can be one matrix, so the others stay alone."""
    plain = {target for target in targets if type(network.get_submodule(target)) is nn.Linear}
    return siblings(sorted(plain)) + [[target] for target in sorted(targets - plain)]
