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
from scripts.model.int8 import product, rounded
from scripts.model.products import linear, packed, packed_linear
from scripts.model.shape import siblings


@dataclass(frozen=True)
class LoraWeights:
    """The matrices of one adapter for one linear layer, the scale folded into B. A: (r, in), B: (out, r)."""

    A: torch.Tensor
    B: torch.Tensor


class RowAdapters:
    """Say which adapter each row of the running batch uses, for all layers.

    Each adapter owns a block of rank columns. A row's mask is 1 in the block of its adapter and 0 elsewhere.
    """

    def __init__(self, ranks: dict[str, int], device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.blocks: dict[str, tuple[int, int]] = {}  # first column and rank
        self.width = 0
        for name, rank in ranks.items():
            self.take_block(name, rank)
        self.refresh()
        self.columns: slice | None = (
            None  # of the adapters in the batch, from the first to the last; None for the base alone
        )
        self._masks: dict[int, torch.Tensor] | None = None  # of those columns; None where all rows use all of them

    def take_block(self, name: str, rank: int) -> int:
        """Give an adapter the first columns that are free, behind the others where none are; return the first."""
        start = 0
        for taken, length in sorted(self.blocks.values()):
            if start + rank <= taken:
                break
            start = taken + length
        self.blocks[name] = (start, rank)
        self.width = max(self.width, start + rank)
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
        blocks = {self.blocks[name] for name in names if self.index[name]}
        self.columns = self._masks = None
        if blocks:
            self.columns = slice(min(start for start, _ in blocks), max(start + rank for start, rank in blocks))
            if len(set(indices)) > 1:
                self._masks = {1: self.table[indices, self.columns][:, None]}

    def mask_of(self, layers: int) -> torch.Tensor | None:
        """Return the mask of each row for so many layers, whose columns alternate, (rows, 1, columns); None where all are 1."""
        if self._masks is None:
            return None
        if layers not in self._masks:
            self._masks[layers] = self._masks[1].repeat_interleave(layers, -1)
        return self._masks[layers]


class StackedLinears(nn.Module):
    """Linear layers that read the same input, with all adapters beside them: three products serve any mixture of rows.

    y = W x + b + B (mask * A x), for each of k layers. W: (sum of out, in). The columns of an adapter lie together for all
    layers, so that a batch computes those it needs: A: (width, k, in), B: (width, k, sum of out), zero where a column
    belongs to another layer.
    """

    def __init__(self, bases: list[Any], rows: RowAdapters) -> None:
        super().__init__()
        self.rows = rows
        outputs_inputs = [_shape(base) for base in bases]
        self.widths, inputs = [outputs for outputs, _ in outputs_inputs], outputs_inputs[0][1]
        self.base: nn.Module | None = None
        weight = bias = None
        if not all(type(base) is nn.Linear for base in bases):
            (self.base,) = bases  # quantised, rounded, or stored the other way round
        else:
            weight = torch.cat([base.weight.detach() for base in bases])
            if any(base.bias is not None for base in bases):
                none = [weight.new_zeros(width) for width in self.widths]
                bias = torch.cat(
                    [each if base.bias is None else base.bias.detach() for base, each in zip(bases, none, strict=True)]
                )
        options: Any = {"device": rows.device, "dtype": rows.dtype}
        self.packed = packed(weight, bias) if weight is not None else None
        self.rounded: tuple[torch.Tensor, torch.Tensor] | None = None
        self.register_buffer("weight", weight if self.packed is None else None, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("A", torch.zeros(rows.width, len(bases), inputs, **options), persistent=False)
        self.register_buffer("B", torch.zeros(rows.width, len(bases), sum(self.widths), **options), persistent=False)
        self._views: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self.weight: Any  # None where it is packed
        self.bias: torch.Tensor | None
        self.A: torch.Tensor
        self.B: torch.Tensor

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the output of each layer. x: (B, T, in), or those tokens as (B, 1, T, in) or (B * T, in)."""
        outputs: tuple[torch.Tensor, ...] = self.side_by_side(x).split(self.widths, dim=-1)
        return outputs

    def side_by_side(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs of all layers in one tensor, (…, out)."""
        y = self._of_base(x)
        columns = self.rows.columns
        if columns is None:
            return y
        A, B = self._factors(columns.start, columns.stop)
        tokens = y.view(-1, y.shape[-1])
        hidden = x.reshape(len(tokens), -1) @ A
        mask = self.rows.mask_of(len(self.widths))
        if mask is not None:
            hidden.view(len(mask), -1, mask.shape[2]).mul_(mask)
        tokens.addmm_(hidden, B)
        return y

    def _factors(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A (in, k columns) and B (k columns, out) of some columns, as views that are made once."""
        if (start, stop) not in self._views:
            self._views[start, stop] = self.A[start:stop].flatten(0, 1).T, self.B[start:stop].flatten(0, 1)
        return self._views[start, stop]

    def _of_base(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is not None:
            return packed_linear(x, self.packed)
        if self.rounded is not None:
            y = product(x, *self.rounded)
            return y if self.bias is None else y.add_(self.bias)
        y = linear(x, self.weight, self.bias) if self.base is None else self.base(x)
        return y.contiguous()

    def keep_in_int8(self) -> None:
        """Round the layers' own matrices and let the full ones go; the adapters stay as they are."""
        if self.base is None:
            weight = self.weight
            if self.packed is not None:
                weight, _ = torch.ops.quantized.linear_unpack_fp16(self.packed)
            self.rounded = rounded(weight)
            self.packed, self.weight = None, None

    @property
    def width(self) -> int:
        """Return how many columns there are; the rows may have more while layers grow one by one."""
        return len(self.A)

    def grown(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B of a wider stack, whose new columns are zero; this one stays as it is."""
        A, B = (torch.cat([old, old.new_zeros(width - len(old), *old.shape[1:])]) for old in (self.A, self.B))
        return A, B

    def become(self, parts: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Take over what `grown` made."""
        self.A, self.B = parts
        self._views.clear()

    def write(self, number: int, start: int, layer: LoraWeights | None, rank: int) -> None:
        """Put an adapter's matrices for one of the layers into its columns; without any, zeros."""
        self.A[start : start + rank, number] = 0
        self.B[start : start + rank, number] = 0
        if layer:
            columns, first = slice(start, start + len(layer.A)), sum(self.widths[:number])
            self.A[columns, number] = layer.A.to(self.A)
            self.B[columns, number, first : first + self.widths[number]] = layer.B.t().to(self.B)


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
        stack = StackedLinears([network.get_submodule(target) for target in together], rows)
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
    """Group layers that read the same input, with those beside them that no adapter changes.

    Only plain layers can be one matrix, so the others stay alone.
    """
    plain = [name for name, module in network.named_modules() if type(module) is nn.Linear]  # as a layer uses them
    groups = [group for group in siblings(plain) if targets.intersection(group)]
    return groups + [[target] for target in sorted(targets.difference(plain))]
