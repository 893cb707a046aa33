"""Adapted linear layers as few, large products: layers that read the same input share one, and the adapter is part of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from scripts.common.machine import empty_heap
from scripts.model.products import FEW_TOKENS, linear

OUTPUTS_AT_ONCE = 1024


def has_adapters(layer: Any) -> bool:
    """Tell whether PEFT has put adapters beside a layer; PEFT itself, which loads for seconds, is not asked."""
    return hasattr(layer, "lora_A")


def with_room(rows: int, columns: int, room: int, like: torch.Tensor) -> torch.Tensor:
    """Return an empty (rows, columns) with `room` more columns in memory after it, which `_widened` finds."""
    return like.new_empty(rows, columns + room)[:, :columns]


def _widened(x: torch.Tensor, room: int) -> torch.Tensor:
    """Return x (N, I) as (N, I + room), whose last columns hold anything: in place where `with_room` made x."""
    rows, columns = x.shape
    whole = x.storage_offset() == 0 and x.untyped_storage().nbytes() == rows * (columns + room) * x.element_size()
    if whole and x.stride() == (columns + room, 1):
        return x.as_strided((rows, columns + room), x.stride())
    wide = x.new_empty(rows, columns + room)
    wide[:, :columns] = x
    return wide


def adapt_in_input_dtype(model: Any) -> None:
    """Let adapters work in their base's dtype, also where PEFT computes them; the weights that the optimizer moves stay fp32."""
    for module in model.modules():
        if has_adapters(module):
            module.cast_input_dtype_enabled = False
            for linears in (module.lora_A, module.lora_B):
                for linear in linears.values():
                    linear.__class__ = _LinearInInputDtype


class _LinearInInputDtype(torch.nn.Linear):
    """Multiply in the dtype of the input; the fp32 weight is cast on the way and receives an fp32 gradient."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.linear(input, self.weight.to(input.dtype))


class Product:
    """Linear layers that read the same input, as one product of their adapters and the frozen weights.

    The base weights W, moved here, and the adapter's A and B make one matrix [[W, s B], [A, 0]], whose upper rows turn
    (x, A x) into the outputs and whose left columns turn (dy, (s B)ᵀ dy) into the input's gradient. Layer by layer, each
    adapter would pass over a matrix of the size of the output once more, forwards and backwards.
    """

    # Two layers q and k with I = 4 inputs, 3 and 2 outputs (O = 5) and rank 1 each (R = 2) make a matrix of 7 x 6:
    #
    #                 I = 4 columns   R = 2 columns
    #     3 rows      W_q             s B_q   0         (x, A x) times the upper O rows: W_q x + s B_q A_q x = y_q,
    #     2 rows      W_k             0       s B_k                                      W_k x + s B_k A_k x = y_k
    #     1 row       A_q             0       0         x times the lower left: A_q x
    #     1 row       A_k             0       0                                 A_k x
    #
    # Backwards, dy = (dy_q, dy_k) times the right columns is (s B)ᵀ dy, of size R. Both together, times the left I
    # columns, are dx = Wᵀ dy + Aᵀ (s B)ᵀ dy. The zeros cost nothing beside W: R is some dozens, I and O are thousands.

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self.bases = [getattr(layer, "base_layer", layer) for layer in layers]
        self.plain_bases = all(type(base) is torch.nn.Linear and not base.weight.requires_grad for base in self.bases)
        self.inputs, self.outputs = layers[0].in_features, sum(layer.out_features for layer in layers)
        self.storage: torch.Tensor | None = None  # has room for the adapter of highest rank
        self.matrix: torch.Tensor | None = (
            None  # the part of it that the active adapter fills; None where PEFT computes
        )
        self.bias: torch.Tensor | None = None
        self.adapters: list[tuple[int, str]] = []  # which layers have one at work, and its name
        self.factors: tuple[Any, ...] = ()  # each adapted layer's A, then each one's B
        self.blocks: tuple[torch.Tensor, ...] = ()  # the views of the matrix that hold them
        self.scales: tuple[float, ...] = ()

    @property
    def room(self) -> int:
        """Return how many columns the product wants free after its input."""
        return sum(len(A) for A in self.factors[: len(self.scales)]) if self.matrix is not None else 0

    @property
    def left_to_chance(self) -> bool:
        """Return whether an adapter's dropout is on."""
        loras = [layer for layer in self.layers if has_adapters(layer)]
        return any(_drops(dropout) for layer in loras for dropout in layer.lora_dropout.values())

    @torch.inference_mode(False)  # what is made in inference mode could not be changed outside it
    @torch.no_grad()
    def renew(self) -> None:
        """Take over the adapters that are at work now; optimizers move weights without leaving a mark on them."""
        adapters = self._plain_adapters() if self.plain_bases else None
        if adapters is None:
            self.matrix = None
            return
        As, Bs = ([getattr(self.layers[i], kind)[name].weight for i, name in adapters] for kind in ("lora_A", "lora_B"))
        self.factors, self.scales = (*As, *Bs), tuple(self.layers[i].scaling[name] for i, name in adapters)
        shapes = [factor.shape for factor in self.factors]
        if self.matrix is None or self.adapters != adapters or [block.shape for block in self.blocks] != shapes:
            self.adapters = adapters
            self._make_room_for(As, Bs)
        if adapters:
            torch._foreach_copy_(self.blocks, (*As, *torch._foreach_mul(Bs, self.scales)))

    def _plain_adapters(self) -> list[tuple[int, str]] | None:
        """Name the one adapter of each layer that has one at work; None where PEFT does more than multiply."""
        from peft.tuners.lora import Linear as LoraLinear

        adapters = []
        for index, layer in enumerate(self.layers):
            if has_adapters(layer):
                if type(layer) is not LoraLinear or layer.merged:
                    return None
                names = [] if layer.disable_adapters else [n for n in layer.active_adapters if n in layer.lora_A]
                for name in names:
                    plain = name not in layer.lora_variant and layer.lora_B[name].bias is None
                    if len(names) > 1 or not plain or _drops(layer.lora_dropout[name]):
                        return None
                    adapters.append((index, name))
        return adapters

    def _make_room_for(self, As: list[torch.Tensor], Bs: list[torch.Tensor]) -> None:
        """Choose the part of the matrix that these adapters fill, and the block of each."""
        rank = sum(map(len, As))
        if self.storage is None or self.storage.shape[1] < self.inputs + rank:
            self.storage = self._move_bases(rank)
        self.matrix = self.storage[: self.outputs + rank, : self.inputs + rank]
        self.matrix[:, self.inputs :] = 0
        lower, right = self.matrix[self.outputs :, : self.inputs], self.matrix[: self.outputs, self.inputs :]
        ranks = [len(A) for A in As]
        rows = right.split([base.out_features for base in self.bases])
        of_B = [rows[i].split(ranks, 1)[place] for place, (i, _) in enumerate(self.adapters)]
        self.blocks = (*lower.split(ranks), *of_B) if ranks else ()

    def _move_bases(self, rank: int) -> torch.Tensor:
        """Move the base weights into a matrix that has room for the largest adapter, and return it."""
        loras = [layer for layer in self.layers if has_adapters(layer)]
        rank = max(rank, sum(max(len(linear.weight) for linear in layer.lora_A.values()) for layer in loras))
        storage: torch.Tensor = self.bases[0].weight.new_empty(self.outputs + rank, self.inputs + rank)
        row = 0
        for base in self.bases:
            block = storage[row : row + len(base.weight), : self.inputs]
            block.copy_(base.weight)
            base.weight.data = block
            row += len(block)
        empty_heap()  # of the weights as they lay before; otherwise the allocator would keep as much again
        if any(base.bias is not None for base in self.bases):
            biases = [
                base.weight.new_zeros(len(base.weight)) if base.bias is None else base.bias for base in self.bases
            ]
            self.bias = torch.cat(biases)
        return storage

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Return what all layers make of x (N, I), side by side: (N, O), added to the residual where there is one."""
        if self.matrix is not None and self.matrix.dtype == x.dtype:
            if not torch.is_grad_enabled():
                return _adapted(x, residual, self.matrix, self.bias, self.outputs)[0]
            places = tuple(index for index, _ in self.adapters)
            widths = [base.out_features for base in self.bases]
            columns = [slice(sum(widths[:index]), sum(widths[: index + 1])) for index in places]
            output: torch.Tensor = _AdaptedProduct.apply(
                x, residual, self.matrix, self.bias, self.outputs, columns, self.scales, *self.factors
            )
            return output
        output = torch.cat([layer(x) for layer in self.layers], 1) if len(self.layers) > 1 else self.layers[0](x)
        return output if residual is None else residual + output


def _drops(dropout: torch.nn.Module) -> bool:
    return dropout.training and getattr(dropout, "p", 0) > 0


class _AdaptedProduct(torch.autograd.Function):
    """Compute residual + W x + b + s B A x (Hu et al. 2021, equation 3) of stacked layers, and its gradients.

    Shapes: x (N, I), residual and result (N, O), matrix (O + R, I + R), bias (O); then each A (r, I), then each B (o, r).
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor | None, matrix: torch.Tensor, bias: torch.Tensor | None, outputs: int,
        columns: Sequence[slice], scales: tuple[float, ...], *factors: torch.Tensor
    ) -> torch.Tensor:  # fmt: skip
        output, wide = _adapted(x, residual, matrix, bias, outputs)
        ctx.save_for_backward(wide, matrix)
        ctx.inputs, ctx.outputs, ctx.columns, ctx.scales = x.shape[1], outputs, columns, scales
        ctx.ranks = [len(A) for A in factors[: len(scales)]]
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        wide, matrix = ctx.saved_tensors
        x, hidden = wide[:, : ctx.inputs], wide[:, ctx.inputs :]
        wide_grad = _widened(grad, sum(ctx.ranks)) if ctx.ranks else grad
        hidden_grad = wide_grad[:, ctx.outputs :]
        if ctx.ranks:
            torch.mm(grad, matrix[: ctx.outputs, ctx.inputs :], out=hidden_grad)
        grad_x = wide_grad @ matrix[:, : ctx.inputs] if ctx.needs_input_grad[0] else None
        grads = (grad_x, grad if ctx.needs_input_grad[1] else None, *[None] * 5)
        if not ctx.ranks or not ctx.needs_input_grad[7]:
            return (*grads, *[None] * (2 * len(ctx.ranks)))
        grad_As = _narrow_product(hidden_grad, x).float().split(ctx.ranks)
        grad_Bs = [
            _narrow_product(part, grad[:, columns]).T.float().mul_(scale)
            for part, columns, scale in zip(hidden.split(ctx.ranks, 1), ctx.columns, ctx.scales, strict=True)
        ]
        return (*grads, *grad_As, *grad_Bs)


def _adapted(
    x: torch.Tensor, residual: torch.Tensor | None, matrix: torch.Tensor, bias: torch.Tensor | None, outputs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what _AdaptedProduct does, and (x, A x), which its gradient needs."""
    inputs, rank = x.shape[1], len(matrix) - outputs
    wide = _widened(x, rank) if rank else x
    if rank:
        torch.mm(x, matrix[outputs:, :inputs].T, out=wide[:, inputs:])  # A x
    upper = matrix[:outputs]
    if len(x) <= FEW_TOKENS:
        output = linear(wide, upper, bias)
        return output if residual is None else output.add_(residual), wide
    output = _wide_product(wide, upper) if residual is None else torch.addmm(residual, wide, upper.T)
    return output if bias is None else output.add_(bias), wide


def _narrow_product(narrow: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    """Return narrowᵀ wide, (r, W) of (N, r) and (N, W): MKL, in fp32, is 15 % faster as (wideᵀ narrow)ᵀ, oneDNN 20 % slower."""
    return (wide.T @ narrow).T if wide.dtype == torch.float32 else narrow.T @ wide


def _wide_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x Wᵀ: MKL, in fp32, is 4 to 7 % faster at some hundred tokens where it is not given thousands of outputs at once."""
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return x @ weight.T
    output = x.new_empty(len(x), len(weight))
    for rows, columns in zip(weight.split(OUTPUTS_AT_ONCE), output.split(OUTPUTS_AT_ONCE, 1), strict=True):
        torch.mm(x, rows.T, out=columns)
    return output
