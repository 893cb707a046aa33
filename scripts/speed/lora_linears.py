"""Adapted linear layers as few, large products: layers that read the same input share one, and the adapter is part of it."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch.nn import functional

from scripts.common.distributed import sharding_engine
from scripts.common.machine import empty_heap
from scripts.model.base import copy_out_of_file
from scripts.model.shape import siblings
from scripts.speed.guard import may_replace, missing_names, other_arguments, other_numbers

LAYER_NAMES = (
    "lora_A", "lora_B", "lora_dropout", "lora_variant", "scaling", "merged", "active_adapters", "disable_adapters",
    "base_layer", "in_features", "out_features", "cast_input_dtype_enabled",
)  # fmt: skip


def share_products(model: Any) -> None:
    """Let plain adapters work in their base's dtype, as part of the base's own products.

    The weights that the optimizer moves stay fp32. With an fp32 base this changes nothing but the speed. Other layers,
    quantised or with dropout or a variant of LoRA, compute as PEFT does.
    """
    if may_replace(_difference, "training with PEFT's own, slower layers"):
        _share_products(model)


def _difference() -> str | None:
    """Return how this PEFT differs from the one whose layers are replaced, tried on a model of three layers."""
    model = get_peft_model(_ThreeLayers(), LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "k_proj", "o_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    reason = missing_names("a LoRA layer of this PEFT", model.get_base_model().q_proj, LAYER_NAMES)
    reason = reason or other_arguments(LoraLinear.forward, SharingLinear.forward)
    if reason:
        return reason
    x = torch.randn(3, 4, 8)
    theirs = _output_and_grads(model, x)
    _share_products(model)
    return other_numbers("a LoRA layer of this PEFT", theirs, _output_and_grads(model, x))


class _ThreeLayers(torch.nn.Module):
    """The least that has layers which read the same input; its own decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = torch.nn.Linear(8, 4), torch.nn.Linear(8, 6, bias=False)
        self.o_proj = torch.nn.Linear(10, 8)

    @property
    def base_model(self) -> torch.nn.Module:
        return self

    def get_decoder(self) -> torch.nn.Module:
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.o_proj(torch.cat([self.q_proj(x), self.k_proj(x)], -1))
        return output


def _output_and_grads(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    output = model(x)
    output.square().sum().backward()
    return [output.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def _share_products(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
            for linears in (module.lora_A, module.lora_B):
                for linear in linears.values():
                    linear.__class__ = _LinearInInputDtype
    if sharding_engine():
        return
    products = [Product(layers) for layers in _reading_the_same(model)]
    for product in products:
        for index, layer in enumerate(product.layers):
            layer.__class__ = SharingLinear
            layer.product, layer.index = product, index
    moved = {layer.base_layer.weight for product in products for layer in product.layers}
    copy_out_of_file(
        parameter
        for parameter in model.get_base_model().base_model.parameters()
        if parameter.device.type == "cpu" and not parameter.requires_grad and parameter not in moved
    )

    def renew(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        # A reference asked within a training step must not touch what that step's backward pass still needs.
        within_step = module.training and not torch.is_grad_enabled()
        inputs = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        tokens = next((given.shape[1] for given in inputs if given is not None), 0)
        one_more = not torch.is_grad_enabled() and tokens == 1
        for product in products:
            product.renew(None if within_step else product.plain_adapter(), one_more)

    # Every pass ends up in the decoder itself; OPT's goes past the base model around it.
    model.get_base_model().get_decoder().register_forward_pre_hook(renew, with_kwargs=True)


def _reading_the_same(model: Any) -> list[list[Any]]:
    """Group the plain adapted layers whose base is frozen by what they read."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module) is LoraLinear
        and type(module.base_layer) is torch.nn.Linear
        and not module.base_layer.weight.requires_grad
    }
    return [[layers[name] for name in names] for names in siblings(layers)]


class _LinearInInputDtype(torch.nn.Linear):
    """Multiply in the dtype of the input; the fp32 weight is cast on the way and receives an fp32 gradient."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.linear(input, self.weight.to(input.dtype))


class SharingLinear(LoraLinear):
    """PEFT's layer as a part of a shared product, while a single plain adapter is at work."""

    product: Product
    index: int

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's output; PEFT computes it where the product does not."""
        if not self.product.ready_for(x) or args or kwargs:
            return super().forward(x, *args, **kwargs)
        return self.product.output(self.index, x)


class Product:
    """Layers that read the same input. The first that is asked computes for all.

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

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.inputs, self.outputs = layers[0].in_features, sum(layer.out_features for layer in layers)
        self.storage: torch.Tensor | None = None  # has room for the adapter of highest rank
        self.matrix: torch.Tensor | None = None  # the part of it that the active adapter fills, if one is active
        self.bias: torch.Tensor | None = None
        self.factors: tuple[Any, ...] = ()  # each layer's A, then each layer's B
        self.blocks: tuple[torch.Tensor, ...] = ()  # the views of the matrix that hold them
        self.scales: tuple[float, ...] = ()
        self.active: str | None = None
        self.pending: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by layer: an input, and its output

    @torch.inference_mode(False)  # what is made in inference mode could not be changed outside it
    @torch.no_grad()
    def renew(self, name: str | None, one_more: bool) -> None:
        """Take over an adapter, which may be another one or have moved since the last pass; with None, stand back.

        Optimizers move weights without leaving a mark on them, so only a pass for one more token takes them for unmoved.
        """
        self.pending.clear()
        if name is None:
            self.matrix = self.active = None
            return
        if one_more and name == self.active:
            return
        As = [layer.lora_A[name].weight for layer in self.layers]
        Bs = [layer.lora_B[name].weight for layer in self.layers]
        self.factors, self.scales = (*As, *Bs), tuple(layer.scaling[name] for layer in self.layers)
        self.active = name
        if self.matrix is None or [block.shape for block in self.blocks] != [factor.shape for factor in self.factors]:
            self._make_room_for(As, Bs)
        torch._foreach_copy_(self.blocks, (*As, *torch._foreach_mul(Bs, self.scales)))

    def _make_room_for(self, As: list[torch.Tensor], Bs: list[torch.Tensor]) -> None:
        """Choose the part of the matrix that these adapters fill, and the block of each."""
        rank = sum(map(len, As))
        if self.storage is None or self.storage.shape[1] < self.inputs + rank:
            self.storage = self._move_base()
        self.matrix = self.storage[: self.outputs + rank, : self.inputs + rank]
        self.matrix[:, self.inputs :] = 0
        lower, right = self.matrix[self.outputs :, : self.inputs], self.matrix[: self.outputs, self.inputs :]
        ranks = [len(A) for A in As]
        rows = right.split([len(B) for B in Bs])
        self.blocks = (*lower.split(ranks), *(part.split(ranks, 1)[index] for index, part in enumerate(rows)))

    def plain_adapter(self) -> str | None:
        """Name the one adapter that all layers use without dropout, bias or variant; None where they do not."""
        adapters: set[str | None] = set()
        for layer in self.layers:
            names = [name for name in layer.active_adapters if name in layer.lora_A]
            plain = len(names) == 1 and not layer.disable_adapters and not layer.merged
            plain = plain and names[0] not in layer.lora_variant and layer.lora_B[names[0]].bias is None
            plain = plain and isinstance(layer.lora_dropout[names[0]], torch.nn.Identity)
            adapters.add(names[0] if plain else None)
        return adapters.pop() if len(adapters) == 1 else None

    def _move_base(self) -> torch.Tensor:
        """Move the base weights into a matrix that has room for the largest adapter, and return it."""
        rank = sum(max(len(linear.weight) for linear in layer.lora_A.values()) for layer in self.layers)
        bases = [layer.base_layer for layer in self.layers]
        storage: torch.Tensor = bases[0].weight.new_zeros(self.outputs + rank, self.inputs + rank)
        row = 0
        for base in bases:
            block = storage[row : row + len(base.weight), : self.inputs]
            block.copy_(base.weight)
            base.weight.data = block
            row += len(block)
        empty_heap()  # of the weights as they lay before; otherwise the allocator would keep as much again
        if any(base.bias is not None for base in bases):
            biases = [base.weight.new_zeros(base.out_features) if base.bias is None else base.bias for base in bases]
            self.bias = torch.cat(biases)
        return storage

    def ready_for(self, x: torch.Tensor) -> bool:
        """Return whether the product takes this input."""
        return self.matrix is not None and self.matrix.dtype == x.dtype

    def output(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Return what one of the layers makes of x, computing for all when the input is new."""
        source, output = self.pending.pop(index, (None, None))
        if output is None or source is not x:
            outputs = _AdaptedProduct.apply(x, self.matrix, self.bias, self.scales, *self.factors)
            self.pending.update({layer: (x, output) for layer, output in enumerate(outputs)})
            _, output = self.pending.pop(index)
        return output


class _AdaptedProduct(torch.autograd.Function):
    """Compute W x + b + s B A x (Hu et al. 2021, equation 3) of stacked layers, and its gradients.

    Shapes: x (…, I), matrix (O + R, I + R), bias (O); then each layer's A (r, I), then each layer's B (o, r).
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, scales: tuple[float, ...], *factors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        As, Bs = factors[: len(scales)], factors[len(scales) :]
        widths, ranks = [len(B) for B in Bs], [len(A) for A in As]
        rows = x.reshape(-1, x.shape[-1])
        hidden = rows @ matrix[sum(widths) :, : rows.shape[1]].T  # A x
        rows_and_hidden = torch.cat([rows, hidden], 1)
        output = functional.linear(rows_and_hidden, matrix[: sum(widths)], bias)
        ctx.save_for_backward(rows_and_hidden, matrix)  # its parts apart would be kept beside it when compiled
        ctx.scales, ctx.ranks, ctx.shape = scales, ranks, x.shape
        return tuple(part.view(*x.shape[:-1], -1) for part in output.split(widths, 1))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows_and_hidden, matrix = ctx.saved_tensors
        rank = sum(ctx.ranks)
        rows, hidden = rows_and_hidden.split([rows_and_hidden.shape[1] - rank, rank], 1)
        grads = [grad.reshape(-1, grad.shape[-1]) for grad in grad_outputs]
        grad_output = grads[0] if len(grads) == 1 else torch.cat(grads, 1)
        left, right = matrix.split([rows.shape[1], rank], 1)
        grad_hidden = grad_output @ right[: grad_output.shape[1]]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (torch.cat([grad_output, grad_hidden], 1) @ left).view(ctx.shape)
        grad_As = (grad_hidden.T @ rows).float().split(ctx.ranks)
        grad_Bs = [
            (part.T @ grad).T.float().mul_(scale)  # a third faster than grad.T @ part: the smaller one turns
            for grad, part, scale in zip(grads, hidden.split(ctx.ranks, 1), ctx.scales, strict=True)
        ]
        return grad_x, None, None, None, *grad_As, *grad_Bs
