"""Linear layers that hold all adapters at once, so that rows of different adapters share a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from scripts.common.stages import BASE
from scripts.model.base import copy_out_of_file
from scripts.model.int8 import Int8Linear
from scripts.model.products import linear
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
        self.device, self.dtype = device, dtype
        self.blocks: dict[str, tuple[int, int]] = {}  # first column and rank
        self.width = 0
        for name, rank in ranks.items():
            self.take_block(name, rank)
        self.refresh()
        self.mask: torch.Tensor | None = None
        self.only: tuple[int, int] | None = None  # first column and rank where all rows use one adapter

    def take_block(self, name: str, rank: int) -> int:
        """Give an adapter the first columns that are free, behind the others where none are; return the first."""
        start = 0
        for taken, length in sorted(self.blocks.values()):
            if start + rank <= taken:
                break
            start = taken + length
        self.blocks[name] = (start, rank)
        # Of an odd width, the outputs that stand beside it would lie where llama4 cannot see them as complex numbers.
        self.width = max(self.width, start + rank + (start + rank) % 2)
        return start

    def refresh(self) -> None:
        """Make the table of masks again after blocks were given or taken back."""
        self.index = {BASE: 0, **{name: number for number, name in enumerate(self.blocks, 1)}}
        table = torch.zeros(len(self.index), self.width)
        for name, (start, rank) in self.blocks.items():
            table[self.index[name], start : start + rank] = 1
        self.table = table.to(self.device, self.dtype)

    def set(self, names: Sequence[str]) -> None:
        """Choose the adapters of the next forward pass. A batch of base rows does no adapter work."""
        indices = [self.index[name] for name in names]
        self.mask = self.table[indices].unsqueeze(1) if any(indices) else None
        self.only = self.blocks.get(names[0]) if len(set(names)) == 1 else None


class StackedLinears(nn.Module):
    """Linear layers that read the same input, with all adapters under each other: two products serve any mixture of rows.

    y = W x + b + B (mask * A x), A: (sum of ranks, in), B: (out, sum of ranks), for each layer. The A stand below the W
    in one matrix: beside a few tokens, a small product takes as long as a large one.
    """

    def __init__(self, bases: list[Any], As: list[torch.Tensor], Bs: list[torch.Tensor], rows: RowAdapters) -> None:
        super().__init__()
        self.rows, self.widths = rows, [len(B) for B in Bs]
        self.width = len(As[0])  # columns of all adapters; the mask may be wider while layers grow one by one
        self.base: nn.Module | None = None
        weights, bias = As, None
        if not all(type(base) is nn.Linear for base in bases):
            (self.base,) = bases  # quantised, rounded, or stored the other way round
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
        outputs: tuple[torch.Tensor, ...] = self.side_by_side(x).split(self.widths, dim=-1)
        return outputs

    def side_by_side(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs of all layers in one tensor, (…, out)."""
        y: torch.Tensor
        if self.base is None:
            y, hidden = linear(x, self.weight, self.bias).split([sum(self.widths), len(self.B_t)], dim=-1)
        else:
            y = self.base(x)
            if self.rows.only:
                return self._with_one_adapter(x, y, *self.rows.only)
            hidden = linear(x, self.weight) if self.rows.mask is not None else y
        if self.rows.mask is not None:
            hidden = hidden.reshape(len(self.rows.mask), -1, len(self.widths), self.width)
            hidden = hidden * self.rows.mask[:, :, None, : self.width]
            y = torch.addmm(y.flatten(0, -2), hidden.view(-1, len(self.B_t)), self.B_t).view(*x.shape[:-1], -1)
        return y

    def _with_one_adapter(self, x: torch.Tensor, y: torch.Tensor, start: int, rank: int) -> torch.Tensor:
        """Add what one adapter gives to the layers' outputs; the columns of others are not read."""
        A = self.weight.view(len(self.widths), self.width, -1)[:, start : start + rank]
        B_t = self.B_t.view(len(self.widths), self.width, -1)[:, start : start + rank]
        outputs = y.flatten(0, -2)
        hidden = x.reshape(len(outputs), -1) @ A.transpose(1, 2)
        first = 0
        for number, width in enumerate(self.widths):
            outputs[:, first : first + width].addmm_(hidden[number], B_t[number, :, first : first + width])
            first += width
        return y

    def keep_in_int8(self) -> None:
        """Round the layers' own matrices and let the full ones go; the adapters stay as they are."""
        if self.base is None:
            outputs = sum(self.widths)
            self.base = Int8Linear.of(self.weight[:outputs], None if self.bias is None else self.bias[:outputs].clone())
            self.weight, self.bias = self.weight[outputs:].clone(), None

    def grown(self, width: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Return weight, bias and B of a wider stack, whose new columns are zero; this one stays as it is."""
        count, plain = len(self.widths), self.weight[: len(self.weight) - len(self.B_t)]
        A = self.weight.new_zeros(count, width, self.weight.shape[1])
        A[:, : self.width] = self.weight[len(plain) :].view(count, self.width, -1)
        B_t = self.B_t.new_zeros(count, width, self.B_t.shape[1])
        B_t[:, : self.width] = self.B_t.view(count, self.width, -1)
        bias = self.bias
        if bias is not None:
            bias = torch.cat([bias, bias.new_zeros(count * (width - self.width))])
        return torch.cat([plain, A.flatten(0, 1)]), bias, B_t.flatten(0, 1)

    def become(self, parts: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]) -> None:
        """Take over what `grown` made."""
        self.weight, self.bias, self.B_t = parts
        self.width = len(self.B_t) // len(self.widths)

    def write(self, number: int, start: int, layer: LoraWeights | None, rank: int) -> None:
        """Put an adapter's matrices for one of the layers into its columns; without any, zeros."""
        first_column = number * self.width + start
        first_row = len(self.weight) - len(self.B_t) + first_column
        first_output = sum(self.widths[:number])
        self.weight[first_row : first_row + rank] = 0
        self.B_t[first_column : first_column + rank] = 0
        if layer:
            self.weight[first_row : first_row + len(layer.A)] = layer.A.to(self.weight)
            outputs = slice(first_output, first_output + self.widths[number])
            self.B_t[first_column : first_column + len(layer.A), outputs] = layer.B.t().to(self.B_t)


class Member(nn.Module):
    """Stand where one of several stacked layers stood; the first to be asked computes for all."""

    def __init__(self, stack: StackedLinears, index: int, shared: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        self.stack, self.index, self.shared = stack, index, shared

    @property
    def out_features(self) -> int:
        """Return what the layer that stood here gives."""
        return self.stack.widths[self.index]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        source, output = self.shared.pop(self.index, (None, None))
        if output is None or source is not x:
            self.shared.update({index: (x, part) for index, part in enumerate(self.stack(x))})
            _, output = self.shared.pop(self.index)
        return output


@contextmanager
def fastest_product(tokens: int) -> Iterator[None]:
    """Let a pass over so many tokens use the products that are fastest for them.

    For a single token oneDNN prepares a product longer than torch's own kernel computes it. The switch is the whole
    process's, but nothing beside the engine's thread computes with torch.
    """
    torch.backends.mkldnn.enabled = tokens > 1  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = True  # type: ignore[assignment]


class StackedProduct:
    """Linear layers that read the same input, as the lean decoder asks for them: one product where they are one stack."""

    room = 0  # a stack needs no columns beside its input
    left_to_chance = False

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        stack = getattr(layers[0], "stack", None)
        whole = stack is not None and len(stack.widths) == len(layers)
        in_order = whole and all(
            isinstance(layer, Member) and layer.stack is stack and layer.index == index
            for index, layer in enumerate(layers)
        )
        self.stack: StackedLinears | None = stack if in_order else None

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Return what all layers make of x (N, I), side by side: (N, O), added to the residual where there is one."""
        y = self.stack.side_by_side(x) if self.stack else torch.cat([layer(x) for layer in self.layers], 1)
        return y if residual is None else residual + y


def stack_adapters(
    network: Any, weights: dict[str, dict[str, LoraWeights]], device: str, dtype: torch.dtype
) -> RowAdapters:
    """Replace adapted linear layers with ones that hold all adapters; ranks and targets may differ."""
    rows = RowAdapters({name: rank_of(layers) for name, layers in weights.items()}, device, dtype)
    stack_layers(network, {layer for layers in weights.values() for layer in layers}, rows)
    for name, layers in weights.items():
        write_adapter(network, rows, name, layers)
    copy_out_of_file(network.parameters())
    return rows


def rank_of(layers: dict[str, LoraWeights]) -> int:
    """Return how many columns an adapter needs."""
    return max(len(layer.A) for layer in layers.values())


def stack_layers(network: Any, targets: set[str], rows: RowAdapters) -> None:
    """Replace linear layers with stacks that have room for every adapter's block, and nothing in it yet."""
    for together in _sharing_an_input(network, targets):
        bases = [network.get_submodule(target) for target in together]
        outputs_inputs = [_shape(base) for base in bases]
        options: Any = {"device": rows.device, "dtype": rows.dtype}
        As = [torch.zeros(rows.width, inputs, **options) for _, inputs in outputs_inputs]
        Bs = [torch.zeros(outputs, rows.width, **options) for outputs, _ in outputs_inputs]
        stack = StackedLinears(bases, As, Bs, rows)
        shared: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for index, target in enumerate(together):
            owner, _, child = target.rpartition(".")
            setattr(network.get_submodule(owner), child, Member(stack, index, shared))


def members(network: Any) -> dict[str, Member]:
    """Return what stands in the place of each stacked layer."""
    return {name: module for name, module in network.named_modules() if isinstance(module, Member)}


def stacks_of(network: Any) -> list[StackedLinears]:
    """Return all stacks."""
    return [module for module in network.modules() if isinstance(module, StackedLinears)]


def write_adapter(network: Any, rows: RowAdapters, name: str, layers: dict[str, LoraWeights]) -> None:
    """Write an adapter's matrices into its block; where it has none for a layer, the block is zero."""
    start, rank = rows.blocks[name]
    for target, member in members(network).items():
        member.stack.write(member.index, start, layers.get(target), rank)


def _shape(base: Any) -> tuple[int, int]:
    """Return outputs and inputs of a linear layer, which some networks store the other way round."""
    if hasattr(base, "in_features"):
        return base.out_features, base.in_features
    return base.nf, base.nx


def _sharing_an_input(network: Any, targets: set[str]) -> list[list[str]]:
    """Group layers that read the same input. Only plain ones can be one matrix, so the others stay alone."""
    plain = {target for target in targets if type(network.get_submodule(target)) is nn.Linear}
    in_order = [name for name, _ in network.named_modules() if name in plain]  # as a decoder layer uses them
    return siblings(in_order) + [[target] for target in sorted(targets - plain)]
